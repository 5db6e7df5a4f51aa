"""Plans: a pure function of configuration, record and peers."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_daemon.cni import Call, NetworkConfig
from ipam_daemon.errors import TryAgainLater
from ipam_daemon.model import (
    Attachment,
    AttachmentKey,
    AttachmentState,
    Backend,
    BackendType,
    Block,
    ClusterConfig,
    NodeRecord,
    PodRef,
    Pool,
)
from ipam_daemon.peer_table import PeerTable
from ipam_daemon.plan import (
    ALIAS_LIMIT,
    NodePlan,
    RoutePlan,
    alias_of,
    attachment_of,
    mac_of,
    plan_attachment,
    plan_node,
    plan_peers,
    plan_record,
    with_peers,
)

CONFIG = ClusterConfig(pools=(Pool(cidr=ipaddress.ip_network("10.244.0.0/16")),), backend=Backend(vni=7, port=8472))


def block(cidr: str, node: str = "node-1") -> Block:
    return Block(cidr=ipaddress.ip_network(cidr), pool="default", node=node, node_id=f"id-{node}", generation=1)


def record(number: int, *cidrs: str, address: str = "") -> NodeRecord:
    """The record of node-<number>, whose block is 10.244.<number>.0/24 unless others are given."""
    name = f"node-{number}"
    blocks = [block(cidr, name) for cidr in cidrs or (f"10.244.{number}.0/24",)]
    addresses = (ipaddress.ip_address(address or f"192.0.2.{number}"),)
    return plan_record(name, f"id-{name}", 1, addresses, blocks, "0.1")


def plan(*peers: NodeRecord, known: bool = True, **more: Any) -> NodePlan:
    mine = record(1)
    got = plan_node(CONFIG, mine, [block("10.244.1.0/24")], **{"underlay_mtu": 1500, **more})
    return beside(got, mine, *peers) if known else got


def beside(got: NodePlan, *nodes: NodeRecord) -> NodePlan:
    """The plan of the first of these nodes with the others in it."""
    table = PeerTable(nodes[0].name, plan_peers, nodes[0].addresses)
    table.update({each.name: each for each in nodes}, nodes[0].blocks)
    return with_peers(got, table.peers, table.vteps)


def test_a_node_alone() -> None:
    got = plan()
    assert str(got.bridge.addresses[0]) == "10.244.1.1/24"
    assert got.bridge.mac == "0a:58:0a:f4:01:01"
    assert (got.vxlan.vni, got.vxlan.port, str(got.vxlan.local)) == (7, 8472, "192.0.2.1")
    assert [str(each) for each in got.vxlan.addresses] == ["10.244.1.2/32"]
    assert got.bridge.pools == got.vxlan.pools == (CONFIG.pools[0].cidr,)
    assert got.peers is not None
    assert (dict(got.peers.neighbours), dict(got.peers.fdb), dict(got.peers.routes)) == ({}, {}, {})
    assert got.firewall.vteps == frozenset()


def test_a_peer_is_a_route_a_neighbour_and_an_fdb_entry() -> None:
    peers = plan(record(2)).peers
    assert peers is not None
    vtep, mac = ipaddress.ip_address("10.244.2.2"), "0a:58:0a:f4:02:02"
    assert peers.routes == {ipaddress.ip_network("10.244.2.0/24"): RoutePlan(gateway=vtep, device="pw-vxlan")}
    assert peers.neighbours == {vtep: mac}
    assert peers.fdb == {mac: ipaddress.ip_address("192.0.2.2")}


def test_a_peer_with_two_blocks_has_one_vtep() -> None:
    peers = plan(record(2, "10.244.2.0/24", "10.244.9.0/24")).peers
    assert peers is not None
    assert {str(each) for each in peers.routes} == {"10.244.2.0/24", "10.244.9.0/24"}
    assert len(peers.neighbours) == len(peers.fdb) == 1


def node(number: int, *families: int, segment: int = 0) -> NodeRecord:
    """Node <number> with an address and a block of each of these families, on 192.0.<segment>.0/24 and its like."""
    addresses = {4: f"192.0.{segment}.{number}", 6: f"2001:db8:{segment}::{number}"}
    cidrs = {4: f"10.244.{number}.0/24", 6: f"fd00:10:244:{number}::/64"}
    made = record(number, *(cidrs[family] for family in families))
    return msgspec.structs.replace(made, addresses=tuple(ipaddress.ip_address(addresses[each]) for each in families))


ON_LINK = {ipaddress.ip_network("192.0.0.0/24"): "eth0", ipaddress.ip_network("2001:db8:0::/64"): "eth0"}
WAYS = {  # peer, backend → device and gateway of its routes
    "VXLAN, whoever is near": (node(2, 4, 6), "vxlan", {"pw-vxlan via 10.244.2.2", "pw-vxlan via fd00:10:244:2::2"}),
    "direct to a node on the same network": (node(2, 4, 6), "direct", {"eth0 via 192.0.0.2", "eth0 via 2001:db8::2"}),
    "no way directly to a node on another network": (node(2, 4, 6, segment=1), "direct", set()),
    "auto to a node on the same network": (node(2, 4, 6), "auto", {"eth0 via 192.0.0.2", "eth0 via 2001:db8::2"}),
    "auto to a node on another network": (node(2, 4, segment=1), "auto", {"pw-vxlan via 10.244.2.2"}),
    "auto, one family near and one far": (
        msgspec.structs.replace(
            node(2, 4, 6), addresses=tuple(map(ipaddress.ip_address, ("192.0.0.2", "2001:db8:9::2")))
        ),
        "auto",
        {"eth0 via 192.0.0.2", "pw-vxlan via fd00:10:244:2::2"},
    ),
    "auto, an IPv6 pod on nodes that have IPv4 alone": (
        msgspec.structs.replace(node(2, 4, 6), addresses=(ipaddress.ip_address("192.0.0.2"),)),
        "auto",
        {"eth0 via 192.0.0.2", "pw-vxlan via fd00:10:244:2::2"},
    ),
}


@pytest.mark.parametrize(("peer", "backend", "ways"), WAYS.values(), ids=WAYS.keys())
def test_the_way_to_a_peer(peer: NodeRecord, backend: str, ways: set[str]) -> None:
    got = plan_peers([peer], BackendType(backend), ON_LINK, 4)
    assert {f"{route.device} via {route.gateway}" for route in got.routes.values()} == ways
    assert all(route.onlink == (route.device == "pw-vxlan") for route in got.routes.values())
    tunnelled = {route.gateway for route in got.routes.values() if route.onlink}
    assert got.neighbours == dict.fromkeys(tunnelled, peer.vtep_mac)
    assert len(got.fdb) == bool(tunnelled)


def test_the_outer_packet_is_of_this_nodes_family() -> None:
    peer = node(2, 4, 6)
    for family in (4, 6):
        (end,) = plan_peers([peer], BackendType.VXLAN, {}, family).fdb.values()
        assert end.version == family
    assert plan_peers([node(2, 4)], BackendType.VXLAN, {}, 6) == plan_peers([])


MTUS_OF_BACKENDS = {
    "direct has the underlay's whole": ("direct", (4,), 1500, 0, (1500, 1450)),
    "VXLAN over IPv6": ("vxlan", (6,), 1500, 0, (1430, 1430)),
    "what the configuration says goes first": ("direct", (4,), 1500, 1400, (1400, 1400)),
    "a VXLAN device with IPv6 has no less than it needs": ("direct", (6,), 1300, 0, (1300, 1280)),
}
MTUS_OF_AUTO = {  # peers, what the configuration says → pods' MTU
    "nobody else": ([], 0, 1500),
    "all near": ([node(2, 4), node(3, 4)], 0, 1500),
    "one far": ([node(2, 4), node(3, 4, segment=1)], 0, 1450),
    "one near by one family alone": ([msgspec.structs.replace(node(2, 4, 6), addresses=node(2, 4).addresses)], 0, 1450),
    "what the configuration says goes first": ([node(2, 4)], 1400, 1400),
}


@pytest.mark.parametrize(
    ("backend", "families", "underlay", "mtu", "wanted"), MTUS_OF_BACKENDS.values(), ids=MTUS_OF_BACKENDS.keys()
)
def test_mtus(backend: str, families: tuple[int, ...], underlay: int, mtu: int, wanted: tuple[int, int]) -> None:
    mine = node(1, *families)
    config = ClusterConfig(pools=CONFIG.pools, backend=Backend(type=BackendType(backend)))
    got = plan_node(config, mine, [block(str(cidr)) for cidr in mine.blocks], underlay, mtu)
    assert (got.mtu, got.vxlan.mtu) == wanted


@pytest.mark.parametrize(("peers", "mtu", "wanted"), MTUS_OF_AUTO.values(), ids=MTUS_OF_AUTO.keys())
def test_the_mtu_of_auto_is_whole_until_a_node_is_reached_by_vxlan(
    peers: list[NodeRecord], mtu: int, wanted: int
) -> None:
    config = ClusterConfig(pools=CONFIG.pools, backend=Backend(type=BackendType.AUTO))
    tunnelled = plan_peers(peers, BackendType.AUTO, ON_LINK, 4).has_tunnels
    got = plan_node(config, node(1, 4), [block("10.244.1.0/24")], 1500, mtu, tunnelled=tunnelled)
    assert (got.mtu, got.vxlan.mtu) == (wanted, mtu or 1450)


def test_an_underlay_that_leaves_too_little_for_ipv6_is_refused() -> None:
    with pytest.raises(TryAgainLater, match="the underlay's MTU 1300 leaves 1230 for pods, which need 1280"):
        plan_node(CONFIG, node(1, 6), [block("fd00:10:244:1::/64")], 1300)


def test_exemptions_that_overlap_the_pools_become_one() -> None:
    exempt = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "10.1.0.0/16", "fd00::/8")]
    firewall = plan(exempt=exempt).firewall
    assert {str(each) for each in firewall.unmasqueraded} == {"10.0.0.0/8", "224.0.0.0/4", "fd00::/8", "ff00::/8"}


INCOMPLETE = {
    "no address yet": {"addresses": ()},
    "no block yet": {"blocks": (), "vtep_mac": "", "vtep_addresses": ()},
}


@pytest.mark.parametrize("lacks", INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_a_peer_that_is_not_complete_is_passed_over(lacks: dict[str, Any]) -> None:
    assert plan(msgspec.structs.replace(record(2), **lacks)) == plan()


def test_of_two_records_that_claim_one_block_the_first_by_name_has_it() -> None:
    thief = record(3, "10.244.2.0/24")
    for peers in ((record(2), thief), (thief, record(2))):
        got = plan(*peers).peers
        assert got is not None
        assert list(got.fdb.values()) == [ipaddress.ip_address("192.0.2.2")]


def test_peers_that_are_not_known_leave_the_kernels_alone() -> None:
    got = plan(known=False)
    assert got.peers is None
    assert got.firewall.vteps is None
    assert got.bridge == plan().bridge


def test_pod_to_pod_and_multicast_are_never_masqueraded() -> None:
    firewall = plan(record(2)).firewall
    assert {str(each) for each in firewall.local_blocks} == {"10.244.1.0/24"}
    assert {str(each) for each in firewall.unmasqueraded} == {"10.244.0.0/16", "224.0.0.0/4", "ff00::/8"}
    assert {str(each) for each in firewall.vteps or ()} == {"192.0.2.2"}


MTUS = {
    "an Ethernet underlay": ({"underlay_mtu": 1500}, 1450),
    "a jumbo underlay": ({"underlay_mtu": 9000}, 8950),
    "as the configuration says": ({"underlay_mtu": 1500, "mtu": 1400}, 1400),
}


@pytest.mark.parametrize(("given_", "expected"), MTUS.values(), ids=MTUS.keys())
def test_the_mtu_leaves_room_for_the_tunnel(given_: dict[str, Any], expected: int) -> None:
    got = plan(**given_)
    assert (got.bridge.mtu, got.vxlan.mtu) == (expected, expected)


def test_the_mtu_over_ipv6_leaves_more() -> None:
    mine = record(1, address="2001:db8::1")
    assert plan_node(CONFIG, mine, [block("10.244.1.0/24")], 1500).bridge.mtu == 1430


def test_dual_stack_takes_the_same_path() -> None:
    mine = record(1, "10.244.1.0/24", "fd00:1::/120")
    peer = record(2, "10.244.2.0/24", "fd00:2::/120")
    blocks = [block("10.244.1.0/24"), block("fd00:1::/120")]
    got = beside(plan_node(CONFIG, mine, blocks, 1500), mine, peer)
    assert [str(each) for each in got.bridge.addresses] == ["10.244.1.1/24", "fd00:1::1/120"]
    assert [str(each) for each in got.vxlan.addresses] == ["10.244.1.2/32", "fd00:1::2/128"]
    assert got.peers is not None
    assert {str(cidr): str(route.gateway) for cidr, route in got.peers.routes.items()} == {
        "10.244.2.0/24": "10.244.2.2",
        "fd00:2::/120": "fd00:2::2",
    }


def test_a_record_of_a_node_without_blocks_is_not_complete() -> None:
    got = plan_record("n", "i", 1, (), (), "0.1")
    assert (got.vtep_mac, got.vtep_addresses, got.blocks) == ("", (), ())


@given(number=st.integers(2, 50), order=st.randoms())
def test_the_order_of_records_does_not_matter(number: int, order: Any) -> None:
    peers = [record(each) for each in range(2, number + 2)]
    expected = plan(*peers)
    order.shuffle(peers)
    assert plan(*peers) == expected


def test_macs_are_unicast_local_and_follow_the_address() -> None:
    assert mac_of(ipaddress.ip_address("10.244.1.3")) == "0a:58:0a:f4:01:03"
    six = mac_of(ipaddress.ip_address("fd00::3"))
    assert six == mac_of(ipaddress.ip_address("fd00:0::3")) != mac_of(ipaddress.ip_address("fd00::4"))
    assert int(six[:2], 16) & 0b11 == 0b10


def call(issued_ns: int) -> Call:
    return Call(
        command="ADD",
        config=NetworkConfig(name="podnet", cni_version="1.1.0"),
        container_id="c1",
        ifname="eth0",
        netns="/run/netns/c1",
        pod=PodRef(),
        issued_ns=issued_ns,
    )


def test_a_container_that_is_added_again_gets_a_host_interface_of_another_name() -> None:
    addresses = (ipaddress.ip_interface("10.244.1.3/24"),)
    first, second = (plan_attachment(call(issued), addresses, 1450, 1.0).host_ifname for issued in (1, 2))
    assert first != second
    assert len(first) <= 15


# --- aliases ------------------------------------------------------------------------------------------------------

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,70}", fullmatch=True)
ifnames = st.from_regex(r"[a-z0-9@_\-]{1,15}", fullmatch=True)
interfaces = st.lists(
    st.builds(
        lambda address, length: ipaddress.ip_interface(f"{address}/{length if address.version == 4 else length * 4}"),
        st.ip_addresses(),
        st.integers(8, 30),
    ),
    min_size=1,
    max_size=2,
).map(tuple)
attachments = st.builds(
    lambda network, container_id, ifname, addresses, created_ns: Attachment(
        key=AttachmentKey(network, container_id, ifname),
        netns="",
        host_ifname="pw0123456789ab",
        mac=mac_of(addresses[0].ip),
        mtu=1450,
        addresses=addresses,
        state=AttachmentState.ATTACHED,
        created=5.0,
        created_ns=created_ns,
    ),
    names,
    names,
    ifnames,
    interfaces,
    st.integers(0, 2**63),
)


@given(attachments)
def test_an_alias_says_all_that_the_journal_needs(attachment: Attachment) -> None:
    alias = alias_of(attachment)
    if alias:
        assert len(alias.encode()) <= ALIAS_LIMIT
        assert attachment_of(alias, "pw0123456789ab", 1450, 5.0) == attachment
    else:
        longest = len(attachment.key.network + attachment.key.container_id + attachment.key.ifname)
        assert longest + 2 * 50 + 30 > ALIAS_LIMIT - 30, "only what is really long has none"


def test_an_alias_that_would_not_fit_is_none() -> None:
    attachment = plan_attachment(call(1), (ipaddress.ip_interface("10.244.1.3/24"),), 1450, 1.0)
    long = msgspec.structs.replace(attachment, key=AttachmentKey("n" * 200, "c" * 64, "eth0"))
    assert alias_of(long) == ""


@given(st.text() | st.text().map(lambda tail: f"podwire {tail}"))
def test_the_alias_of_somebody_else_is_nobodys(alias: str) -> None:
    got = attachment_of(alias, "eth7", 1500, 1.0)
    assert got is None or alias.startswith("podwire ")


FOREIGN = {
    "empty": "",
    "words": "uplink to the rack",
    "our mark alone": "podwire",
    "another mark": "calico podnet/c1/eth0 10.244.1.3/24 7",
    "no addresses": "podwire podnet/c1/eth0  7",
    "a key of two parts": "podwire podnet/c1 10.244.1.3/24 7",
    "no number": "podwire podnet/c1/eth0 10.244.1.3/24 soon",
    "no address": "podwire podnet/c1/eth0 10.244.1.300/24 7",
}


@pytest.mark.parametrize("alias", FOREIGN.values(), ids=FOREIGN.keys())
def test_an_alias_that_is_not_ours(alias: str) -> None:
    assert attachment_of(alias, "eth7", 1500, 1.0) is None
