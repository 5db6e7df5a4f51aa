"""NetworkPolicy as packets see it: what a new flow costs, and how soon a label that changes is in force.

    local pods {10, 100, 1,000} × policies {1, 100, 1,000}, 1,000 pods elsewhere; then 10,000 of them

Each policy selects a tenth of the local pods (all of them when it is alone), so that each pod has a tenth of the
policies. A policy lets in one in fifty of the pods elsewhere, by label, and the last ones of each tenth also the
client, which then is let in by the last rule that could. Changes are seen from the client: a pod's label changes in the
API, and connections are tried until the first one that succeeds, or does not. Half of the changes are of the client's
label (a member of sets), half of a local pod's (another class).

Beside it the same policies by hand, as a rule for each pod and a chain for each policy (bench/hand_rules.py). And pods
that are attached by the executable, the daemon and the proxy together, which answer when the pod's policies are in the
kernel, beside a daemon without policies.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator

import msgspec

from bench import process
from bench.hand_rules import linear, linear_changed
from bench.objects import (
    TARGET_PORT,
    Object,
    namespace,
    node_name,
    pod,
    pod_address,
    policy,
    uid,
)
from bench.podwire_node import PodwireNode, daemon_on, etcd_on
from bench.process import BenchFailed
from bench.proxy_node import (
    CLIENT,
    STRANGER,
    Ground,
    Place,
    Proxied,
    SyntheticApi,
    connect_times,
    proxy_beside,
    proxy_on,
    reaches,
    wait_until,
)
from bench.report import Bound, Report, Table, milliseconds
from bench.scenarios.memory import settled
from bench.stage import Namespace, Stage
from bench.statistic import median, percentile, ratio_of_medians
from podwire.lab.etcd import EtcdServer

_FULL = 40
_LOCAL, _POLICIES = (10, 100, 1000), (1, 100, 1000)
_REMOTE, _MANY_REMOTE = 1000, 10_000
_CONNECTIONS = 2000
_ROLES, _TENTHS = 50, 10
_FIRST_REMOTE, _CLIENT = 100_000, 99_999  # numbers of pods
_SHOP, _CLIENTS = "shop", "clients"
_QUICKLY, _LOST = 0.002, 0.004  # seconds for an answer; those after which there is none
_SURE = 3  # in a row
_ATTACHED = 100
_SEED = 1

Seconds = list[float]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """So many pods here, policies, and pods elsewhere."""

    local: int
    policies: int
    remote: int

    def __str__(self) -> str:
        policies = "1 policy" if self.policies == 1 else f"{self.policies:,} policies"
        return f"{self.local:,} pods, {policies}, {self.remote:,} elsewhere"


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds; `start` from the proxy's exec until a stranger is shut out. Memory in MB."""

    start: float
    member: Seconds
    subject: Seconds
    change_cpu: float
    connecting: Seconds
    memory: dict[str, float]


class ByHand(msgspec.Struct, frozen=True, kw_only=True):
    """The same of rules that were loaded by hand; `change` takes a member into a set."""

    load: float
    change: Seconds
    connecting: Seconds


