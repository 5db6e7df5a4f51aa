"""The programs of the fast path, where the case is a packet: which go the fast way, which go on, and as what.

Each case is asked of every way that it is about, in both families: a packet that takes the fast way by itself (the
first table), and one thing of it changed. What goes on goes on untouched. Where a packet comes out is not told by
a single run: test_fastpath_wire.py.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_daemon.fastpath_program import Where, pod_key, pod_value
from tests.netns import fastpath_stage
from tests.netns.fastpath_stage import (
    A_MAC,
    ACK,
    ASIDE,
    B_MAC,
    BESIDE,
    BRIDGE_MAC,
    CWR,
    ECE,
    ELSEWHERE,
    FAST,
    FIN,
    FROM_NEAR,
    FROM_NODE,
    HEADER,
    HELPER,
    MTU,
    NARROW,
    NARROW_MTU,
    NEAR,
    NOBODY,
    ON,
    OUTSIDE,
    PSH,
    RST,
    SEQUENCE,
    SYN,
    TCP,
    TO_NEAR,
    TO_NODE,
    UDP,
    UNDERLAY_MTU,
    URG,
    WAYS,
    A,
    B,
    Flow,
    Stage,
    at,
    expected,
    flow,
    with_checksum,
)
from tests.netns.frames import BROADCAST, tagged

SENT, ARRIVING = (BESIDE, TO_NODE, TO_NEAR), (FROM_NODE, FROM_NEAR)
TO_OTHERS = (TO_NODE, TO_NEAR)
ROUTED = (*TO_OTHERS, *ARRIVING)
SEGMENT = {TCP: 20, UDP: 8}
PROTOCOL_AT = {4: 23, 6: 20}
VIP = {4: "10.96.0.1", 6: "fd00:96::1"}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with fastpath_stage.stage() as made:
        yield made


class Case(NamedTuple):
    """One thing about a packet or its connection, and the ways, families and protocols that it is about."""

    change: Callable[[Flow], Flow]
    ways: tuple[str, ...] = tuple(WAYS)
    versions: tuple[int, ...] = (4, 6)
    protocols: tuple[int, ...] = (TCP, UDP)

    def flows(self) -> Iterator[tuple[str, Flow]]:
        """Each with the way that it has without the change."""
        for way in self.ways:
            for version in self.versions:
                for protocol in self.protocols:
                    yield way, self.change(flow(way, version, protocol))


def but(**changes: object) -> Callable[[Flow], Flow]:
    return lambda it: it.but(**changes)


def put(place: int, *content: int) -> Callable[[Flow], Flow]:
    """The frame with other bytes at a place."""
    new = bytes(content)
    return but(edit=lambda frame: frame[:place] + new + frame[place + len(new) :])


def to(network: int, host: int) -> Callable[[Flow], Flow]:
    return lambda it: it.but(target=at(it.version, network, host))


def of_protocol(number: int) -> Callable[[Flow], Flow]:
    """The same packet under another protocol's number."""
    return lambda it: put(PROTOCOL_AT[it.version], number)(it)


def with_extension(kind: int) -> Callable[[Flow], Flow]:
    """An IPv6 extension header of eight bytes before the segment."""

    def change(it: Flow) -> Flow:
        header = bytes([it.protocol, 0, 1, 4, 0, 0, 0, 0])
        return it.but(edit=lambda frame: frame[:20] + bytes([kind]) + frame[21:54] + header + frame[54:])

    return change


def with_option(frame: bytes) -> bytes:
    """An option of four bytes after the IPv4 header, which are the ports once more: where they would be without it."""
    return frame[:14] + with_checksum(b"\x46" + frame[15:34] + frame[34:38]) + frame[34:]


def mtu_of(it: Flow) -> int:
    mtus = {NEAR: UNDERLAY_MTU, NARROW: NARROW_MTU}
    return next((mtu for place, mtu in mtus.items() if it.target == at(it.version, *place)), MTU)


def long(more: int) -> Callable[[Flow], Flow]:
    """A packet of the MTU of its way and so many bytes more."""
    return lambda it: it.but(payload=mtu_of(it) - HEADER[it.version] - SEGMENT[it.protocol] + more)


