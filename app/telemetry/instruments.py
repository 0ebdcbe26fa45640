"""Counters and gauges over all workers of a service, with prometheus_client's exposition."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.telemetry.tally import Tallies


class Count:
    """How often something has happened, for one set of labels. One thread counts."""

    __slots__ = ("_cells",)

    def __init__(self, cells: "memoryview[float]") -> None:
        self._cells = cells

    def inc(self, amount: float = 1.0) -> None:
        """`amount`: not less than 0."""
        self._cells[0] += amount

    def reach(self, total: float) -> None:
        """Someone else counts, and is at `total`, or was."""
        self._cells[0] = max(self._cells[0], total)


class Level:
    """How much there is of something now, for one set of labels. One thread sets it."""

    __slots__ = ("_cells", "_value")

    def __init__(self, cells: "memoryview[float]") -> None:
        self._cells = cells
        self._value: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        # In this order: who sees that there is a value sees this one.
        self._cells[1] = value
        self._cells[0] = 1

    def inc(self, amount: float = 1.0) -> None:
        self._cells[1] += amount

    def dec(self, amount: float = 1.0) -> None:
        self._cells[1] -= amount

    def set_function(self, value: Callable[[], float]) -> None:
        """Ask `value` for it from now on."""
        self._value = value

    def forget(self) -> None:
        """There is nothing of it any more: no series, until it is set again."""
        self._value = None
        self._cells[0] = 0

    def refresh(self) -> None:
        """What it is to be asked for, it is asked for."""
        if self._value is not None:
            self.set(self._value())


class _Family(Collector):
    """A metric on the registry: its series are those of every worker."""

    _type: Literal["counter", "gauge"]
    _sample: str

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str] = (),
        *,
        registry: CollectorRegistry,
        tallies: Tallies,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labelnames = tuple(labelnames)
        self._tallies = tallies
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return [Metric(self._name, self._documentation, self._type)]

    def _metric(self, values: Mapping[tuple[str, ...], float]) -> Iterable[Metric]:
        metric = Metric(self._name, self._documentation, self._type)
        for labels, value in values.items():
            named = dict(zip(self._labelnames, labels, strict=True))
            metric.add_sample(self._name + self._sample, named, value)
        return [metric]

    def _everyones(self, cells: int) -> "Mapping[tuple[str, ...], Sequence[memoryview[float]]]":
        return self._tallies.everyones(self._name, len(self._labelnames), cells)

    def _checked(self, labels: Sequence[str]) -> Sequence[str]:
        if len(labels) != len(self._labelnames):
            raise ValueError(f"{self._name}: {len(labels)} values for {self._labelnames}")
        return labels


class Counter(_Family):
    """Its value is the sum over all workers, those before them included."""

    _type = "counter"
    _sample = "_total"

    def labels(self, *values: str) -> Count:
        """The series of these label values: look it up once."""
        return Count(self._tallies.ours(self._name, self._checked(values), 1))

    def inc(self, amount: float = 1.0) -> None:
        """Of a counter without labels."""
        self.labels().inc(amount)

    def collect(self) -> Iterable[Metric]:
        everyones = self._everyones(1).items()
        return self._metric(
            {labels: sum(cells[0] for cells in workers) for labels, workers in everyones}
        )


class Gauge(_Family):
    """What each worker told last, `together` made one of it: `sum`, `min` or `max`; NaN counts for
    nothing. What the worker before us told in our place is forgotten."""

    _type = "gauge"
    _sample = ""

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str] = (),
        *,
        together: Callable[[Sequence[float]], float],
        registry: CollectorRegistry,
        tallies: Tallies,
    ) -> None:
        super().__init__(name, documentation, labelnames, registry=registry, tallies=tallies)
        self._together = together
        self._levels: dict[tuple[str, ...], Level] = {}
        for cells in tallies.inherited(name, len(self._labelnames), 2).values():
            cells[0] = 0
        if not labelnames:
            self.labels()

    def labels(self, *values: str) -> Level:
        """The series of these label values; 0 until it is set."""
        if values not in self._levels:
            level = Level(self._tallies.ours(self._name, self._checked(values), 2))
            level.set(0)
            self._levels[values] = level
        return self._levels[values]

    def set(self, value: float) -> None:
        """Of a gauge without labels."""
        self.labels().set(value)

    def inc(self, amount: float = 1.0) -> None:
        """Of a gauge without labels."""
        self.labels().inc(amount)

    def dec(self, amount: float = 1.0) -> None:
        """Of a gauge without labels."""
        self.labels().dec(amount)

    def publish(self) -> None:
        """Have the others see what it is now, where a function says that."""
        for level in tuple(self._levels.values()):
            level.refresh()

    def collect(self) -> Iterable[Metric]:
        self.publish()
        told = {
            labels: [cells[1] for cells in workers if cells[0]]
            for labels, workers in self._everyones(2).items()
        }
        return self._metric({labels: self._one_of(all_) for labels, all_ in told.items() if all_})

    def _one_of(self, values: Sequence[float]) -> float:
        known = [value for value in values if value == value]
        return self._together(known) if known else float("nan")
