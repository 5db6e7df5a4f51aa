"""What the kernel of this node should hold: pure, a function of the configuration, this node's record and its peers.

    ┌─ node ──────────────────────────────────────────────────────────────────┐
    │  pod ──veth── pw0 (bridge, gateway of every block)                       │
    │                │                                                         │
    │                ├── 10.244.1.0/24            connected: this node's pods  │
    │                ├── 10.244.2.0/24 via 10.244.2.2 dev pw-vxlan onlink      │──▶ UDP 4789 to the peer
    │                └── default                  masqueraded, as are nodes    │
    └─────────────────────────────────────────────────────────────────────────┘

By VXLAN there is, for each peer, one route a block, and one neighbour entry and one FDB entry a VTEP, all permanent:
nothing is learnt, nothing is resolved, and the cost is three small kernel objects a peer. The inner MAC finds the
underlay address (FDB), the VTEP's address finds the inner MAC (neighbour), the pod's address finds the VTEP (route).

Directly there is the route alone, by the peer's own address on the underlay, when that is on a network that this node
is on, too:

    vxlan    10.244.2.0/24 via 10.244.2.2 dev pw-vxlan onlink          pods have the underlay's MTU less the overhead
    direct   10.244.2.0/24 via 172.31.0.12 dev eth0                    pods have the underlay's MTU
    auto     direct to the nodes on the same network, VXLAN to others  as VXLAN leaves it, once a node is reached by it

The choice is made for each block, so one family may go directly and the other by VXLAN. A node takes both kinds of
packets whatever the backend, and the VXLAN device stays in all of them (it has the VTEP's addresses): nodes that change
from one backend to the other at different moments reach each other meanwhile.

MACs are made from addresses (`0a:58` and the four bytes of an IPv4 address; for IPv6 the last four of a hash), so an
address that moves to a new pod keeps its MAC, and no neighbour entry anywhere is ever stale.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from ipam_daemon.allocator import Layout
from ipam_daemon.cni import Call
from ipam_daemon.errors import TryAgainLater
from ipam_daemon.model import (
    Address,
    Attachment,
    AttachmentKey,
    AttachmentState,
    BackendType,
    Block,
    ClusterConfig,
    Interface,
    Network,
    NodeRecord,
)

BRIDGE = "pw0"
VXLAN = "pw-vxlan"
VXLAN_OVERHEAD = {4: 50, 6: 70}
"""Bytes that VXLAN adds over an underlay of each family: outer IP, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348)."""
ALIAS_LIMIT = 255
"""Longest interface alias that the kernel takes, in bytes (IFALIASZ in if.h, less the NUL)."""
LEAST_MTU = {4: 576, 6: 1280}
"""The smallest MTU that a link of each family may have (RFC 791, RFC 8200 section 5), in bytes."""
NOWHERE: Mapping[Network, str] = MappingProxyType({})
NEVER_MASQUERADED = (ipaddress.ip_network("224.0.0.0/4"), ipaddress.ip_network("ff00::/8"))


class BridgePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The bridge of this node. `addresses` are the gateways, with the prefix length of their blocks; others of `pools`
    that it has are of blocks that are no longer this node's."""

    name: str
    mac: str
    mtu: int
    addresses: tuple[Interface, ...]
    pools: tuple[Network, ...] = ()


class VxlanPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The VXLAN device of this node. `addresses` are its VTEP addresses as host routes (/32, /128); others of `pools`
    that it has are in blocks that are no longer this node's."""

    name: str
    vni: int
    port: int
    local: Address
    mac: str
    mtu: int
    addresses: tuple[Interface, ...]
    pools: tuple[Network, ...] = ()


class RoutePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The way to a peer's block: `gateway` is its VTEP, taken as `onlink`, or its address on the underlay itself."""

    gateway: Address
    device: str
    onlink: bool = True


class PeersPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel holds for all peers together."""

    neighbours: Mapping[Address, str]  # VTEP address → MAC
    fdb: Mapping[str, Address]  # MAC → address on the underlay
    routes: Mapping[Network, RoutePlan]

    @property
    def has_tunnels(self) -> bool:
        """Whether a peer is reached by VXLAN."""
        return bool(self.fdb)


class FirewallPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The elements of this node's nft sets; the rules around them never change.

    A packet from `local_blocks` to anywhere but `unmasqueraded` leaves with the node's address. VXLAN is taken from
    `vteps` alone, and no pod may send it; None while the peers are not known, and then the kernel's stay.
    """

    local_blocks: frozenset[Network]
    unmasqueraded: frozenset[Network]
    vteps: frozenset[Address] | None
    vxlan_port: int


class NodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the kernel of this node should hold, apart from the pods' own wires, which get `mtu`."""

    bridge: BridgePlan
    vxlan: VxlanPlan
    peers: PeersPlan | None
    firewall: FirewallPlan
    backend: BackendType = BackendType.VXLAN

    @property
    def mtu(self) -> int:
        """The MTU of bridge and pods, in bytes."""
        return self.bridge.mtu


def plan_node(
    config: ClusterConfig,
    record: NodeRecord,
    blocks: Iterable[Block],
    underlay_mtu: int,
    mtu: int = 0,
    exempt: Iterable[Network] = (),
    tunnelled: bool = True,
) -> NodePlan:
    """The desired state of the node that `record` is about. `underlay_mtu` and `mtu` (0: made from it) are in bytes.

    `blocks` are the node's own, at least one. Of other nodes it says nothing (`with_peers` does), so that nothing which
    the kernel has of them is removed; `tunnelled` says whether one of them is reached by VXLAN, which with `auto` is
    what the MTU depends on. What goes to `exempt` is not masqueraded.

    Raises TryAgainLater when the underlay leaves less than IPv6 needs.
    """
    cidrs = [block.cidr for block in blocks]
    families = {pool.cidr.version for pool in config.pools} | {cidr.version for cidr in cidrs}
    tunnel_mtu = mtu or underlay_mtu - VXLAN_OVERHEAD[record.addresses[0].version]
    mtu = mtu or (tunnel_mtu if _leaves_room(config.backend.type, tunnelled) else underlay_mtu)
    least = LEAST_MTU[max(families)]
    if mtu < least:
        raise TryAgainLater(f"the underlay's MTU {underlay_mtu} leaves {mtu} for pods, which need {least}")
    layouts = {cidr: Layout.of(cidr) for cidr in cidrs}
    pools = tuple(pool.cidr for pool in config.pools)
    return NodePlan(
        bridge=BridgePlan(
            name=BRIDGE,
            mac=mac_of(layouts[cidrs[0]].gateway),
            mtu=mtu,
            addresses=tuple(ipaddress.ip_interface(f"{layouts[cidr].gateway}/{cidr.prefixlen}") for cidr in cidrs),
            pools=pools,
        ),
        vxlan=VxlanPlan(
            name=VXLAN,
            vni=config.backend.vni,
            port=config.backend.port,
            local=record.addresses[0],
            mac=record.vtep_mac,
            mtu=max(least, tunnel_mtu),
            addresses=tuple(ipaddress.ip_interface(address) for address in record.vtep_addresses),
            pools=pools,
        ),
        peers=None,
        firewall=FirewallPlan(
            local_blocks=frozenset(cidrs),
            unmasqueraded=_unmasqueraded([*pools, *NEVER_MASQUERADED, *exempt]),
            vteps=None,
            vxlan_port=config.backend.port,
        ),
        backend=config.backend.type,
    )


def _leaves_room(backend: BackendType, tunnelled: bool) -> bool:
    """Whether pods have to leave room for VXLAN."""
    return backend is BackendType.VXLAN or (backend is BackendType.AUTO and tunnelled)


def with_peers(plan: NodePlan, peers: PeersPlan, vteps: frozenset[Address]) -> NodePlan:
    """The plan of a node whose peers are known now. `vteps` are their addresses on the underlay."""
    firewall = msgspec.structs.replace(plan.firewall, vteps=vteps)
    return msgspec.structs.replace(plan, peers=peers, firewall=firewall)


def plan_peers(
    peers: Iterable[NodeRecord],
    backend: BackendType = BackendType.VXLAN,
    on_link: Mapping[Network, str] = NOWHERE,
    underlay_family: int = 0,
) -> PeersPlan:
    """Routes, neighbours and FDB entries towards `peers`. Of two records that claim one thing, the first has it.

    `underlay_family` is that of the outer packets of VXLAN, 4 or 6; 0 takes each peer's first address.
    """
    neighbours: dict[Address, str] = {}
    fdb: dict[str, Address] = {}
    routes: dict[Network, RoutePlan] = {}
    for peer in peers:
        end = next((each for each in peer.addresses if underlay_family in (0, each.version)), None)
        hops = {} if backend is BackendType.VXLAN else _direct_hops(peer, on_link)
        tunnelled = set()
        for cidr in peer.blocks:
            vtep = next((vtep for vtep in peer.vtep_addresses if vtep.version == cidr.version), None)
            if cidr.version in hops:
                routes.setdefault(cidr, hops[cidr.version])
            elif backend is not BackendType.DIRECT and vtep is not None and end is not None:
                routes.setdefault(cidr, RoutePlan(gateway=vtep, device=VXLAN))
                tunnelled.add(vtep)
        for vtep in tunnelled:
            neighbours.setdefault(vtep, peer.vtep_mac)
        if tunnelled and end is not None:
            fdb.setdefault(peer.vtep_mac, end)
    return PeersPlan(neighbours=neighbours, fdb=fdb, routes=routes)


