"""Busy connections between pods, and what a kernel keeps for them: for tests that the fast path breaks no promise.

    Busy ── numbered messages, 500 a second ──▶ Echo ── each one back ──▶ Busy
                        └─▶ Ear: whatever reaches an interface, also of a pod that nobody listens in any more

A moment is a number: what is sent from then on has that number or a greater one. So "nothing arrives any more" needs no
clock and no grace: a message that arrives says itself whether it was sent before or after.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from ipam_daemon.faults import VARIABLE
from podwire import netns
from podwire.lab import cluster, node
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import CONFIG, Answer, Container, know_each_other, on_node, status, wait
from tests.netns.lab_fixtures import fresh_name

DUAL = "10.244.0.0/16,fd00:10:244::/56"
PORT = 7000
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
_MESSAGE = struct.Struct("!4sIQ")
_MAGIC = b"PWFP"
_PAUSE = 0.002  # seconds between two messages
_RCVBUFFORCE, _ROOM = 33, 1 << 22  # for seconds in which this process does not get to run
_PATIENCE = 90.0
_LAST = 10.0  # seconds in which an answer may come that is on its way
_numbers = itertools.count(1)
T = TypeVar("T")
_SEVERAL = 40
"""Messages by which it is told whether a connection is fast."""


# --- connections --------------------------------------------------------------------------------------------------


def inside(path: str | Path, make: Callable[[], T]) -> T:
    """What is made, or found, in the network namespace at `path`."""
    descriptor = netns.open_netns(str(path))
    try:
        with netns.inside(descriptor):
            return make()
    finally:
        os.close(descriptor)


def message(connection: int, number: int) -> bytes:
    """What is sent."""
    return _MESSAGE.pack(_MAGIC, connection, number)


class _Work:
    """A thread that runs from the beginning of the block to its end."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._close()

    def _run(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class Echo(_Work):
    """Sends back what reaches a port in a namespace, TCP and UDP of both families. `latest` is the highest number of
    each connection's messages, `peers` who has sent datagrams."""

    def __init__(self, path: str | Path, port: int = PORT) -> None:
        self.latest: dict[int, int] = {}
        self.peers = set[str]()
        self._servers = {kind: self._listen(path, kind, port) for kind in (TCP, UDP)}
        self._connections: dict[socket.socket, bytes] = {}
        super().__init__()

    def __enter__(self) -> Echo:
        return self

    def _listen(self, path: str | Path, kind: int, port: int) -> socket.socket:
        made = inside(path, lambda: socket.socket(socket.AF_INET6, kind))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _ROOM)
        made.setblocking(False)
        made.bind(("::", port))
        if kind == TCP:
            made.listen()
        return made

    def _run(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([*self._servers.values(), *self._connections], [], [], 0.05)
            for each in ready:
                with contextlib.suppress(BlockingIOError):
                    self._serve(each)

    def _serve(self, ready: socket.socket) -> None:
        if ready is self._servers[TCP]:
            made, _ = ready.accept()
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[made] = b""
        elif ready is self._servers[UDP]:
            data, source = ready.recvfrom(2048)
            self._take(data)
            self.peers.add(source[0].removeprefix("::ffff:"))
            with contextlib.suppress(OSError):  # it has no network any more
                ready.sendto(data, source)
        else:
            try:
                data = ready.recv(65536)
                ready.send(data)
            except (ConnectionError, TimeoutError):
                data = b""
            self._connections[ready] = self._take(self._connections[ready] + data)
            if not data:
                ready.close()
                del self._connections[ready]

    def _take(self, data: bytes) -> bytes:
        whole = len(data) // _MESSAGE.size * _MESSAGE.size
        for magic, connection, number in _MESSAGE.iter_unpack(data[:whole]):
            if magic == _MAGIC:
                self.latest[connection] = max(number, self.latest.get(connection, 0))
        return data[whole:]

    def _close(self) -> None:
        for each in (*self._servers.values(), *self._connections):
            each.close()


class Busy(_Work):
    """A connection from a namespace to an address that an Echo listens at, with messages from beginning to end."""

    alive: ClassVar[set[Busy]] = set()

    def __init__(self, path: str | Path, to: str, kind: int = UDP, port: int = PORT, own_port: int = 0) -> None:
        self.number, self.sent, self.answered = next(_numbers), 0, set[int]()
        self.errors: list[str] = []
        self._name = f"{Path(path).name} to {to} {port}, {'TCP' if kind == TCP else 'UDP'}"
        self._resting, self._rest = threading.Event(), b""
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        self._socket = inside(path, lambda: socket.socket(family, kind))
        try:
            self._socket.settimeout(_PATIENCE)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _ROOM)
            self._socket.bind(("::" if ":" in to else "0.0.0.0", own_port))
            self._socket.connect((to, port))
            if kind == TCP:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise
        super().__init__()
        self.alive.add(self)

    def __enter__(self) -> Busy:
        return self

    def __str__(self) -> str:
        return f"{self.number}: {self._name}"

    @property
    def own_port(self) -> int:
        """Where it sends from."""
        return int(self._socket.getsockname()[1])

    def now(self) -> int:
        """What is sent from now on has this number or a greater one."""
        return self.sent + 1

    def goes_on(self, more: int = _SEVERAL) -> None:
        """Returns when it has sent so many more, answered or not."""
        wanted = self.sent + more
        wait(lambda: self.sent >= wanted, "messages to be sent")

    def is_answered(self, more: int = _SEVERAL) -> None:
        """Returns when so many more were answered."""
        wanted = len(self.answered) + more
        wait(lambda: len(self.answered) >= wanted, f"messages to be answered ({self.errors[-3:]})")

    def lost(self, since: int = 1) -> list[int]:
        """Which were not answered, of those that were sent from the moment until now; what is on its way may arrive."""
        with self.resting():
            wanted = set(range(since, self.sent + 1))
            deadline = time.monotonic() + _LAST
            while not wanted <= self.answered and time.monotonic() < deadline:
                time.sleep(0.01)
            return sorted(wanted - self.answered)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Sends nothing until the end of the block."""
        self._resting.set()
        try:
            yield
        finally:
            self._resting.clear()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.is_set():
            now = time.monotonic()
            if now >= due:
                if not self._resting.is_set():
                    self._send()
                due = max(due + _PAUSE, now)
            if select.select([self._socket], [], [], max(0.0, due - now))[0]:
                self._hear()

    def _send(self) -> None:
        self.sent += 1
        try:
            self._socket.send(message(self.number, self.sent))
        except BlockingIOError:  # a TCP connection whose buffer is full
            self.sent -= 1
        except OSError as error:
            self.errors.append(f"{self.sent}: {error}")

    def _hear(self) -> None:
        try:
            data = self._rest + self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self.errors.append(f"{self.sent}: {error}")
            time.sleep(_PAUSE)
            return
        whole = len(data) // _MESSAGE.size * _MESSAGE.size
        self.answered |= {number for _, mine, number in _MESSAGE.iter_unpack(data[:whole]) if mine == self.number}
        self._rest = data[whole:]
        if not data:
            time.sleep(_PAUSE)

    def _close(self) -> None:
        self.alive.discard(self)
        self._socket.close()


class Ear(_Work):
    """Whatever an interface takes in, though nobody listens there: the highest number of each connection's messages."""

    def __init__(self, path: str | Path, ifname: str = "eth0") -> None:
        self.latest: dict[int, int] = {}
        self._socket = inside(
            path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        )
        self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _ROOM)
        self._socket.bind((ifname, 0))
        super().__init__()

    def __enter__(self) -> Ear:
        return self

    def _run(self) -> None:
        while not self._ended.is_set():
            if select.select([self._socket], [], [], 0.05)[0]:
                self._hear()

    def _hear(self) -> None:
        try:
            frame, about = self._socket.recvfrom(65536)
        except OSError:  # the interface has gone down, or away
            time.sleep(_PAUSE)
            return
        at = frame.find(_MAGIC)
        while about[2] != socket.PACKET_OUTGOING and 0 <= at <= len(frame) - _MESSAGE.size:
            _, connection, number = _MESSAGE.unpack_from(frame, at)
            self.latest[connection] = max(number, self.latest.get(connection, 0))
            at = frame.find(_MAGIC, at + _MESSAGE.size)

    def _close(self) -> None:
        self._socket.close()


