"""The ways of the fast path: between pods of a node and across, whatever the backend, and what takes the long way.

Each story begins with a connection that is seen to be fast. What it carries arrives whole, and what the long way says
to a sender (too large, too far, no such way) is still said.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from ipam_daemon.fastpath_program import Where
from podwire.lab import demo
from podwire.lab.process import wait_for
from podwire.lab.state import LabState
from tests.netns.containers import status, wait
from tests.netns.fast_fixtures import (
    Datagrams,
    Flow,
    Pod,
    Tcp,
    Udp,
    counts,
    lab,
    pods,
    programs_of_ours,
    small_lab,
    succeed,
    trio,
)
from tests.netns.test_backends import have_vni, podwire, underlay_mtu
from tests.netns.traffic import traffic

__all__ = ["lab", "trio"]

MEGABYTES = 16
_HEADERS = {4: 28, 6: 48}  # IP and UDP
_UDP_SEGMENT = 103  # linux/udp.h


# --- every way ----------------------------------------------------------------------------------------------------


def carries(flow: Flow, mtu: int) -> None:
    """That a fast connection carries what it is given, as it was given."""
    flow.until_fast()
    if isinstance(flow, Tcp):
        taken = flow.taken(lambda: flow.carry(MEGABYTES << 20))
        assert all(taken[way] > MEGABYTES << 4 for way in flow.ways()), "at least one packet for each 64 KiB"
        return
    assert isinstance(flow, Udp)
    largest = mtu - _HEADERS[flow.family]
    fitting = (1, 17, 512, largest - 1, largest)
    taken = flow.taken(partial(flow.carry, *fitting))
    assert all(taken[way] == len(fitting) * (2 if way[1] == "pod" else 1) for way in flow.ways()), taken
    for size in (largest + 1, 2 * largest, 60_000):
        taken = flow.taken(partial(flow.carry, size))
        # what a node has put together may be whole where it arrives
        assert not any(number for (_, way), number in taken.items() if way != "from-node"), "fragments go the long way"
    flow.exchange()
    in_segments(flow)


def in_segments(flow: Udp) -> None:
    """One packet that leaves as several (UDP_SEGMENT)."""
    said = [bytes([number]) * 1000 for number in range(20)]
    flow.client.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 1000)
    flow.client.send(b"".join(said))
    assert [flow.server.recv(2000) for _ in said] == said
    flow.client.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)


def every_way(here: Pod, beside: Pod, across: Pod) -> None:
    for family in here.addresses:
        for there in (beside, across):
            for kind in (Tcp, Udp):
                with kind(here, there, family) as flow:
                    carries(flow, status(here.lab, "node1").mtu)


@pytest.mark.parametrize("backend", ["vxlan", "direct", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_fast_connection_carries_all_that_it_is_given(trio: list[Pod], backend: str) -> None:
    with chosen(trio[0].lab, backend):
        every_way(*trio)


@contextmanager
def chosen(lab: LabState, backend: str) -> Iterator[None]:
    """This backend, and VXLAN again afterwards."""
    if backend != "vxlan":
        demo.set_backend(lab, backend)
    try:
        yield
    finally:
        if backend != "vxlan":
            demo.set_backend(lab, "vxlan")


OTHERS = {
    "IPv4 alone": "10.244.0.0/16",
    "IPv6 alone": "fd00:10:244::/56",
    "both, over an underlay of IPv6": "fd00:10:244::/56,10.244.0.0/16",
}


@pytest.mark.slow
@pytest.mark.parametrize("pod_cidr", OTHERS.values(), ids=OTHERS.keys())
def test_a_cluster_of_other_families_has_the_same_ways(pod_cidr: str) -> None:
    with small_lab(pod_cidr) as other, pods(other, "node1", "node1", "node2") as made:
        for backend in ("vxlan", "direct", "auto"):
            with chosen(other, backend):
                every_way(*made)


# --- a backend that changes ---------------------------------------------------------------------------------------


@contextmanager
def busy(here: Pod, there: Pod) -> Iterator[tuple[Udp, Datagrams]]:
    """A UDP flow that is fast, and what is sent on it."""
    with Udp(here, there) as flow:
        flow.until_fast()
        with Datagrams(flow) as datagrams:
            yield flow, datagrams


def until_counted(flow: Flow) -> None:
    """Returns when what is being sent is fast on both nodes."""
    seen: dict[tuple[str, str], int] = {}

    def grow() -> bool:
        now = {(at, way): counts(flow.here.lab, at)[way] for at, way in flow.ways()}
        first = seen or now
        seen.update({place: min(first[place], number) for place, number in now.items()})
        return all(now[place] > seen[place] + 20 for place in now)

    wait(grow, "the connection to be fast")


def looking(lab: LabState, name: str) -> dict[str, list[str]]:
    """What looks at packets from other nodes, by device."""
    return {device: programs_of_ours(lab, name, device) for device in ("eth0", "pw-vxlan")}


def test_the_backend_changes_under_a_fast_connection(trio: list[Pod]) -> None:
    here, _, there = trio
    lab = here.lab
    ours = [Where.ARRIVING.value]
    with busy(here, there) as (flow, datagrams), traffic(here.box, there.box, there.addresses[6]) as talk:
        for backend in ("direct", "auto", "vxlan", "auto", "vxlan"):
            demo.set_backend(lab, backend)
            wanted = {"eth0": [] if backend == "vxlan" else ours, "pw-vxlan": ours}
            for name in ("node1", "node2"):
                wait(lambda: looking(lab, name) == wanted, f"the programs of {backend} on {name}")  # noqa: B023
            until_counted(flow)
        assert datagrams.lost() == 0
        assert talk.harm() == []


def test_the_vni_changes_under_a_fast_connection(trio: list[Pod]) -> None:
    """The device is made anew, so what is on its way is lost; nothing after it is."""
    here, _, there = trio
    lab = here.lab
    with Tcp(here, there) as flow:
        flow.until_fast()
        try:
            podwire(lab, "node1", "cluster", "set", "--vni", "7")
            wait(partial(have_vni, lab, 7), "VNI 7")
            flow.until_fast()
            assert looking(lab, "node1") == {"eth0": [], "pw-vxlan": [Where.ARRIVING.value]}
            flow.carry(MEGABYTES << 20)
        finally:
            podwire(lab, "node1", "cluster", "set", "--vni", "1")
            wait(partial(have_vni, lab, 1), "VNI 1")
        flow.until_fast()


@pytest.mark.parametrize("backend", ["vxlan", pytest.param("direct", marks=pytest.mark.slow)])
def test_the_mtu_of_the_underlay_changes_under_a_fast_connection(trio: list[Pod], backend: str) -> None:
    here, _, there = trio
    lab = here.lab
    with chosen(lab, backend), busy(here, there) as (_, datagrams), Tcp(here, there, 6) as stream:
        stream.until_fast()
        usual = status(lab, "node1").mtu
        try:
            for mtu in (1400, 1500):
                underlay_mtu(lab, mtu)
                for name in ("node1", "node2"):
                    wait(lambda: status(lab, name).mtu == usual - 1500 + mtu, f"MTU {mtu} on {name}")  # noqa: B023
                stream.carry(MEGABYTES << 20)
                stream.until_fast()
            assert datagrams.lost() == 0
        finally:
            underlay_mtu(lab, 1500)
            wait(lambda: status(lab, "node1").mtu == usual, "the usual MTU")


# --- what the long way says ---------------------------------------------------------------------------------------


def complaint(sender: socket.socket, family: int) -> tuple[int, str]:
    """The error number that the next ICMP error is, and who sent it."""
    level, kind = (socket.IPPROTO_IP, 11) if family == 4 else (socket.IPPROTO_IPV6, 25)  # IP_RECVERR, IPV6_RECVERR
    found: list[tuple[int, str]] = []
    usual = sender.gettimeout()
    sender.setblocking(False)

    def came() -> bool:
        with suppress(BlockingIOError):
            _, control, _, _ = sender.recvmsg(4096, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            for at, what, data in control:
                if (at, what) == (level, kind):
                    found.append(_offender(data))
        return bool(found)

    wait_for(came, 20, "an ICMP error")
    sender.settimeout(usual)
    return found[0]


def _offender(data: bytes) -> tuple[int, str]:
    """struct sock_extended_err, and the address after it (linux/errqueue.h)."""
    (number,) = struct.unpack_from("=I", data)
    (family,) = struct.unpack_from("=H", data, 16)
    at, length = (20, 4) if family == socket.AF_INET else (24, 16)
    return number, socket.inet_ntop(family, data[at : at + length])


def hear_errors(sender: socket.socket, family: int) -> None:
    sender.setsockopt(*((socket.IPPROTO_IP, 11) if family == 4 else (socket.IPPROTO_IPV6, 25)), 1)


@pytest.mark.parametrize("family", [4, 6])
def test_a_packet_that_may_go_no_further_is_answered_by_each_node(trio: list[Pod], family: int) -> None:
    """As traceroute asks, on the addresses and ports of a connection that is fast."""
    hops = (socket.IPPROTO_IP, socket.IP_TTL) if family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    here, _, there = trio
    with Udp(here, there, family) as flow:
        flow.until_fast()
        usual = flow.client.getsockopt(*hops)
        hear_errors(flow.client, family)
        answered = []
        for number in (1, 2):
            flow.client.setsockopt(*hops, number)
            flow.client.send(b"?")
            answered.append(complaint(flow.client, family))
        gateway = here.result["ips"][0 if family == 4 else 1]["gateway"]
        assert answered[0] == (errno.EHOSTUNREACH, gateway)
        assert answered[1][0] == errno.EHOSTUNREACH
        assert answered[1][1] != gateway
        flow.client.setsockopt(*hops, 3)
        flow.client.send(b"enough")
        assert flow.server.recv(16) == b"enough"
        flow.client.setsockopt(*hops, usual)
        flow.until_fast()


@pytest.mark.parametrize("family", [4, 6])
def test_a_packet_too_large_for_the_way_is_answered(lab: LabState, family: int) -> None:
    """The way to one pod takes less than the devices do; TCP, which sends several packets as one, learns it, too."""
    discover = (socket.IPPROTO_IP, 10, 2) if family == 4 else (socket.IPPROTO_IPV6, 23, 2)  # …_MTU_DISCOVER, …_DO
    with (
        pods(lab, "node1", "node2") as (here, there),
        Udp(here, there, family) as flow,
        Tcp(here, there, family) as stream,
    ):
        flow.until_fast()
        stream.until_fast()
        with narrow_way(lab, there.addresses[family], 1300):
            flow.client.setsockopt(*discover)
            hear_errors(flow.client, family)
            flow.client.send(bytes(1300))
            assert complaint(flow.client, family)[0] == errno.EMSGSIZE
            flow.carry(1300 - _HEADERS[family])
            assert flow.is_fast()
            stream.carry(MEGABYTES << 20)
            assert stream.is_fast()


@contextmanager
def narrow_way(lab: LabState, address: str, mtu: int) -> Iterator[None]:
    """A route of node1 to this pod alone, of this MTU, where the others go."""
    ip = "ip -6" if ":" in address else "ip"
    way = json.loads(succeed(lab, "node1", f"{ip} -j route get {address}"))[0]
    succeed(lab, "node1", f"{ip} route add {address} via {way['gateway']} dev {way['dev']} onlink mtu lock {mtu}")
    try:
        yield
    finally:
        succeed(lab, "node1", f"{ip} route del {address}")


# --- routes of somebody else --------------------------------------------------------------------------------------

# {pod} is the receiver's address, {block} the block that it is in, {source} the sender's.
POLICIES = {
    "an unreachable route": ["ip route add unreachable {pod}"],
    "another table for a sender": ["ip route add prohibit {pod} table 99", "ip rule add from {source} table 99"],
    "another table for what comes in by the bridge": ["ip rule add iif pw0 to {pod} blackhole"],
    "a rule about a port": ["ip rule add to {pod} ipproto {protocol} dport {port} prohibit"],
    "a rule about the type of service": ["ip rule add to {pod} dsfield 0x10 prohibit"],
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_route_that_forbids_a_way_forbids_the_fast_one(trio: list[Pod], policy: list[str], family: int) -> None:
    kind = (socket.IPPROTO_IP, socket.IP_TOS) if family == 4 else (socket.IPPROTO_IPV6, 67)  # IPV6_TCLASS
    here, _, there = trio
    with Udp(here, there, family) as flow:
        for end in (flow.client, flow.server):
            end.setsockopt(*kind, 0x10)
        flow.until_fast()
        said = {
            "pod": there.addresses[family],
            "source": here.addresses[family],
            "protocol": "udp",
            "port": flow.server.getsockname()[1],
        }
        with obeyed(here.lab, [line.format(**said).replace("ip ", f"ip -{family} ", 1) for line in policy]):
            assert not any(flow.taken(lambda: forbidden(flow)).values())
        flow.until_fast()


@contextmanager
def obeyed(lab: LabState, lines: list[str]) -> Iterator[None]:
    """With these routes and rules on node1."""
    done: list[str] = []
    try:
        for line in lines:
            succeed(lab, "node1", line)
            done.insert(0, line.replace(" add ", " del "))
        yield
    finally:
        for line in done:
            succeed(lab, "node1", line)


def forbidden(flow: Udp) -> None:
    """That nothing arrives; whether the sender is told is the route's kind."""
    flow.server.settimeout(0.3)
    with suppress(OSError):
        flow.client.send(b"?")
    with pytest.raises(TimeoutError):
        flow.server.recv(16)
    flow.server.settimeout(60)
    flow.client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # which forgets it
