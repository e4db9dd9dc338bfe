"""Metrics of plans in vLLM's Prometheus endpoint.

Plans are made in worker processes; the endpoint is in the API server. Each worker keeps its numbers in a
memory-mapped file of prometheus_client, in a folder that the environment names. The endpoint sums up the files at
every request.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.registry import Collector

from chunkwise_lora.method.batch import Usage

if TYPE_CHECKING:
    from chunkwise_lora.engines.vllm.manager import Held

FOLDER = "CHUNKWISE_METRICS_DIR"
"""Environment variable: the folder where the workers of this machine keep their numbers."""

COUNTERS = {
    "chunkwise:tokens": ("Tokens run with the adapter, by the rank of their highest rung.", ("adapter", "rank")),
    "chunkwise:rank": ("Sum of the ranks of these tokens.", ("adapter",)),
    "chunkwise:scheduler_seconds": ("Time spent in planning.", ("adapter",)),
}
RANK = "chunkwise:adapter_rank"
GAUGES = {
    "chunkwise:mean_rank": ("Mean rank of all tokens run with the adapter.", ("adapter",)),
    "chunkwise:adapter_bytes": ("Bytes of the adapter's factors on this rank's device.", ("adapter",)),
    RANK: ("Rank of the adapter's highest rung on the device.", ("adapter",)),
    "chunkwise:schedulers": ("Requests that are being planned.", ()),
}

unloaded: set[str] = set()
"""Names of adapters that users of this API server have unloaded. Their metrics are not shown."""


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
        self._names: dict[str, str] = {}
        """Names of the adapters that have numbers, by key."""
        self._held: dict[str, Held] = {}
        """The adapters on the device, by key."""
        self._keys: dict[str, set[str]] = defaultdict(set)
        """Keys of the numbers of all adapters of a name."""

    def record(self, adapter: str, usage: Usage) -> None:
        """Count the usage of an adapter in a pass. Adapters that share a name are counted together."""
        self._names[adapter] = usage.name
        for rung in usage.tokens.nonzero()[0].tolist():
            self._add("chunkwise:tokens", float(usage.tokens[rung]), usage.name, f"{usage.rung_ranks[rung]:.4g}")
        self._add("chunkwise:rank", usage.rank, usage.name)
        self._add("chunkwise:scheduler_seconds", usage.seconds, usage.name)

    def schedulers(self, count: int) -> None:
        """Record how many requests are being planned."""
        self._values.write_value(_key("chunkwise:schedulers"), float(count), 0.0)

    def loaded(self, held: Held) -> None:
        """Record what an adapter has on the device."""
        self._names[held.info.key], self._held[held.info.key] = held.info.name, held
        self._record_held(held.info.name)

    def unloaded(self, adapter: str) -> None:
        """Record that an adapter is no longer on the device. It may come back, so its counters stay."""
        if self._held.pop(adapter, None) is not None:
            self._record_held(self._names[adapter])

    def removed(self, adapter: str) -> None:
        """Remove the numbers of an adapter, unless another one has its name."""
        self._held.pop(adapter, None)
        name = self._names.pop(adapter, None)
        if name is None:
            return
        if name in self._names.values():
            self._record_held(name)
            return
        for key in self._keys.pop(name, ()):
            self._values.write_value(key, math.nan, 0.0)

    def _record_held(self, name: str) -> None:
        """Record the bytes of all adapters of a name, and their highest rank."""
        found = [held for held in self._held.values() if held.info.name == name]
        nbytes = float(sum(held.nbytes for held in found)) if found else math.nan
        self._write(_key("chunkwise:adapter_bytes", name), nbytes, name)
        self._write(_key(RANK, name), max((held.rank for held in found), default=math.nan), name)

    def _add(self, metric: str, amount: float, name: str, *labels: str) -> None:
        key = _key(metric, name, *labels)
        before = self._values.read_value(key)[0]
        self._write(key, amount if math.isnan(before) else before + amount, name)

    def _write(self, key: str, value: float, name: str) -> None:
        self._keys[name].add(key)
        self._values.write_value(key, value, 0.0)


def _key(name: str, *labels: str) -> str:
    return json.dumps([name, *labels])


class WorkerCollector(Collector):
    """Sums up the numbers of all workers, and takes the highest rank. NaN stands for a number that was removed."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. prometheus_client calls this."""
        values: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
        for file in self._folder.glob("*.db"):
            for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):
                name, *labels = json.loads(key)
                if not math.isnan(value) and not unloaded.intersection(labels[:1]):
                    before = values[name][tuple(labels)]
                    values[name][tuple(labels)] = max(before, value) if name == RANK else before + value
        tokens: dict[tuple[str, ...], float] = defaultdict(float)
        for (adapter, _rank), count in values["chunkwise:tokens"].items():
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
