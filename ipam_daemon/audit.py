"""What etcd, journal, kernel and runtime say of one node, side by side: facts in, named differences out. Pure.

    wires       journal ↔ kernel ↔ runtime      every row has its wire, every wire its row, every wire its pod
    sandboxes   journal ↔ runtime               if it is asked: every row has its sandbox, every ready one its row
    addresses   journal ↔ journal ↔ allocator   each is somebody's, nobody's twice, and of a block of this node
    blocks      journal ↔ etcd                  and no other node's
    the name    daemon ↔ etcd                   the record says what the node is, the live key that it lives
    the node    plan ↔ kernel                   devices, entries towards the other nodes, nft table, sysctls
    elements    journal ↔ kernel                what pods may send as, ports that lead to them, limits
    the queue   daemon ↔ disk                   DELs that are owed

One look may catch something on its way, so who looks reports only what `lasting` finds in two. The cost
is linear in everything that is looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

from ipam_daemon import audit_elements, ruleset
from ipam_daemon.claims import overlap
from ipam_daemon.differences import Difference, difference
from ipam_daemon.facts import Facts, Link
from ipam_daemon.model import Address, Attachment, AttachmentState, Interface
from ipam_daemon.plan import BRIDGE, BridgePlan, VxlanPlan, alias_of, attachment_of, is_same_wire

UNFINISHED_S = 60.0
"""Seconds after which an ADD that is still under way is told of, and a sandbox is missed."""
_OUR_NAME = re.compile(r"pw[0-9a-f]{12}\Z")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def compare(facts: Facts) -> tuple[Difference, ...]:
    """Everything that differs, in the order of the table above."""
    parts = (_wires, _rows, _sandboxes, _addresses, _blocks, _name, _node, audit_elements.compare, _queue)
    return tuple(difference for part in parts for difference in part(facts))


# --- wires ----------------------------------------------------------------------------------------------------------


def _wires(facts: Facts) -> Iterator[Difference]:
    """Links that no row has."""
    rows = {each.host_ifname: each for each in facts.journal.attachments}
    for link in facts.kernel.links.values():
        if link.doomed or link.name in rows or link.name in facts.journal.releasing:
            continue
        found = attachment_of(link.alias, link.name, link.mtu, facts.now)
        if found is None:
            if link.kind == "veth" and _OUR_NAME.match(link.name):
                yield difference("nameless-wire", link.name, kernel=_describe(link), journal="no row")
            continue
        row = next((each for each in rows.values() if is_same_wire(found, each)), None)
        if row is not None and row.host_ifname not in facts.kernel.links:
            yield difference("renamed-wire", link.name, kernel=link.alias, journal=f"{row.key} is {row.host_ifname}")
        else:
            other = next((each for each in rows.values() if each.key == found.key), None)
            journal = f"{other.key} is {other.host_ifname}" if other else "no row"
            yield difference("orphan-wire", link.name, kernel=link.alias, journal=journal)


def _rows(facts: Facts) -> Iterator[Difference]:
    """Rows, and what became of their wires."""
    links = facts.kernel.links
    renamed = {
        (found.key, found.created_ns)
        for link in links.values()
        if (found := attachment_of(link.alias, link.name, link.mtu, facts.now)) is not None
    }
    for row in facts.journal.attachments:
        link = links.get(row.host_ifname)
        if row.state is AttachmentState.ADDING:
            yield from _adding(facts, row)
        elif link is None:
            if (row.key, row.created_ns) not in renamed:
                gone = facts.runtime.gone.get(row.host_ifname)
                says = {"runtime": gone} if gone else {}
                yield difference("wire-gone", row.host_ifname, journal=_pod(row), kernel="no such link", **says)
        elif not facts.is_stranded(row):
            yield from _wire_of(facts, row, link)
    for name, addresses in facts.journal.releasing.items():
        if name in links:
            yield difference(
                "releasing-stuck", name, journal=f"releasing {_listed(addresses)}", kernel=_describe(links[name])
            )


def _adding(facts: Facts, row: Attachment) -> Iterator[Difference]:
    busy = row.key in facts.in_flight
    age = facts.now - row.created
    if not busy or age > UNFINISHED_S:
        kernel = "the link is there" if row.host_ifname in facts.kernel.links else "no such link"
        daemon = f"under way for {age:.0f} s" if busy else "no ADD is under way"
        yield difference("unfinished-add", str(row.key), journal="intent without commit", kernel=kernel, daemon=daemon)


def _wire_of(facts: Facts, row: Attachment, link: Link) -> Iterator[Difference]:
    name = row.host_ifname
    if link.master != BRIDGE or not link.up:
        yield difference("port-detached", name, journal=_pod(row), kernel=_describe(link))
    if link.alias != alias_of(row):
        yield difference("alias-lost", name, journal=alias_of(row), kernel=link.alias or "no alias")
    if name in facts.runtime.gone:
        yield difference("namespace-gone", name, journal=_pod(row), kernel="up", runtime=facts.runtime.gone[name])
    elif name in facts.runtime.changed:
        changed = "; ".join(facts.runtime.changed[name])
        yield difference("pod-changed", name, journal=_pod(row), runtime=changed)


def _sandboxes(facts: Facts) -> Iterator[Difference]:
    """Only rows of which the runtime has named the pod are a kubelet's: others (`ctr run --cni`) have no sandbox. Nor
    are young ones compared: a runtime lists a sandbox when it has started, which comes after its network."""
    if facts.runtime.error:
        yield difference("runtime-unreachable", "runtime", runtime=facts.runtime.error)
    if facts.runtime.sandboxes is None:
        return
    known = {each.id for each in facts.runtime.sandboxes}
    for row in facts.journal.attachments:
        settled = row.state is AttachmentState.ATTACHED and facts.now - row.created > UNFINISHED_S
        if settled and row.pod.name and row.key.container_id not in known:
            yield difference("sandbox-gone", row.host_ifname, journal=_pod(row), runtime="no such sandbox")
    attached = {row.key.container_id for row in facts.journal.attachments}
    attached |= {key.container_id for key in facts.in_flight}
    for sandbox in facts.runtime.sandboxes:
        if sandbox.ready and sandbox.own_network and sandbox.id not in attached:
            yield difference("sandbox-unattached", sandbox.id, runtime=f"ready ({sandbox.pod})", journal="no row")


# --- addresses and blocks -------------------------------------------------------------------------------------------


def _addresses(facts: Facts) -> Iterator[Difference]:
    holders: dict[Address, list[str]] = defaultdict(list)
    for row in facts.journal.attachments:
        for each in row.addresses:
            holders[each.ip].append(str(row.key))
        if facts.is_stranded(row):
            blocks = _listed(facts.record.blocks)
            yield difference("address-stranded", _listed(row.addresses), journal=_pod(row), daemon=f"has {blocks}")
    for name, addresses in facts.journal.releasing.items():
        for each in addresses:
            holders[each.ip].append(f"{name} (releasing)")
    for address, names in sorted(holders.items(), key=lambda pair: str(pair[0])):
        if len(names) > 1:
            yield difference("address-twice", str(address), journal=" and ".join(names))
    ours = {address for address in holders if any(address in cidr for cidr in facts.record.blocks)}
    for address in sorted(ours - facts.held, key=str):
        yield difference("address-unheld", str(address), journal=holders[address][0], daemon="free or cooling")
    for address in sorted(facts.held - holders.keys(), key=str):
        yield difference("address-leaked", str(address), journal="no row", daemon="used or releasing")


def _blocks(facts: Facts) -> Iterator[Difference]:
    if facts.etcd is None:
        yield difference("etcd-unreachable", "etcd", daemon=facts.etcd_error)
        return
    journaled = {block.cidr for block in facts.journal.blocks}
    for cidr in sorted(journaled, key=str):
        holders = [block for block in facts.etcd.blocks if overlap(block.cidr, cidr)]
        others = [block for block in holders if block.node != facts.record.name]
        if others:
            theirs = _listed(f"{block.cidr} is {block.node}'s" for block in others)
            yield difference("block-of-another", str(cidr), journal="this node's", etcd=theirs)
        elif not holders:
            yield difference("block-not-in-etcd", str(cidr), journal="this node's", etcd="no such key")
    for block in facts.etcd.blocks:
        if block.node == facts.record.name and block.cidr not in journaled:
            yield difference("block-not-in-journal", str(block.cidr), etcd="this node's", journal="no row")


def _name(facts: Facts) -> Iterator[Difference]:
    if facts.etcd is None:
        return
    ours, theirs = facts.record, facts.etcd.record
    if theirs is None:
        yield difference("record-missing", ours.name, etcd="no record", daemon=f"machine {ours.node_id}")
    else:
        wrong = [
            (field, getattr(theirs, field), getattr(ours, field))
            for field in ours.__struct_fields__
            if field != "published" and getattr(theirs, field) != getattr(ours, field)
        ]
        if wrong:
            etcd, daemon = ("; ".join(f"{each[0]} {_text(each[which])}" for each in wrong) for which in (1, 2))
            yield difference("record-differs", ours.name, etcd=etcd, daemon=daemon)
    if facts.etcd.live != ours.node_id:
        live = f"machine {facts.etcd.live}" if facts.etcd.live else "no live key"
        yield difference("name-not-live", ours.name, etcd=live, daemon=f"machine {ours.node_id}")


# --- the node -------------------------------------------------------------------------------------------------------


def _node(facts: Facts) -> Iterator[Difference]:
    if facts.plan is None:
        yield difference("node-not-set-up", facts.record.name, daemon=facts.waiting_for)
        return
    yield from _bridge(facts)
    yield from _vxlan(facts)
    for name, wanted in facts.sysctls.items():
        found = facts.kernel.sysctls.get(name, "")
        if found != wanted:
            yield difference("sysctl-changed", name.replace("/", "."), kernel=found or "no such sysctl", daemon=wanted)
    if facts.plan.peers is not None:
        there, wanted_peers = facts.kernel.peers, facts.plan.peers
        yield from _entries("neighbour", wanted_peers.neighbours, there.neighbours)
        yield from _entries("fdb", wanted_peers.fdb, there.fdb)
        yield from _entries(
            "route",
            {cidr: route.gateway for cidr, route in wanted_peers.routes.items()},
            {cidr: route.gateway for cidr, route in there.routes.items()},
        )
    yield from _firewall(facts)


def _bridge(facts: Facts) -> Iterator[Difference]:
    assert facts.plan is not None
    plan = facts.plan.bridge
    link = facts.kernel.links.get(plan.name)
    if link is None:
        yield difference("bridge-missing", plan.name, kernel="no such link", daemon=_listed(plan.addresses))
        return
    wrong = _common(link, "bridge", plan.mac, plan.mtu)
    if not link.filtered:
        wrong["nf_call_iptables"] = ("off", "on")
    yield from _changed("bridge-changed", plan.name, wrong)
    for each, says in _addresses_of(link, plan, "a gateway"):
        yield difference("bridge-address", f"{each} on {plan.name}", kernel=says[0], daemon=says[1])
    if link.up:  # else it has none, and no address of IPv6
        for each in plan.addresses:
            if each in link.addresses and each.network not in link.connected:
                yield difference("bridge-route", f"{each.network} on {plan.name}", kernel="absent", daemon="wanted")


def _vxlan(facts: Facts) -> Iterator[Difference]:
    assert facts.plan is not None
    plan = facts.plan.vxlan
    link = facts.kernel.links.get(plan.name)
    if link is None:
        yield difference("vxlan-missing", plan.name, kernel="no such link", daemon=_listed(plan.addresses))
        return
    wrong = _common(link, "vxlan", plan.mac, plan.mtu)
    tunnel = f"{plan.vni} {plan.port} {plan.local}"
    if link.tunnel != tunnel:
        wrong["VNI, port, local address"] = (link.tunnel, tunnel)
    for each, says in _addresses_of(link, plan, "a VTEP"):
        wrong[f"address {each}"] = says
    yield from _changed("vxlan-changed", plan.name, wrong)


def _addresses_of(link: Link, plan: BridgePlan | VxlanPlan, what: str) -> Iterator[tuple[Interface, tuple[str, str]]]:
    """Addresses that are missing, or there although nobody wants them, with what the kernel and the daemon say."""
    missing = set(plan.addresses) - link.addresses
    extra = {each for each in link.addresses - set(plan.addresses) if any(each.ip in pool for pool in plan.pools)}
    for each in sorted(missing | extra, key=str):
        yield each, ("absent", "wanted") if each in missing else ("there", f"not {what} of this node")


def _common(link: Link, kind: str, mac: str, mtu: int) -> dict[str, tuple[str, str]]:
    pairs = {
        "kind": (link.kind, kind),
        "MAC": (link.mac, mac),
        "MTU": (str(link.mtu), str(mtu)),
        "state": ("up" if link.up else "down", "up"),
    }
    return {what: (found, wanted) for what, (found, wanted) in pairs.items() if found != wanted}


def _changed(kind: str, subject: str, wrong: Mapping[str, tuple[str, str]]) -> Iterator[Difference]:
    if wrong:
        kernel, daemon = (_listed(f"{what} {each[side]}" for what, each in wrong.items()) for side in (0, 1))
        yield difference(kind, subject, kernel=kernel, daemon=daemon)


def _entries(what: str, wanted: Mapping[K, V], there: Mapping[K, V]) -> Iterator[Difference]:
    for key in sorted(wanted.keys() | there.keys(), key=str):
        if key not in there:
            yield difference(f"{what}-missing", str(key), kernel="absent", daemon=str(wanted[key]))
        elif key not in wanted:
            yield difference(f"{what}-stale", str(key), kernel=str(there[key]), daemon="no node has it")
        elif wanted[key] != there[key]:
            yield difference(f"{what}-changed", str(key), kernel=str(there[key]), daemon=str(wanted[key]))


def _firewall(facts: Facts) -> Iterator[Difference]:
    assert facts.plan is not None
    wanted, there = ruleset.desired(facts.plan.firewall), facts.kernel.firewall
    if wanted.chains != there.chains:
        kernel = f"rules {there.chains}" if there.chains else "no table"
        yield difference("rules-changed", ruleset.TABLE, kernel=kernel, daemon=f"rules {wanted.chains}")
    for name, elements in sorted(wanted.elements.items()):
        found = there.elements.get(name, frozenset())
        if found != elements:
            says = {"kernel": _listed(sorted(found)) or "empty", "daemon": _listed(sorted(elements)) or "empty"}
            yield difference("elements-changed", f"{ruleset.TABLE} {name}", **says)


def _queue(facts: Facts) -> Iterator[Difference]:
    for name in facts.waiting_dels:
        yield difference("del-waiting", name, daemon="owed to the runtime")
    for name in facts.unreadable_dels:
        yield difference("del-unreadable", name, daemon="set aside")


# --- words ----------------------------------------------------------------------------------------------------------


def _pod(row: Attachment) -> str:
    pod = f" ({row.pod.namespace}/{row.pod.name})" if row.pod.name else ""
    return f"{row.key}{pod} {_listed(row.addresses)}"


def _describe(link: Link) -> str:
    place = f"port of {link.master}" if link.master else "no port of a bridge"
    return f"{'up' if link.up else 'down'}, {place}"


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _text(value: object) -> str:
    return _listed(value) if isinstance(value, tuple) else str(value)
