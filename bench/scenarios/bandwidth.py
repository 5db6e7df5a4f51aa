"""Limits: what TCP and UDP reach through them in each direction, beside what was asked for.

Two pods of one node, one limited. TCP runs for some seconds, of which the first is left out: the burst is for it. UDP
is offered at one and a half times the limit, and what arrives is counted. The same pods without limits say what the
wire does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import process
from bench.contender import Contender
from bench.podwire_node import podwire_node
from bench.process import BenchFailed
from bench.report import Bound, Report, Table
from bench.stage import Namespace, Stage
from bench.statistic import median

_IPERF = "/usr/bin/iperf3"
_SECONDS, _OMITTED = 4, 1
_RATES = (10, 100, 1000)  # Mbit/s
_UDP_RATES = (10, 100)  # beyond that it would be a measurement of iperf3
_BURST_S, _LEAST_BURST = 0.01, 8 * 64 * 1024  # seconds of the rate, and bits
_OFFERED = 1.5
_ATTEMPTS = 5
_LISTEN_STATE, _WITHIN = "0A", 100
_WAYS = {"from the pod": (), "to the pod": ("--reverse",)}
_KINDS = ("TCP", "UDP")

Samples = dict[str, list[float]]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` measurements of each."""
    samples: Samples = {}
    with podwire_node(stage, "bandwidth") as node:
        plain = node.contender
        peer_pod, pod = stage.pods(2)
        peer = plain.add(peer_pod)
        address = str(peer.result["ips"][0]["address"]).split("/")[0]
        with _serving(peer_pod):
            for rate in (0, *_RATES):
                limited = Contender("limited", plain.node, plain.executable, {"type": "podwire", **_limits(rate)})
                added = limited.add(pod)
                for _ in range(rounds):
                    _measure(pod, address, rate, samples)
                limited.delete(added)
        plain.delete(peer)
    return _report(samples, rounds)


def _limits(rate: int) -> dict[str, int]:
    """The keys of a configuration, for Mbit/s."""
    bits = rate * 1_000_000
    burst = max(round(bits * _BURST_S), _LEAST_BURST)
    return {"ingressRate": bits, "ingressBurst": burst, "egressRate": bits, "egressBurst": burst} if rate else {}


def _measure(pod: Namespace, address: str, rate: int, samples: Samples) -> None:
    """Mbit/s that arrived."""
    for way, options in _WAYS.items():
        for kind in _KINDS:
            if kind == "UDP" and rate not in _UDP_RATES:
                continue
            offered = ("--udp", "--bitrate", f"{round(rate * _OFFERED)}M", "--length", "1400") if kind == "UDP" else ()
            omitted = ("--omit", str(_OMITTED)) if kind == "TCP" else ()
            said = _iperf(pod, address, *options, *offered, *omitted)
            got = (
                said["sum"]["bits_per_second"] * (1 - said["sum"]["lost_percent"] / 100)
                if kind == "UDP"
                else (said["sum_received"]["bits_per_second"])
            )
            samples.setdefault(_name(rate, kind, way), []).append(got / 1e6)


def _name(rate: int, kind: str, way: str) -> str:
    return f"{kind} {way}, {f'{rate} Mbit/s' if rate else 'no limit'}"


def _iperf(pod: Namespace, address: str, *options: str) -> Any:
    """The results of a run that went to its end: iperf3's server may still be busy with the one before."""
    command = [_IPERF, "--client", address, "--json", "--time", str(_SECONDS), *options]
    for _ in range(_ATTEMPTS):
        with pod.entered():
            done = process.run(command, dict(os.environ))
        said = json.loads(done.stdout)
        if done.exit_code == 0 and said.get("end"):
            return said["end"]
        time.sleep(1)
    raise BenchFailed(f"{' '.join(command)}: {said.get('error')}")


@contextlib.contextmanager
def _serving(namespace: Namespace) -> Iterator[None]:
    command = ("ip", "netns", "exec", namespace.name, "setpriv", "--pdeathsig", "KILL", "--", _IPERF, "--server")
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as server:
        try:
            with namespace.entered():
                _wait_listening()
            yield
        finally:
            server.kill()


def _wait_listening() -> None:
    for _ in range(_WITHIN):
        tables = [Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6")]
        if any(f" {_LISTEN_STATE} " in line for table in tables for line in table.splitlines()):
            return
        time.sleep(0.1)
    raise BenchFailed("iperf3 does not listen")


def _report(samples: Samples, rounds: int) -> Report:
    rows = []
    bounds = []
    for rate in (*_RATES, 0):
        for way in _WAYS:
            for kind in _KINDS:
                found = samples.get(_name(rate, kind, way))
                if not found:
                    continue
                share = f"{median(found) / rate:.3f}" if rate else ""
                rows.append(
                    (_name(rate, kind, way), f"{median(found):.1f}", f"{min(found):.1f}", f"{max(found):.1f}", share)
                )
                if rate:
                    off = max(abs(each / rate - 1) for each in found)
                    bounds.append(Bound(what=f"{_name(rate, kind, way)}: off", measured=100 * off, limit=10, unit="%"))
    table = Table(
        title=f"What arrives of a limited pod's packets, Mbit/s ({rounds} runs of {_SECONDS} s)",
        columns=("", "median", "least", "most", "of the limit"),
        rows=tuple(rows),
        notes=("iperf3 counts what a program gets; the limit counts the packets' headers, too.",),
    )
    return Report(tables=(table,), bounds=tuple(bounds), samples=samples)
