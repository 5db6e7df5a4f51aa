"""The proxy's Prometheus metrics, in one registry that is made with the proxy (no globals).

Names that begin with `kubeproxy_` mean what kube-proxy's of that name mean, so that dashboards and alerts go on
working; what kube-proxy has not begins with `podwire_proxy_`. docs/metrics.md lists them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from podwire.kube.kinds import ENDPOINT_SLICES, SERVICES

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Implements the observer of the API's source; `services` and `policies` are those of the syncs."""

    def __init__(self, mode: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.services = ServiceObserver(registry, mode)
        self.policies = PolicyObserver(registry)
        self.problems = Gauge("podwire_proxy_problems", "Objects, or parts of them, passed over", registry=registry)
        self.health_ports_missing = Gauge(
            "podwire_proxy_health_ports_missing", "Health node ports that cannot be served", registry=registry
        )
        self.no_local_endpoints = Gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Ports of Services with a policy Local, and without an endpoint on this node",
            ["traffic_policy"],
            registry=registry,
        )
        self.drift = Counter(
            "podwire_proxy_drift", "Times that somebody else changed our rules", ["rules"], registry=registry
        )
        self.left_out = Counter(
            "podwire_proxy_objects_left_out", "Objects that could not be decoded", ["kind"], registry=registry
        )
        self.requests = Counter(
            "podwire_proxy_api_requests", "Requests to the API by outcome", ["outcome"], registry=registry
        )
        self.api_trouble = Gauge(
            "podwire_proxy_api_trouble", "1 while following a kind is hindered", ["kind"], registry=registry
        )
        self.pages = {
            page: Counter(f"kubeproxy_proxy_{page}", f"Answers of /{page}", ["code"], registry=registry)
            for page in ("healthz", "livez")
        }

    def answered(self, page: str, code: int) -> None:
        """A health check was answered."""
        self.pages[page].labels(code).inc()

    # --- podwire.kube's Observer

    def attempt(self, endpoint: str, outcome: str, seconds: float) -> None:  # noqa: ARG002
        """A request to the API."""
        self.requests.labels(outcome).inc()

    def follow(self, kind: str, event: str) -> None:
        """Passed over: `problem` says what hinders."""

    def skipped(self, kind: str, name: str, reason: str) -> None:  # noqa: ARG002
        """An object was left out; the log names it."""
        self.left_out.labels(kind).inc()

    def problem(self, kind: str, reason: str) -> None:
        """Following a kind is hindered, or not any more."""
        self.api_trouble.labels(kind).set(1 if reason else 0)


class ServiceObserver:
    """sync.ServiceObserver."""

    def __init__(self, registry: CollectorRegistry, mode: str) -> None:
        def seconds(name: str, what: str) -> Histogram:
            return Histogram(name, what, buckets=_SECONDS, registry=registry)

        rules = "kubeproxy_sync_proxy_rules"
        self.sync_seconds = seconds(f"{rules}_duration_seconds", "Runs")
        self.full_seconds = seconds("kubeproxy_sync_full_proxy_rules_duration_seconds", "Runs that read everything")
        self.partial_seconds = seconds("kubeproxy_sync_partial_proxy_rules_duration_seconds", "Runs that did not")
        self.last = Gauge(f"{rules}_last_timestamp_seconds", "End of the last good run", registry=registry)
        self.queued = Gauge(f"{rules}_last_queued_timestamp_seconds", "The last change", registry=registry)
        self.network_seconds = seconds(
            "kubeproxy_network_programming_duration_seconds", "From the cause of a change until it was in the kernel"
        )
        self.programming_seconds = seconds(
            "podwire_proxy_programming_seconds", "From when a change reached the proxy until it was in the kernel"
        )
        self.changes = {
            resource: (
                Counter(f"{rules}_{word}_changes", f"{what} that changed", registry=registry),
                Gauge(f"{rules}_{word}_changes_pending", f"{what} not in the kernel yet", registry=registry),
            )
            for resource, word, what in (
                (SERVICES.resource, "service", "Services"),
                (ENDPOINT_SLICES.resource, "endpoint", "EndpointSlices"),
            )
        }
        self._pending = dict.fromkeys(self.changes, 0)
        self._served = dict(self._pending)
        self.cut_connections = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries", "Stale connections that were cut", registry=registry
        )
        self.look_seconds = seconds(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds", "Looks at the node's connections"
        )
        self.failures = Counter("podwire_proxy_sync_failures", "Runs that failed", registry=registry)
        word = {"nftables": "nftables_sync", "iptables": "iptables_restore"}.get(mode)
        self.mode_failures = Counter(f"{rules}_{word}_failures", "Same", registry=registry) if word else None
        self.plans = Counter("podwire_proxy_changed_plans", "Ports of Services that changed", registry=registry)

    def noted(self, resource: str, objects: int) -> None:
        """So many objects of a kind have come, changed or gone."""
        if resource in self.changes:
            total, pending = self.changes[resource]
            total.inc(objects)
            self._pending[resource] += objects
            pending.set(self._pending[resource])
            self.queued.set(time.time())

    def begun(self) -> None:
        """A run has begun; it serves what has come until now."""
        self._served = dict(self._pending)

    def synced(self, seconds: float, resync: bool, changes: int, waited: float) -> None:
        """A run has ended well."""
        self.sync_seconds.observe(seconds)
        (self.full_seconds if resync else self.partial_seconds).observe(seconds)
        self.last.set(time.time())
        self.plans.inc(changes)
        if changes:
            self.programming_seconds.observe(waited)
        for resource, (_, pending) in self.changes.items():
            self._pending[resource] -= self._served[resource]
            pending.set(self._pending[resource])

    def programmed(self, seconds: Sequence[float]) -> None:
        """How long changes of endpoints took from their cause to the kernel."""
        for each in seconds:
            self.network_seconds.observe(each)

    def failed(self, reason: str) -> None:  # noqa: ARG002
        """A run has failed; the log has the reason."""
        self.failures.inc()
        if self.mode_failures:
            self.mode_failures.inc()

    def looked(self, seconds: float) -> None:
        """A look at connections has ended well."""
        self.look_seconds.observe(seconds)

    def cut(self, connections: int) -> None:
        """Connections were cut."""
        self.cut_connections.inc(connections)


class PolicyObserver:
    """sync.SyncObserver for policies."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.seconds = Histogram("podwire_policy_sync_seconds", "Runs", ["kind"], buckets=_SECONDS, registry=registry)
        self.programming_seconds = Histogram(
            "podwire_policy_programming_seconds",
            "From when a change reached the proxy until it was in the kernel",
            buckets=_SECONDS,
            registry=registry,
        )
        self.generation = Counter(
            "podwire_policy_generations", "Times that the kernel was brought to the policies", registry=registry
        )
        self.failures = Counter("podwire_policy_sync_failures", "Runs that failed", registry=registry)
        self.cut_connections = Counter(
            "podwire_policy_cut_connections", "Connections cut that a change forbids", registry=registry
        )

    def synced(self, seconds: float, resync: bool, changes: int, waited: float) -> None:
        """A run has ended well."""
        self.seconds.labels("full" if resync else "partial").observe(seconds)
        self.generation.inc()
        if changes:
            self.programming_seconds.observe(waited)

    def failed(self, reason: str) -> None:  # noqa: ARG002
        """A run has failed; the log has the reason."""
        self.failures.inc()

    def cut(self, connections: int) -> None:
        """Connections were cut."""
        self.cut_connections.inc(connections)
