"""Metrics of several workers, read from any of them."""

import os
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.telemetry.instruments import Gauge
from app.telemetry.metrics import Metrics
from app.telemetry.tally import Tallies

NAN = float("nan")


class Service:
    """Its workers count on one file."""

    def __init__(self, file: int, workers: int) -> None:
        self._file = file
        self.workers = [self.started(place, workers) for place in range(workers)]

    def started(self, place: int, workers: int) -> Metrics:
        return Metrics(Tallies.shared(self._file, place, workers))

    def replace(self, place: int) -> Metrics:
        self.workers[place] = self.started(place, len(self.workers))
        return self.workers[place]

    def seen(self, name: str, **labels: str) -> float | None:
        """The same from each of them, after a beat."""
        for worker in self.workers:
            worker.record()
        one, *others = (worker.registry.get_sample_value(name, labels) for worker in self.workers)
        assert others == pytest.approx([one] * len(others), nan_ok=True)
        return one


@pytest.fixture
def two() -> Iterator[Service]:
    file = os.memfd_create("tallies")
    yield Service(file, workers=2)
    os.close(file)


def test_counters_and_histograms_are_the_sum_over_all_workers(two: Service) -> None:
    for amount, worker in enumerate(two.workers, start=1):
        worker.requests.labels("m", "ok").inc(amount)
        for _ in range(amount):
            worker.request_duration.labels("m").observe(0.002)
    assert two.seen("hikyaku_requests_total", model="m", code="ok") == 3
    assert two.seen("hikyaku_request_duration_seconds_count", model="m") == 3
    assert two.seen("hikyaku_request_duration_seconds_sum", model="m") == pytest.approx(0.006)
    assert two.seen("hikyaku_request_duration_seconds_bucket", model="m", le="0.0025") == 3


def test_whoever_is_asked_adds_them_up_to_the_last_bit_alike() -> None:
    """A sum that is less by one bit than the one before was reset, for Prometheus."""
    file = os.memfd_create("tallies")
    service = Service(file, workers=3)
    for place, value in ((0, 0.1), (2, 0.7), (1, 0.3)):  # the last has not the last place
        service.workers[place].request_duration.labels("m").observe(value)
        service.seen("hikyaku_request_duration_seconds_sum", model="m")
    name, labels = "hikyaku_request_duration_seconds_sum", {"model": "m"}
    seen = {worker.registry.get_sample_value(name, labels) for worker in service.workers}
    assert seen == {0.1 + 0.3 + 0.7}
    os.close(file)


def test_they_do_not_fall_when_a_worker_is_replaced(two: Service) -> None:
    def count(worker: Metrics) -> None:
        worker.requests.labels("m", "ok").inc()
        worker.request_duration.labels("m").observe_all([0.002] * 20)

    for worker in two.workers:
        count(worker)
    two.workers[1].record()
    replacement = two.replace(1)
    assert two.seen("hikyaku_requests_total", model="m", code="ok") == 2
    count(replacement)
    assert two.seen("hikyaku_requests_total", model="m", code="ok") == 3
    assert two.seen("hikyaku_request_duration_seconds_count", model="m") == 60


def test_what_the_parent_counts_of_a_place_is_told_once(two: Service) -> None:
    two.workers[1].worker_replacements.labels("died").reach(1)
    two.replace(1).worker_replacements.labels("died").reach(2)
    two.workers[0].worker_replacements.labels("died").reach(0)
    assert two.seen("hikyaku_worker_replacements_total", reason="died") == 2


@pytest.mark.parametrize(("told", "together"), [((1, 1), 1), ((1, 0), 0)])
def test_ready_is_who_is_least(two: Service, told: tuple[float, float], together: float) -> None:
    for worker, value in zip(two.workers, told, strict=True):
        worker.ready.set(value)
    assert two.seen("hikyaku_ready") == together


def test_a_worker_that_is_replaced_is_not_ready_before_it_says_so(two: Service) -> None:
    for worker in two.workers:
        worker.ready.set(1)
    replacement = two.replace(1)
    assert two.seen("hikyaku_ready") == 0
    replacement.ready.set(1)
    assert two.seen("hikyaku_ready") == 1


def test_a_gauge_goes_up_and_down_and_begins_anew_with_a_replacement() -> None:
    file = os.memfd_create("tallies")

    def started() -> tuple[CollectorRegistry, Gauge]:
        registry = CollectorRegistry()
        tallies = Tallies.shared(file, 0, workers=1)
        return registry, Gauge(
            "open", "How many.", together=sum, registry=registry, tallies=tallies
        )

    registry, gauge = started()
    assert registry.get_sample_value("open") == 0
    gauge.inc(3)
    gauge.dec()
    assert registry.get_sample_value("open") == 2
    registry, gauge = started()
    gauge.inc()
    assert registry.get_sample_value("open") == 1
    os.close(file)


def test_queued_rows_add_up_and_are_asked_for(two: Service) -> None:
    rows = [3, 4]
    for place, worker in enumerate(two.workers):
        worker.queued_rows.labels("m").set_function(lambda place=place: rows[place])
    assert two.seen("hikyaku_queued_rows", model="m") == 7
    rows[1] = 0
    assert two.seen("hikyaku_queued_rows", model="m") == 3


@pytest.mark.parametrize(
    ("told", "together"), [((30, 20), 20), ((30, NAN), 30), ((NAN, NAN), NAN), ((NAN, 5), 5)]
)
def test_the_newest_row_is_anybodys(
    two: Service, told: tuple[float, float], together: float
) -> None:
    for worker, age_s in zip(two.workers, told, strict=True):
        worker.feature_newest_age.labels("m", "v").set(age_s)
    newest = two.seen("hikyaku_feature_newest_age_seconds", model="m", feature_view="v")
    assert newest == pytest.approx(together, nan_ok=True)


def test_a_version_that_no_worker_has_any_more_is_gone(two: Service) -> None:
    labels = {"model": "m", "sha256": "0", "role": "champion"}
    for place in range(2):
        two.workers[place].model_info.labels("m", "1", "0", "champion").set(1)
    for place in range(2):
        two.replace(place).model_info.labels("m", "2", "0", "champion").set(1)
    assert two.seen("hikyaku_model_info", version="1", **labels) is None
    assert two.seen("hikyaku_model_info", version="2", **labels) == 1


def test_a_plan_is_outdated_once_one_worker_says_so(two: Service) -> None:
    for worker, value in zip(two.workers, (0, 1), strict=True):
        worker.plan_outdated.labels("m").set(value)
    assert two.seen("hikyaku_plan_outdated", model="m") == 1


def test_processes_are_told_apart_where_there_are_several(two: Service) -> None:
    for number in "12":
        assert two.seen("process_max_fds", worker=number)
    assert two.seen("process_max_fds") is None
    assert Metrics().registry.get_sample_value("process_max_fds")


async def test_a_scrape_in_pieces_is_the_exposition_of_the_whole() -> None:
    metrics = Metrics()
    for model in ("a", "b", 'c"\n'):
        metrics.requests.labels(model, "ok").inc()
        metrics.request_duration.labels(model).observe(0.5)
        metrics.prediction.labels(model, "champion", "p").observe_all([0.1] * 50)

    def lines(exposition: bytes) -> list[bytes]:
        return [line for line in exposition.splitlines() if b"hikyaku_" in line]

    whole = lines(generate_latest(metrics.registry))
    assert len(whole) > 200
    assert lines(await metrics.render()) == whole
