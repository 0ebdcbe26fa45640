"""The short form of `make prove-redis-outage`: the same real server and Redis, for seconds."""

import pytest

from loadtests.prove_redis_outage import Form, Load, prove

pytestmark = pytest.mark.system


@pytest.mark.parametrize("form", ["killed", "stopped", "silent"])
async def test_answers_are_flagged_while_redis_is_gone_and_fresh_once_it_is_back(
    form: Form,
) -> None:
    report = await prove(form, Load(before_s=1, outage_s=1, after_s=2.5, per_s=100, seed=2013))
    assert report.violations == []
    assert report.outcomes["before"]["fresh"] > 50
    assert report.outcomes["during"]["flagged"] > 50
    assert report.outcomes["after"]["fresh"] > 50
