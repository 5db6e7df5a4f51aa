"""Connections whose endpoint, Service or rules are no more: cut, so that the client goes on; all others are left alone.

The clients send from one port for as long as a story lasts, so the kernel remembers them as it would remember a
resolver's socket. No packet of theirs is judged by rules again unless the proxy makes it so.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.netns.node_fixtures import Netns
from tests.netns.plain_api import inside
from tests.netns.proxy_fixtures import (
    PATIENCE,
    SERVICE_CIDRS,
    ProxyStage,
    clean,
    endpoints,
    node,
    proxy_stage,
    sent,
    service,
    until,
)
from tests.unit.service_cases import LOCAL, LOCAL_2, REMOTE, address

VERSIONS = pytest.mark.parametrize("version", [4, 6])
_ports = itertools.count(21000)  # none that the kernel gives to others
LINES = 8081
VOID = "table inet void { chain in { type filter hook prerouting priority -400; policy drop; }; }"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyStage]:
    with proxy_stage(tmp_path_factory.mktemp("proxy")) as made:
        yield made


@pytest.fixture
def place(whole: ProxyStage) -> Iterator[ProxyStage]:
    clean(whole)
    yield whole
    clean(whole)


class Talker:
    """A client of UDP that sends from one port, whatever comes back."""

    def __init__(self, place: Netns, to: str, port: int = 80) -> None:
        self._socket = sent(place, socket.SOCK_DGRAM, to, port, next(_ports))
        self._socket.settimeout(0.1)

    def hears(self) -> str:
        """Who answers one datagram; empty for nobody, `refused` for an ICMP error."""
        try:
            self._socket.send(b"?")
            return self._socket.recv(256).decode().partition(" ")[0]
        except TimeoutError:
            return ""
        except (ConnectionRefusedError, PermissionError):
            return "refused"

    def answer(self) -> str:
        """What comes back first."""
        heard: list[str] = []

        def heard_anything() -> bool:
            heard.append(self.hears())
            return heard[-1] != ""

        until(heard_anything)
        return heard[-1]

    def until(self, *wanted: str) -> None:
        """Goes on sending until one of these answers."""
        heard: list[str] = []

        def heard_it() -> bool:
            heard.append(self.hears())
            return heard[-1] in wanted

        until(heard_it, lambda: f"expected {wanted}, heard {heard[-5:]}")

    def close(self) -> None:
        self._socket.close()


class Talkers:
    """One from the pod, one from outside by the node port."""

    def __init__(self, place: ProxyStage, version: int) -> None:
        self.pod = Talker(place.stage.client, str(address("10.96.0.1", version)))
        self.outside = Talker(place.stage.outside, str(address("10.0.0.1", version)), 30001)

    def __enter__(self) -> Talkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pod.close()
        self.outside.close()

    def until(self, *wanted: str) -> None:
        self.pod.until(*wanted)
        self.outside.until(*wanted)


def dns(version: int) -> dict[str, object]:
    return service("dns", version=version, protocol="UDP", node_port=30001)


def at(version: int, *hosts: str, terminating: tuple[str, ...] = ()) -> dict[str, object]:
    return endpoints("dns", *hosts, version=version, protocol="UDP", terminating=terminating)


@VERSIONS
def test_udp_follows_the_endpoints(place: ProxyStage, version: int) -> None:
    """Changed, none, back again; Service deleted, and made anew: every client is heard again by itself."""
    local, local_2, remote = (str(address(host, version)) for host in (LOCAL, LOCAL_2, REMOTE))
    place.api.put(dns(version), at(version, LOCAL), node(), SERVICE_CIDRS)
    proxy = place.start(syncPeriod=3600)
    with Talkers(place, version) as talkers:
        talkers.until(local)
        place.api.put(at(version, LOCAL_2))
        talkers.until(local_2)
        place.api.put(at(version))
        talkers.until("refused")
        place.api.put(at(version, REMOTE))
        talkers.until(remote)
        place.api.drop("Service", "dns")
        talkers.pod.until("")
        place.api.put(dns(version))
        talkers.until(remote)
    assert proxy.metric("kubeproxy_conntrack_reconciler_deleted_entries_total") >= 4


@VERSIONS
def test_udp_that_was_sent_before_there_was_a_service(place: ProxyStage, version: int) -> None:
    """It went wherever the node sends what it does not know, and is remembered to have gone there."""
    place.start(syncPeriod=3600)
    with Talkers(place, version) as talkers:
        assert talkers.pod.hears() == ""
        talkers.outside.hears()
        place.api.put(at(version, LOCAL))
        place.api.put(dns(version))
        talkers.until(str(address(LOCAL, version)))


def test_what_happened_while_no_proxy_ran_is_found_at_its_start(place: ProxyStage) -> None:
    """An endpoint has gone; another Service, too, with its node none the wiser: its rules went with the table."""
    place.api.put(dns(4), at(4, LOCAL), service("gone", 2, protocol="UDP"), SERVICE_CIDRS, node())
    place.api.put(endpoints("gone", LOCAL, protocol="UDP"))
    proxy = place.start()
    orphan = Talker(place.stage.client, "10.96.0.2")
    with Talkers(place, 4) as talkers:
        talkers.until(LOCAL)
        orphan.until(LOCAL)
        proxy.end()
        place.api.put(at(4, LOCAL_2))
        place.api.drop("Service", "gone")
        place.start()
        talkers.until(LOCAL_2)
        orphan.until("")
    orphan.close()


def test_udp_stays_with_who_serves_while_it_terminates(place: ProxyStage) -> None:
    place.api.put(dns(4), at(4, LOCAL))
    proxy = place.start(syncPeriod=3600)
    with Talkers(place, 4) as talkers:
        talkers.until(LOCAL)
        place.api.put(at(4, LOCAL_2, terminating=(LOCAL,)))
        place.served("10.96.0.1", LOCAL_2, protocol="UDP")
        until(lambda: proxy.metric("kubeproxy_conntrack_reconciler_sync_duration_seconds_count") >= 2)
        assert talkers.pod.answer() == LOCAL
        place.api.put(at(4, LOCAL_2))
        talkers.until(LOCAL_2)


def test_udp_of_others_is_left_alone(place: ProxyStage) -> None:
    """To a pod itself, and to a node port's number at an address where no NodePort answers."""
    place.api.put(dns(4), at(4, LOCAL))
    place.start(syncPeriod=3600, nodePortAddresses=["10.0.1.0/24"])
    for to, port in ((LOCAL, 8080), ("10.0.0.1", 30001)):
        talker = Talker(place.stage.client, to, port)
        talker.hears()
        before = ids(place, to, port)
        assert len(before) == 1
        place.api.put(at(4, LOCAL_2 if to == LOCAL else REMOTE))
        place.served("10.96.0.1", LOCAL_2, REMOTE, protocol="UDP")
        probe = Talker(place.stage.client, "10.96.0.1")
        probe.until(LOCAL_2, REMOTE)
        assert ids(place, to, port) == before
        talker.close()
        probe.close()


