"""A dozen of the hostile corpus, each in the process that verifies it (make prove-hostile-models
takes all of them)."""

import asyncio
from pathlib import Path

import pytest

from app.errors import InvalidModel
from app.repository.verify import verify_version
from loadtests.hostile_models import CONTRACT, Hostile, corpus, honest, publish_as_it_is
from tests.backends.isolated_models import processes, until

CHOSEN = {
    "a hard link",
    "random bytes",
    "64 times half a GB",
    "an endless Loop",
    "a cycle",
    "67 million nodes of functions",
    "a renamed input",
    "NaN",
    "the first row of the batch",
    "one row for all",
    "a thousandth off",
    "a negative deviation",
}


@pytest.mark.parametrize(
    "hostile", [each for each in corpus() if each.name in CHOSEN], ids=lambda each: each.name
)
async def test_a_hostile_model_is_refused_with_its_reason(tmp_path: Path, hostile: Hostile) -> None:
    version = publish_as_it_is(hostile, tmp_path / "1")
    with pytest.raises(InvalidModel, match=hostile.reason) as refused:
        await verify_version(version, CONTRACT, within_s=2 if "endless" in hostile.name else 60)
    assert str(refused.value).isprintable()
    assert processes() == []


async def test_a_good_model_with_its_weights_beside_it_is_accepted(tmp_path: Path) -> None:
    version = publish_as_it_is(Hostile("good", "", honest), tmp_path / "1")
    verified = await verify_version(version, CONTRACT)
    assert sorted(verified.execution_s) == [1, 2, 4, 8]


async def test_who_gives_up_leaves_no_process(tmp_path: Path) -> None:
    (endless,) = [each for each in corpus() if each.name == "an endless Loop"]
    version = publish_as_it_is(endless, tmp_path / "1")
    verifying = asyncio.create_task(verify_version(version, CONTRACT))
    await until(lambda: bool(processes()))
    verifying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await verifying
    assert processes() == []


async def test_of_those_that_ask_at_once_one_verifies(tmp_path: Path) -> None:
    version = publish_as_it_is(Hostile("good", "", honest), tmp_path / "1")
    seen: set[int] = set()

    async def watch() -> None:
        while True:
            seen.update(processes())
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    found = await asyncio.gather(*(verify_version(version, CONTRACT) for _ in range(4)))
    watching.cancel()
    assert len(seen) == 1
    assert all(each == found[0] for each in found)
