"""A node that runs the proxy, between a client and the pods of a whole cluster.

    client ──── node ──── pods: one namespace that has all of their addresses
                 │
                 ├── podwire-proxy, the real process
                 └── a synthetic API (bench/synthetic_api.py)

The client is a pod of another node, by its address. What the proxy does is seen from it: a connection through a
ClusterIP says which pod it has reached. Whoever is compared gets a ground of its own of the same make.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from bench.objects import PODS, TARGET_PORT, Object
from bench.podwire_node import Memory, memory_of, stop
from bench.process import BenchFailed
from bench.stage import Namespace, Stage

CLIENT, STRANGER = "10.127.0.2", "10.127.0.6"  # both the client's; the second is of a pod that nobody knows
_GATEWAY = "10.127.0.1"
_POD_NETWORK = "10.64.0.0/11"  # the half of PODS that the pods are in; the client is in the other
_API_PORT = 6443
_PATIENCE = 0.005  # seconds for an answer of somebody on this machine
_ASK_EVERY = 0.0005
_WITHIN = 120.0
_LINGER_NOT = struct.pack("ii", 1, 0)  # closed by a reset: no port of the client stays taken
_TICKS = os.sysconf("SC_CLK_TCK")
_NETLINK_NETFILTER, _NFTABLES_GROUP = 12, 1 << 6
_BUFFER = 1 << 24


class Place:
    """A node of a stage, where an API and a proxy can be. `name` is also the node's name in the API."""

    def __init__(self, stage: Stage, name: str, node: Namespace) -> None:
        self.stage = stage
        self.name = name
        self.node = node


class Ground(Place):
    """The three namespaces. Forwarding is on, and nothing filters."""

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__(stage, name, stage.node(name))
        self.client, self.pods = stage.pods(2)
        stage.ip(
            self.node,
            [
                f"link add client type veth peer name eth0 netns {self.client.name}",
                f"link add pods type veth peer name eth0 netns {self.pods.name}",
                f"address add {_GATEWAY}/30 dev client",
                "address add 10.126.0.1/30 dev pods",
                "link set client up",
                "link set pods up",
                f"route add {_POD_NETWORK} via 10.126.0.2 onlink dev pods",
                f"route add {STRANGER} dev client",
            ],
        )
        stage.ip(
            self.client,
            [
                "link set lo up",
                f"address add {CLIENT}/30 dev eth0",
                f"address add {STRANGER}/32 dev eth0",
                "link set eth0 up",
                f"route add default via {_GATEWAY}",
            ],
        )
        stage.ip(
            self.pods,
            [
                "link set lo up",
                "address add 10.126.0.2/30 dev eth0",
                "link set eth0 up",
                "route add default via 10.126.0.1",
                f"route add local {_POD_NETWORK} dev lo",
            ],
        )
        with self.node.entered():
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """The pods answer."""
        process = _start(self.pods, ["bench.backends", str(TARGET_PORT)])
        try:
            _first_line(process)
            yield
        finally:
            stop(process)


# --- what a client sees -----------------------------------------------------------------------------------------------


def ask(address: str, port: int, patience: float = _PATIENCE) -> str:
    """Which pod a new connection reaches; empty when it reaches nobody in time."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        client.settimeout(patience)
        try:
            client.connect((address, port))
            return client.recv(64).decode()
        except OSError:
            return ""


def reaches(source: str, address: str, port: int, patience: float) -> bool:
    """Whether one of the client's addresses can connect in time; the kernel answers, so nobody needs to be awake."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        client.bind((source, 0))
        client.settimeout(patience)
        try:
            client.connect((address, port))
        except OSError:
            return False
        return True


def connect_times(addresses: Sequence[str], port: int, count: int) -> list[float]:
    """Seconds that connecting takes, `count` times, to one address after another, when nobody has anything to do."""
    taken = []
    for number in range(count):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            client.settimeout(None)
            address = (addresses[number % len(addresses)], port)
            began = time.perf_counter()
            client.connect(address)
            taken.append(time.perf_counter() - began)
            while client.recv(64):  # until it has closed, so that nobody is busy when the next one comes
                pass
    return taken


class RuleEvents:
    """Transactions of nftables in a namespace, as the kernel tells of them (and of an iptables that is nft)."""

    def __init__(self, namespace: Namespace) -> None:
        with namespace.entered():
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._channel = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
            self._channel.setsockopt(socket.SOL_SOCKET, 33, _BUFFER)  # SO_RCVBUFFORCE
            self._channel.bind((0, _NFTABLES_GROUP))

    def drain(self) -> None:
        """Forgets what was told."""
        while self.came(0.0):
            pass

    def came(self, within: float) -> bool:
        """Waits for something to be told, and takes it."""
        if not select.select((self._channel,), (), (), within)[0]:
            return False
        with contextlib.suppress(OSError):
            self._channel.recv(1 << 16)
        return True

    def close(self) -> None:
        """Ends it."""
        self._channel.close()


# --- the API ----------------------------------------------------------------------------------------------------------


