"""Services as a client sees them: how long until they answer, what a change costs, and a connection, by their number.

    the API's lists ─▶ podwire-proxy ─▶ kernel: 20 Services are asked until each has answered
    a slice changes ─▶                          its Service is asked until the new pod answers
    a new Service   ─▶                          it is asked until it answers
    a stranger's chain appears in our table ─▶  all is read back and compared, as it is every `syncPeriod`

The proxy has nothing else to do (`networkPolicy: false`). Beside it the same Services are loaded by hand, one chain
each in nftables and one list in iptables (bench/hand_rules.py). Connections that have nothing to do with Services go to
a pod's own address.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from bench import process, services_report
from bench.hand_rules import chains, chains_changed, flat, flat_changed
from bench.objects import (
    PORT,
    TARGET_PORT,
    Object,
    cluster_ip,
    node,
    pod_address,
    service,
    service_cidr,
    slices,
)
from bench.process import BenchFailed
from bench.proxy_node import Ground, Proxied, RuleEvents, ask, connect_times, proxy_on, wait_until
from bench.report import Report
from bench.scenarios.memory import settled
from bench.services_report import ByHand, Connecting, Measured, Modelled, Seconds, Shape
from bench.stage import Namespace, Stage
from kube_proxy_lite.errors import ModeUnavailable
from kube_proxy_lite.model import Settings
from kube_proxy_lite.modes import make_mode
from kube_proxy_lite.settings import Mode

_PROBED = 20  # Services that are asked at a start
_CONNECTIONS = 3000
_CONNECTED = 200  # Services that connections go to
_NEW_PODS = 1_500_000  # the numbers of pods that come later begin here
_FULL = 40
_SLICES = 50_000
_SEED = 1
_CALM = 0.25  # seconds without any work, after a look at the whole
_FEW = 3  # endpoints: with more of them, a client would have to ask too often to meet a new one

_NFTABLES = tuple(
    Shape(mode="nftables", services=number, endpoints=endpoints)
    for number, endpoints in ((10, 3), (1000, 3), (5000, 3), (10_000, 3), (30_000, 3), (1, 1000), (5000, 50))
)
_IPTABLES = tuple(Shape(mode="iptables", services=number) for number in (10, 1000, 5000, 10_000))
_CHAINS = tuple(Shape(mode="nftables by hand, a chain each", services=number) for number in (1000, 5000, 10_000))
_FLAT = tuple(Shape(mode="iptables by hand, one list", services=number) for number in (1000, 5000))


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how many changes and additions each shape meets; with fewer than 40 there are fewer Services, too."""
    full = rounds >= _FULL
    shapes = [each for each in (*_NFTABLES, *_IPTABLES) if _is_there(each.mode)]
    hand = list(_CHAINS + _FLAT)
    if not full:
        shapes = [each for each in shapes if each.services * each.endpoints <= 3000]
        hand = [each for each in hand if each.services <= 1000]
    found = {each: _measure(stage, each, rounds) for each in shapes}
    by_hand = {each: _by_hand(stage, each, max(3, rounds // 8)) for each in hand}
    slices = _SLICES if full else 5000
    modelled = _modelled(slices)
    return services_report.report(found, by_hand, modelled, slices=slices, bounded=full, connections=_CONNECTIONS)


def _is_there(mode: str) -> bool:
    try:
        make_mode(Mode(mode), Settings(node="bench"))
    except ModeUnavailable:
        return False
    return True


# --- the proxy --------------------------------------------------------------------------------------------------------


class _Cluster:
    """Services with their endpoints, and what happens to them."""

    def __init__(self, shape: Shape) -> None:
        self.pods = [
            list(range(each * shape.endpoints, (each + 1) * shape.endpoints)) for each in range(shape.services)
        ]
        self._new = _NEW_PODS
        self._chance = random.Random(_SEED)

    def objects(self, node_name: str) -> dict[str, Iterator[Object]]:
        """All, by the plural of their kind."""
        return {
            "services": (service(number) for number in range(len(self.pods))),
            "endpointslices": (each for number, pods in enumerate(self.pods) for each in slices(number, pods)),
            "nodes": iter((node(node_name),)),
            "servicecidrs": iter((service_cidr(),)),
        }

    def change(self) -> tuple[int, str, Object]:
        """One endpoint of a Service becomes another: the Service, the new address, the slice."""
        number = self._chance.randrange(len(self.pods))
        place = self._chance.randrange(len(self.pods[number]))
        before = slices(number, self.pods[number])
        self.pods[number][place] = new = self._next()
        changed = [each for each in slices(number, self.pods[number]) if each not in before]
        return number, pod_address(new), changed[0]

    def add(self) -> tuple[int, list[Object]]:
        """A new Service of three endpoints: its number, and its slices."""
        self.pods.append([self._next() for _ in range(_FEW)])
        number = len(self.pods) - 1
        return number, slices(number, self.pods[number])

    def some(self, count: int) -> list[int]:
        """So many Services, or all."""
        return self._chance.sample(range(len(self.pods)), min(count, len(self.pods)))

    def _next(self) -> int:
        self._new += 1
        return self._new


def _measure(stage: Stage, shape: Shape, rounds: int) -> Measured:
    cluster = _Cluster(shape)
    ground = Ground(stage, f"{shape.mode}-{shape.services}-{shape.endpoints}")
    settings: dict[str, object] = {"mode": shape.mode, "networkPolicy": False}
    with (
        ground.answering(),
        contextlib.closing(RuleEvents(ground.node)) as events,
        proxy_on(ground, cluster.objects(ground.name), settings) as proxied,
    ):
        with ground.client.entered():
            answered = _wait_all(proxied, cluster.some(_PROBED))
        listed = proxied.api.listed()
        _wait_calm(proxied)
        changes, written, change_cpu = _change(ground, proxied, cluster, events, rounds, few=shape.endpoints <= _FEW)
        adds, add_cpu = _add(ground, proxied, cluster, rounds)
        memory = settled(proxied)
        whole, meanwhile = _look_at_all(ground, proxied, cluster, shape.mode)
        with ground.client.entered():
            connecting = _connect(cluster)
    return Measured(
        cold=answered - proxied.began,
        listed=answered - listed,
        changes=changes,
        written=written,
        adds=adds,
        change_cpu=change_cpu,
        add_cpu=add_cpu,
        whole=whole,
        meanwhile=meanwhile,
        memory=dict(memory),
        connecting=connecting,
    )


def _wait_all(proxied: Proxied, numbers: Sequence[int]) -> float:
    at = 0.0
    for number in numbers:
        at = wait_until(proxied, lambda number=number: ask(cluster_ip(number), PORT), f"Service {number} is silent")
    return at


def _wait_calm(proxied: Proxied) -> None:
    """Returns when the proxy has nothing to do."""
    seen = -1.0
    while (now := proxied.cpu_seconds()) != seen:
        seen = now
        time.sleep(_CALM)


def _change(
    ground: Ground, proxied: Proxied, cluster: _Cluster, events: RuleEvents, rounds: int, *, few: bool
) -> tuple[Seconds, Seconds, float]:
    """Until a client meets the new pod (where it is one of few), until the kernel tells, and CPU seconds of each."""
    met, written = [], []
    before = proxied.cpu_seconds()
    for _ in range(rounds):
        number, address, changed = cluster.change()
        events.drain()
        sent = proxied.api.put(("endpointslices", "MODIFIED", changed))
        told = 0.0
        with ground.client.entered():
            deadline = sent + 10.0
            while True:
                if not told and events.came(0.0005):
                    told = time.monotonic()
                if (few or told) and ask(cluster_ip(number), PORT) == address:
                    break
                if time.monotonic() > deadline:
                    raise proxied.fail(f"{address} is not met behind Service {number}")
        met.append(time.monotonic() - sent)
        written.append((told or time.monotonic()) - sent)
    _wait_calm(proxied)
    return met if few else [], written, (proxied.cpu_seconds() - before) / rounds


def _add(ground: Ground, proxied: Proxied, cluster: _Cluster, rounds: int) -> tuple[Seconds, float]:
    taken = []
    before = proxied.cpu_seconds()
    for _ in range(rounds):
        number, listed = cluster.add()
        new = ("services", "ADDED", service(number))
        sent = proxied.api.put(new, *(("endpointslices", "ADDED", each) for each in listed))
        with ground.client.entered():
            taken.append(_wait_all(proxied, [number]) - sent)
    _wait_calm(proxied)
    return taken, (proxied.cpu_seconds() - before) / rounds


def _look_at_all(ground: Ground, proxied: Proxied, cluster: _Cluster, mode: str) -> tuple[float, float]:
    """A stranger's rule makes the proxy look at everything. CPU seconds, and how long a change takes meanwhile."""
    number, address, changed = cluster.change()
    before = proxied.cpu_seconds()
    commands = {
        "nftables": ["/usr/sbin/nft", "add", "chain", "ip", "podwire_proxy", "stranger"],
        "iptables": ["/usr/sbin/iptables", "-w", "-t", "nat", "-N", "KUBE-SVC-STRANGER"],
    }
    _check(ground.node, commands[mode])
    time.sleep(0.05)
    sent = proxied.api.put(("endpointslices", "MODIFIED", changed))
    with ground.client.entered():
        met = wait_until(proxied, lambda: ask(cluster_ip(number), PORT) == address, f"{address} is not met")
    _wait_calm(proxied)
    return proxied.cpu_seconds() - before, met - sent


def _connect(cluster: _Cluster) -> Connecting:
    numbers = cluster.some(_CONNECTED)
    addresses = [cluster_ip(number) for number in numbers]
    pods = [pod_address(cluster.pods[number][0]) for number in numbers]
    connect_times(addresses, PORT, _CONNECTIONS // 10)
    return Connecting(
        service=connect_times(addresses, PORT, _CONNECTIONS), other=connect_times(pods, TARGET_PORT, _CONNECTIONS)
    )


# --- by hand ----------------------------------------------------------------------------------------------------------


class _Layout(msgspec.Struct, frozen=True, kw_only=True):
    load: Callable[[Sequence[Sequence[int]]], str]
    change: Callable[[int, Sequence[int], Sequence[int]], str]
    command: tuple[str, ...]
    changed: tuple[str, ...]


_LAYOUTS = {
    "nftables": _Layout(
        load=chains,
        change=chains_changed,
        command=("/usr/sbin/nft", "-f"),
        changed=("/usr/sbin/nft", "-f"),
    ),
    "iptables": _Layout(
        load=flat,
        change=flat_changed,
        command=("/usr/sbin/iptables-restore", "-w", "60"),
        changed=("/usr/sbin/iptables-restore", "-w", "60", "--noflush"),
    ),
}


def _by_hand(stage: Stage, shape: Shape, rounds: int) -> ByHand:
    layout = _LAYOUTS[shape.mode.partition(" ")[0]]
    ground = Ground(stage, f"hand-{shape.mode[:8]}-{shape.services}")
    cluster = _Cluster(shape)
    script = stage.memory / "script"
    with ground.answering():
        script.write_text(layout.load(cluster.pods))
        load = _check(ground.node, [*layout.command, str(script)])
        with ground.client.entered():
            silent = [number for number in cluster.some(_PROBED) if not ask(cluster_ip(number), PORT, 1.0)]
        if silent:
            raise BenchFailed(f"{shape}: the Services {silent} do not answer")
        changes = []
        for _ in range(rounds):
            before = [list(each) for each in cluster.pods]
            number, _, _ = cluster.change()
            script.write_text(layout.change(number, before[number], cluster.pods[number]))
            changes.append(_check(ground.node, [*layout.changed, str(script)]))
        with ground.client.entered():
            connecting = _connect(cluster)
    return ByHand(load=load, changes=changes, connecting=connecting)


def _check(namespace: Namespace, command: list[str]) -> float:
    """Runs a program of the node's to its end. How many seconds it took."""
    with namespace.entered():
        done = process.run(command, dict(os.environ))
    if done.exit_code:
        raise BenchFailed(f"{' '.join(command)}: {(done.stdout + done.stderr).decode(errors='replace')[-500:]}")
    return done.seconds


# --- the model alone --------------------------------------------------------------------------------------------------


def _modelled(count: int) -> Modelled:
    done = process.run([sys.executable, "-m", "bench.modelling", str(count)], dict(os.environ))
    if done.exit_code:
        raise BenchFailed(done.stderr.decode(errors="replace")[-500:])
    return msgspec.convert(json.loads(done.stdout), Modelled)
