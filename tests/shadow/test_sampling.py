"""Which requests a candidate is shown."""

import random

import pytest

from app.contract import Shadow
from app.request_ids import RequestIds
from app.shadow.sampling import ShareOfKeys, ShareOfRequests, policy_of

_random = random.Random(7)
REQUESTS = [_random.randbytes(16).hex() for _ in range(20_000)]
KEYS = [f"key {n}" for n in range(20_000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_of_the_requests_is_admitted(share: float) -> None:
    admitted = sum(ShareOfRequests(share).admits(request, None) for request in REQUESTS)
    assert admitted / len(REQUESTS) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_what_is_kept_for_labels_is_what_a_candidate_is_shown(share: float) -> None:
    kept = [request for request in REQUESTS if RequestIds(share).is_sampled(request)]
    assert kept
    assert kept == [request for request in REQUESTS if ShareOfRequests(share).admits(request, None)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_of_the_keys_is_admitted_with_all_their_requests(share: float) -> None:
    policy = ShareOfKeys(share, "salt")
    admitted = [key for key in KEYS if policy.admits(REQUESTS[0], key)]
    assert len(admitted) / len(KEYS) == pytest.approx(share, abs=0.015)
    assert all(policy.admits(REQUESTS[1], key) for key in admitted)


def test_who_is_in_at_5_percent_stays_in_at_10() -> None:
    for less, more, subjects in (
        (ShareOfRequests(0.05), ShareOfRequests(0.1), [(r, None) for r in REQUESTS]),
        (ShareOfKeys(0.05, "s"), ShareOfKeys(0.1, "s"), [("0", k) for k in KEYS]),
    ):
        assert all(more.admits(*each) for each in subjects if less.admits(*each))


def test_another_salt_draws_other_keys() -> None:
    drawn = [{k for k in KEYS if ShareOfKeys(0.1, salt).admits("0", k)} for salt in ("a", "b")]
    assert 0 < len(drawn[0] & drawn[1]) < len(drawn[0]) / 5


@pytest.mark.parametrize("by", ["request", "routing_key"])
def test_all_is_all(by: str) -> None:
    shadow = Shadow.model_validate({"by": by})
    assert policy_of(shadow, 1.0, "salt") is None
    almost = policy_of(shadow, 1 - 1e-12, "salt")
    assert almost is not None
    assert all(almost.admits(request, key) for request, key in zip(REQUESTS, KEYS, strict=True))


def test_a_request_without_a_key_is_drawn_by_itself() -> None:
    policy = ShareOfKeys(0.25, "salt")
    admitted = [request for request in REQUESTS if policy.admits(request, None)]
    assert len(admitted) / len(REQUESTS) == pytest.approx(0.25, abs=0.015)
