"""Flows that policies meet in the life of a node, with a real podwire-proxy in each mode: what is cut, what is related,
what a Service leads to, and a protocol that this kernel has no sockets for.

The proxy runs on node1 of tests/netns/policy_stage.py, follows a folder of manifests, and has the pods of x and z.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kube_proxy_lite.settings import Mode
from podwire.kube.objects import SERVICE_NAME_LABEL
from tests.netns.plain_api import inside
from tests.netns.policy_stage import PolicyStage
from tests.netns.proxy_fixtures import Proxy
from tests.policy_cases import BASE, Manifest, at, block, policy, spaces, tcp

PATIENCE, MOMENT = 90.0, 0.3
CLUSTER_IP = "10.96.0.1"
SCTP = 132


class Place:
    """The stage, and a proxy on node1 that follows a folder."""

    def __init__(self, stage: PolicyStage, folder: Path, mode: str) -> None:
        self.stage = stage
        self._objects = folder / "objects"
        self._objects.mkdir()
        self._policies: list[Manifest] = []
        (self._objects / "base.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": [*BASE]}))
        config = folder / "proxy.yaml"
        settings = {"node": "node1", "mode": mode, "manifests": str(self._objects), "syncPeriod": 3600.0}
        settings |= {"daemonSocket": str(folder / "nobody"), "clusterCIDRs": ["10.244.0.0/16"]}
        config.write_text(yaml.safe_dump(settings))
        name = stage.name("node1")
        self.proxy = Proxy(SimpleNamespace(name=name, path=f"/run/netns/{name}"), config)  # type: ignore[arg-type]
        until(lambda: self.proxy.healthz()[0] == 200, self.proxy.log.read_text)

    def put(self, *manifests: Manifest) -> None:
        """These are the objects beside the pods; returns when the kernel has them."""
        before, now = self._runs(), json.dumps({"kind": "List", "apiVersion": "v1", "items": manifests})
        policies = [each for each in manifests if each["kind"] == "NetworkPolicy"]
        temporary = self._objects.with_name("other.json")
        temporary.write_text(now)
        temporary.replace(self._objects / "other.json")
        if policies != self._policies:
            until(lambda: self._runs() > before, self.proxy.log.read_text)
        self._policies = policies

    def _runs(self) -> float:
        return self.proxy.metric("podwire_policy_generations_total")

    def made(self, where: str, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket of the pod "x/a"."""
        name = self.stage.name(where.replace("/", "."))
        return inside(f"/run/netns/{name}", make)

    def run(self, where: str, *command: str) -> int:
        """What a program in a pod returned."""
        name = self.stage.name(where.replace("/", "."))
        words = ("ip", "netns", "exec", name, *command)
        return subprocess.run(words, capture_output=True, check=False, timeout=PATIENCE).returncode


def until(holds: Callable[[], bool], why: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


@pytest.fixture(scope="module", params=[Mode.NFTABLES.value, pytest.param(Mode.IPTABLES.value, marks=pytest.mark.slow)])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with PolicyStage(prefix="pwflow") as stage:
        place = Place(stage, tmp_path_factory.mktemp("flows"), request.param)
        try:
            yield place
        finally:
            place.proxy.end()


@pytest.fixture
def place(whole: Place) -> Place:
    whole.stage.forget_connections()
    return whole


# --- what a change cuts ---------------------------------------------------------------------------------------------


def pair(place: Place, kind: int, version: int = 4) -> tuple[socket.socket, socket.socket]:
    """A connection from y/a to x/a, on port 7000: the client's end, and the server's."""
    place.put()
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    to = (at("x/a", version), 7000)

    def server() -> socket.socket:
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.settimeout(PATIENCE)
        made.bind(to)
        return made

    listening = place.made("x/a", server)
    client = place.made("y/a", lambda: socket.socket(family, kind))
    client.settimeout(PATIENCE)
    if kind == socket.SOCK_STREAM:
        listening.listen()
        client.connect(to)
        accepted, _ = listening.accept()
        accepted.settimeout(PATIENCE)
        listening.close()
        return client, accepted
    client.connect(to)
    client.send(b"first")
    _, peer = listening.recvfrom(16)
    listening.connect(peer)
    return client, listening


def carries(sender: socket.socket, receiver: socket.socket, seconds: float = MOMENT) -> bool:
    """Whether something that is sent arrives."""
    receiver.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while receiver.recv(65536):
            pass
    receiver.settimeout(seconds)
    sender.send(b"again")
    try:
        return bool(receiver.recv(16))
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("kind", "version"), [(socket.SOCK_STREAM, 4), (socket.SOCK_STREAM, 6), (socket.SOCK_DGRAM, 6)]
)
def test_what_a_change_forbids_is_cut_and_not_revived_from_either_end(place: Place, kind: int, version: int) -> None:
    client, server = pair(place, kind, version)
    with client, server:
        assert carries(client, server, PATIENCE)
        assert carries(server, client, PATIENCE)
        # a datagram from the server is a flow of its own, which x/a may begin unless its egress is closed, too
        types = ["Ingress"] if kind == socket.SOCK_STREAM else ["Ingress", "Egress"]
        place.put(policy("x/deny", policyTypes=types))
        until(lambda: not carries(client, server) and not carries(server, client))
        assert not carries(server, client)
        assert not carries(client, server)