def several(more: int, options: int = 0) -> Callable[[Flow], Flow]:
    """One that stands for several, each of the MTU and so many bytes more; `options` are bytes of TCP's."""

    def change(it: Flow) -> Flow:
        size = mtu_of(it) - HEADER[it.version] - SEGMENT[it.protocol] - options + more
        made = it.but(payload=2 * size, gso_size=size)
        return put(14 + HEADER[it.version] + 12, (20 + options) // 4 << 4)(made) if options else made

    return change


def narrow(change: Callable[[Flow], Flow]) -> Callable[[Flow], Flow]:
    """By a route with an MTU of its own, smaller than the device's."""
    return lambda it: change(to(*NARROW)(it))


def asked_otherwise(word: int) -> Callable[[Flow], Flow]:
    """The connection was begun to an address that differs in one word from the one that answers, as IPVS leaves it; by
    two, which is a bit of the status, too."""

    def change(it: Flow) -> Flow:
        packed = bytearray(ipaddress.ip_address(it.source).packed)
        packed[4 * word] += 2
        return it.but(answers=True, asked=str(ipaddress.ip_address(bytes(packed))))

    return change


FAST_CASES = {
    "from who began it": Case(but()),
    "from who was asked": Case(but(answers=True)),
    "pushed": Case(but(flags=PSH | ACK), protocols=(TCP,)),
    "urgent, and of congestion": Case(but(flags=URG | ACK | ECE | CWR), protocols=(TCP,)),
    "no acknowledgement, whatever that is": Case(but(flags=0), protocols=(TCP,)),
    "without payload": Case(but(payload=0)),
    "the last hop but one": Case(but(hops=2)),
    "the last hop, to a pod on the same bridge": Case(but(hops=1), ways=(BESIDE,)),
    "not to be fragmented": Case(put(20, 0x40, 0), versions=(4,)),
    "of another class": Case(but(class_=0xB8)),
    "as large as the way takes": Case(long(0), ways=TO_OTHERS),
    "several as large as the way takes": Case(several(0), ways=TO_OTHERS),
    "several, and TCP has options": Case(several(0, options=12), ways=TO_OTHERS, protocols=(TCP,)),
    "as large as a narrow route takes": Case(narrow(long(0)), ways=(TO_NODE,)),
    "several as large as a narrow route takes": Case(narrow(several(0)), ways=(TO_NODE,)),
    "larger, to a pod on the same bridge": Case(but(payload=2000), ways=(BESIDE,)),
    "the second of the pools": Case(lambda it: it.but(target=ELSEWHERE[it.version]), ways=(TO_NODE,)),
    "from the first address after one of the node's blocks": Case(
        but(source="10.250.8.64"), ways=ARRIVING, versions=(4,)
    ),
    "UDP that is not assured": Case(but(status="SEEN_REPLY"), protocols=(UDP,)),
    "two minutes left": Case(but(seconds=120)),
}
ON_CASES = {
    # TCP that begins and ends
    "SYN": Case(but(flags=SYN), protocols=(TCP,)),
    "SYN and ACK": Case(but(flags=SYN | ACK), protocols=(TCP,)),
    "FIN": Case(but(flags=FIN | ACK), protocols=(TCP,)),
    "RST": Case(but(flags=RST), protocols=(TCP,)),
    "RST with data": Case(but(flags=RST | ACK | PSH), protocols=(TCP,)),
    # what conntrack has of it
    "a connection that nobody knows": Case(but(known=False)),
    "not answered yet": Case(but(status="")),
    "assured, but not answered": Case(but(status="ASSURED")),
    "source translated": Case(lambda it: it.but(more=("--src-nat", VIP[it.version]))),
    "destination translated": Case(lambda it: it.but(more=("--dst-nat", VIP[it.version]))),
    "a helper reads along": Case(but(by_hand=HELPER), protocols=(TCP,)),
    "sequence numbers changed": Case(but(by_hand=SEQUENCE), protocols=(TCP,)),
    "hardly any time left": Case(but(seconds=15)),
    "asked for another port": Case(but(answers=True, asked_port=80)),
    "asked for another address, first word": Case(asked_otherwise(0)),
    **{f"asked for another address, word {word}": Case(asked_otherwise(word), versions=(6,)) for word in (1, 2, 3)},
    **{
        f"TCP is in {state}": Case(but(state=state), protocols=(TCP,))
        for state in ("SYN_SENT", "SYN_RECV", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "LISTEN")
    },
    # what is not whole, or not TCP and UDP
    "the first fragment": Case(put(20, 0x20, 0), versions=(4,)),
    "a fragment in the middle": Case(put(20, 0x20, 0xB9), versions=(4,)),
    "the last fragment": Case(put(20, 0, 0xB9), versions=(4,)),
    "the last fragment of a large one": Case(put(20, 0x1F, 0), versions=(4,)),
    "an option of IPv4": Case(but(edit=with_option), versions=(4,)),
    "a header that is too short": Case(put(14, 0x44), versions=(4,)),
    "another version of IP": Case(put(14, 0x55), versions=(4,)),
    **{
        f"an extension header: {name}": Case(with_extension(kind), versions=(6,))
        for name, kind in {"hop by hop": 0, "routing": 43, "fragment": 44, "destination": 60, "mobility": 135}.items()
    },
    **{
        name: Case(of_protocol(number))
        for name, number in {"ICMP": 1, "ICMPv6": 58, "SCTP": 132, "UDP-Lite": 136, "ESP": 50, "IP in IP": 4}.items()
    },
    "a VLAN tag": Case(but(edit=lambda frame: tagged(frame, 0x8100))),
    "a tag of a provider's VLAN": Case(but(edit=lambda frame: tagged(frame, 0x88A8))),
    "another type of frame": Case(put(12, 0x08, 0x06)),
    # who sends it
    "by the port of another": Case(but(port="pwb"), ways=SENT),
    "a MAC that begins otherwise": Case(but(source_mac="0a:58:0a:f5:01:03"), ways=SENT),
    "a MAC that ends otherwise": Case(but(source_mac="0a:58:0a:f4:01:13"), ways=SENT),
    "the address of nobody": Case(lambda it: it.but(source=at(it.version, *NOBODY)), ways=SENT),
    "the address of another pod": Case(lambda it: it.but(source=at(it.version, *B)), ways=TO_OTHERS),
    "address and MAC of another pod": Case(
        lambda it: it.but(source=at(it.version, *B), source_mac=B_MAC), ways=TO_OTHERS
    ),
    "the address of a pod of this node, from elsewhere": Case(
        lambda it: it.but(source=at(it.version, *B)), ways=ARRIVING
    ),
    "one of its blocks that nobody has, from elsewhere": Case(
        lambda it: it.but(source=at(it.version, *NOBODY)), ways=ARRIVING
    ),
    "one of another of its blocks, from elsewhere": Case(but(source="10.250.8.63"), ways=ARRIVING, versions=(4,)),
    # who is to have it
    "to a MAC that begins otherwise": Case(but(target_mac="0a:58:0a:f5:01:04"), ways=(BESIDE,)),
    "to a MAC that ends otherwise": Case(but(target_mac="0a:58:0a:f4:01:14"), ways=(BESIDE,)),
    "to the pod beside by way of the node": Case(but(target_mac=BRIDGE_MAC), ways=(BESIDE,)),
    "to a MAC that begins otherwise than the bridge's": Case(but(target_mac="0a:58:0a:f5:01:01"), ways=TO_OTHERS),
    "to a MAC that ends otherwise than the bridge's": Case(but(target_mac="0a:58:0a:f4:01:11"), ways=TO_OTHERS),
    "to another pod's MAC": Case(but(target_mac=B_MAC), ways=ROUTED),
    "to everybody's MAC": Case(but(target_mac=BROADCAST)),
    "to the MAC of a group": Case(but(target_mac="01:00:5e:00:00:fb")),
    "to a group": Case(
        lambda it: it.but(
            target={4: "224.0.0.251", 6: "ff02::fb"}[it.version],
            target_mac={4: "01:00:5e:00:00:fb", 6: "33:33:00:00:00:fb"}[it.version],
        )
    ),
    "to a group, with the MAC of one": Case(lambda it: it.but(target={4: "224.0.0.251", 6: "ff02::fb"}[it.version])),
    "to everybody": Case(but(target="255.255.255.255"), versions=(4,)),
    "to what is no pod": Case(lambda it: it.but(target=OUTSIDE[it.version]), ways=ROUTED),
    "to a pod of this node that is not known": Case(to(*NOBODY), ways=ROUTED),
    "to a node by a device that is none of ours": Case(to(*ASIDE), ways=TO_OTHERS),
    "to what is unreachable": Case(to(5, 9), ways=TO_OTHERS),
    "to a VTEP that nobody knows": Case(to(6, 9), ways=TO_OTHERS),
    "by a router of the other family": Case(to(7, 9), ways=TO_OTHERS, versions=(4,)),
    "to where there is no route": Case(to(8, 9), ways=TO_OTHERS),
    # hops and size
    "the last hop": Case(but(hops=1), ways=ROUTED),
    "no hop left": Case(but(hops=0), ways=ROUTED),
    "one byte too large": Case(long(1), ways=TO_OTHERS),
    "as much too large as a VLAN tag": Case(long(4), ways=TO_OTHERS),
    "much too large": Case(long(500), ways=TO_OTHERS),
    "too large for a narrow route": Case(narrow(long(1)), ways=(TO_NODE,)),
    "several, each too large for a narrow route": Case(narrow(several(1)), ways=(TO_NODE,)),
    "several, each one byte too large": Case(several(1), ways=TO_OTHERS),
    "several, too large with TCP's options": Case(several(1, options=12), ways=TO_OTHERS, protocols=(TCP,)),
}


@pytest.mark.parametrize("name", FAST_CASES)
def test_this_goes_the_fast_way(stage: Stage, name: str) -> None:
    wrong = []
    for way, it in FAST_CASES[name].flows():
        counted = stage.taken()
        returned, before, after = stage.ask(it)
        place = 0 if way == BESIDE else 2 if it.where is Where.ARRIVING else 1
        counted[place] += 1
        if returned != FAST or stage.taken() != counted or (after != expected(it, before) and it.edit is bytes):
            wrong.append((way, it, returned, before.hex(), after.hex()))
    assert not wrong


@pytest.mark.parametrize("name", ON_CASES)
def test_this_goes_on_as_it_is(stage: Stage, name: str) -> None:
    wrong, counted = [], stage.taken()
    for way, it in ON_CASES[name].flows():
        returned, before, after = stage.ask(it)
        if returned != ON or after != before:
            wrong.append((way, it, returned, before.hex(), after.hex()))
    assert not wrong
    assert stage.taken() == counted


def every_flow() -> list[Flow]:
    return [it for _, it in Case(but()).flows()]


def test_what_is_cut_off_goes_on(stage: Stage) -> None:
    """At each length, from that of the IP header, which is what can be run, to the last that is not enough."""
    for it in every_flow():
        whole = stage.begin(it.but(payload=0))
        assert stage.say(it, whole)[0] == FAST
        wrong = [n for n in range(14 + HEADER[it.version], len(whole)) if stage.say(it, whole[:n]) != (ON, whole[:n])]
        assert not wrong, it


def test_without_a_daemon_everything_goes_on(stage: Stage) -> None:
    given = [(it, stage.begin(it)) for it in every_flow()]
    for seconds, says in ((-1, ON), (600, FAST), (-3600, ON), (3600, FAST)):
        stage.live(seconds)
        assert {stage.say(it, frame)[0] for it, frame in given} == {says}, seconds


def test_a_connection_that_is_cut_goes_on_at_once(stage: Stage) -> None:
    for it in every_flow():
        frame = stage.begin(it)
        assert stage.say(it, frame)[0] == FAST
        stage.command("conntrack", "-D", "-s", it.source, "-d", it.target)
        assert stage.say(it, frame)[0] == ON, it


@pytest.mark.parametrize("version", [4, 6])
def test_a_route_that_is_gone_is_no_way_at_once(stage: Stage, version: int) -> None:
    it = flow(TO_NODE, version)
    frame = stage.begin(it)
    route = [at(version, 2, 0) + {4: "/24", 6: "/64"}[version], "via", at(version, 2, 2), "dev", "pw-vxlan", "onlink"]
    stage.netns.ip("route", "del", *route)
    try:
        assert stage.say(it, frame)[0] == ON
    finally:
        stage.netns.ip("route", "add", *route)
    assert stage.say(it, frame)[0] == FAST


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("asks", ["tos 0x10", "sport {}", "dport {}", "ipproto udp", "iif pw0", "from {} to {}"])
def test_a_rule_about_routes_holds(stage: Stage, version: int, asks: str) -> None:
    it = flow(TO_NODE, version, UDP).but(class_=0x10)
    frame = stage.begin(it)
    ports = struct.unpack_from("!HH", frame, 14 + HEADER[version])
    words = {"sport {}": ports[:1], "dport {}": ports[1:], "from {} to {}": (it.source, it.target)}
    rule = (f"-{version}", "rule", "{}", *asks.format(*words.get(asks, ())).split(), "unreachable")
    stage.netns.ip(*(word.format("add") for word in rule))
    try:
        assert stage.say(it, frame)[0] == ON
    finally:
        stage.netns.ip(*(word.format("del") for word in rule))
    assert stage.say(it, frame)[0] == FAST


def test_a_node_that_does_not_forward_has_no_way_to_others(stage: Stage) -> None:
    given = [(it, stage.begin(it)) for way in TO_OTHERS for it in (flow(way, 4), flow(way, 6))]
    names = [f"net.ipv{version}.conf.pw0.forwarding" for version in (4, 6)]
    stage.netns.run("sysctl", "-qw", *(f"{name}=0" for name in names))
    try:
        assert {stage.say(it, frame)[0] for it, frame in given} == {ON}
    finally:
        stage.netns.run("sysctl", "-qw", *(f"{name}=1" for name in names))
    assert {stage.say(it, frame)[0] for it, frame in given} == {FAST}


@pytest.mark.parametrize("version", [4, 6])
def test_a_pod_that_is_forgotten_sends_and_gets_nothing_the_fast_way(stage: Stage, version: int) -> None:
    key = pod_key(ipaddress.ip_address(at(version, *A)))
    given = [(it, stage.begin(it)) for it in every_flow() if it.version == version]
    others = [(it, stage.begin(it)) for it in every_flow() if it.version != version]
    stage.pods.remove(key)
    try:
        assert {stage.say(it, frame)[0] for it, frame in given} == {ON}
        assert {stage.say(it, frame)[0] for it, frame in others} == {FAST}
    finally:
        stage.pods.put(key, pod_value(stage.index["pwa"], A_MAC))
    assert {stage.say(it, frame)[0] for it, frame in given} == {FAST}


@pytest.mark.parametrize(
    ("fast", "change"),
    [
        (tuple(WAYS), {}),
        ((BESIDE, *ARRIVING), {"vxlan": 0, "underlay": ()}),
        ((BESIDE, TO_NEAR, *ARRIVING), {"vxlan": 0}),
        ((BESIDE, TO_NODE, *ARRIVING), {"underlay": ()}),
        ((), {"pools": tuple(map(ipaddress.ip_network, ("10.251.0.0/16", "fd01::/48")))}),
        ((*TO_OTHERS, *ARRIVING), {"blocks": tuple(map(ipaddress.ip_network, ("10.244.99.0/24", "fd00:1:0:99::/64")))}),
        ((), {"blocks": ()}),
    ],
)
def test_what_a_node_has_no_device_or_pool_for_goes_on(
    stage: Stage, fast: tuple[str, ...], change: dict[str, object]
) -> None:
    programs = {where: stage.load(where, msgspec.structs.replace(stage.node, **change)) for where in Where}
    try:
        found = {
            way for way, it in Case(but()).flows() if stage.say(it, stage.begin(it), programs[it.where])[0] == FAST
        }
    finally:
        for program in programs.values():
            os.close(program)
    assert found == set(fast)


@pytest.mark.parametrize("missing", ["pools", "blocks"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_node_of_one_family_lets_the_other_s_go_on(stage: Stage, version: int, missing: str) -> None:
    """In a cluster of one, or where the node has no block of the other yet."""
    of_one = tuple(each for each in getattr(stage.node, missing) if each.version == version)
    programs = {where: stage.load(where, msgspec.structs.replace(stage.node, **{missing: of_one})) for where in Where}
    try:
        for it in every_flow():
            says = stage.say(it, stage.begin(it), programs[it.where])[0]
            assert says == (FAST if it.version == version else ON), it
    finally:
        for program in programs.values():
            os.close(program)


@given(
    way=st.sampled_from(ROUTED),
    version=st.sampled_from((4, 6)),
    protocol=st.sampled_from((TCP, UDP)),
    hops=st.integers(2, 255),
    class_=st.integers(0, 255),
    identification=st.integers(0, 0xFFFF),
    payload=st.integers(0, 1300),
)
def test_a_hop_is_taken_and_nothing_else_is_touched(stage: Stage, way: str, version: int, **header: int) -> None:
    it = flow(way, version).but(**header)
    returned, before, after = stage.ask(it)
    assert returned == FAST
    assert after == expected(it, before)


@pytest.mark.parametrize("checksum", [0, 1, 0x00FF, 0x0100, 0xFDFF, 0xFEFE, 0xFEFF, 0xFF00, 0xFFFD, 0xFFFE])
def test_the_checksum_is_right_where_it_wraps_around(stage: Stage, checksum: int) -> None:
    """It grows by 0x100, and its carry comes in at the other end (RFC 1624)."""
    for way in ROUTED:
        it = flow(way, 4).but(identification=0)
        (zero,) = struct.unpack_from("!H", stage.begin(it), 24)
        it = it.but(identification=(zero - checksum) % 0xFFFF)
        returned, before, after = stage.ask(it)
        assert struct.unpack_from("!H", before, 24) == (checksum,), "the stage: a header with this checksum"
        assert (returned, after) == (FAST, expected(it, before))
