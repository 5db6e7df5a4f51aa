"""Ports of the node on paper: what is asked for, who has which, the table's text and its elements."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_daemon.errors import CniError
from ipam_daemon.hostport_rules import MARK, is_whole, render
from ipam_daemon.hostports import (
    Element,
    Entry,
    check_families,
    describe,
    elements,
    mappings_of,
    overlap,
    parse,
    shadows,
)
from ipam_daemon.model import Attachment, AttachmentKey, PortMapping, decode, encode

GOLDEN = Path(__file__).parent.parent / "golden" / "hostports.nft"
FOUR, SIX = ipaddress.ip_interface("10.244.1.3/24"), ipaddress.ip_interface("fd00:1::3/120")


def entry(host: int | None = 8080, to: int | None = 80, protocol: str | None = "tcp", ip: str | None = None) -> Entry:
    return Entry(host_port=host, container_port=to, protocol=protocol, host_ip=ip)


def mapping(protocol: str = "tcp", host: int = 8080, to: int = 80, ip: str = "") -> PortMapping:
    address = ipaddress.ip_address(ip) if ip else None
    return PortMapping(protocol=protocol, host_port=host, container_port=to, host_ip=address)


ASKED: dict[str, tuple[list[Entry], list[PortMapping]]] = {
    "nothing": ([], []),
    "one, as containerd writes it": ([entry(ip="")], [mapping()]),
    "in capitals, as Kubernetes writes it": ([entry(protocol="UDP")], [mapping("udp")]),
    "no protocol is TCP": ([entry(protocol=None), entry(host=81, protocol="")], [mapping(), mapping(host=81)]),
    "SCTP": ([entry(protocol="sctp")], [mapping("sctp")]),
    "an address of the node": ([entry(ip="192.0.2.1")], [mapping(ip="192.0.2.1")]),
    "all of a family": ([entry(ip="0.0.0.0"), entry(ip="::")], [mapping(ip="0.0.0.0"), mapping(ip="::")]),
    "an address in another spelling": ([entry(ip="2001:DB8:0::1")], [mapping(ip="2001:db8::1")]),
    "an address of IPv4, as IPv6 writes it": ([entry(ip="::ffff:192.0.2.1")], [mapping(ip="192.0.2.1")]),
    "all of IPv4, as IPv6 writes it": ([entry(ip="::ffff:0.0.0.0")], [mapping(ip="0.0.0.0")]),
    "localhost": ([entry(ip="127.0.0.1")], [mapping(ip="127.0.0.1")]),
    "the same twice": ([entry(), entry()], [mapping()]),
    "the highest ports": ([entry(65535, 65535)], [mapping(host=65535, to=65535)]),
    "one address elsewhere than all": (
        [entry(), entry(to=81, ip="192.0.2.1")],
        [mapping(), mapping(to=81, ip="192.0.2.1")],
    ),
}


@pytest.mark.parametrize(("entries", "expected"), ASKED.values(), ids=ASKED.keys())
def test_what_is_asked_for(entries: list[Entry], expected: list[PortMapping]) -> None:
    assert parse(entries) == tuple(expected)


WRONG: dict[str, tuple[list[Entry], int, str]] = {
    "no host port": ([entry(None)], 7, r"portMappings\[0\].hostPort is missing, expected 1 to 65535"),
    "host port 0": ([entry(), entry(0)], 7, r"portMappings\[1\].hostPort is 0, expected 1 to 65535"),
    "host port 65536": ([entry(65536)], 7, "hostPort is 65536"),
    "no container port": ([entry(to=None)], 7, "containerPort is missing"),
    "container port 0": ([entry(to=0)], 7, "containerPort is 0"),
    "a negative one": ([entry(to=-1)], 7, "containerPort is -1"),
    "another protocol": (
        [entry(protocol="icmp")],
        7,
        r"portMappings\[0\].protocol is 'icmp', expected tcp, udp or sctp",
    ),
    "a name": ([entry(ip="node1")], 7, r"portMappings\[0\].hostIP is 'node1', expected an address"),
    "a network": ([entry(ip="192.0.2.0/24")], 7, "hostIP is '192.0.2.0/24'"),
    "a group": ([entry(ip="224.0.0.1")], 7, "hostIP is '224.0.0.1', expected an address of the node"),
    "an address of a link": ([entry(ip="fe80::1%eth0")], 7, "hostIP is 'fe80::1%eth0'"),
    "one of IPv4 of a link": ([entry(ip="::ffff:192.0.2.1%eth0")], 7, "hostIP is '::ffff:192.0.2.1%eth0'"),
    "localhost of IPv6": ([entry(ip="::1")], 2, "hostIP is '::1': the kernel takes nothing from ::1"),
    "one port, two targets": ([entry(), entry(to=81)], 7, r"\[1\] maps port 8080/tcp to 81, .* port 8080/tcp to 80"),
    "all addresses in two ways": ([entry(), entry(to=81, ip="::")], 7, r"\[1\] maps \[::\]:8080/tcp to 81, .* to 80"),
}


@pytest.mark.parametrize(("entries", "code", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(entries: list[Entry], code: int, said: str) -> None:
    with pytest.raises(CniError, match=said) as caught:
        parse(entries)
    assert caught.value.code == code


def test_a_family_that_the_pod_has_not() -> None:
    check_families([mapping(), mapping(ip="0.0.0.0")], [FOUR])
    for ip in ("::", "2001:db8::1"):
        with pytest.raises(CniError, match=f"hostIP '{ip}', and the pod gets no IPv6 address") as caught:
            check_families([mapping(ip=ip)], [FOUR])
        assert caught.value.code == 2


ANY, FIRST, SECOND, SIXTH = "", "192.0.2.1", "192.0.2.2", "2001:db8::1"
CLAIMS = {
    "any and any": (ANY, ANY, True),
    "any and one": (ANY, FIRST, True),
    "any and one of IPv6": (ANY, SIXTH, True),
    "all of IPv4 and one": ("0.0.0.0", FIRST, True),
    "all of IPv4 and localhost": ("0.0.0.0", "127.0.0.1", True),
    "all of IPv6 and one": ("::", SIXTH, True),
    "the same": (FIRST, FIRST, True),
    "two addresses": (FIRST, SECOND, False),
    "two families": (FIRST, SIXTH, False),
    "all of each family": ("0.0.0.0", "::", False),
    "all of IPv6 and one of IPv4": ("::", FIRST, False),
}


@pytest.mark.parametrize(("one", "other", "expected"), CLAIMS.values(), ids=CLAIMS.keys())
def test_who_is_in_whose_way(one: str, other: str, expected: bool) -> None:
    a, b = (ipaddress.ip_address(text) if text else None for text in (one, other))
    assert overlap(a, b) == overlap(b, a) == expected


LISTENING = {
    "everywhere": (ANY, "0.0.0.0", True),
    "everywhere in IPv6": (ANY, "::", True),
    "everywhere in IPv6, and one of it is asked for": (SIXTH, "::", True),
    "everywhere in IPv6, and all of IPv4 is asked for": ("0.0.0.0", "::", False),
    "everywhere in IPv6, and one of IPv4 is asked for": (FIRST, "::", False),
    "at one address": (ANY, FIRST, True),
    "at localhost": (ANY, "127.0.0.1", True),
    "at the resolver's address, which is not mapped": (ANY, "127.0.0.53", False),
    "at ::1, which is not mapped": (ANY, "::1", False),
    "at an address of a link, which is not mapped": (ANY, "fe80::1", False),
    "at an address of a link, and all of IPv6 is asked for": ("::", "fe80::1", False),
    "at another address": (SECOND, FIRST, False),
    "everywhere, and one is asked for": (FIRST, "0.0.0.0", True),
    "everywhere, and one of IPv6 is asked for": (SIXTH, "0.0.0.0", False),
    "at one of IPv6, and all of IPv4 is asked for": ("0.0.0.0", SIXTH, False),
    "at the resolver's address, which is asked for": ("127.0.0.53", "127.0.0.53", True),
}


@pytest.mark.parametrize(("asked", "listening", "expected"), LISTENING.values(), ids=LISTENING.keys())
def test_whether_the_node_itself_listens_there(asked: str, listening: str, expected: bool) -> None:
    assert shadows(mapping(ip=asked), ipaddress.ip_address(listening)) == expected


def test_a_port_in_words() -> None:
    said = [describe(each) for each in (mapping(), mapping("udp", ip="192.0.2.1"), mapping(ip="2001:db8::1"))]
    assert said == ["port 8080/tcp", "192.0.2.1:8080/udp", "[2001:db8::1]:8080/tcp"]


# --- elements -------------------------------------------------------------------------------------------------------


def attachment(
    *mappings: PortMapping, families: tuple[ipaddress.IPv4Interface | ipaddress.IPv6Interface, ...]
) -> Attachment:
    return Attachment(
        key=AttachmentKey("podnet", "c1", "eth0"),
        netns="/run/netns/c1",
        host_ifname="pw0123456789ab",
        mac="0a:58:0a:f4:01:03",
        mtu=1450,
        addresses=families,
        port_mappings=mappings,
        created=1.0,
        created_ns=1,
    )


def test_an_element_is_packed_as_nft_packs_it() -> None:
    """What `nft --debug=netlink` shows of `1.2.3.4 . sctp . 8080 : 10.244.1.3 . 80`, in network order."""
    (found,) = {e for e in elements(attachment(mapping("sctp", ip="1.2.3.4"), families=(FOUR,))) if e.data}
    assert found == Element(
        "specific4", bytes.fromhex("01020304 84000000 1f900000"), bytes.fromhex("0af40103 00500000")
    )


def test_a_mapping_is_an_element_for_each_family_and_a_pod_is_one_more() -> None:
    names = sorted(each.name for each in elements(attachment(mapping(), mapping("udp"), families=(FOUR, SIX))))
    assert names == ["any4", "any4", "any6", "any6", "hairpin4", "hairpin6"]
    assert elements(attachment(families=(FOUR,))) == frozenset()
    only = elements(attachment(mapping(ip="0.0.0.0"), mapping(ip="2001:db8::1"), families=(FOUR, SIX)))
    assert sorted(each.name for each in only) == ["any4", "hairpin4", "hairpin6", "specific6"]


ADDRESSES = st.sampled_from([None, *map(ipaddress.ip_address, ("0.0.0.0", "192.0.2.1", "2001:db8::1"))])
MAPPINGS = st.builds(
    PortMapping,
    protocol=st.sampled_from(["tcp", "udp", "sctp"]),
    host_port=st.integers(1, 65535),
    container_port=st.integers(1, 65535),
    host_ip=ADDRESSES,
)


@given(st.lists(MAPPINGS, max_size=5, unique_by=lambda each: (each.protocol, each.host_port)))
def test_the_kernel_tells_what_a_lost_journal_has_forgotten(mappings: list[PortMapping]) -> None:
    pod = attachment(*mappings, families=(FOUR, SIX))
    others = elements(attachment(mapping("udp", 53), families=(ipaddress.ip_interface("10.244.1.9/24"),)))
    assert set(mappings_of(elements(pod) | others, pod.addresses)) == set(mappings)
    assert decode(encode(pod), Attachment) == pod


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_whole_table_as_it_is_made() -> None:
    """After a change that is meant, the golden file is what this test's failure shows."""
    assert render() == GOLDEN.read_text(encoding="utf-8")


def test_a_table_of_another_version_is_not_whole() -> None:
    rules = [(line.split()[4], "") for line in render().splitlines() if line.startswith("add rule")]
    mine = [(chain, MARK if chain == "shape" else "") for chain, _ in rules]
    assert is_whole(mine)
    assert not is_whole([])
    assert not is_whole(mine[1:]), "a chain that somebody flushed"
    assert not is_whole([(chain, "another" if chain == "shape" else "") for chain, _ in rules])
