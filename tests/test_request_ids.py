"""The id of a request leads to its bucket, and says whether it is in the sample."""

import pytest

from app.request_ids import IDS_IN_BUCKET, RequestId, RequestIds


def test_ids_are_new_and_lead_to_whoever_gave_them() -> None:
    ours, theirs = RequestIds(), RequestIds()
    given = [ids.next() for ids in (ours, theirs) for _ in range(1_000)]
    assert len(set(given)) == 2_000
    parsed = [RequestId.parse(each) for each in given]
    assert {each.tag for each in parsed if each} == {ours.tag, theirs.tag}
    assert [each.bucket for each in parsed[:1_000] if each] == [
        number // IDS_IN_BUCKET for number in range(1_000)
    ]


def test_a_bucket_can_be_left_early() -> None:
    ids = RequestIds()
    ids.next()
    ids.turn()
    assert RequestId.parse(ids.next()) is not None
    assert ids.bucket == 1


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "G" + "0" * 31, "A" * 32])
def test_what_is_no_id_is_none(text: str) -> None:
    assert RequestId.parse(text) is None


def test_every_worker_says_the_same_of_the_sample() -> None:
    ours, theirs = RequestIds(0.25), RequestIds(0.25)
    given = [ours.next() for _ in range(10_000)]
    sampled = [each for each in given if ours.is_sampled(each)]
    assert 2_200 < len(sampled) < 2_800
    assert [each for each in given if theirs.is_sampled(each)] == sampled
    buckets = ours.bucket + 1
    assert len(sampled) / buckets == pytest.approx(IDS_IN_BUCKET, rel=0.2)
    assert all(map(RequestIds().is_sampled, given))