class SyntheticApi:
    """bench.synthetic_api on a node."""

    def __init__(self, place: Place, objects: Mapping[str, Iterable[Object]]) -> None:
        """`objects` by the plural of their kind."""
        folder = place.stage.memory / f"{place.name}-api"
        folder.mkdir()
        for plural, listed in objects.items():
            (folder / plural).write_bytes(b"\n".join(map(msgspec.json.encode, listed)))
        self._process = _start(place.node, ["bench.synthetic_api", str(_API_PORT), str(folder)])
        _first_line(self._process)
        self.kubeconfig = place.stage.memory / f"{place.name}-kubeconfig"
        server = {"server": f"http://127.0.0.1:{_API_PORT}"}
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "bench",
                    "clusters": [{"name": "bench", "cluster": server}],
                    "users": [{"name": "bench", "user": {}}],
                    "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
                }
            )
        )

    def put(self, *events: tuple[str, str, Object]) -> float:
        """Sends (plural, ADDED | MODIFIED | DELETED, object) to who watches. When the first was sent."""
        lines = [b"%b\t%b\t%b\t%b\n" % (b"put" if event is events[-1] else b"then", *_words(event)) for event in events]
        return float(self._command(b"".join(lines)))

    def listed(self) -> float:
        """When the last list had been sent."""
        times: dict[str, float] = self._command(b"listed\n")
        return max(times.values())

    def _command(self, line: bytes) -> Any:
        assert self._process.stdin is not None, "it was made a pipe"
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return json.loads(_first_line(self._process))

    def stop(self) -> None:
        """Ends it."""
        stop(self._process)


def _words(event: tuple[str, str, Object]) -> tuple[bytes, bytes, bytes]:
    plural, kind, obj = event
    return plural.encode(), kind.encode(), msgspec.json.encode(obj)


# --- the proxy --------------------------------------------------------------------------------------------------------


class Proxied:
    """A proxy that runs. `began` is CLOCK_MONOTONIC before its exec, in seconds."""

    def __init__(self, api: SyntheticApi, process: subprocess.Popen[bytes], log: Path) -> None:
        self.api = api
        self.began = 0.0
        self._process = process
        self._log = log

    def cpu_seconds(self) -> float:
        """How long the proxy, its threads and the programs that it has run have been on a CPU."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS  # utime, stime and those of children

    def memory(self) -> Memory:
        """The proxy's memory now."""
        return memory_of(self._process.pid)

    def check(self) -> None:
        """Raises BenchFailed when the proxy has ended."""
        if self._process.poll() is not None:
            raise BenchFailed(f"the proxy has ended: {self._log.read_text(errors='replace')[-1500:]}")

    def fail(self, what: str) -> BenchFailed:
        """The error that says what did not happen, with the end of the log."""
        return BenchFailed(f"{what}: {self._log.read_text(errors='replace')[-1500:]}")


@contextlib.contextmanager
def proxy_on(
    place: Place, objects: Mapping[str, Iterable[Object]], settings: Mapping[str, object]
) -> Iterator[Proxied]:
    """The proxy with the objects of an API; `settings` are those that are not its defaults."""
    api = SyntheticApi(place, objects)
    try:
        with proxy_beside(place, api, settings) as proxied:
            yield proxied
    finally:
        api.stop()


@contextlib.contextmanager
def proxy_beside(place: Place, api: SyntheticApi, settings: Mapping[str, object]) -> Iterator[Proxied]:
    """The proxy beside an API that is there already."""
    given: dict[str, object] = {"node": place.name, "clusterCIDRs": [str(PODS)], **settings}
    given.setdefault("daemonSocket", str(place.stage.memory / "none.sock"))
    path, log_path = (place.stage.memory / f"{place.name}-proxy.{end}" for end in ("yaml", "log"))
    path.write_text(yaml.safe_dump(given))
    words = ["kube_proxy_lite.main", "--config", str(path), "--kubeconfig", str(api.kubeconfig)]
    with log_path.open("wb") as log:
        began = time.monotonic()
        process = _start(place.node, words, log)
        try:
            proxied = Proxied(api, process, log_path)
            proxied.began = began
            yield proxied
        finally:
            stop(process)


def wait_until(proxied: Proxied, condition: Any, what: str) -> float:
    """Asks until `condition()` is true. When it was. Raises BenchFailed when that takes too long."""
    deadline = time.monotonic() + _WITHIN
    while not condition():
        proxied.check()
        if time.monotonic() > deadline:
            raise proxied.fail(what)
        time.sleep(_ASK_EVERY)
    return time.monotonic()


def _start(namespace: Namespace, words: list[str], log: Any = None) -> subprocess.Popen[bytes]:
    entering = ("ip", "netns", "exec", namespace.name, "setpriv", "--pdeathsig", "KILL", "--")
    pipes = {"stdout": log, "stderr": log} if log else {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen((*entering, sys.executable, "-m", *words), **{"stdin": subprocess.DEVNULL, **pipes})


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None, "it was made a pipe"
    line = process.stdout.readline()
    if not line:
        raise BenchFailed(f"{process.args!r} has ended")
    return line
