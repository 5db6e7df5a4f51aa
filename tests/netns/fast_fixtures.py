"""Connections on the fast path: both ends in the test's own hands, what took which way, and what the kernel has.

A socket belongs to the namespace that it was opened in, so each end is opened in its pod and used from outside, with no
process in between. A connection is fast when what it sends is counted, packet for packet, on every node that it passes:
until then a test about the fast path would be one about the long way.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self
from uuid import uuid4

import pytest
import yaml

from podwire.bpf import tcx
from podwire.errors import PodwireError
from podwire.lab import cluster, node
from podwire.lab.state import LabState, plan_nodes
from tests.netns.busy_flows import inside
from tests.netns.containers import Container, add, containers, know_each_other, on_node, pod_links, status, wait

DUAL = "10.244.0.0/16,fd00:10:244::/56"
PATIENCE = 60.0  # seconds of a socket's
_COUNTER = re.compile(r'^podwire_fast_path_packets(?:_total)?\{way="([a-z-]+)"\} (\S+)$', re.MULTILINE)
_numbers = itertools.count(1)


@contextlib.contextmanager
def small_lab(pod_cidr: str = DUAL, nodes: int = 2) -> Iterator[LabState]:
    """A lab of so many nodes that know each other, whose pods may be fast at once."""
    state = LabState(name=f"fast-{uuid4().hex[:6]}", nodes=plan_nodes(nodes, pod_cidr), pod_cidr=pod_cidr)
    try:
        made = cluster.up(state)
        for each in made.nodes:
            configure(made, each.name, 0.0)
        for each in made.nodes:
            node.wait_daemon(made, each.name)
        yield know_each_other(made)
    finally:
        cluster.down(state.name)


def configure(lab: LabState, name: str, after: float) -> None:
    """Starts a node's daemon anew; pods are fast after so many seconds."""
    path = lab.files.node_path(name, "/etc/podwire") / "ipamd.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"fastPathAfter": after}))
    node.stop_daemon(lab, name)
    node.start_daemon(lab, name)


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """Two nodes, dual stack, VXLAN over IPv4."""
    with small_lab() as made:
        yield made


@pytest.fixture(scope="module")
def trio(lab: LabState) -> Iterator[list[Pod]]:
    """Pods that live as long as the lab: two on its first node, one on the second."""
    with pods(lab, "node1", "node1", "node2") as made:
        yield made


class Pod:
    """A container with a network, and its addresses by family."""

    def __init__(self, box: Container, result: dict[str, Any]) -> None:
        self.box, self.lab, self.node, self.result = box, box.lab, box.node, result
        found = [each["address"].split("/")[0] for each in self.result["ips"]]
        self.addresses = {6 if ":" in each else 4: each for each in found}
        self.port = next(each["name"] for each in self.result["interfaces"] if "sandbox" not in each)

    def socket(self, family: int, kind: socket.SocketKind) -> socket.socket:
        """One of its own, that waits for long but not for ever."""
        made = inside(self.box.netns, lambda: socket.socket(_AF[family], kind))
        made.settimeout(PATIENCE)
        return made


_AF = {4: socket.AF_INET, 6: socket.AF_INET6}


@contextlib.contextmanager
def pods(lab: LabState, *nodes: str, config: dict[str, Any] | None = None) -> Iterator[list[Pod]]:
    """A pod on each of the nodes, in this order; deleted and gone afterwards."""
    with contextlib.ExitStack() as stack:
        made: list[Pod] = []
        for name in nodes:
            (box,) = stack.enter_context(containers(lab, name, f"fast{next(_numbers)}-", 1))
            stack.callback(box.call, "DEL")
            made.append(Pod(box, add(box, config).body))
        yield made
    ports = {each.port for each in made}
    wait(lambda: not any(ports & pod_links(lab, name) for name in nodes), "the pods to be gone")


# --- connections --------------------------------------------------------------------------------------------------


