"""Metrics of plans in vLLM's Prometheus endpoint.

Plans are made in worker processes; the endpoint is in the API server. Each worker keeps its numbers in a
memory-mapped file of prometheus_client, in a folder that the environment names. The endpoint sums up the files at
every request.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.registry import Collector

from chunkwise_lora.method.batch import Usage

FOLDER = "CHUNKWISE_METRICS_DIR"
"""Environment variable: the folder where the workers of this machine keep their numbers."""

COUNTERS = {
    "chunkwise:tokens": ("Tokens run with the adapter, by their highest rung.", ("adapter", "rung")),
    "chunkwise:rank": ("Sum of the ranks of these tokens.", ("adapter",)),
    "chunkwise:scheduler_seconds": ("Time spent in planning.", ("adapter",)),
}
GAUGES = {
    "chunkwise:mean_rank": ("Mean rank of all tokens run with the adapter.", ("adapter",)),
    "chunkwise:adapter_bytes": ("Bytes of the adapter's factors on this rank's device.", ("adapter",)),
    "chunkwise:schedulers": ("Requests that are being planned.", ()),
}


def open_folder() -> None:
    """Create a folder for this server's workers, unless the environment names one. It is deleted when this process
    ends."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="chunkwise-metrics-")
        atexit.register(_remove, folder, os.getpid())


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class Recorder:
    """The numbers of one worker."""

    def __init__(self, folder: str) -> None:
        self._values = MmapedDict(str(Path(folder) / f"{os.getpid()}.db"))
        self._bytes: dict[str, dict[str, int]] = {}
        """Bytes of adapters, by name and then by key."""

    def record(self, adapter: str, usage: Usage) -> None:
        """Count the usage of an adapter in a pass. Adapters that share a name are counted together."""
        for rung in usage.tokens.nonzero()[0].tolist():
            self._add("chunkwise:tokens", float(usage.tokens[rung]), usage.name, str(rung))
        self._add("chunkwise:rank", usage.rank, usage.name)
        self._add("chunkwise:scheduler_seconds", usage.seconds, usage.name)

    def schedulers(self, count: int) -> None:
        """Record how many requests are being planned."""
        self._values.write_value(_key("chunkwise:schedulers"), float(count), 0.0)

    def adapter_bytes(self, adapter: str, name: str, nbytes: int) -> None:
        """Record the bytes of an adapter's factors. The bytes of adapters that share a name are added up."""
        by_key = self._bytes.setdefault(name, {})
        by_key[adapter] = nbytes
        self._values.write_value(_key("chunkwise:adapter_bytes", name), float(sum(by_key.values())), 0.0)

    def _add(self, name: str, amount: float, *labels: str) -> None:
        key = _key(name, *labels)
        self._values.write_value(key, self._values.read_value(key)[0] + amount, 0.0)


def _key(name: str, *labels: str) -> str:
    return json.dumps([name, *labels])


class WorkerCollector(Collector):
    """Sums up the numbers of all workers."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. prometheus_client calls this."""
        values: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
        for file in self._folder.glob("*.db"):
            for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):
                name, *labels = json.loads(key)
                values[name][tuple(labels)] += value
        tokens: dict[tuple[str, ...], float] = defaultdict(float)
        for (adapter, _rung), count in values["chunkwise:tokens"].items():
            tokens[(adapter,)] += count
        for labels, rank in values["chunkwise:rank"].items():
            values["chunkwise:mean_rank"][labels] = rank / max(tokens[labels], 1)
        families: list[CounterMetricFamily | GaugeMetricFamily] = [
            *(CounterMetricFamily(name, *about[:1], labels=about[1]) for name, about in COUNTERS.items()),
            *(GaugeMetricFamily(name, *about[:1], labels=about[1]) for name, about in GAUGES.items()),
        ]
        for family in families:
            for labels, value in sorted(values[family.name].items()):
                family.add_metric(labels, value)
            yield family


def register(registry: CollectorRegistry) -> None:
    """Add the workers' numbers to `registry`, if the environment names their folder."""
    known = getattr(registry, "_collector_to_names", {})
    if (folder := os.environ.get(FOLDER)) and not any(isinstance(collector, WorkerCollector) for collector in known):
        registry.register(WorkerCollector(folder))
