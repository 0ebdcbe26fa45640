"""What the operating system says of each worker, whichever of them is asked."""

import os
from collections.abc import Iterable
from functools import partial

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.telemetry.tally import Tallies

_PROCESS_IDS = "process id by worker"


class WorkerProcesses(Collector):
    """`process_*` of every worker, with its number as the label `worker`.

    Without a label each scrape would tell of another process.
    """

    def __init__(self, tallies: Tallies) -> None:
        self._tallies = tallies
        tallies.ours(_PROCESS_IDS, [str(tallies.place + 1)], 1)[0] = os.getpid()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for (worker,), (cells,) in self._tallies.everyones(_PROCESS_IDS, 1, 1).items():
            process_id = int(cells[0])
            of_worker = ProcessCollector(pid=partial(int, process_id), registry=None)
            for metric in of_worker.collect():  # nothing where it has just ended
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    family.add_sample(sample.name, {"worker": worker}, sample.value)
        return families.values()
