"""Counters, gauges and histograms of one engine, in a registry of its own.

The engine makes one `Metrics` and hands it down; whoever has something to count bumps it by its
short name. The names are frozen in `SERIES`: dashboards and alerts are built on them.
"""

import difflib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

PREFIX = "kvengine_"
# From a copy of one small block to a read from a slow remote tier.
SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True)
class Series:
    """One frozen metric: its full name, as it is exposed, its kind, its labels and its help."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    labels: tuple[str, ...]
    help: str


TABLE = (
    Series("kvengine_lookup_blocks_total", "counter", (), "Blocks asked for by match"),
    Series("kvengine_hit_blocks_total", "counter", ("tier",), "Blocks found, by where they were"),
    Series("kvengine_saved_blocks_total", "counter", (), "Blocks committed"),
    Series("kvengine_save_refused_blocks_total", "counter", (), "Blocks that found no room"),
    Series("kvengine_overfull_blocks_total", "counter", (), "Blocks too large for their encoding"),
    Series("kvengine_evicted_blocks_total", "counter", ("reason",), "Blocks evicted from memory"),
    Series("kvengine_corrupt_blocks_total", "counter", ("tier",), "Blocks whose digest was wrong"),
    Series(
        "kvengine_unreadable_blocks_total", "counter", ("tier",), "Blocks whose key is not held"
    ),
    Series("kvengine_tier_failures_total", "counter", ("tier",), "Reads and writes that failed"),
    Series("kvengine_op_seconds", "histogram", ("op", "tier"), "Seconds an operation took"),
    Series("kvengine_bytes", "gauge", ("tier",), "Bytes held"),
    Series("kvengine_blocks", "gauge", ("tier",), "Blocks held"),
    Series("kvengine_demoted_blocks_total", "counter", ("tier",), "Blocks written to a tier"),
    Series(
        "kvengine_write_skipped_blocks_total",
        "counter",
        ("tier",),
        "Blocks a tier was too slow for",
    ),
    Series("kvengine_fetched_blocks_total", "counter", ("tier",), "Blocks read from a tier"),
    Series(
        "kvengine_saved_prefill_seconds_total",
        "counter",
        (),
        "Seconds of computing that loads made unnecessary, less what they took",
    ),
    Series("kvengine_plan_decisions_total", "counter", ("reason",), "Prompts, by what was fetched"),
    Series(
        "kvengine_incomplete_blocks_total",
        "counter",
        ("reason",),
        "Blocks given up for a part that was aborted, or missing at the deadline",
    ),
    Series("kvengine_shadow_lookup_blocks_total", "counter", (), "Blocks asked of the shadows"),
    Series(
        "kvengine_shadow_missed_blocks_total",
        "counter",
        ("policy",),
        "Blocks of those that a policy would miss, by the sample; live: that memory did",
    ),
    Series(
        "kvengine_shadow_missed_prefill_seconds_total",
        "counter",
        ("policy",),
        "Seconds of computing them",
    ),
    Series("kvengine_dropped_blocks_total", "counter", (), "Blocks dropped by command"),
    Series("kvengine_hint_unknown_blocks_total", "counter", (), "Blocks of hints, not known here"),
    Series("kvengine_expired_total", "counter", ("kind",), "Leases and reservations past deadline"),
    Series("kvengine_pinned_bytes", "gauge", (), "Bytes of memory that a GPU reaches by itself"),
    Series("kvengine_pin_failures_total", "counter", (), "Times that memory could not be pinned"),
    Series("kvengine_adapter_errors_total", "counter", ("adapter",), "Errors turned into a miss"),
)


def short(name: str) -> str:
    """The name used in code: without the prefix, and without the unit of a counter."""
    return name.removeprefix(PREFIX).removesuffix("_total")


SERIES: Mapping[str, Series] = MappingProxyType({short(row.name): row for row in TABLE})


class Metrics:
    """The metrics of one engine. Any thread may call any method.

    Names are the short ones of `SERIES` ("hit_blocks", "op_seconds"); labels are given by name.
    An unknown name is a KeyError that says the nearest known one, and so is a wrong set of labels.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._lock = threading.Lock()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        # Resolved children by (name, *labels as given): resolving costs more than bumping.
        self._children: dict[tuple[object, ...], Counter | Gauge | Histogram] = {}
        for name, row in SERIES.items():
            if row.kind == "counter":
                self._counters[name] = Counter(
                    row.name, row.help, row.labels, registry=self.registry
                )
            elif row.kind == "gauge":
                self._gauges[name] = Gauge(row.name, row.help, row.labels, registry=self.registry)
            else:
                self._histograms[name] = Histogram(
                    row.name, row.help, row.labels, buckets=SECONDS, registry=self.registry
                )

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add `value` (not negative) to a counter, or observe it in a histogram (in seconds)."""
        child = self._children.get((name, *labels.items()))
        if child is None:
            child = self._resolve(name, labels)
        if isinstance(child, Counter):  # first: a check that fails costs more than the rest
            child.inc(value)
        elif isinstance(child, Histogram):
            child.observe(value)
        else:
            raise KeyError(f"metric {name!r} is a gauge: use set, not add")

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge to `value`."""
        child = self._children.get((name, *labels.items()))
        if child is None:
            child = self._resolve(name, labels)
        if not isinstance(child, Gauge):
            raise KeyError(f"metric {name!r} is a {SERIES[name].kind}: use add, not set")
        child.set(value)

    def get(self, name: str, **labels: str) -> float:
        """Read a counter or a gauge, or the sum of a histogram; what was never bumped reads 0.

        Labels may be left out: the sum over them is given.
        """
        row = self._row(name)
        if unknown := set(labels) - set(row.labels):
            raise KeyError(self._wrong_labels(row, unknown))
        sample = row.name + ("_sum" if row.kind == "histogram" else "")
        wanted = labels.items()
        return sum(
            value
            for (found, given), value in self._samples().items()
            if found == sample and wanted <= dict(given).items()
        )

    def snapshot(self) -> dict[str, float]:
        """Read all series that were bumped or set, by exposed name: `name{label="value"}`.

        Of a histogram there are the count and the sum, without its buckets.
        """
        found = {}
        for (name, labels), value in self._samples().items():
            if not name.endswith(("_bucket", "_created")):
                inner = ",".join(f'{key}="{text}"' for key, text in labels)
                found[f"{name}{{{inner}}}" if inner else name] = value
        return found

    def text(self) -> bytes:
        """Write all series in the Prometheus text format."""
        return generate_latest(self.registry)

    def _samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (sample.name, tuple(sample.labels.items())): sample.value
            for family in self.registry.collect()
            for sample in family.samples
        }

    def _row(self, name: str) -> Series:
        row = SERIES.get(name)
        if row is None:
            near = difflib.get_close_matches(short(name), SERIES, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f": known are {', '.join(SERIES)}"
            raise KeyError(f"no metric {name!r}{hint}")
        return row

    def _wrong_labels(self, row: Series, given: Iterable[str]) -> str:
        expected = ", ".join(row.labels) or "none"
        return f"metric {short(row.name)!r} has labels {expected}, not {', '.join(sorted(given))}"

    def _resolve(self, name: str, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        row = self._row(name)
        if set(labels) != set(row.labels):
            raise KeyError(self._wrong_labels(row, labels))
        parent: Counter | Gauge | Histogram
        if row.kind == "counter":
            parent = self._counters[name]
        elif row.kind == "gauge":
            parent = self._gauges[name]
        else:
            parent = self._histograms[name]
        child = parent.labels(**labels) if row.labels else parent
        with self._lock:
            return self._children.setdefault((name, *labels.items()), child)


class _Merged:
    """What several registries hold, each under a label of its own."""

    def __init__(self, by_tenant: Mapping[str, Metrics]) -> None:
        self._by_tenant = by_tenant

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for tenant, metrics in self._by_tenant.items():
            for family in metrics.registry.collect():
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = sample.labels | {"tenant": tenant}
                    merged.samples.append(sample._replace(labels=labels))
        yield from families.values()


def text_of(by_tenant: Mapping[str, Metrics]) -> bytes:
    """Write the series of several tenants in the Prometheus text format, labelled `tenant`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(by_tenant))
    return generate_latest(registry)