def test_what_a_change_still_allows_goes_on(place: Place) -> None:
    client, server = pair(place, socket.SOCK_STREAM)
    with client, server:
        assert carries(client, server, PATIENCE)
        place.put(policy("x/p", ingress=[{"from": [spaces(ns="y")], "ports": [tcp(7000)]}]))
        for _ in range(4):
            assert carries(client, server, PATIENCE)
            assert carries(server, client, PATIENCE)
            time.sleep(MOMENT / 2)  # the look at connections comes after the rules


# --- ICMP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_errors_come_back_to_a_pod_that_lets_nobody_in(place: Place, version: int) -> None:
    place.put(policy("x/deny"))
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with place.made("x/a", lambda: socket.socket(family, socket.SOCK_DGRAM)) as asking:
        asking.settimeout(PATIENCE)
        asking.connect((at("y/a", version), 7999))
        asking.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(16)


@pytest.mark.parametrize("version", [4, 6])
def test_an_echo_passes_where_all_ports_do_and_not_where_some_do(place: Place, version: int) -> None:
    ping = ("ping", "-qnc1", "-W1", at("x/a", version))
    place.put(policy("x/p", ingress=[{"ports": [tcp(1, 65535), {"protocol": "UDP"}, {"protocol": "SCTP"}]}]))
    until(lambda: place.run("y/a", *ping) == 1)
    place.put(policy("x/p", ingress=[{"from": [spaces(ns="y")]}]))
    until(lambda: place.run("y/a", *ping) == 0)


# --- SCTP ----------------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    found = 0xFFFFFFFF
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = found >> 1 ^ (0x82F63B78 if found & 1 else 0)
    return found ^ 0xFFFFFFFF


def init_to(port: int) -> bytes:
    """An SCTP packet with one chunk, INIT."""
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 0x1234, 65536, 1, 1, 1)
    head = struct.pack("!HHI", 5000 + port, port, 0)  # an INIT's tag is 0; another would be invalid to conntrack
    checksum = crc32c(head + b"\0\0\0\0" + chunk)
    return head + struct.pack("<I", checksum) + chunk


@pytest.mark.parametrize("version", [4, 6])
def test_sctp_is_judged_by_its_own_ports(place: Place, version: int) -> None:
    place.put(policy("x/p", ingress=[{"ports": [{"protocol": "SCTP", "port": 80}, tcp(81)]}]))
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    raw = [place.made(where, lambda: socket.socket(family, socket.SOCK_RAW, SCTP)) for where in ("y/a", "x/a")]
    with raw[0] as sender, raw[1] as receiver:
        receiver.settimeout(PATIENCE)
        for port in (81, 82, 80):
            sender.sendto(init_to(port), (at("x/a", version), 0))
        heard: list[int] = []
        while 80 not in heard:
            packet = receiver.recv(2048)
            heard.append(struct.unpack("!H", packet[20 if version == 4 else 0 :][2:4])[0])
        assert heard == [80]


# --- Services ------------------------------------------------------------------------------------------------------


def service() -> tuple[Manifest, Manifest]:
    """10.96.0.1:80, which leads to port 81 of z/a."""
    meta = {"name": "web", "namespace": "z"}
    ports = [{"port": 80, "targetPort": 81, "protocol": "TCP"}]
    spec = {"type": "ClusterIP", "clusterIP": CLUSTER_IP, "clusterIPs": [CLUSTER_IP], "ports": ports}
    there = {"addresses": [at("z/a")], "conditions": {"ready": True}, "nodeName": "node1"}
    return (
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**meta, "labels": {SERVICE_NAME_LABEL: "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 81, "protocol": "TCP"}],
            "endpoints": [there],
        },
    )


def connects(place: Place, where: str, seconds: float = MOMENT) -> bool:
    """Whether a pod's connection to the Service is answered."""
    with place.made(where, lambda: socket.socket()) as asking:
        asking.settimeout(seconds)
        try:
            asking.connect((CLUSTER_IP, 80))
        except OSError:
            return False
        return True


SERVED: dict[str, tuple[Manifest, bool]] = {
    "the endpoint's port is what counts": (policy("z/p", ingress=[{"ports": [tcp(81)]}]), True),
    "the Service's port counts for nothing": (policy("z/p", ingress=[{"ports": [tcp(80)]}]), False),
    "the client is who asks": (policy("z/p", ingress=[{"from": [spaces(ns="x")]}]), True),
    "another client is not": (policy("z/p", ingress=[{"from": [spaces(ns="y")]}]), False),
    "out to the endpoint": (
        policy("x/p", policyTypes=["Egress"], egress=[{"to": [spaces(ns="z")], "ports": [tcp(81)]}]),
        True,
    ),
    "out to the ClusterIP is out to nobody": (
        policy("x/p", policyTypes=["Egress"], egress=[{"to": [block(f"{CLUSTER_IP}/32")]}]),
        False,
    ),
}


@pytest.mark.parametrize(("asked", "passes"), SERVED.values(), ids=SERVED.keys())
def test_a_service_is_its_endpoints(place: Place, asked: Manifest, passes: bool) -> None:
    place.put(*service())
    until(lambda: connects(place, "x/a"))
    place.put(*service(), asked)
    until(lambda: connects(place, "x/a", PATIENCE if passes else MOMENT) is passes)


def test_a_pod_comes_to_itself_by_way_of_a_service(place: Place) -> None:
    place.put(*service())
    until(lambda: connects(place, "z/a"))
    place.put(*service(), policy("z/deny", policyTypes=["Ingress", "Egress"]))
    assert connects(place, "z/a", PATIENCE)
    until(lambda: not connects(place, "z/b"))
