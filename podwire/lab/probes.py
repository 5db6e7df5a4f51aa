"""Probes: what a container's manifest asks to be looked at, and what the answers mean. Pure; probing.py looks.

    startup ──passed──▶ liveness ──failureThreshold in a row──▶ the container is restarted
            ──failed──▶ restarted          readiness ─▶ containerStatuses[].ready, the pod's Ready condition

A container without a startup probe has started when it runs; one without a readiness probe is ready when it has
started. Readiness and liveness wait until it has started. All of it begins anew with every start of the container.

Source: Kubernetes core/v1 Probe; k8s.io/kubernetes pkg/kubelet/prober/worker.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

KINDS = ("startup", "liveness", "readiness")


class HttpGet(msgspec.Struct, frozen=True, kw_only=True):
    """GET; a status from 200 to 399 is success. `host` empty: the pod's address. `headers` are pairs."""

    port: int
    path: str = "/"
    host: str = ""
    tls: bool = False
    headers: tuple[tuple[str, str], ...] = ()


class TcpSocket(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that is accepted is success. `host` empty: the pod's address."""

    port: int
    host: str = ""


class Exec(msgspec.Struct, frozen=True, kw_only=True):
    """A command that ends with 0 in the pod is success."""

    command: tuple[str, ...]


Action = HttpGet | TcpSocket | Exec


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One probe of a container; times in seconds."""

    action: Action
    initial_delay: float = 0
    period: float = 10
    timeout: float = 1
    success_threshold: int = 1
    failure_threshold: int = 3


def plan_probes(container: Mapping[str, Any]) -> tuple[dict[str, Probe], list[str]]:
    """The container's probes by KINDS, and in words what was left out because the lab cannot do it."""
    probes, left_out = {}, []
    for kind in KINDS:
        spec = container.get(f"{kind}Probe")
        if not spec:
            continue
        try:
            action = _action(spec, container)
        except (KeyError, TypeError, ValueError) as error:
            left_out.append(f"{kind} probe is left out: {error}")
            continue
        probes[kind] = Probe(
            action=action,
            initial_delay=_number(spec, "initialDelaySeconds", 0),
            period=_number(spec, "periodSeconds", 10),
            timeout=_number(spec, "timeoutSeconds", 1),
            success_threshold=int(_number(spec, "successThreshold", 1)) if kind == "readiness" else 1,
            failure_threshold=int(_number(spec, "failureThreshold", 3)),
        )
    return probes, left_out


def _number(spec: Mapping[str, Any], field: str, otherwise: int) -> float:
    """A number of the spec; 0 means the default, as it does to the API."""
    return float(spec.get(field) or otherwise)


def _action(spec: Mapping[str, Any], container: Mapping[str, Any]) -> Action:
    if http := spec.get("httpGet"):
        headers = tuple((str(one["name"]), str(one["value"])) for one in http.get("httpHeaders") or ())
        path = str(http.get("path") or "/")
        return HttpGet(
            port=_port(http["port"], container), path=path if path.startswith("/") else f"/{path}",
            host=str(http.get("host") or ""), tls=http.get("scheme") == "HTTPS", headers=headers,
        )  # fmt: skip
    if tcp := spec.get("tcpSocket"):
        return TcpSocket(port=_port(tcp["port"], container), host=str(tcp.get("host") or ""))
    if command := (spec.get("exec") or {}).get("command"):
        return Exec(command=tuple(str(word) for word in command))
    raise ValueError("the lab probes by httpGet, tcpSocket or exec")


def _port(port: int | str, container: Mapping[str, Any]) -> int:
    """A port by number, or by its name among the container's."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for one in container.get("ports") or ():
        if one.get("name") == port:
            return int(one["containerPort"])
    raise ValueError(f"the container has no port {port!r}")


# --- what the answers mean --------------------------------------------------------------------------------------


class Health:
    """One run of a container: `started`, `ready`, and `failed`, the kind of the probe for which it must be restarted.

    The caller asks `due_at`, looks at that time, and says what it saw; times are seconds of one clock.
    """

    def __init__(self, probes: Mapping[str, Probe], now: float) -> None:
        self.started = "startup" not in probes
        self.ready = self.started and "readiness" not in probes
        self.failed = ""
        self._probes = dict(probes)
        self._due = {kind: now + probe.initial_delay for kind, probe in probes.items()}
        self._run: dict[str, tuple[bool, int]] = {}  # the last result, and how often it came in a row

    @property
    def kinds(self) -> Sequence[str]:
        """The probes that are to be made now: startup alone until it has passed, then the others; none when failed."""
        if self.failed:
            return ()
        return [kind for kind in KINDS if kind in self._probes and (kind == "startup") != self.started]

    def due_at(self, kind: str) -> float:
        """When the next probe of this kind is to be made."""
        return self._due[kind]

    def record(self, kind: str, succeeded: bool, now: float) -> bool:
        """Takes a result in. Returns whether `started`, `ready` or `failed` changed."""
        probe, before = self._probes[kind], (self.started, self.ready, self.failed)
        last, times = self._run.get(kind, (succeeded, 0))
        times = times + 1 if last is succeeded else 1
        self._run[kind] = (succeeded, times)
        self._due[kind] = max(now, self._due[kind] + probe.period)
        if times >= (probe.success_threshold if succeeded else probe.failure_threshold):
            self._settle(kind, succeeded)
        return before != (self.started, self.ready, self.failed)

    def _settle(self, kind: str, succeeded: bool) -> None:
        if kind == "readiness":
            self.ready = succeeded
        elif not succeeded:
            self.failed, self.ready = kind, False
        elif kind == "startup":
            self.started = True
            self.ready = "readiness" not in self._probes
