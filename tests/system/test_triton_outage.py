"""The short form of `make prove-triton-outage`: the same real Triton, for seconds."""

import pytest

from loadtests.prove_triton_outage import Form, Load, Protocol, prove

pytestmark = [pytest.mark.system, pytest.mark.triton]


@pytest.mark.parametrize(
    ("form", "protocol", "failover"), [("killed", "http", True), ("stopped", "grpc", False)]
)
async def test_callers_are_refused_or_answered_locally_while_triton_is_gone(
    form: Form, protocol: Protocol, failover: bool
) -> None:
    load = Load(before_s=1, outage_s=1, after_s=2.5, per_s=100, seed=2013)
    report = await prove(form, failover, protocol, load)
    assert report.violations == []
    assert report.outcomes["before"]["triton"] > 50
    assert report.outcomes["during"]["local" if failover else "model_not_ready"] > 50
    assert report.outcomes["after"]["triton"] > 50
