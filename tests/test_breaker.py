"""The circuit breaker: open until a probe says otherwise."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from app.breaker import CircuitBreaker, StillDown


class Patient:
    """Something to depend on: its probes wait for `ask`, and tell what `down` says."""

    def __init__(self) -> None:
        self.down = "it is down"
        self.probes = 0
        self.at_once = 0
        self.most_at_once = 0
        self.probed = asyncio.Event()

    async def probe(self) -> None:
        self.probes += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.probed.set()
        try:
            await asyncio.sleep(0)
            if self.down:
                raise StillDown(self.down)
        finally:
            self.at_once -= 1


@asynccontextmanager
async def breaker_of(patient: Patient) -> AsyncIterator[CircuitBreaker]:
    breaker = CircuitBreaker("the dependency", patient.probe)
    try:
        async with asyncio.timeout(5):
            yield breaker
    finally:
        await breaker.close()


async def closed(breaker: CircuitBreaker) -> None:
    while breaker.is_open:  # noqa: ASYNC110 (it has no event: nobody waits for it to close)
        await asyncio.sleep(0.005)


async def test_it_is_closed_until_it_is_opened() -> None:
    patient = Patient()
    async with breaker_of(patient) as breaker:
        assert not breaker.is_open
        breaker.open("it said no")
        assert (breaker.is_open, breaker.reason) == (True, "it said no")


async def test_it_stays_open_while_probes_fail_and_says_what_the_last_one_met() -> None:
    patient = Patient()
    async with breaker_of(patient) as breaker:
        breaker.open("it said no")
        while patient.probes < 3:
            patient.probed.clear()
            await patient.probed.wait()
        assert (breaker.is_open, breaker.reason) == (True, "it is down")


async def test_the_first_probe_that_succeeds_closes_it() -> None:
    patient = Patient()
    async with breaker_of(patient) as breaker:
        breaker.open("it said no")
        await patient.probed.wait()
        patient.down = ""
        await closed(breaker)
        probes = patient.probes
        await asyncio.sleep(0.3)
        assert patient.probes == probes


async def test_opening_it_again_while_it_is_open_starts_no_second_probe() -> None:
    patient = Patient()
    async with breaker_of(patient) as breaker:
        for _ in range(100):
            breaker.open("it said no")
        while patient.probes < 3:
            patient.probed.clear()
            await patient.probed.wait()
        assert patient.most_at_once == 1


async def test_it_can_open_again() -> None:
    patient = Patient()
    patient.down = ""
    async with breaker_of(patient) as breaker:
        for _ in range(2):
            breaker.open("it said no")
            assert breaker.is_open
            await closed(breaker)


async def test_a_closed_one_probes_no_more() -> None:
    patient = Patient()
    breaker = CircuitBreaker("the dependency", patient.probe)
    breaker.open("it said no")
    await patient.probed.wait()
    await breaker.close()
    probes = patient.probes
    await asyncio.sleep(0.3)
    assert patient.probes == probes


async def test_a_defect_of_the_probe_is_logged_and_probes_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries = 0

    async def broken_at_first() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ZeroDivisionError

    breaker = CircuitBreaker("the dependency", broken_at_first)
    breaker.open("it said no")
    async with asyncio.timeout(5):
        await closed(breaker)
    assert "the probe failed" in caplog.text


async def test_it_tells_when_it_opens_and_closes_and_not_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    patient = Patient()
    patient.down = ""
    async with breaker_of(patient) as breaker:
        breaker.open("it said no")
        await closed(breaker)
        assert [record.message for record in caplog.records] == [
            "it is down: it is not asked until a probe succeeds",
            "it is back",
        ]
        for _ in range(20):
            breaker.open("it said no")
            await closed(breaker)
    assert len(caplog.records) == 10
