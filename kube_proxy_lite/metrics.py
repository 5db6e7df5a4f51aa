"""The proxy's Prometheus metrics, in one registry that is made with the proxy (no globals).

Names that begin with `kubeproxy_` mean what kube-proxy's of that name mean, so that dashboards and alerts go on
working; what kube-proxy has not begins with `podwire_proxy_`. docs/metrics.md lists them.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Implements the observer of the API's source; `services` and `policies` are those of the syncs."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.sync_seconds = Histogram(
            "kubeproxy_sync_proxy_rules_duration_seconds", "Runs", buckets=_SECONDS, registry=registry
        )
        self.full_seconds = Histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "Runs that looked at everything",
            buckets=_SECONDS,
            registry=registry,
        )
        self.partial_seconds = Histogram(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "Runs that looked at what had changed",
            buckets=_SECONDS,
            registry=registry,
        )
        self.last = Gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "End of the last good run", registry=registry
        )
        self.queued = Gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "The last change", registry=registry
        )
        self.programming_seconds = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "From when a change reached the proxy until it was in the kernel",
            buckets=_SECONDS,
            registry=registry,
        )
        self.changes = Counter(
            "kubeproxy_sync_proxy_rules_endpoint_changes", "EndpointSlices that changed", registry=registry
        )
        self.service_changes = Counter(
            "kubeproxy_sync_proxy_rules_service_changes", "Services that changed", registry=registry
        )
        self.cut_connections = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries", "Stale connections that were cut", registry=registry
        )
        self.failures = Counter("podwire_proxy_sync_failures", "Runs that failed", registry=registry)
        self.plans = Counter("podwire_proxy_changed_plans", "Ports of Services that changed", registry=registry)
        self.drift = Counter("podwire_proxy_drift", "Times that somebody else changed our rules", registry=registry)
        self.services = ServiceObserver(self)
        self.policies = PolicyObserver(registry)
        self.problems = Gauge("podwire_proxy_problems", "Objects, or parts of them, passed over", registry=registry)
        self.left_out = Counter(
            "podwire_proxy_objects_left_out", "Objects that could not be decoded", ["kind"], registry=registry
        )
        self.requests = Counter(
            "podwire_proxy_api_requests", "Requests to the API by outcome", ["outcome"], registry=registry
        )
        self.api_trouble = Gauge(
            "podwire_proxy_api_trouble", "1 while following a kind is hindered", ["kind"], registry=registry
        )

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
    """sync.SyncObserver for Services."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def synced(self, seconds: float, resync: bool, changes: int, waited: float) -> None:
        """A run has ended well."""
        metrics = self._metrics
        metrics.sync_seconds.observe(seconds)
        (metrics.full_seconds if resync else metrics.partial_seconds).observe(seconds)
        metrics.last.set(time.time())
        metrics.plans.inc(changes)
        if changes:
            metrics.programming_seconds.observe(waited)

    def failed(self, reason: str) -> None:  # noqa: ARG002
        """A run has failed; the log has the reason."""
        self._metrics.failures.inc()

    def cut(self, connections: int) -> None:
        """Connections were cut."""
        self._metrics.cut_connections.inc(connections)


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