class Flow:
    """A connection between two pods, `client` being the end of the one that began it."""

    def __init__(self, here: Pod, there: Pod, family: int) -> None:
        self.here, self.there, self.family = here, there, family
        self.client: socket.socket
        self.server: socket.socket
        self.source_port: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()

    def exchange(self, times: int = 1) -> None:
        """Something small there, and something back, so many times."""
        raise NotImplementedError

    def carry(self, *sizes: int) -> None:
        """So many bytes in each direction, as they were sent. Raises AssertionError."""
        raise NotImplementedError

    def ways(self) -> list[tuple[str, str]]:
        """Where its packets are counted when it is fast: a node, and a way."""
        one, other = self.here.node, self.there.node
        if one == other:
            return [(one, "pod")]
        return [(at, way) for at in (one, other) for way in ("node", "from-node")]

    def taken(self, work: Callable[[], None]) -> dict[tuple[str, str], int]:
        """How many packets took the fast ways while something was done."""
        lab, nodes = self.here.lab, {self.here.node, self.there.node}
        before = {(at, way): n for at in nodes for way, n in counts(lab, at).items()}
        work()
        after = {(at, way): n for at in nodes for way, n in counts(lab, at).items()}
        return {place: after[place] - before[place] for place in after}

    def is_fast(self) -> bool:
        """Whether what it exchanges is counted everywhere on its way, both ways."""
        taken = self.taken(partial(self.exchange, 10))
        return all(taken[place] >= 10 for place in self.ways())

    def is_slow(self) -> bool:
        """Whether nothing at all is counted."""
        return not any(self.taken(partial(self.exchange, 10)).values())

    def _settled(self, holds: Callable[[], bool]) -> bool:
        """Whether it holds, where datagrams may still be lost: a link that gets a place for programs sends nothing for
        half a millisecond."""
        ends = (self.client, self.server)
        try:
            for end in ends:
                end.settimeout(PATIENCE if isinstance(self, Tcp) else 2.0)
            return holds()
        except TimeoutError:
            for end in ends:
                end.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    while end.recv(1 << 16):
                        continue
            return False
        finally:
            for end in ends:
                end.settimeout(PATIENCE)

    def until_fast(self) -> None:
        """Returns when it is fast."""
        try:
            wait(partial(self._settled, self.is_fast), f"{self._what} to be fast")
        except PodwireError as error:
            said = [f"{name}: {status(self.here.lab, name).fast_path}" for name in {self.here.node, self.there.node}]
            raise AssertionError(f"{error}; {'; '.join(said)}") from error

    def until_slow(self) -> None:
        """Returns when none of its packets is fast."""
        wait(partial(self._settled, self.is_slow), f"{self._what} to take the long way")

    @property
    def _what(self) -> str:
        return f"{type(self).__name__} from {self.here.box.name} to {self.there.box.name}"


class Tcp(Flow):
    """Of TCP."""

    def __init__(self, here: Pod, there: Pod, family: int = 4) -> None:
        super().__init__(here, there, family)
        with there.socket(family, socket.SOCK_STREAM) as listening:
            listening.bind((there.addresses[family], 0))
            listening.listen(1)
            self.client = here.socket(family, socket.SOCK_STREAM)
            self.client.connect(listening.getsockname()[:2])
            self.server, source = listening.accept()
            self.source_port = source[1]
        for end in (self.client, self.server):
            end.settimeout(PATIENCE)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, times: int = 1) -> None:
        for _ in range(times):
            for one, other in ((self.client, self.server), (self.server, self.client)):
                one.sendall(b"?")
                assert other.recv(16) == b"?"

    def carry(self, *sizes: int) -> None:
        for size in sizes:
            self.send(self.client, self.server, size)
            self.send(self.server, self.client, size)

    def send(self, source: socket.socket, target: socket.socket, size: int) -> None:
        """So many bytes from one end to the other, whole and in order."""
        piece = os.urandom(1 << 20)
        sent, got, left = hashlib.sha256(), hashlib.sha256(), [size]

        def receive() -> None:
            while left[0] and (data := target.recv(min(left[0], 1 << 20))):
                got.update(data)
                left[0] -= len(data)

        reader = threading.Thread(target=receive)
        reader.start()
        for at in range(0, size, len(piece)):
            part = piece[: size - at]
            source.sendall(part)
            sent.update(part)
        reader.join(2 * PATIENCE)
        assert (left[0], got.hexdigest()) == (0, sent.hexdigest())


class Udp(Flow):
    """Of UDP, answered once."""

    def __init__(self, here: Pod, there: Pod, family: int = 4) -> None:
        super().__init__(here, there, family)
        self.server = there.socket(family, socket.SOCK_DGRAM)
        self.server.bind((there.addresses[family], 0))
        self.client = here.socket(family, socket.SOCK_DGRAM)
        self.client.connect(self.server.getsockname()[:2])
        self.client.send(b"?")
        _, source = self.server.recvfrom(16)
        self.server.connect(source)
        self.source_port = source[1]

    def exchange(self, times: int = 1) -> None:
        self.carry(*[1] * times)

    def carry(self, *sizes: int) -> None:
        for size in sizes:
            for one, other in ((self.client, self.server), (self.server, self.client)):
                said = os.urandom(size)
                one.send(said)
                assert other.recv(1 << 16) == said, f"{size} bytes"


