"""Throughput and latency from pod to pod, beside the same devices plumbed by hand, without us.

What is compared runs in turn, in an order that rotates: iperf3 over TCP and over UDP, then one byte to and fro.
Everybody has two nodes of namespaces: Podwire over VXLAN, with its fast path and without, a bridge with VXLAN by hand,
the same by hand with the one masquerade rule without which no pod reaches the world; and Podwire with `backend: auto`,
which goes directly between two nodes on one segment, beside plain routes by hand, without and with that rule.

Where the scheduler puts the two ends decides more than the path does, so they are told. TCP and a ping-pong have both
ends on one core, where what counts is the path and what the ends do themselves. With a core each, TCP tells how often
its receiver sleeps, and what it costs the sender to wake it: half of the sender's time on a virtual machine. Both are
bounded.

UDP counts what the sender gets rid of: its system call takes a packet all the way to the receiver's socket, so that is
what the wire costs; whether the receiving process gets a turn on a machine of two cores is another matter.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench import process
from bench.process import BenchFailed
from bench.report import Bound, Report, Table
from bench.stage import Namespace, Stage
from bench.statistic import median, percentile, ratio_of_medians
from bench.wires import ACROSS, SAME, Pods, hand_pods, podwire_pods

_IPERF, _PORT = "/usr/bin/iperf3", 7000
_TCP_BYTES, _UDP_PACKETS, _UDP_BYTES, _TURNS = "800M", "100000", "1400", "4000"
_ONE_CORE, _CORE_EACH = "0,0", "0,1" if len(os.sched_getaffinity(0)) > 1 else "0,0"
"""The client's, and the server's."""
_LEAST = 0.95
_VXLAN, _HAND, _NODE = "Podwire", "bridge + VXLAN by hand", "by hand, with masquerade"
_SLOW = "Podwire without its fast path"
_AUTO, _PLAIN, _PLAIN_NODE = "Podwire, auto", "plain routes by hand", "plain routes, with masquerade"
_PATHS = (
    (SAME, (_VXLAN, _HAND, _NODE, _SLOW)),
    (ACROSS, (_VXLAN, _HAND, _NODE, _SLOW)),
    (ACROSS, (_AUTO, _PLAIN, _PLAIN_NODE)),
)
_TCP, _TCP_APART, _UDP, _PING_PONG = "TCP", "TCP on two cores", "UDP", "ping-pong"
_KINDS = {_TCP: "Gbit/s", _UDP: "1,000 packets/s", _PING_PONG: "µs", _TCP_APART: "Gbit/s"}
_SERVING_WITHIN = 50  # attempts

Samples = dict[str, list[float]]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how many samples there are of each."""
    samples: Samples = {}
    with contextlib.ExitStack() as stack:
        owners = {
            _VXLAN: stack.enter_context(podwire_pods(stage, _VXLAN, "ours", "vxlan")),
            _SLOW: stack.enter_context(podwire_pods(stage, _SLOW, "slow", "vxlan", fast=False)),
            _HAND: hand_pods(stage, _HAND, "hand", vxlan=True),
            _NODE: hand_pods(stage, _NODE, "node", vxlan=True, masquerade=True),
            _AUTO: stack.enter_context(podwire_pods(stage, _AUTO, "auto", "auto")),
            _PLAIN: hand_pods(stage, _PLAIN, "plain", vxlan=False),
            _PLAIN_NODE: hand_pods(stage, _PLAIN_NODE, "pnode", vxlan=False, masquerade=True),
        }
        for pods in owners.values():
            for server, _ in pods.servers.values():
                stack.enter_context(_serving(server))
        for number in range(-1, rounds):  # the first warms up
            for place, compared in _PATHS:
                first = number % len(compared)
                for owner in compared[first:] + compared[:first]:
                    for kind, value in _measure(owners[owner], place).items():
                        if number >= 0:
                            samples.setdefault(_name(place, owner, kind), []).append(value)
    return _report(samples, rounds)


def _name(place: str, owner: str, kind: str) -> str:
    return f"{place}, {kind}: {owner}"


# --- one sample -------------------------------------------------------------------------------------------------------


