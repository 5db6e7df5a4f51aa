"""What etcd, journal, kernel and runtime say of one node, side by side: facts in, named differences out. Pure.

    wires       journal ↔ kernel ↔ runtime      every row has its wire, every wire its row, every wire its pod
    sandboxes   journal ↔ runtime               if it is asked: every row has its sandbox, every ready one its row
    addresses   journal ↔ journal ↔ allocator   each is somebody's, nobody's twice, and of a block of this node
    blocks      journal ↔ etcd                  and no other node's
    the name    daemon ↔ etcd                   the record says what the node is, the live key that it lives
    the node    plan ↔ kernel                   devices, entries towards the other nodes, nft table, sysctls
    the queue   daemon ↔ disk                   DELs that are owed

A difference has a kind, whose reason and remedy are the same wherever it turns up (KINDS); docs/operations.md has a
line for each. One look may catch something on its way, so who looks reports only what `lasting` finds in two. The cost
is linear in everything that is looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec

from ipam_daemon import ruleset
from ipam_daemon.claims import overlap
from ipam_daemon.facts import Facts, Link
from ipam_daemon.model import Address, Attachment, AttachmentState
from ipam_daemon.plan import BRIDGE, alias_of, attachment_of, is_same_wire

UNFINISHED_S = 60.0
"""Seconds after which an ADD that is still under way is told of, and a sandbox is missed."""
_OUR_NAME = re.compile(r"pw[0-9a-f]{12}\Z")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kind(msgspec.Struct, frozen=True):
    """Why such a difference comes about, what a repair does (empty: nothing) and what is left for people to do."""

    why: str
    fix: str = ""
    advice: str = ""

    @property
    def patient(self) -> bool:
        """Whether it is worth waiting for the repair to show."""
        return bool(self.fix) and not self.advice


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """`says` is what each source says about `subject`; it may vary from look to look."""

    kind: str
    subject: str
    says: Mapping[str, str]

    @property
    def identity(self) -> tuple[str, str]:
        """The same for the same difference in another look."""
        return self.kind, self.subject


_ROUND = "the periodic reconcile was not there yet, or failed"
_NAME_AGAIN = "compares with etcd again: publishes the record, claims its blocks where nobody else has them"
_NETWORK = "brings devices, entries and rules back to the plan"
_ENTRIES = {
    f"{what}-{how}": Kind(f"somebody {did} it, or {_ROUND}", _NETWORK)
    for what in ("neighbour", "fdb", "route")
    for how, did in (("missing", "deleted"), ("stale", "added"), ("changed", "changed"))
}
KINDS: dict[str, Kind] = {
    # wires
    "orphan-wire": Kind(
        "the journal was lost or replaced while the wire lived",
        "takes the wire into the journal; deletes it if its DEL was done, or if its attachment or address is another's",
    ),
    "nameless-wire": Kind(
        "a wire of ours without alias and without row: nobody can say whose it is",
        advice="look at the pod at its other end; delete the link when there is none",
    ),
    "renamed-wire": Kind("somebody renamed the link", "gives it its name back"),
    "wire-gone": Kind(
        "the pod's namespace is gone, or somebody deleted the link; the runtime has not called DEL",
        "frees the address after two looks",
    ),
    "port-detached": Kind("somebody took the link out of the bridge, or down", "puts it back, and up"),
    "alias-lost": Kind(
        "somebody changed the link's alias, from which a lost journal would be rebuilt", "writes it again"
    ),
    "namespace-gone": Kind(
        "the namespace's path was removed, and something keeps the namespace (a process, an open file)",
        advice="the address stays taken while the wire lives: end what is left of the pod, or let the runtime call DEL",
    ),
    "pod-changed": Kind(
        "something inside the pod changed its network", advice="recreate the pod; what is inside is not repaired"
    ),
    "unfinished-add": Kind(
        "an ADD ended halfway, or has been under way for long", "undoes it, unless it is still under way"
    ),
    "releasing-stuck": Kind(
        "the wire of a DEL that was answered cannot be deleted, or left the group of wires to delete",
        "takes it down and deletes it; until it is gone its address is nobody's",
    ),
    # sandboxes
    "runtime-unreachable": Kind(
        "the container runtime did not answer", advice="look at the endpoint, and at the runtime"
    ),
    "sandbox-gone": Kind(
        "the runtime removed the sandbox without a DEL, or its DEL was lost",
        "does what the DEL would have done, if two looks have missed the sandbox",
    ),
    "sandbox-unattached": Kind(
        "the sandbox was set up by another plugin or before Podwire, or its DEL was done and it goes on",
        advice="recreate the pod: it has no address of this node",
    ),
    # addresses
    "address-twice": Kind(
        "two rows have one address, which no allocation does: the journal was changed or rebuilt from damaged wires",
        advice="delete both pods; neither address is freed by a repair",
    ),
    "address-stranded": Kind(
        "the pod's address is in no block of this node: its block went to another node",
        "cuts the wire, since the address may be in use elsewhere",
        "move the pod away: until it is deleted no pod is added here",
    ),
    "address-unheld": Kind(
        "the allocator would hand out an address that a row has", "counts the addresses again from the journal"
    ),
    "address-leaked": Kind(
        "the allocator counts an address as taken that no row has", "counts the addresses again from the journal"
    ),
    # blocks and the name
    "etcd-unreachable": Kind("etcd did not answer, or refused", advice="see `podwire status`"),
    "block-not-in-etcd": Kind(
        "etcd was wiped or restored, somebody deleted the key, or the node was forgotten", _NAME_AGAIN
    ),
    "block-not-in-journal": Kind("a claim was not finished, or etcd was restored", "takes the block up"),
    "block-of-another": Kind(
        "the node was away for long and was forgotten, or etcd was restored",
        "gives the block up, and cuts the wires of the pods in it",
        "move those pods away",
    ),
    "record-missing": Kind("etcd was wiped or restored, or the node was forgotten", _NAME_AGAIN),
    "record-differs": Kind("somebody wrote it, or the daemon could not yet", _NAME_AGAIN),
    "name-not-live": Kind(
        "somebody deleted the live key, or etcd was away for longer than its lease", "takes the name again"
    ),
    # the node
    "node-not-set-up": Kind("the daemon has not brought the kernel to a plan yet", advice="see `podwire status`"),
    "bridge-missing": Kind("somebody deleted the bridge", _NETWORK + ", and the pods' ports into it"),
    "bridge-changed": Kind("somebody changed the bridge", _NETWORK),
    "bridge-address": Kind("somebody changed the bridge's addresses", _NETWORK),
    "vxlan-missing": Kind("somebody deleted the device", _NETWORK),
    "vxlan-changed": Kind("somebody changed the device", _NETWORK),
    **_ENTRIES,
    "rules-changed": Kind("somebody deleted or flushed our nft table, or it is another version's", _NETWORK),
    "elements-changed": Kind("somebody changed the sets of our nft table", _NETWORK),
    "sysctl-changed": Kind("somebody set it", _NETWORK),
    # the queue
    "del-waiting": Kind(
        "the executable could not reach the daemon, and the DEL was not replayed yet or fails", "replays it"
    ),
    "del-unreadable": Kind(
        "a file of the queue is damaged, or a DEL that can never be done", advice="look at it, then delete it"
    ),
}


def compare(facts: Facts) -> tuple[Difference, ...]:
    """Everything that differs, in the order of the table above."""
    parts = (_wires, _rows, _sandboxes, _addresses, _blocks, _name, _node, _queue)
    return tuple(difference for part in parts for difference in part(facts))


def lasting(first: Iterable[Difference], second: Iterable[Difference]) -> tuple[Difference, ...]:
    """Those of the second look that the first had found, too."""
    known = {each.identity for each in first}
    return tuple(each for each in second if each.identity in known)


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
                yield _difference("nameless-wire", link.name, kernel=_describe(link), journal="no row")
            continue
        row = next((each for each in rows.values() if is_same_wire(found, each)), None)
        if row is not None and row.host_ifname not in facts.kernel.links:
            yield _difference("renamed-wire", link.name, kernel=link.alias, journal=f"{row.key} is {row.host_ifname}")
        else:
            other = next((each for each in rows.values() if each.key == found.key), None)
            journal = f"{other.key} is {other.host_ifname}" if other else "no row"
            yield _difference("orphan-wire", link.name, kernel=link.alias, journal=journal)


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
                yield _difference("wire-gone", row.host_ifname, journal=_pod(row), kernel="no such link", **says)
        elif not is_stranded(facts, row):
            yield from _wire_of(facts, row, link)
    for name, addresses in facts.journal.releasing.items():
        if name in links:
            yield _difference(
                "releasing-stuck", name, journal=f"releasing {_listed(addresses)}", kernel=_describe(links[name])
            )


def _adding(facts: Facts, row: Attachment) -> Iterator[Difference]:
    busy = row.key in facts.in_flight
    age = facts.now - row.created
    if not busy or age > UNFINISHED_S:
        kernel = "the link is there" if row.host_ifname in facts.kernel.links else "no such link"
        daemon = f"under way for {age:.0f} s" if busy else "no ADD is under way"
        yield _difference("unfinished-add", str(row.key), journal="intent without commit", kernel=kernel, daemon=daemon)


def _wire_of(facts: Facts, row: Attachment, link: Link) -> Iterator[Difference]:
    name = row.host_ifname
    if link.master != BRIDGE or not link.up:
        yield _difference("port-detached", name, journal=_pod(row), kernel=_describe(link))
    if link.alias != alias_of(row):
        yield _difference("alias-lost", name, journal=alias_of(row), kernel=link.alias or "no alias")
    if name in facts.runtime.gone:
        yield _difference("namespace-gone", name, journal=_pod(row), kernel="up", runtime=facts.runtime.gone[name])
    elif name in facts.runtime.changed:
        changed = "; ".join(facts.runtime.changed[name])
        yield _difference("pod-changed", name, journal=_pod(row), runtime=changed)


def _sandboxes(facts: Facts) -> Iterator[Difference]:
    """Only rows of which the runtime has named the pod are a kubelet's: others (`ctr run --cni`) have no sandbox. Nor
    are young ones compared: a runtime lists a sandbox when it has started, which comes after its network."""
    if facts.runtime.error:
        yield _difference("runtime-unreachable", "runtime", runtime=facts.runtime.error)
    if facts.runtime.sandboxes is None:
        return
    known = {each.id for each in facts.runtime.sandboxes}
    for row in facts.journal.attachments:
        settled = row.state is AttachmentState.ATTACHED and facts.now - row.created > UNFINISHED_S
        if settled and row.pod.name and row.key.container_id not in known:
            yield _difference("sandbox-gone", row.host_ifname, journal=_pod(row), runtime="no such sandbox")
    attached = {row.key.container_id for row in facts.journal.attachments}
    attached |= {key.container_id for key in facts.in_flight}
    for sandbox in facts.runtime.sandboxes:
        if sandbox.ready and sandbox.own_network and sandbox.id not in attached:
            yield _difference("sandbox-unattached", sandbox.id, runtime=f"ready ({sandbox.pod})", journal="no row")


# --- addresses and blocks -------------------------------------------------------------------------------------------


def is_stranded(facts: Facts, row: Attachment) -> bool:
    """Whether an address of the row is in no block of this node. Before the first block is known none is."""
    cidrs = facts.record.blocks
    return bool(cidrs) and any(each.network not in cidrs for each in row.addresses)


def _addresses(facts: Facts) -> Iterator[Difference]:
    holders: dict[Address, list[str]] = defaultdict(list)
    for row in facts.journal.attachments:
        for each in row.addresses:
            holders[each.ip].append(str(row.key))
        if is_stranded(facts, row):
            blocks = _listed(facts.record.blocks)
            yield _difference("address-stranded", _listed(row.addresses), journal=_pod(row), daemon=f"has {blocks}")
    for name, addresses in facts.journal.releasing.items():
        for each in addresses:
            holders[each.ip].append(f"{name} (releasing)")
    for address, names in sorted(holders.items(), key=lambda pair: str(pair[0])):
        if len(names) > 1:
            yield _difference("address-twice", str(address), journal=" and ".join(names))
    ours = {address for address in holders if any(address in cidr for cidr in facts.record.blocks)}
    for address in sorted(ours - facts.held, key=str):
        yield _difference("address-unheld", str(address), journal=holders[address][0], daemon="free or cooling")
    for address in sorted(facts.held - holders.keys(), key=str):
        yield _difference("address-leaked", str(address), journal="no row", daemon="used or releasing")


def _blocks(facts: Facts) -> Iterator[Difference]:
    if facts.etcd is None:
        yield _difference("etcd-unreachable", "etcd", daemon=facts.etcd_error)
        return
    journaled = {block.cidr for block in facts.journal.blocks}
    for cidr in sorted(journaled, key=str):
        holders = [block for block in facts.etcd.blocks if overlap(block.cidr, cidr)]
        others = [block for block in holders if block.node != facts.record.name]
        if others:
            theirs = _listed(f"{block.cidr} is {block.node}'s" for block in others)
            yield _difference("block-of-another", str(cidr), journal="this node's", etcd=theirs)
        elif not holders:
            yield _difference("block-not-in-etcd", str(cidr), journal="this node's", etcd="no such key")
    for block in facts.etcd.blocks:
        if block.node == facts.record.name and block.cidr not in journaled:
            yield _difference("block-not-in-journal", str(block.cidr), etcd="this node's", journal="no row")


def _name(facts: Facts) -> Iterator[Difference]:
    if facts.etcd is None:
        return
    ours, theirs = facts.record, facts.etcd.record
    if theirs is None:
        yield _difference("record-missing", ours.name, etcd="no record", daemon=f"machine {ours.node_id}")
    else:
        wrong = [
            (field, getattr(theirs, field), getattr(ours, field))
            for field in ours.__struct_fields__
            if field != "published" and getattr(theirs, field) != getattr(ours, field)
        ]
        if wrong:
            etcd, daemon = ("; ".join(f"{each[0]} {_text(each[which])}" for each in wrong) for which in (1, 2))
            yield _difference("record-differs", ours.name, etcd=etcd, daemon=daemon)
    if facts.etcd.live != ours.node_id:
        live = f"machine {facts.etcd.live}" if facts.etcd.live else "no live key"
        yield _difference("name-not-live", ours.name, etcd=live, daemon=f"machine {ours.node_id}")


# --- the node -------------------------------------------------------------------------------------------------------


def _node(facts: Facts) -> Iterator[Difference]:
    if facts.plan is None:
        yield _difference("node-not-set-up", facts.record.name, daemon=facts.waiting_for)
        return
    yield from _bridge(facts)
    yield from _vxlan(facts)
    for name, wanted in facts.sysctls.items():
        found = facts.kernel.sysctls.get(name, "")
        if found != wanted:
            yield _difference("sysctl-changed", name.replace("/", "."), kernel=found or "no such sysctl", daemon=wanted)
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
        yield _difference("bridge-missing", plan.name, kernel="no such link", daemon=_listed(plan.addresses))
        return
    wrong = _common(link, "bridge", plan.mac, plan.mtu)
    if not link.filtered:
        wrong["nf_call_iptables"] = ("off", "on")
    yield from _changed("bridge-changed", plan.name, wrong)
    missing = set(plan.addresses) - link.addresses
    extra = {each for each in link.addresses - set(plan.addresses) if any(each.ip in pool for pool in plan.pools)}
    for each in sorted(missing | extra, key=str):
        kernel, daemon = ("absent", "wanted") if each in missing else ("there", "not a gateway of this node")
        yield _difference("bridge-address", f"{each} on {plan.name}", kernel=kernel, daemon=daemon)


def _vxlan(facts: Facts) -> Iterator[Difference]:
    assert facts.plan is not None
    plan = facts.plan.vxlan
    link = facts.kernel.links.get(plan.name)
    if link is None:
        yield _difference("vxlan-missing", plan.name, kernel="no such link", daemon=_listed(plan.addresses))
        return
    wrong = _common(link, "vxlan", plan.mac, plan.mtu)
    tunnel = f"{plan.vni} {plan.port} {plan.local}"
    if link.tunnel != tunnel:
        wrong["VNI, port, local address"] = (link.tunnel, tunnel)
    for each in sorted(set(plan.addresses) - link.addresses, key=str):
        wrong[f"address {each}"] = ("absent", "wanted")
    yield from _changed("vxlan-changed", plan.name, wrong)


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
        yield _difference(kind, subject, kernel=kernel, daemon=daemon)


def _entries(what: str, wanted: Mapping[K, V], there: Mapping[K, V]) -> Iterator[Difference]:
    for key in sorted(wanted.keys() | there.keys(), key=str):
        if key not in there:
            yield _difference(f"{what}-missing", str(key), kernel="absent", daemon=str(wanted[key]))
        elif key not in wanted:
            yield _difference(f"{what}-stale", str(key), kernel=str(there[key]), daemon="no node has it")
        elif wanted[key] != there[key]:
            yield _difference(f"{what}-changed", str(key), kernel=str(there[key]), daemon=str(wanted[key]))


def _firewall(facts: Facts) -> Iterator[Difference]:
    assert facts.plan is not None
    wanted, there = ruleset.desired(facts.plan.firewall), facts.kernel.firewall
    if wanted.chains != there.chains:
        kernel = f"rules {there.chains}" if there.chains else "no table"
        yield _difference("rules-changed", ruleset.TABLE, kernel=kernel, daemon=f"rules {wanted.chains}")
    for name, elements in sorted(wanted.elements.items()):
        found = there.elements.get(name, frozenset())
        if found != elements:
            says = {"kernel": _listed(sorted(found)) or "empty", "daemon": _listed(sorted(elements)) or "empty"}
            yield _difference("elements-changed", f"{ruleset.TABLE} {name}", **says)


def _queue(facts: Facts) -> Iterator[Difference]:
    for name in facts.waiting_dels:
        yield _difference("del-waiting", name, daemon="owed to the runtime")
    for name in facts.unreadable_dels:
        yield _difference("del-unreadable", name, daemon="set aside")


# --- words ----------------------------------------------------------------------------------------------------------


def _difference(kind: str, subject: str, **says: str) -> Difference:
    assert kind in KINDS
    return Difference(kind=kind, subject=subject, says=says)


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