class Datagrams:
    """Numbered datagrams on a flow, 200 a second and echoed, until it is asked how many were lost."""

    def __init__(self, flow: Udp) -> None:
        self._flow = flow
        self._last, self._end = threading.Event(), threading.Event()
        self._sent, self._heard = 0, set[bytes]()
        self._threads = [threading.Thread(target=each) for each in (self._echo, self._hear, self._send)]

    def __enter__(self) -> Datagrams:
        for end in (self._flow.client, self._flow.server):
            end.settimeout(0.2)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._last.set()
        self._end.set()
        for thread in self._threads:
            thread.join()
        for end in (self._flow.client, self._flow.server):
            end.settimeout(PATIENCE)

    def lost(self) -> int:
        """Sends no more, and waits for what is on its way. How many were not echoed."""
        self._last.set()
        self._threads[2].join()
        until = time.monotonic() + PATIENCE / 6
        while len(self._heard) < self._sent and time.monotonic() < until:
            time.sleep(0.01)
        return self._sent - len(self._heard)

    def _send(self) -> None:
        while not self._last.wait(0.005):
            with contextlib.suppress(OSError):  # it was sent, and is lost
                self._flow.client.send(struct.pack("!I", self._sent))
            self._sent += 1

    def _echo(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(OSError):
                self._flow.server.send(self._flow.server.recv(16))

    def _hear(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(OSError):
                self._heard.add(self._flow.client.recv(16))


# --- what there is on a node --------------------------------------------------------------------------------------


def counts(lab: LabState, name: str) -> dict[str, int]:
    """Packets that took the fast ways of a node, by way, as its metrics say."""
    family = 6 if ":" in lab.node(name).addresses[0] else 4
    line = http.client.HTTPConnection("node", node.METRICS_PORT)
    line.sock = inside(lab.netns(name), lambda: socket.socket(_AF[family]))
    with contextlib.closing(line):
        line.sock.settimeout(PATIENCE)
        line.sock.connect(("::1" if family == 6 else "127.0.0.1", node.METRICS_PORT))
        line.request("GET", "/metrics")
        text = line.getresponse().read().decode()
    found = {way: int(float(number)) for way, number in _COUNTER.findall(text)}
    return dict.fromkeys(("pod", "node", "from-node"), 0) | found  # a daemon that has just begun has none


def programs_of_ours(lab: LabState, name: str, device: str) -> list[str]:
    """The names of our programs that an interface runs for what it takes in: of tc's filters, then of TCX."""
    filtered = re.findall(r"(podwire_\w+) direct-action", filters(lab, name, device))
    return filtered + sorted(_of_tcx(lab, name, device))


def _of_tcx(lab: LabState, name: str, device: str) -> list[str]:
    return inside(lab.netns(name), lambda: list(tcx.programs(socket.if_nametoindex(device), tcx.Way.IN).values()))


def filters(lab: LabState, name: str, device: str) -> str:
    """tc's filters of an interface, both ways, as `tc` shows them."""
    shown = (on_node(lab, name, "tc", "filter", "show", "dev", device, way).stdout for way in ("ingress", "egress"))
    return "".join(shown)


def tracked(lab: LabState, name: str, flow: Flow) -> list[tuple[int, str]]:
    """conntrack's entries of a flow on a node: the seconds that are left, and the state; "" for UDP."""
    kind = "tcp" if isinstance(flow, Tcp) else "udp"
    family = "ipv6" if flow.family == 6 else "ipv4"
    source = flow.here.addresses[flow.family]
    words = ["conntrack", "-L", "-f", family, "-p", kind, "-s", source, "--orig-port-src", str(flow.source_port)]
    lines = [line.split() for line in on_node(lab, name, *words).stdout.splitlines()]
    return [(int(each[2]), each[3] if kind == "tcp" else "") for each in lines]


def sysctl(lab: LabState, name: str, key: str, value: str = "") -> str:
    """Reads a setting of a node's namespace, or sets it."""
    done = on_node(lab, name, "sysctl", "-n", *([f"{key}={value}"] if value else [key]))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def succeed(lab: LabState, name: str, command: str) -> str:
    """Runs a shell command on a node."""
    done = on_node(lab, name, "sh", "-c", command)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
