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

from bench import process
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
from bench.report import Bound, Report, Table, milliseconds
from bench.scenarios.memory import settled
from bench.stage import Namespace, Stage
from bench.statistic import median, percentile
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

Seconds = list[float]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A mode with so many Services of so many endpoints each."""

    mode: str
    services: int
    endpoints: int = 3

    def __str__(self) -> str:
        return f"{self.mode}, {self.services:,} × {self.endpoints:,}"


_NFTABLES = tuple(
    Shape(mode="nftables", services=number, endpoints=endpoints)
    for number, endpoints in ((10, 3), (1000, 3), (5000, 3), (10_000, 3), (30_000, 3), (1, 1000), (5000, 50))
)
_IPTABLES = tuple(Shape(mode="iptables", services=number) for number in (10, 1000, 5000, 10_000))
_CHAINS = tuple(Shape(mode="nftables by hand, a chain each", services=number) for number in (1000, 5000, 10_000))
_FLAT = tuple(Shape(mode="iptables by hand, one list", services=number) for number in (1000, 5000))


class Connecting(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that new connections took, through Services and past them."""

    service: Seconds
    other: Seconds


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What one shape cost the proxy: times in seconds, CPU with the programs that it runs, memory in MB.

    `cold` counts from the proxy's exec, `listed` from when the API had sent the last list; `changes` until a client
    met the new pod, `written` until the kernel told of the change; `whole` is the CPU time of a look at everything, and
    `meanwhile` how long a change took that came with it.
    """

    cold: float
    listed: float
    changes: Seconds
    written: Seconds
    adds: Seconds
    change_cpu: float
    add_cpu: float
    whole: float
    meanwhile: float
    memory: dict[str, float]
    connecting: Connecting


class ByHand(msgspec.Struct, frozen=True, kw_only=True):
    """The same of rules that were loaded by hand."""

    load: float
    changes: Seconds
    connecting: Connecting


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
    modelled = _modelled(_SLICES if full else 5000)
    return Report(
        tables=(
            _answer_table(found, by_hand),
            _cost_table(found),
            _connect_table(found, by_hand),
            _model_table(modelled, _SLICES if full else 5000),
        ),
        bounds=_bounds(found, modelled if full else None),
        samples={f"{shape}: {name}": values for shape, each in found.items() for name, values in _samples(each)},
    )


def _is_there(mode: str) -> bool:
    try:
        make_mode(Mode(mode), Settings(node="bench"))
    except ModeUnavailable:
        return False
    return True


def _samples(found: Measured) -> Iterator[tuple[str, Seconds]]:
    yield from (("change", found.changes), ("written", found.written), ("add", found.adds))


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


class Modelled(msgspec.Struct, frozen=True):
    """Seconds, of which `decoding`, for so many bytes."""

    seconds: float
    decoding: float
    bytes: int


def _modelled(count: int) -> Modelled:
    done = process.run([sys.executable, "-m", "bench.modelling", str(count)], dict(os.environ))
    if done.exit_code:
        raise BenchFailed(done.stderr.decode(errors="replace")[-500:])
    return msgspec.convert(json.loads(done.stdout), Modelled)


# --- the report -------------------------------------------------------------------------------------------------------


def _answer_table(found: dict[Shape, Measured], by_hand: dict[Shape, ByHand]) -> Table:
    rows = [
        (
            str(shape),
            f"{each.cold:.2f}",
            f"{each.listed:.2f}",
            *_spread(each.changes or each.written),
            *_spread(each.adds),
            milliseconds(each.meanwhile),
        )
        for shape, each in found.items()
    ]
    rows += [
        (str(shape), "", f"{each.load:.2f}", milliseconds(median(each.changes)), "", "", "", "")
        for shape, each in by_hand.items()
    ]
    return Table(
        title="Until Services answer: mode, Services × endpoints",
        columns=(
            "",
            "start, s",
            "after the lists, s",
            "change, ms",
            "p99",
            "new one, ms",
            "p99",
            "change during a look at all, ms",
        ),
        rows=tuple(rows),
        notes=(
            "Of rules by hand: the program that loads them, and the one that changes one endpoint of one Service. With "
            "more than three endpoints a change counts until the kernel tells of it.",
        ),
    )


def _cost_table(found: dict[Shape, Measured]) -> Table:
    return Table(
        title="What the proxy costs",
        columns=("", "CPU a change, ms", "CPU a new one, ms", "CPU of a look at all, ms", "VmRSS, MB", "Pss", "VmHWM"),
        rows=tuple(
            (
                str(shape),
                *(milliseconds(value) for value in (each.change_cpu, each.add_cpu, each.whole)),
                *(f"{each.memory[key]:.1f}" for key in ("VmRSS", "Pss", "VmHWM")),
            )
            for shape, each in found.items()
        ),
        notes=("CPU is the proxy's with the programs that it runs. Memory is settled, after all changes.",),
    )


def _connect_table(found: dict[Shape, Measured], by_hand: dict[Shape, ByHand]) -> Table:
    both = {shape: each.connecting for shape, each in found.items()}
    both |= {shape: each.connecting for shape, each in by_hand.items()}
    return Table(
        title=f"A new connection, µs ({_CONNECTIONS:,} each)",
        columns=("", "to a Service", "p90", "past Services", "p90"),
        rows=tuple((str(shape), *_micro(each.service), *_micro(each.other)) for shape, each in both.items()),
    )


def _model_table(modelled: Modelled, count: int) -> Table:
    return Table(
        title=f"{count:,} EndpointSlices, {modelled.bytes / 1e6:.0f} MB",
        columns=("", "s"),
        rows=(
            ("decoded", f"{modelled.decoding:.2f}"),
            ("decoded and modelled", f"{modelled.seconds:.2f}"),
        ),
    )


def _bounds(found: dict[Shape, Measured], modelled: Modelled | None) -> tuple[Bound, ...]:
    bounds = list(_everywhere({shape: each for shape, each in found.items() if shape.mode == "nftables"}))

    def add(what: str, measured: float, limit: float, unit: str) -> None:
        bounds.append(Bound(what=what, measured=measured, limit=limit, unit=unit))

    for shape, each in found.items():
        if (shape.mode, shape.services, shape.endpoints) in _COLD:
            limit = _COLD[shape.mode, shape.services, shape.endpoints]
            add(f"{shape}: answering after the lists", each.listed, limit, "s")
        if shape == Shape(mode="nftables", services=10_000):
            for key in ("VmRSS", "Pss"):
                add(f"{shape}: settled {key}", each.memory[key], 140, "MB")
        if shape == Shape(mode="iptables", services=5000):
            add(f"{shape}: change, p50", median(each.changes) * 1000, 100, "ms")
            few = found[Shape(mode="iptables", services=10)].connecting.service
            add(f"{shape}: a new connection, of that with 10", median(each.connecting.service) / median(few), 1.2, "")
    if modelled is not None:
        add(f"{_SLICES:,} slices decoded and modelled", modelled.seconds, 2, "s")
    return tuple(bounds)


def _everywhere(found: dict[Shape, Measured]) -> Iterator[Bound]:
    """What is asked for at every size: the worst of them."""
    changes = [each.changes or each.written for each in found.values()]
    for what, taken in (("a change", changes), ("a new Service", [each.adds for each in found.values()])):
        for percent, limit in ((50, 50), (99, 150)):
            worst = max(percentile(each, percent) for each in taken)
            what_of = f"nftables, at every size: {what}, p{percent}"
            yield Bound(what=what_of, measured=worst * 1000, limit=limit, unit="ms")
    cpu = max(each.change_cpu for each in found.values())
    yield Bound(what="nftables, at every size: CPU of a change", measured=cpu * 1000, limit=30, unit="ms")


_COLD = {("nftables", 10_000, 3): 1.5, ("nftables", 30_000, 3): 5.0, ("iptables", 5000, 3): 2.5}


def _spread(seconds: Seconds) -> tuple[str, str]:
    return milliseconds(median(seconds)), milliseconds(percentile(seconds, 99))


def _micro(seconds: Seconds) -> tuple[str, str]:
    return f"{median(seconds) * 1e6:.0f}", f"{percentile(seconds, 90) * 1e6:.0f}"
