"""Pushing files: every view of the source gets its rows, older ones change nothing, faults are
named."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from app.errors import ConfigurationError
from tests.features.pushed_repository import Pushed

if TYPE_CHECKING:
    from app.features.push import Written

NOON = pd.Timestamp("2013-06-01T12:00:00Z")


def push(
    pushed: Pushed, path: Path, *, source: str = "tracked", batch_rows: int = 10_000
) -> "Written":
    from app.features.push_progress import Progress
    from app.features.row_file import push_file

    progress = Progress(lambda line: None)
    push_file(pushed.target(source), path, batch_rows=batch_rows, progress=progress)
    return progress.written


def tracked(driver_ids: list[int], at: pd.Timestamp = NOON, **columns: Any) -> pd.DataFrame:
    rows = {"stars": 4.5, "trips": 7, "plate": "品川 11", "active": True} | columns
    return pd.DataFrame({"driver_id": driver_ids, "known_at": at, **rows})


def parquet(folder: Path, rows: pd.DataFrame) -> Path:
    path = folder / "rows.parquet"
    rows.to_parquet(path)
    return path


def csv(folder: Path, text: str) -> Path:
    path = folder / "rows.csv"
    path.write_text(text)
    return path


def ratings(pushed: Pushed, driver_id: int) -> list[Any]:
    return pushed.online(
        "ratings:rating", "ratings:trips", "ratings:plate", "states:active", driver_id=driver_id
    )


def test_every_view_that_the_source_feeds_gets_its_features(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    written = push(pushed, parquet(tmp_path, tracked([driver_id])))
    assert ratings(pushed, driver_id) == [4.5, 7, "品川 11", True]
    assert (written.rows, written.stored) == (1, {"ratings": 1, "states": 1})
    assert set(written.newest_s.values()) == {NOON.timestamp()}


def test_a_csv_file_says_the_same_as_a_parquet_file(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    header = "driver_id,known_at,stars,trips,plate,active\n"
    push(
        pushed, csv(tmp_path, f"{header}{driver_id},2013-06-01T14:00:00+02:00,4.5,7,品川 11,true\n")
    )
    assert ratings(pushed, driver_id) == [4.5, 7, "品川 11", True]
    # Not newer: it is the same instant.
    assert push(pushed, parquet(tmp_path, tracked([driver_id]))).stored["ratings"] == 0


def test_an_empty_field_of_a_csv_file_is_null_and_quotes_are_empty_text(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    header = "driver_id,known_at,stars,trips,plate,active\n"
    at = "2013-06-01T12:00:00Z"
    push(pushed, csv(tmp_path, f'{header}{driver_id},{at},,,,\n-{driver_id},{at},,,"",\n'))
    assert ratings(pushed, driver_id) == [None, None, None, None]
    assert ratings(pushed, -driver_id) == [None, None, "", None]


def test_pushing_again_changes_nothing(pushed: Pushed, driver_id: int, tmp_path: Path) -> None:
    path = parquet(tmp_path, tracked([driver_id]))
    push(pushed, path)
    before = pushed.dump()
    written = push(pushed, path)
    assert pushed.dump() == before
    assert written.not_newer == {"ratings": 1, "states": 1}


def test_an_older_row_does_not_replace_a_newer_one_in_whatever_order_they_come(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    instants = [NOON + pd.Timedelta(microseconds=offset) for offset in (1, 3, 2)]
    rows = pd.concat([tracked([driver_id], at, trips=i) for i, at in enumerate(instants)])
    for batch_rows in (1, 2, 10):
        push(pushed, parquet(tmp_path, rows), batch_rows=batch_rows)
        assert ratings(pushed, driver_id)[1] == 1


def test_rows_are_written_in_batches(pushed: Pushed, driver_id: int, tmp_path: Path) -> None:
    ids = [driver_id * 1000 + i for i in range(700)]
    written = push(pushed, parquet(tmp_path, tracked(ids, trips=range(700))), batch_rows=300)
    assert written.stored == {"ratings": 700, "states": 700}
    assert [ratings(pushed, ids[i])[1] for i in (0, 299, 300, 699)] == [0, 299, 300, 699]


def test_a_batch_of_nothing_but_nulls_is_stored(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    push(pushed, parquet(tmp_path, tracked([driver_id])))
    later = NOON + pd.Timedelta(hours=1)
    nulls = tracked([driver_id], later, stars=np.nan, trips=None, plate=None, active=None)
    push(pushed, parquet(tmp_path, nulls))
    assert ratings(pushed, driver_id) == [None, None, None, None]


def test_integers_keep_every_digit_beside_nulls(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    trips = pd.array([2**53 + 1, None], dtype="Int64")
    push(pushed, parquet(tmp_path, tracked([driver_id, -driver_id], trips=trips)))
    assert ratings(pushed, driver_id)[1] == 2**53 + 1


def test_lists_and_instants_are_values_too(pushed: Pushed, driver_id: int, tmp_path: Path) -> None:
    text = (
        "driver_id,known_at,price,seats,seen,tags\n"
        f'{driver_id},2013-06-01T12:00:00Z,1e300,4,2013-06-01T00:00:00Z,"[""a"", ""b""]"\n'
    )
    push(pushed, csv(tmp_path, text), source="measured")
    names = ["measured:price", "measured:seats", "measured:seen", "measured:tags"]
    price, seats, seen, tags = pushed.online(*names, driver_id=driver_id)
    assert (price, seats, tags) == (1e300, 4, ["a", "b"])
    assert seen == pd.Timestamp("2013-06-01T00:00:00Z")


def test_a_view_without_entities_has_one_row(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    push(pushed, csv(tmp_path, "known_at,drivers\n2013-06-01T12:00:00Z,5\n"), source="worldwide")
    # The SDK wants an entity to count the rows by.
    assert pushed.online("worldwide:drivers", "states:active", driver_id=driver_id)[0] == 5


HEADER = "driver_id,known_at,stars,trips,plate,active"
AT = "2013-06-01T12:00:00Z"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER},luck\n", r"unknown column 'luck'; tracked takes driver_id, known_at, stars"),
        ("known_at,stars,trips,plate,active\n", r"column 'driver_id' is missing"),
        ("driver_id,known_at,stars,trips,plate\n", r"column 'active' is missing"),
        (f"{HEADER},stars\n", r"two columns have one name"),
        (f"{HEADER}\n1,{AT},4,,,\n,{AT},4,,,\n", r"row 2: column 'driver_id': is null"),
        (f"{HEADER}\n1,,4,,,\n", r"row 1: column 'known_at': is null"),
        (
            f"{HEADER}\n1,2013-06-01 12:00:00,4,,,\n",
            r"row 1: column 'known_at': '2013-06-01 12:00:00' has no offset from UTC",
        ),
        (f"{HEADER}\n1,yesterday,4,,,\n", r"'yesterday' is no instant"),
        (
            f"{HEADER}\n1,{AT},4,,,\n2,{AT},four,,,\n",
            r"row 2: column 'stars': 'four' is no Float32",
        ),
        (f"{HEADER}\n1,{AT},1e39,,,\n", r"'1e39' is beyond Float32"),
        (f"{HEADER}\n1,{AT},4,1.5,,\n", r"row 1: column 'trips': '1.5' is no Int64"),
        (f"{HEADER}\n1,{AT},4,,,perhaps\n", r"column 'active': 'perhaps' is no Bool"),
        (f"{HEADER}\n1,{AT}\n", r"cannot be read"),
        ("", r"cannot be read"),
    ],
)
def test_a_fault_is_named_by_its_column_and_row(
    pushed: Pushed, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"rows\.csv: .*{message}"):
        push(pushed, csv(tmp_path, text))


@pytest.mark.parametrize(
    ("price", "seats", "seen", "tags", "message"),
    [
        ("cheap", "4", "0", "[]", "column 'price': 'cheap' is no Float64"),
        ("1", "2147483648", "0", "[]", "column 'seats': '2147483648' is beyond Int32"),
        ("1", "4", "1370088000000", "[]", "column 'seen': 1370088000000 is beyond UnixTimestamp"),
        ("1", "4", "2013-06-01T12:00:00", "[]", "column 'seen': .* has no offset"),
        ("1", "4", "0", "a", "column 'tags': 'a' is no JSON"),
        ("1", "4", "0", '{""a"": 1}', "column 'tags': {'a': 1} is no Array"),
    ],
)
def test_values_of_rarer_types_are_looked_at_too(
    pushed: Pushed, tmp_path: Path, price: str, seats: str, seen: str, tags: str, message: str
) -> None:
    text = f'driver_id,known_at,price,seats,seen,tags\n1,{AT},{price},{seats},{seen},"{tags}"\n'
    with pytest.raises(ConfigurationError, match=message):
        push(pushed, csv(tmp_path, text), source="measured")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"trips": ["many"]}, "row 1: column 'trips': 'many' is no Int64"),
        ({"stars": ["4.5"]}, "row 1: column 'stars': '4.5' is no Float32"),
        ({"plate": [11]}, "row 1: column 'plate': 11 is no String"),
        ({"active": [1]}, "row 1: column 'active': 1 is no Bool"),
        (
            {"known_at": [NOON.tz_localize(None)]},
            "row 1: column 'known_at': '2013-06-01 12:00:00' has no offset from UTC",
        ),
    ],
)
def test_a_parquet_file_whose_types_are_others_is_refused(
    pushed: Pushed, tmp_path: Path, columns: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        push(pushed, parquet(tmp_path, tracked([1]).assign(**columns)))


def test_what_is_no_parquet_file_is_refused(pushed: Pushed, tmp_path: Path) -> None:
    (tmp_path / "rows.dat").write_text("hello")
    with pytest.raises(ConfigurationError, match=r"rows\.dat: cannot be read"):
        push(pushed, tmp_path / "rows.dat")


def test_batches_before_a_fault_stay_written_and_its_own_is_not(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    rows = [f"{driver_id},{AT},4,1,,", f"-{driver_id},{AT},4,2,,", f"-{driver_id},{AT},four,3,,"]
    path = csv(tmp_path, "\n".join([HEADER, rows[0], rows[0], *rows[1:]]))
    with pytest.raises(ConfigurationError, match=r"row 4: .* \(2 rows before it were written"):
        push(pushed, path, batch_rows=2)
    assert ratings(pushed, driver_id)[1] == 1
    assert ratings(pushed, -driver_id)[1] is None


def test_an_unknown_push_source_is_refused_with_those_that_are_known(pushed: Pushed) -> None:
    with pytest.raises(ConfigurationError, match=r"no push source 'trackt' .*'tracked'"):
        pushed.target("trackt")


def test_a_source_of_views_without_online_data_is_refused(pushed: Pushed) -> None:
    with pytest.raises(ConfigurationError, match="kept_offline: kept_offline has no online data"):
        pushed.target("kept_offline")
