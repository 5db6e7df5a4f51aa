"""The daemon's Prometheus metrics, all in one registry that is made with the daemon (no globals).

Latencies are by command and phase: `total` is from the call's arrival to its answer, the others are its parts, so that
a slow ADD says where it was slow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_RECENT = 300


class Repair(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was put right. `what` is the label of podwire_repairs; `at` is in seconds since the epoch."""

    at: float
    what: str
    detail: str


class KernelCounter(Collector):
    """A counter that the kernel keeps: what was last read of it, by its label."""

    def __init__(self, name: str, text: str, label: str, registry: CollectorRegistry) -> None:
        self._family = (name, text, label)
        self.values: Mapping[str, int] = {}
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For the registry."""
        name, text, label = self._family
        family = CounterMetricFamily(name, text, labels=[label])
        for value, number in self.values.items():
            family.add_metric([value], number)
        yield family


class Metrics:
    """Names begin with `podwire_`; docs/metrics.md lists them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "podwire_cni_seconds", "CNI calls by phase", ["command", "phase"], registry=self.registry, buckets=_BUCKETS
        )
        self.calls = Counter(
            "podwire_cni_calls", "CNI calls by their code (0: success)", ["command", "code"], registry=self.registry
        )
        self.addresses = Gauge(
            "podwire_pool_addresses",
            "Addresses of this node's blocks",
            ["pool", "block", "state"],
            registry=self.registry,
        )
        self.attachments = Gauge("podwire_attachments", "Attachments in the journal", registry=self.registry)
        self.peers = Gauge("podwire_peers", "Other nodes whose pods are reached", registry=self.registry)
        self.etcd_connected = Gauge("podwire_etcd_connected", "1 while etcd answers", registry=self.registry)
        self.etcd_attempts = Counter(
            "podwire_etcd_attempts", "Calls and streams to etcd by outcome", ["outcome"], registry=self.registry
        )
        self.ready = Gauge("podwire_ready", "1 while an ADD can succeed", registry=self.registry)
        self.repairs = Counter("podwire_repairs", "What reconcile had to put right", ["what"], registry=self.registry)
        self.failures = Counter(
            "podwire_converge_failures",
            "Attempts to bring the kernel to its plan that failed, wholly or in part",
            registry=self.registry,
        )
        self.replayed = Counter(
            "podwire_queued_dels", "DELs replayed from the queue", ["result"], registry=self.registry
        )
        self.releasing_wires = Gauge(
            "podwire_releasing_wires", "Wires waiting for their deletion", registry=self.registry
        )
        self.spoofed = KernelCounter(
            "podwire_spoofed_packets",
            "Frames of pods that were dropped because a pod may not send them",
            "reason",
            self.registry,
        )
        self.fast_packets = KernelCounter(
            "podwire_fast_path_packets",
            "Packets that went past bridge and firewall: to a pod of this node, to another node, from one",
            "way",
            self.registry,
        )
        self.fast_pods = Gauge(
            "podwire_fast_path_pods", "Pods whose packets may take the fast path", registry=self.registry
        )
        self.recent: deque[Repair] = deque(maxlen=_RECENT)
        """The last repairs, for status; the counters have no room for what exactly was done."""

    def repaired(self, what: str, detail: str, count: int = 1) -> None:
        """Counts repairs of a kind, and keeps what was done."""
        self.repairs.labels(what).inc(count)
        self.recent.append(Repair(at=time.time(), what=what, detail=detail))

    @contextmanager
    def phase(self, command: str, phase: str) -> Iterator[None]:
        """Times the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.labels(command, phase).observe(time.perf_counter() - began)

    # --- podwire.etcd's Observer

    def attempt(self, method: str, endpoint: str, outcome: str, seconds: float) -> None:  # noqa: ARG002
        """Counts a call to etcd."""
        self.etcd_attempts.labels(outcome).inc()

    def watch(self, prefix: str, event: str) -> None:
        """Passed over: what a watch brings is seen in the peers."""