def ids(place: ProxyStage, to: str, port: int) -> list[str]:
    """The kernel's names of what it remembers of UDP to there."""
    lines = place.node.run("conntrack", "-L", "-o", "id", "-p", "udp", "--orig-dst", to, "--dport", str(port))
    return [line.rpartition("id=")[2] for line in lines.splitlines()]


# --- TCP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def lines(whole: ProxyStage) -> Iterator[None]:
    """Servers on each backend that send back what they get, for as long as somebody sends."""
    listeners = []
    for space, hosts in ((whole.stage.local, (LOCAL,)), (whole.stage.local2, (LOCAL_2,)), (whole.stage.b, (REMOTE,))):
        for host in hosts:
            for version in (4, 6):
                own = str(address(host, version))
                family = socket.AF_INET if version == 4 else socket.AF_INET6
                listener = inside(
                    space.path,
                    lambda own=own, family=family: socket.create_server((own, LINES), family=family),  # type: ignore[misc]
                )
                listeners.append(listener)
                threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    yield
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _accept(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(256):
                connection.sendall(data)
        except OSError:
            pass


def web(version: int) -> dict[str, object]:
    return service("web", version=version, node_port=30001)


def pods(version: int, *hosts: str, terminating: tuple[str, ...] = ()) -> dict[str, object]:
    made = endpoints("web", *hosts, version=version, terminating=terminating)
    return {**made, "ports": [{"name": "", "port": LINES, "protocol": "TCP"}]}


def says(connection: socket.socket) -> bool:
    """Whether a line comes back."""
    connection.sendall(b"hello\n")
    return connection.recv(256) == b"hello\n"


def says_and_says(connection: socket.socket) -> None:
    """Until the connection ends."""
    while says(connection):
        pass


@pytest.mark.parametrize(
    ("version", "left"),
    [
        (4, (REMOTE,)),
        (6, ()),
        pytest.param(6, (REMOTE,), marks=pytest.mark.slow),
        pytest.param(4, (), marks=pytest.mark.slow),
    ],
)
def test_tcp_to_a_pod_that_vanished_is_reset(place: ProxyStage, version: int, left: tuple[str, ...]) -> None:
    """Its machine lost its cable: without us, the client would send into the void for a quarter of an hour."""
    place.api.put(web(version), pods(version, LOCAL))
    place.start(syncPeriod=3600)
    from_pod = sent(place.stage.client, socket.SOCK_STREAM, str(address("10.96.0.1", version)), 80)
    outside = sent(place.stage.outside, socket.SOCK_STREAM, str(address("10.0.0.1", version)), 30001)
    with from_pod, outside:
        assert says(from_pod)
        assert says(outside)
        place.stage.local.run("nft", "-f", "-", stdin=VOID)
        try:
            place.api.put(pods(version, *left))
            for connection in (from_pod, outside):
                with pytest.raises(ConnectionResetError):
                    says_and_says(connection)
        finally:
            place.stage.local.run("nft", "flush", "ruleset")


@VERSIONS
def test_tcp_to_a_pod_that_terminates_is_left_alone(place: ProxyStage, version: int) -> None:
    place.api.put(web(version), pods(version, LOCAL))
    proxy = place.start(syncPeriod=3600)
    with sent(place.stage.client, socket.SOCK_STREAM, str(address("10.96.0.1", version)), 80) as connection:
        assert says(connection)
        place.api.put(pods(version, REMOTE, terminating=(LOCAL,)))
        place.api.put(service("mark", 9, version), endpoints("mark", REMOTE, version=version))
        place.served(str(address("10.96.0.9", version)), str(address(REMOTE, version)))
        assert says(connection)
        assert proxy.metric("kubeproxy_conntrack_reconciler_deleted_entries_total") == 0


def test_tcp_of_a_service_that_is_deleted_goes_on(place: ProxyStage) -> None:
    place.api.put(web(4), pods(4, LOCAL))
    place.start(syncPeriod=3600)
    with sent(place.stage.client, socket.SOCK_STREAM, "10.96.0.1", 80) as connection:
        assert says(connection)
        place.api.drop("Service", "web")
        until(lambda: not place.elements("services"))
        assert says(connection)


def test_tcp_goes_on_when_the_target_port_is_another(place: ProxyStage) -> None:
    place.api.put(web(4), pods(4, LOCAL))
    place.start(syncPeriod=3600)
    with sent(place.stage.client, socket.SOCK_STREAM, "10.96.0.1", 80) as connection:
        assert says(connection)
        place.api.put(endpoints("web", LOCAL))
        place.served("10.96.0.1", LOCAL)
        assert says(connection)


def test_tcp_that_was_asked_for_before_there_was_a_service(place: ProxyStage) -> None:
    """The first packet went elsewhere; one of the next finds the Service."""
    place.start(syncPeriod=3600)
    found: list[socket.socket] = []
    asking = threading.Thread(
        target=lambda: found.append(sent(place.stage.client, socket.SOCK_STREAM, "10.96.0.1", 80)), daemon=True
    )
    place.stage.outside.run("nft", "-f", "-", stdin=VOID)
    try:
        asking.start()
        until(lambda: "SYN_SENT" in place.node.run("conntrack", "-L", "-p", "tcp", "--orig-dst", "10.96.0.1"))
        place.api.put(pods(4, LOCAL), web(4))
        asking.join(PATIENCE)
    finally:
        place.stage.outside.run("nft", "flush", "ruleset")
    with found[0] as connection:
        assert says(connection)