def moments(*flows: Busy) -> dict[Busy, int]:
    """Now, for each connection."""
    return {each: each.now() for each in flows}


def nothing_since(hearer: Echo | Ear, since: dict[Busy, int]) -> dict[int, int]:
    """What of these connections came to somebody although it was sent after the moment; waits until they have sent
    some more. Empty when it is as it should be."""
    for each in since:
        each.goes_on()
    time.sleep(0.1)  # whoever hears has to read it, too
    found = {each.number: hearer.latest.get(each.number, 0) - moment for each, moment in since.items()}
    return {number: late for number, late in found.items() if late >= 0}


BARELY = 0.1
"""The share of a connection that is not fast: an acknowledgement of one that rests may come meanwhile."""


@contextlib.contextmanager
def undisturbed(*flows: Busy) -> Iterator[None]:
    """None of the connections loses anything by what is done in the block."""
    since = moments(*flows)
    yield
    lost = {each: each.lost(since[each]) for each in flows}
    words = [
        f"{each}: {len(which)} from {which[0]} to {which[-1]} of {each.sent}" for each, which in lost.items() if which
    ]
    assert words == []


# --- pods ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quick_lab(proxy: str = "none") -> Iterator[LabState]:
    """A lab of two nodes and both families whose pods are on the fast path as soon as the daemon looks at them."""
    state = LabState(name=fresh_name(), nodes=plan_nodes(2, DUAL), pod_cidr=DUAL, proxy=proxy)
    plain = node.daemon_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "daemon_config", lambda *of: plain(*of) | {"fastPathAfter": 0.0, "cooldown": 0.0})
        patch.setenv(VARIABLE, str(_fault(state)))
        try:
            yield know_each_other(cluster.up(state))
        finally:
            cluster.down(state.name)


