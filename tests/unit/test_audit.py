"""What differs between etcd, journal, kernel and runtime: one node that is well, and one thing changed at a time."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipam_daemon import hostports, ruleset, spoofguard
from ipam_daemon.audit import compare
from ipam_daemon.differences import KINDS, lasting
from ipam_daemon.facts import Facts, Journaled, Kernel, Link, Registered, Runtime, Sandbox
from ipam_daemon.hostports import TableState
from ipam_daemon.model import (
    Attachment,
    AttachmentKey,
    AttachmentState,
    Bandwidth,
    Block,
    ClusterConfig,
    NodeRecord,
    PodRef,
    Pool,
    PortMapping,
)
from ipam_daemon.plan import RoutePlan, alias_of, mac_of, plan_node, plan_peers, plan_record, with_peers
from ipam_daemon.spoofguard import GuardState

NOW = 1000.0
CIDR, PEER, THIRD = (ipaddress.ip_network(f"10.244.{number}.0/24") for number in (1, 2, 3))
POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"))
DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def block(cidr: Any, node: str = "node-1") -> Block:
    return Block(cidr=cidr, pool="default", node=node, node_id=f"id-{node}", generation=1)


def record(node: str, cidr: Any) -> NodeRecord:
    address = ipaddress.ip_address(f"172.31.0.{node[-1]}")
    return plan_record(node, f"id-{node}", 1, (address,), [block(cidr, node)], "1")


def row(number: int, **changes: Any) -> Attachment:
    address = ipaddress.ip_interface(f"10.244.1.{number}/24")
    made = Attachment(
        key=AttachmentKey("podnet", f"c{number}", "eth0"),
        netns=f"/run/netns/c{number}",
        host_ifname=f"pw{number:012x}",
        mac=mac_of(address.ip),
        mtu=1450,
        addresses=(address,),
        pod=PodRef(namespace="default", name=f"pod-{number}"),
        state=AttachmentState.ATTACHED,
        created=NOW - 500,
        created_ns=number,
    )
    return msgspec.structs.replace(made, **changes)


def sandbox(name: str, ready: bool = True, own_network: bool = True) -> Sandbox:
    return Sandbox(id=name, ready=ready, pod=f"default/{name}", own_network=own_network)


def wire(attachment: Attachment, **changes: Any) -> Link:
    link = Link(name=attachment.host_ifname, kind="veth", mac="", mtu=1450, master="pw0", alias=alias_of(attachment))
    return msgspec.structs.replace(link, **changes)


def guard(*attachments: Attachment) -> GuardState:
    """The table with what these may send as."""
    return GuardState(spoofguard.shape(), frozenset().union(*map(spoofguard.elements, attachments)))


OTHER = record("node-2", PEER)
PLAN = with_peers(
    plan_node(ClusterConfig(pools=(POOL,)), record("node-1", CIDR), [block(CIDR)], underlay_mtu=1500),
    plan_peers([OTHER]),
    frozenset(OTHER.addresses),
)
assert PLAN.peers is not None
BRIDGE = Link(
    name="pw0",
    kind="bridge",
    mac=PLAN.bridge.mac,
    mtu=1450,
    filtered=True,
    addresses=frozenset(PLAN.bridge.addresses),
    connected=frozenset({CIDR}),
)
VXLAN = Link(
    name="pw-vxlan",
    kind="vxlan",
    mac=PLAN.vxlan.mac,
    mtu=1450,
    tunnel="1 4789 172.31.0.1",
    addresses=frozenset(PLAN.vxlan.addresses),
)
UPLINK = Link(name="eth0", kind="", mac="02:00:00:00:00:01", mtu=1500)
ROWS = (row(3), row(4))
WELL = Facts(
    now=NOW,
    record=record("node-1", CIDR),
    plan=PLAN,
    journal=Journaled(attachments=ROWS, blocks=(block(CIDR),)),
    kernel=Kernel(
        links={each.name: each for each in (UPLINK, BRIDGE, VXLAN, *map(wire, ROWS))},
        peers=PLAN.peers,
        firewall=ruleset.desired(PLAN.firewall),
        sysctls={"net/ipv4/ip_forward": "1"},
        guard=guard(*ROWS),
    ),
    etcd=Registered(
        blocks=(block(CIDR), block(PEER, "node-2")),
        record=msgspec.structs.replace(record("node-1", CIDR), published=7.0),
        live="id-node-1",
    ),
    held=frozenset(each.addresses[0].ip for each in ROWS),
    sysctls={"net/ipv4/ip_forward": "1"},
)

Change = Callable[[Facts], Facts]


def where(part: str, **changes: Any) -> Change:
    """The facts with other fields in one of their parts."""

    def change(facts: Facts) -> Facts:
        return msgspec.structs.replace(facts, **{part: msgspec.structs.replace(getattr(facts, part), **changes)})

    return change


def but(**changes: Any) -> Change:
    return lambda facts: msgspec.structs.replace(facts, **changes)


def links(*changed: Link, without: str = "") -> Change:
    """The kernel with these links, and without one."""

    def change(facts: Facts) -> Facts:
        there = {**facts.kernel.links, **{each.name: each for each in changed}}
        there.pop(without, None)
        return where("kernel", links=there)(facts)

    return change


def peers(**changes: Any) -> Change:
    assert PLAN.peers is not None
    return where("kernel", peers=msgspec.structs.replace(PLAN.peers, **changes))


def both(*changes: Change) -> Change:
    def change(facts: Facts) -> Facts:
        for each in changes:
            facts = each(facts)
        return facts

    return change


def rows(*attachments: Attachment) -> Change:
    """These rows, with the allocator of the same mind."""
    held = frozenset(each.addresses[0].ip for each in attachments)
    return both(
        where("journal", attachments=attachments), but(held=held), where("kernel", guard=guard(*ROWS, *attachments))
    )


ADDRESS_3 = ROWS[0].addresses[0].ip
VTEP = next(iter(PLAN.peers.neighbours))
INNER = next(iter(PLAN.peers.fdb))
STRANDED = row(3, addresses=(ipaddress.ip_interface("10.244.3.3/24"),))
UNKNOWN = row(9)
FIREWALL = ruleset.desired(PLAN.firewall)
MAPPED = row(3, port_mappings=(PortMapping(protocol="tcp", host_port=8080, container_port=80),))
LIMITED = row(3, bandwidth=Bandwidth(ingress_rate=8_000, ingress_burst=80_000))


def leading(whole: bool, *attachments: Attachment) -> Change:
    """The kernel with ports that lead to these."""
    found = frozenset[hostports.Element]().union(*map(hostports.elements, attachments))
    return where("kernel", host_ports=TableState(whole, found))


STORIES: dict[str, tuple[Change, set[tuple[str, str]]]] = {
    "all is well": (but(), set()),
    # wires
    "an ADD under way": (
        both(rows(*ROWS, row(5, state=AttachmentState.ADDING, created=NOW)), but(in_flight=frozenset({row(5).key}))),
        set(),
    ),
    "an ADD that takes for ever": (
        both(rows(*ROWS, row(5, state=AttachmentState.ADDING)), but(in_flight=frozenset({row(5).key}))),
        {("unfinished-add", "podnet/c5/eth0")},
    ),
    "an ADD that nobody works on": (
        rows(*ROWS, row(5, state=AttachmentState.ADDING, created=NOW)),
        {("unfinished-add", "podnet/c5/eth0")},
    ),
    "a wire without a row": (links(wire(UNKNOWN)), {("orphan-wire", UNKNOWN.host_ifname)}),
    "a dead wire without a row": (links(wire(UNKNOWN, doomed=True)), set()),
    "a second wire of an attachment": (
        links(wire(row(9, key=ROWS[0].key))),
        {("orphan-wire", UNKNOWN.host_ifname)},
    ),
    "a wire of ours without alias": (links(wire(UNKNOWN, alias="")), {("nameless-wire", UNKNOWN.host_ifname)}),
    "somebody else's port of our bridge": (links(wire(UNKNOWN, name="veth1", alias="theirs")), set()),
    "a renamed wire": (
        links(wire(ROWS[0], name="mine"), without=ROWS[0].host_ifname),
        {("renamed-wire", "mine")},
    ),
    "a row without wire": (links(without=ROWS[0].host_ifname), {("wire-gone", ROWS[0].host_ifname)}),
    "a port out of the bridge": (links(wire(ROWS[0], master="")), {("port-detached", ROWS[0].host_ifname)}),
    "a port that is down": (links(wire(ROWS[0], up=False)), {("port-detached", ROWS[0].host_ifname)}),
    "another alias": (links(wire(ROWS[0], alias="hello")), {("alias-lost", ROWS[0].host_ifname)}),
    "a namespace that is gone": (
        but(runtime=Runtime(gone={ROWS[0].host_ifname: "nothing there"})),
        {("namespace-gone", ROWS[0].host_ifname)},
    ),
    "a pod that changed": (
        but(runtime=Runtime(changed={ROWS[0].host_ifname: ("eth0 is down",)})),
        {("pod-changed", ROWS[0].host_ifname)},
    ),
    "a wire that is being deleted and is not": (
        both(where("journal", releasing={UNKNOWN.host_ifname: ()}), links(wire(UNKNOWN, doomed=True))),
        {("releasing-stuck", UNKNOWN.host_ifname)},
    ),
    "a wire that is being deleted and is gone": (where("journal", releasing={UNKNOWN.host_ifname: ()}), set()),
    # addresses
    "a runtime that was asked and has all": (where("runtime", sandboxes=(sandbox("c3"), sandbox("c4"))), set()),
    "a runtime that does not answer": (
        where("runtime", error="connection refused"),
        {("runtime-unreachable", "runtime")},
    ),
    "an attachment whose sandbox is gone": (
        where("runtime", sandboxes=(sandbox("c3"),)),
        {("sandbox-gone", ROWS[1].host_ifname)},
    ),
    "a sandbox that is stopped has its attachment still": (
        where("runtime", sandboxes=(sandbox("c3", ready=False), sandbox("c4"))),
        set(),
    ),
    "attachments that are no sandbox's": (
        both(rows(row(3, pod=PodRef()), row(4, created=NOW - 5)), where("runtime", sandboxes=())),
        set(),
    ),
    "a ready sandbox without attachment": (
        where("runtime", sandboxes=(sandbox("c3"), sandbox("c4"), sandbox("c9"))),
        {("sandbox-unattached", "c9")},
    ),
    "sandboxes that need none": (
        where(
            "runtime",
            sandboxes=(sandbox("c3"), sandbox("c4"), sandbox("h", own_network=False), sandbox("s", ready=False)),
        ),
        set(),
    ),
    "two rows with one address": (
        both(rows(*ROWS, row(9, addresses=ROWS[0].addresses)), links(wire(row(9, addresses=ROWS[0].addresses)))),
        {("address-twice", str(ADDRESS_3))},
    ),
    "an address that is released and used": (
        where("journal", releasing={UNKNOWN.host_ifname: ROWS[0].addresses}),
        {("address-twice", str(ADDRESS_3))},
    ),
    "an address of another block, its wire cut": (
        both(
            where("journal", attachments=(STRANDED,)),
            where("kernel", guard=guard(STRANDED)),
            but(held=frozenset()),
            links(wire(STRANDED, master="", up=False), without=ROWS[1].host_ifname),
        ),
        {("address-stranded", "10.244.3.3/24")},
    ),
    "an address that the allocator would hand out": (
        but(held=frozenset({ROWS[1].addresses[0].ip})),
        {("address-unheld", str(ADDRESS_3))},
    ),
    "an address that no row has": (
        but(held=WELL.held | {ipaddress.ip_address("10.244.1.9")}),
        {("address-leaked", "10.244.1.9")},
    ),
    # blocks and the name
    "etcd away": (but(etcd=None, etcd_error="no answer"), {("etcd-unreachable", "etcd")}),
    "a block that etcd has lost": (where("etcd", blocks=()), {("block-not-in-etcd", str(CIDR))}),
    "a block that the journal lacks": (
        where("etcd", blocks=(block(CIDR), block(THIRD))),
        {("block-not-in-journal", str(THIRD))},
    ),
    "a block that is another's": (where("etcd", blocks=(block(CIDR, "node-2"),)), {("block-of-another", str(CIDR))}),
    "a block part of which is another's": (
        where("etcd", blocks=(block(ipaddress.ip_network("10.244.1.128/25"), "node-2"),)),
        {("block-of-another", str(CIDR))},
    ),
    "no record": (where("etcd", record=None), {("record-missing", "node-1")}),
    "another record": (where("etcd", record=record("node-1", PEER)), {("record-differs", "node-1")}),
    "nobody has the name": (where("etcd", live=""), {("name-not-live", "node-1")}),
    "another machine has the name": (where("etcd", live="id-9"), {("name-not-live", "node-1")}),
    # the node
    "no plan yet": (but(plan=None, waiting_for="etcd"), {("node-not-set-up", "node-1")}),
    "no bridge": (links(without="pw0"), {("bridge-missing", "pw0")}),
    "a bridge that is down": (links(msgspec.structs.replace(BRIDGE, up=False)), {("bridge-changed", "pw0")}),
    "a bridge that passes the firewall by": (
        links(msgspec.structs.replace(BRIDGE, filtered=False)),
        {("bridge-changed", "pw0")},
    ),
    "no gateway": (
        links(msgspec.structs.replace(BRIDGE, addresses=frozenset())),
        {("bridge-address", "10.244.1.1/24 on pw0")},
    ),
    "the gateway of a returned block": (
        links(msgspec.structs.replace(BRIDGE, addresses=BRIDGE.addresses | {ipaddress.ip_interface("10.244.3.1/24")})),
        {("bridge-address", "10.244.3.1/24 on pw0")},
    ),
    "somebody else's address on the bridge": (
        links(msgspec.structs.replace(BRIDGE, addresses=BRIDGE.addresses | {ipaddress.ip_interface("fe80::1/64")})),
        set(),
    ),
    "no route to its own pods": (
        links(msgspec.structs.replace(BRIDGE, connected=frozenset())),
        {("bridge-route", "10.244.1.0/24 on pw0")},
    ),
    "a bridge that is down, and so has no routes": (
        links(msgspec.structs.replace(BRIDGE, up=False, connected=frozenset())),
        {("bridge-changed", "pw0")},
    ),
    "no VXLAN device": (links(without="pw-vxlan"), {("vxlan-missing", "pw-vxlan")}),
    "another tunnel": (
        links(msgspec.structs.replace(VXLAN, tunnel="7 4789 172.31.0.1")),
        {("vxlan-changed", "pw-vxlan")},
    ),
    "no VTEP address": (links(msgspec.structs.replace(VXLAN, addresses=frozenset())), {("vxlan-changed", "pw-vxlan")}),
    "the VTEP of a block that went to another node": (
        links(msgspec.structs.replace(VXLAN, addresses=VXLAN.addresses | {ipaddress.ip_interface("10.244.3.2/32")})),
        {("vxlan-changed", "pw-vxlan")},
    ),
    "somebody else's address on the VXLAN device": (
        links(msgspec.structs.replace(VXLAN, addresses=VXLAN.addresses | {ipaddress.ip_interface("fe80::1/64")})),
        set(),
    ),
    "no neighbour": (peers(neighbours={}), {("neighbour-missing", str(VTEP))}),
    "no FDB entry": (peers(fdb={}), {("fdb-missing", INNER)}),
    "no route": (peers(routes={}), {("route-missing", str(PEER))}),
    "another gateway": (
        peers(routes={PEER: RoutePlan(gateway=ipaddress.ip_address("10.244.9.2"), device="pw-vxlan")}),
        {("route-changed", str(PEER))},
    ),
    "another underlay address": (
        peers(fdb={INNER: ipaddress.ip_address("172.31.0.9")}),
        {("fdb-changed", INNER)},
    ),
    "a neighbour that left": (
        peers(neighbours={**PLAN.peers.neighbours, ipaddress.ip_address("10.244.9.2"): "02:00:00:00:00:01"}),
        {("neighbour-stale", "10.244.9.2")},
    ),
    "peers that are not known yet": (
        both(but(plan=msgspec.structs.replace(PLAN, peers=None)), peers(neighbours={}, routes={})),
        set(),
    ),
    "no table": (
        where("kernel", firewall=ruleset.FirewallState(chains="", elements={})),
        {
            ("rules-changed", "inet podwire"),
            ("elements-changed", "inet podwire local_blocks4"),
            ("elements-changed", "inet podwire unmasqueraded4"),
            ("elements-changed", "inet podwire unmasqueraded6"),
            ("elements-changed", "inet podwire vteps4"),
        },
    ),
    "an element too many": (
        where(
            "kernel",
            firewall=msgspec.structs.replace(
                FIREWALL, elements={**FIREWALL.elements, "vteps4": frozenset({"172.31.0.2", "172.31.0.9"})}
            ),
        ),
        {("elements-changed", "inet podwire vteps4")},
    ),
    "a node that does not forward": (
        where("kernel", sysctls={"net/ipv4/ip_forward": "0"}),
        {("sysctl-changed", "net.ipv4.ip_forward")},
    ),
    # what a pod has besides its wire
    "no table of addresses": (where("kernel", guard=GuardState()), {("guard-changed", "bridge podwire")}),
    "a rule more in it": (
        where("kernel", guard=GuardState(spoofguard.Shape("", (), ()), guard(*ROWS).elements)),
        {("guard-changed", "bridge podwire")},
    ),
    "a pod that may send nothing": (
        where("kernel", guard=guard(ROWS[1])),
        {("guard-elements", ROWS[0].host_ifname)},
    ),
    "a pod that may send as another": (
        where("kernel", guard=guard(*ROWS, row(3, addresses=ROWS[1].addresses))),
        {("guard-elements", ROWS[0].host_ifname)},
    ),
    "a port that is being added to": (
        both(where("kernel", guard=guard(*ROWS, UNKNOWN)), links(wire(UNKNOWN, doomed=True))),
        set(),
    ),
    "what nobody's port may send as": (
        where("kernel", guard=guard(*ROWS, UNKNOWN)),
        {("guard-stale", UNKNOWN.host_ifname)},
    ),
    "a port of the node that leads to its pod": (both(rows(MAPPED, ROWS[1]), leading(True, MAPPED)), set()),
    "one that leads nowhere": (
        both(rows(MAPPED, ROWS[1]), leading(True)),
        {("host-port-missing", MAPPED.host_ifname)},
    ),
    "one without its rules": (
        both(rows(MAPPED, ROWS[1]), leading(False, MAPPED)),
        {("host-ports-changed", "inet podwire_hostports")},
    ),
    "one that leads to nobody": (leading(True, MAPPED), {("host-port-stale", str(ADDRESS_3))}),
    "a limit that somebody took": (
        both(rows(LIMITED, ROWS[1]), where("kernel", limits={LIMITED.host_ifname: ("its queue is gone",)})),
        {("limit-changed", LIMITED.host_ifname)},
    ),
    "the queue of a wire that is gone": (
        links(Link(name=f"pwi{UNKNOWN.host_ifname[2:]}", kind="ifb")),
        {("orphan-queue", f"pwi{UNKNOWN.host_ifname[2:]}")},
    ),
    "a queue on its way out": (links(Link(name=f"pwi{UNKNOWN.host_ifname[2:]}", kind="ifb", doomed=True)), set()),
    # the queue
    "DELs that wait": (but(waiting_dels=("1.del",)), {("del-waiting", "1.del")}),
    "a damaged DEL": (but(unreadable_dels=("1.bad",)), {("del-unreadable", "1.bad")}),
}


@pytest.mark.parametrize("story", STORIES)
def test_what_differs(story: str) -> None:
    change, expected = STORIES[story]
    found = compare(change(WELL))
    assert {each.identity for each in found} == expected
    assert len(found) == len(expected), "each is told of once"
    assert all(any(each.says.values()) for each in found)


def test_every_kind_has_a_story_a_reason_and_a_remedy_and_is_documented() -> None:
    told = {kind for _, expected in STORIES.values() for kind, _ in expected}
    entries = {f"{what}-{how}" for what in ("neighbour", "fdb", "route") for how in ("missing", "stale", "changed")}
    assert KINDS.keys() - entries <= told <= KINDS.keys()
    assert all(kind.why and (kind.fix or kind.advice) for kind in KINDS.values())
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == KINDS.keys()


def test_only_what_two_looks_find_lasts() -> None:
    first = compare(both(links(without=ROWS[0].host_ifname), but(waiting_dels=("1.del",)))(WELL))
    second = compare(both(links(without=ROWS[0].host_ifname), but(waiting_dels=("2.del",)))(WELL))
    assert {each.identity for each in lasting(first, second)} == {("wire-gone", ROWS[0].host_ifname)}