class Adds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of ADDs beside `pods` others, in turn."""

    pods: int
    waiting: Seconds
    alone: Seconds


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how many changes and ADDs there are of each; with fewer than 40 less of everything."""
    full = rounds >= _FULL
    local, policies = (_LOCAL, _POLICIES) if full else ((10, 100), (1, 100))
    shapes = [Shape(local=each, policies=number, remote=_REMOTE) for number in policies for each in local]
    if full:
        shapes.append(Shape(local=1000, policies=1000, remote=_MANY_REMOTE))
    found = {each: _measure(stage, each, rounds) for each in shapes}
    hand = {
        each: _by_hand(stage, each, rounds // 4)
        for each in shapes
        if each.policies == _POLICIES[1] and each.remote == _REMOTE
    }
    adds = _adds(stage, _ATTACHED if full else 10, rounds)
    return Report(
        tables=(_flow_table(found, hand), _change_table(found, hand), _adds_table(adds)),
        bounds=_bounds(found, adds),
        samples={f"{shape}: {name}": getattr(each, name) for shape, each in found.items() for name in _SAMPLED}
        | {"ADD with policies": adds.waiting, "ADD without": adds.alone},
    )


_SAMPLED = ("member", "subject", "connecting")


# --- the cluster ------------------------------------------------------------------------------------------------------


class _Cluster:
    """Pods and policies of a shape."""

    def __init__(self, shape: Shape, node: str) -> None:
        self.shape = shape
        self.node = node
        self.tenths = min(shape.policies, _TENTHS)

    def objects(self) -> dict[str, Iterator[Object]]:
        """All, by the plural of their kind."""
        return {"pods": self.pods(), "namespaces": self.namespaces(), "networkpolicies": self.policies()}

    def pods(self) -> Iterator[Object]:
        """Those here, those elsewhere, and the client."""
        yield from (self.local(number) for number in range(self.shape.local))
        yield self.client()
        for number in range(self.shape.remote):
            labels = {"role": f"role-{number % _ROLES}", "pod-template-hash": "7f9c6d5b8"}
            yield pod(f"remote-{number}", _CLIENTS, node_name(number % 500), _FIRST_REMOTE + number, labels)

    def local(self, number: int, app: str = "", address: str | None = None) -> Object:
        """A pod of this node; of the app that its policies select, or of another."""
        labels = {"app": app or f"app-{number % self.tenths}", "pod-template-hash": "6b7c9d4f5"}
        return pod(f"local-{number}", _SHOP, self.node, number, labels, address)

    def client(self, role: str = "visitor") -> Object:
        """The client."""
        return pod("client", _CLIENTS, node_name(1), _CLIENT, {"role": role}, CLIENT)

    def namespaces(self) -> Iterator[Object]:
        """Both."""
        yield namespace(_SHOP, {"team": "shop"})
        yield namespace(_CLIENTS, {"team": "clients"})

    def policies(self) -> Iterator[Object]:
        """All policies."""
        for number in range(self.shape.policies):
            roles = (f"role-{number % _ROLES}", *(("visitor",) if self.admits(number) else ()))
            peers = [
                {
                    "namespaceSelector": {"matchLabels": {"team": "clients"}},
                    "podSelector": {"matchLabels": {"role": role}},
                }
                for role in roles
            ]
            yield policy(f"policy-{number:04}", _SHOP, {"app": f"app-{number % self.tenths}"}, peers, (TARGET_PORT,))

    def admits(self, number: int) -> bool:
        """Whether the policy with this number lets the client in."""
        return number >= self.shape.policies - self.tenths

    def peers(self, number: int) -> list[str]:
        """The addresses that it lets in."""
        role = number % _ROLES
        found = [pod_address(_FIRST_REMOTE + each) for each in range(role, self.shape.remote, _ROLES)]
        return [*found, CLIENT] if self.admits(number) else found

    def policies_of(self, pod_number: int) -> list[int]:
        """The policies that select a local pod."""
        return list(range(pod_number % self.tenths, self.shape.policies, self.tenths))


# --- the proxy --------------------------------------------------------------------------------------------------------


def _measure(stage: Stage, shape: Shape, rounds: int) -> Measured:
    ground = Ground(stage, f"p{shape.local}-{shape.policies}-{shape.remote}")
    cluster = _Cluster(shape, ground.name)
    with ground.answering(), proxy_on(ground, cluster.objects(), {"mode": "none"}) as proxied:
        with ground.client.entered():
            last = pod_address(shape.local - 1)
            start = wait_until(proxied, lambda: _is_shut(STRANGER, last), "strangers are let in") - proxied.began
            wait_until(proxied, lambda: _passes(CLIENT, last), "the client is not let in")
        before = proxied.cpu_seconds()
        with ground.client.entered():
            member = _change_member(proxied, cluster, rounds // 2)
            subject = _change_subject(proxied, cluster, rounds // 2)
        time.sleep(0.2)
        change_cpu = (proxied.cpu_seconds() - before) / (len(member) + len(subject))
        with ground.client.entered():
            chance = random.Random(_SEED)
            addresses = [pod_address(chance.randrange(shape.local)) for _ in range(_CONNECTIONS)]
            connecting = connect_times(addresses, TARGET_PORT, _CONNECTIONS)
        memory = settled(proxied) if shape.remote == _MANY_REMOTE else proxied.memory()
    return Measured(
        start=start,
        member=member,
        subject=subject,
        change_cpu=change_cpu,
        connecting=connecting,
        memory=dict(memory),
    )


def _change_member(proxied: Proxied, cluster: _Cluster, pairs: int) -> Seconds:
    """The client is no visitor any more, and is one again."""
    target = pod_address(0)
    taken = []
    for _ in range(pairs):
        sent = proxied.api.put(("pods", "MODIFIED", cluster.client("somebody")))
        taken.append(_when_shut(proxied, CLIENT, target) - sent)
        sent = proxied.api.put(("pods", "MODIFIED", cluster.client()))
        taken.append(_when_open(proxied, CLIENT, target) - sent)
    return taken


def _change_subject(proxied: Proxied, cluster: _Cluster, pairs: int) -> Seconds:
    """A local pod is one that no policy selects, and is selected again."""
    taken = []
    for number in range(pairs):
        chosen = number % cluster.shape.local
        sent = proxied.api.put(("pods", "MODIFIED", cluster.local(chosen, "free")))
        taken.append(_when_open(proxied, STRANGER, pod_address(chosen)) - sent)
        sent = proxied.api.put(("pods", "MODIFIED", cluster.local(chosen)))
        taken.append(_when_shut(proxied, STRANGER, pod_address(chosen)) - sent)
    return taken


def _passes(source: str, address: str) -> bool:
    return reaches(source, address, TARGET_PORT, _QUICKLY)


def _is_shut(source: str, address: str) -> bool:
    return not any(reaches(source, address, TARGET_PORT, _LOST) for _ in range(_SURE))


def _when_open(proxied: Proxied, source: str, address: str) -> float:
    return wait_until(proxied, lambda: _passes(source, address), f"{source} is not let in to {address}")


def _when_shut(proxied: Proxied, source: str, address: str) -> float:
    """When the first of those connections was tried that got no answer."""
    left = 0.0

    def shut() -> bool:
        nonlocal left
        left = time.monotonic()
        return _is_shut(source, address)

    wait_until(proxied, shut, f"{source} is let in to {address}")
    return left


# --- by hand ----------------------------------------------------------------------------------------------------------


def _by_hand(stage: Stage, shape: Shape, rounds: int) -> ByHand:
    ground = Ground(stage, f"hand{shape.local}-{shape.policies}")
    cluster = _Cluster(shape, ground.name)
    script = stage.memory / "script"
    policies_of = [cluster.policies_of(number) for number in range(shape.local)]
    with ground.answering():
        script.write_text(linear(shape.local, policies_of, [cluster.peers(each) for each in range(shape.policies)]))
        load = _nft(ground.node, str(script))
        change = []
        for number in range(max(2, rounds)):
            script.write_text(linear_changed(0, STRANGER, there=number % 2 == 0))
            change.append(_nft(ground.node, str(script)))
        with ground.client.entered():
            if not _is_shut(STRANGER, pod_address(shape.local - 1)):
                raise BenchFailed("by hand: a stranger is let in")
            chance = random.Random(_SEED)
            addresses = [pod_address(chance.randrange(shape.local)) for _ in range(_CONNECTIONS)]
            connecting = connect_times(addresses, TARGET_PORT, _CONNECTIONS)
    return ByHand(load=load, change=change, connecting=connecting)


def _nft(where: Namespace, path: str) -> float:
    with where.entered():
        done = process.run(["/usr/sbin/nft", "-f", path], dict(os.environ))
    if done.exit_code:
        raise BenchFailed(f"nft: {done.stderr.decode(errors='replace')[-500:]}")
    return done.seconds


# --- pods that wait for their policies --------------------------------------------------------------------------------


def _adds(stage: Stage, pods: int, rounds: int) -> Adds:
    """ADDs beside `pods` others, with a proxy that says when, and on a node without policies, in turn."""
    taken: tuple[Seconds, Seconds] = ([], [])
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(_waiting_node(stage, pods + 1)), stack.enter_context(_plain_node(stage))
        spare = [_fill(stage, node, pods) for node in nodes]
        for number in range(rounds):
            for place in (0, 1) if number % 2 else (1, 0):
                added = nodes[place].contender.add(spare[place])
                taken[place].append(added.finished.seconds)
                nodes[place].contender.delete(added)
    return Adds(pods=pods, waiting=taken[0], alone=taken[1])


def _fill(stage: Stage, node: PodwireNode, pods: int) -> Namespace:
    """Attaches so many pods, and returns the namespace of one more."""
    namespaces = stage.pods(pods + 1)
    numbers = {each.name: number for number, each in enumerate(namespaces)}
    node.contender.arguments = lambda each: _arguments(numbers[each.name])
    for each in namespaces[:-1]:
        node.contender.add(each)
    return namespaces[-1]


@contextlib.contextmanager
def _waiting_node(stage: Stage, pods: int) -> Iterator[PodwireNode]:
    """A daemon whose ADDs wait for policies, and the proxy that brings them: 100 policies, a tenth for each pod."""
    node = stage.node("waiting")
    place = Place(stage, "waiting", node)
    cluster = _Cluster(Shape(local=pods, policies=100, remote=_REMOTE), place.name)
    scheduled = [cluster.local(number, address="") for number in range(pods)]
    elsewhere = [each for each in cluster.pods() if each["spec"]["nodeName"] != place.name]
    api = SyntheticApi(place, {**cluster.objects(), "pods": [*scheduled, *elsewhere]})
    try:
        with (
            etcd_on(stage, node, place.name) as etcd,
            _daemon_and_proxy(stage, place, api, etcd) as attached,
        ):
            yield attached
    finally:
        api.stop()


@contextlib.contextmanager
def _daemon_and_proxy(stage: Stage, place: Place, api: SyntheticApi, etcd: EtcdServer) -> Iterator[PodwireNode]:
    socket = stage.memory / place.name / "run" / "ipamd.sock"
    with (
        proxy_beside(place, api, {"mode": "none", "daemonSocket": str(socket)}),
        daemon_on(stage, place.node, place.name, etcd, {"networkPolicy": True}) as node,
    ):
        yield node


@contextlib.contextmanager
def _plain_node(stage: Stage) -> Iterator[PodwireNode]:
    node = stage.node("plain")
    with etcd_on(stage, node, "plain") as etcd, daemon_on(stage, node, "plain", etcd, {}) as attached:
        yield attached


def _arguments(number: int) -> str:
    return f"IgnoreUnknown=1;K8S_POD_NAMESPACE={_SHOP};K8S_POD_NAME=local-{number};K8S_POD_UID={uid(number)}"


# --- the report -------------------------------------------------------------------------------------------------------


def _flow_table(found: dict[Shape, Measured], by_hand: dict[Shape, ByHand]) -> Table:
    both = {f"{shape}": each.connecting for shape, each in found.items()}
    both |= {f"a rule a pod, by hand: {shape}": each.connecting for shape, each in by_hand.items()}
    return Table(
        title=f"A new connection from a pod elsewhere, µs ({_CONNECTIONS:,} each)",
        columns=("", "median", "p90"),
        rows=tuple((name, *(f"{value * 1e6:.0f}" for value in _middle(each, 90))) for name, each in both.items()),
    )


def _change_table(found: dict[Shape, Measured], by_hand: dict[Shape, ByHand]) -> Table:
    rows = [
        (
            str(shape),
            f"{each.start:.2f}",
            *map(milliseconds, _middle(each.member, 99)),
            *map(milliseconds, _middle(each.subject, 99)),
            milliseconds(each.change_cpu),
            f"{each.memory['VmRSS']:.0f}",
            f"{each.memory['Pss']:.0f}",
        )
        for shape, each in found.items()
    ]
    rows += [
        (f"by hand: {shape}", f"{each.load:.2f}", *map(milliseconds, _middle(each.change, 99)), "", "", "", "", "")
        for shape, each in by_hand.items()
    ]
    return Table(
        title="From a label in the API to packets",
        columns=(
            "",
            "start, s",
            "pod elsewhere, ms",
            "p99",
            "pod here, ms",
            "p99",
            "CPU a change, ms",
            "VmRSS, MB",
            "Pss",
        ),
        rows=tuple(rows),
        notes=("By hand: the process that loads the rules, and the one that takes an address into a policy's set.",),
    )


def _adds_table(adds: Adds) -> Table:
    return Table(
        title=f"ADD beside {adds.pods} pods, whole process, ms ({len(adds.alone)} each, alternating)",
        columns=("", "median", "p90", "of that without"),
        rows=(
            (
                "waits for its policies (100, of which it has ten)",
                *map(milliseconds, _middle(adds.waiting, 90)),
                str(ratio_of_medians(adds.waiting, adds.alone)),
            ),
            ("without policies", *map(milliseconds, _middle(adds.alone, 90)), ""),
        ),
    )


def _bounds(found: dict[Shape, Measured], adds: Adds) -> tuple[Bound, ...]:
    bounds: list[Bound] = []
    taken = [[*each.member, *each.subject] for each in found.values()]
    for percent, limit in ((50, 50), (99, 100)):
        worst = max(percentile(each, percent) for each in taken)
        what = f"policies, at every size: a label in force, p{percent}"
        bounds.append(Bound(what=what, measured=worst * 1000, limit=limit, unit="ms"))
    for shape, each in found.items():
        few = found.get(Shape(local=_LOCAL[0], policies=shape.policies, remote=shape.remote))
        if few is not None and shape.local == _LOCAL[-1]:
            ratio = median(each.connecting) / median(few.connecting)
            bounds.append(Bound(what=f"{shape}: a new connection, of that with 10 pods", measured=ratio, limit=1.2))
        if shape.remote == _MANY_REMOTE:
            bounds += (
                Bound(what=f"{shape}: settled {key}", measured=each.memory[key], limit=170, unit="MB")
                for key in ("VmRSS", "Pss")
            )
    ratio = median(adds.waiting) / median(adds.alone)
    bounds.append(Bound(what=f"ADD with policies, of that without, {adds.pods} pods", measured=ratio, limit=1.3))
    return tuple(bounds)


def _middle(seconds: Seconds, percent: float) -> tuple[float, float]:
    return median(seconds), percentile(seconds, percent)