def _fault(lab: LabState) -> Path:
    """What the daemons are made to do at which point (ipam_daemon/faults.py)."""
    return lab.files.folder / "fault"


class Pod:
    """A container that has been added. Names and addresses are those of its last ADD."""

    def __init__(self, box: Container, config: dict[str, Any] | None = None) -> None:
        self.box, self.node, self.netns = box, box.node, box.netns
        self.add(config)

    def add(self, config: dict[str, Any] | None = None) -> None:
        """Its ADD, which may be its second, tried until it works."""
        answers: list[Answer] = []

        def works() -> bool:
            answers.append(self.box.call("ADD", CONFIG | (config or {})))
            return answers[-1].code == 0

        wait(works, "an ADD to work")
        said = answers[-1]
        self.at = {6 if ":" in each["address"] else 4: each["address"].split("/")[0] for each in said.body["ips"]}
        self.gateway = {6 if ":" in each["gateway"] else 4: each["gateway"] for each in said.body["ips"]}
        interfaces = {bool(each.get("sandbox")): each for each in said.body["interfaces"]}
        self.mac, self.port = str(interfaces[True]["mac"]), str(interfaces[False]["name"])

    def delete(self) -> None:
        """Its DEL."""
        assert self.box.call("DEL").code == 0


@contextlib.contextmanager
def dying(pod: Pod) -> Iterator[None]:
    """Its DEL is as good as answered when the block begins: its wire is dead, and stays so long as it is to be seen
    that nothing passes it; it would be deleted a moment later."""
    lab = pod.box.lab
    _fault(lab).write_text("del.released delay 2")
    try:
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(pod.delete)
            shown = ("ip", "-j", "link", "show", "dev", pod.port)
            wait(lambda: '"UP"' not in on_node(lab, pod.node, *shown).stdout, "the wire to be dead")
            yield
            assert on_node(lab, pod.node, *shown).returncode == 0, "it was there all the time"
            answered.result()
    finally:
        _fault(lab).unlink()


# --- what is fast -------------------------------------------------------------------------------------------------


def metric(lab: LabState, name: str, port: int, wanted: str, label: str = "") -> int:
    """The sum of a metric's samples with this label, of whoever listens at the port of a node."""
    line = http.client.HTTPConnection("node", port)
    with contextlib.closing(line):
        line.sock = inside(lab.netns(name), lambda: socket.socket(socket.AF_INET))
        line.sock.settimeout(_PATIENCE)
        line.sock.connect(("127.0.0.1", port))
        line.request("GET", "/metrics")
        text = line.getresponse().read().decode()
    samples = [each.rpartition(" ") for each in text.splitlines() if not each.startswith("#")]
    return int(sum(float(value) for what, _, value in samples if what.partition("{")[0] == wanted and label in what))


def taken(lab: LabState, name: str) -> int:
    """Packets that took the fast way at a node, as its daemon says."""
    return metric(lab, name, node.METRICS_PORT, "podwire_fast_path_packets_total")


def share(flow: Busy, counter: Callable[[], int]) -> float:
    """Of a connection's packets, what part a counter counts, while all others rest: two a message are all of them."""
    with contextlib.ExitStack() as stack:
        for each in Busy.alive - {flow}:
            stack.enter_context(each.resting())
        flow.is_answered(5)
        before, first = counter(), len(flow.answered)
        flow.is_answered()
        now, last = len(flow.answered), counter()
        return (last - before) / (now - first) / 2


def until_fast(lab: LabState, *flows: Busy, at: Sequence[str] = ("node1",)) -> None:
    """Returns when each of the connections is fast at each of the nodes, both ways."""

    def is_fast(flow: Busy, name: str) -> bool:
        return share(flow, lambda: taken(lab, name)) > 0.9

    for name in at:
        for flow in flows:
            what = f"connection {flow} to be fast at {name} ({status(lab, name).fast_path})"
            wait(partial(is_fast, flow, name), what)