def _measure(pods: Pods, place: str) -> dict[str, float]:
    """Gbit/s, thousands of packets a second, and microseconds."""
    _, address = pods.servers[place]
    together, apart = (
        _iperf(pods, address, cores, "--bytes", _TCP_BYTES)["sum_received"]["bits_per_second"] / 1e9
        for cores in (_ONE_CORE, _CORE_EACH)
    )
    datagrams = ("--udp", "--bitrate", "0", "--length", _UDP_BYTES, "--blockcount", _UDP_PACKETS)
    sent = _iperf(pods, address, _CORE_EACH, *datagrams)["sum"]
    command = [sys.executable, "-m", "bench.pingpong", "ask", address, str(_PORT), _TURNS]
    return {
        _TCP: together,
        _TCP_APART: apart,
        _UDP: sent["packets"] / sent["seconds"] / 1000,
        _PING_PONG: float(_inside(pods.client, command)) * 1e6,
    }


def _iperf(pods: Pods, address: str, cores: str, *options: str) -> dict[str, dict[str, float]]:
    said = _inside(pods.client, [_IPERF, "--client", address, "--json", "--affinity", cores, *options])
    return dict(json.loads(said)["end"])


def _inside(namespace: Namespace, command: list[str]) -> bytes:
    with namespace.entered():
        done = process.run(command, dict(os.environ))
    if done.exit_code:
        raise BenchFailed(f"{' '.join(command)}: {(done.stdout + done.stderr).decode(errors='replace')[-500:]}")
    return done.stdout


@contextlib.contextmanager
def _serving(namespace: Namespace) -> Iterator[None]:
    """Both servers, which answer at the end of the block's beginning."""
    entering = ("ip", "netns", "exec", namespace.name, "setpriv", "--pdeathsig", "KILL", "--")
    commands = ((_IPERF, "--server"), (sys.executable, "-m", "bench.pingpong", "serve", str(_PORT)))
    quiet = subprocess.DEVNULL
    running = [subprocess.Popen((*entering, *command), stdin=quiet, stdout=quiet, stderr=quiet) for command in commands]
    try:
        with namespace.entered():
            _wait_listening((5201, _PORT))
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def _wait_listening(ports: tuple[int, ...]) -> None:
    """Looks at the sockets, since iperf3 takes a connection for a test."""
    wanted = {f"{port:04X}" for port in ports}
    for _ in range(_SERVING_WITHIN):
        tables = [Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables for line in table.splitlines()]
        if wanted <= {words[1].rsplit(":", 1)[1] for words in lines if words[3] == "0A"}:
            return
        time.sleep(0.1)
    raise BenchFailed(f"nobody listens on the ports {ports}")


# --- the report -------------------------------------------------------------------------------------------------------


def _report(samples: Samples, rounds: int) -> Report:
    rows: list[tuple[str, ...]] = []
    bounds: list[Bound] = []
    for place, (ours, *others) in _PATHS:
        for kind, unit in _KINDS.items():
            mine = samples[_name(place, ours, kind)]
            rows.append((f"{place}, {kind}, {unit}: {ours}", *_spread(mine), ""))
            for owner in others:
                theirs = samples[_name(place, owner, kind)]
                pair = (theirs, mine) if kind == _PING_PONG else (mine, theirs)
                ratio = ratio_of_medians(*pair)
                rows.append((f"{place}, {kind}, {unit}: {owner}", *_spread(theirs), str(ratio)))
                what = f"{kind}, {place}: {ours}, of {owner}"
                if owner != _SLOW:
                    bounds.append(Bound(what=what, measured=ratio.value, limit=_LEAST, least=True))
    table = Table(
        title=f"Pod to pod ({rounds} rounds, alternating)",
        columns=("", "median", "p10–p90", "Podwire / this (95 %)"),
        rows=tuple(rows),
        notes=("Above 1 Podwire is the faster; of ping-pong it is round trips a second that are compared.",),
    )
    return Report(tables=(table,), bounds=tuple(bounds), samples=samples)


def _spread(values: list[float]) -> tuple[str, str]:
    return f"{median(values):.1f}", f"{percentile(values, 10):.1f}–{percentile(values, 90):.1f}"