def _direct_hops(peer: NodeRecord, on_link: Mapping[Network, str]) -> dict[int, RoutePlan]:
    """Family → the way to the peer without a router, where there is one."""
    hops: dict[int, RoutePlan] = {}
    for address in peer.addresses:
        device = next((device for network, device in on_link.items() if address in network), None)
        if device is not None:
            hops.setdefault(address.version, RoutePlan(gateway=address, device=device, onlink=False))
    return hops


def _unmasqueraded(networks: Iterable[Network]) -> frozenset[Network]:
    """Without overlaps, which an nft set of intervals refuses."""
    by_family: dict[int, list[Any]] = {4: [], 6: []}
    for network in networks:
        by_family[network.version].append(network)
    return frozenset(each for family in by_family.values() for each in ipaddress.collapse_addresses(family))


def plan_record(
    name: str, node_id: str, generation: int, addresses: tuple[Address, ...], blocks: Iterable[Block], version: str
) -> NodeRecord:
    """What this node tells its peers: its VTEP is in the first of its blocks of each family."""
    vteps: dict[int, Address] = {}
    cidrs = [block.cidr for block in blocks]
    for cidr in cidrs:
        vteps.setdefault(cidr.version, Layout.of(cidr).vtep)
    return NodeRecord(
        name=name,
        node_id=node_id,
        generation=generation,
        addresses=addresses,
        vtep_mac=mac_of(next(iter(vteps.values()))) if vteps else "",
        vtep_addresses=tuple(vteps.values()),
        blocks=tuple(cidrs),
        version=version,
    )


def plan_attachment(call: Call, addresses: tuple[Interface, ...], mtu: int, now: float) -> Attachment:
    """The wire of an ADD. The host's interface is named after the attachment and the moment, so that a container that
    is added again while its old wire is still being deleted gets another name."""
    digest = hashlib.sha256(f"{call.key} {call.issued_ns} {addresses}".encode()).hexdigest()
    return Attachment(
        key=call.key,
        netns=call.netns,
        host_ifname=f"pw{digest[:12]}",
        mac=call.wanted.mac or mac_of(addresses[0].ip),
        mtu=mtu,
        addresses=addresses,
        pod=call.pod,
        port_mappings=call.wanted.port_mappings,
        bandwidth=call.wanted.bandwidth,
        created=now,
        created_ns=call.issued_ns,
    )


def gateways(blocks: Iterable[Block]) -> dict[Network, Address]:
    """Block → the gateway of the pods in it."""
    return {block.cidr: Layout.of(block.cidr).gateway for block in blocks}


def mac_of(address: Address) -> str:
    """The locally administered MAC that belongs to an address."""
    tail = address.packed if address.version == 4 else hashlib.sha256(address.packed).digest()[:4]
    return ":".join(f"{byte:02x}" for byte in b"\x0a\x58" + tail)


# --- what a wire says about itself, so that a lost journal can be rebuilt from the kernel -------------------------


def alias_of(attachment: Attachment) -> str:
    """The alias of the host's interface: whose it is, which addresses it has, and its MAC when that was asked for by
    name. Empty when it would not fit."""
    addresses = ",".join(map(str, attachment.addresses))
    asked = "" if attachment.mac == mac_of(attachment.addresses[0].ip) else f" {attachment.mac}"
    alias = f"podwire {attachment.key} {addresses} {attachment.created_ns}{asked}"
    return alias if len(alias.encode()) <= ALIAS_LIMIT else ""


def attachment_of(alias: str, host_ifname: str, mtu: int, now: float) -> Attachment | None:
    """The attachment that an alias describes, None when the alias is not ours. Its netns is not known."""
    try:
        mark, key, addresses, created_ns, *asked = alias.split(" ")
        network, container_id, ifname = key.split("/")
        interfaces = tuple(ipaddress.ip_interface(each) for each in addresses.split(","))
        created = int(created_ns)
    except ValueError:
        return None
    if mark != "podwire":
        return None
    return Attachment(
        key=AttachmentKey(network, container_id, ifname),
        netns="",
        host_ifname=host_ifname,
        mac=asked[0] if asked else mac_of(interfaces[0].ip),
        mtu=mtu,
        addresses=interfaces,
        state=AttachmentState.ATTACHED,
        created=now,
        created_ns=created,
    )


def is_same_wire(found: Attachment, row: Attachment) -> bool:
    """Whether a wire that was found by its alias is this row's, perhaps under another name."""
    return (found.key, found.created_ns, found.addresses) == (row.key, row.created_ns, row.addresses)


def is_complete(peer: NodeRecord) -> bool:
    """Whether the record says what it takes to reach the node's pods."""
    return bool(peer.addresses and peer.vtep_mac and peer.vtep_addresses)
