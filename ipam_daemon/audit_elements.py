"""What pods have in the kernel besides their wires, against the journal: the part of an audit about elements. Pure.

spoof guard     what each port may send as      (ipam_daemon/spoofguard.py)
host ports      what leads to pods              (ipam_daemon/hostports.py)
limits          queues, and the way into them   (ipam_daemon/bandwidth.py)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from ipam_daemon import hostport_rules, hostports, spoofguard
from ipam_daemon.bandwidth import wire_of
from ipam_daemon.differences import Difference, difference
from ipam_daemon.facts import Facts
from ipam_daemon.model import Attachment, AttachmentState


def compare(facts: Facts) -> Iterator[Difference]:
    """Everything that differs, once the node is set up."""
    if facts.plan is not None:
        yield from _guard(facts)
        yield from _host_ports(facts)
        yield from _limits(facts)


def settled(facts: Facts) -> list[Attachment]:
    """The rows that nothing is being done to."""
    return [
        row
        for row in facts.journal.attachments
        if row.state is AttachmentState.ATTACHED and row.key not in facts.in_flight
    ]


def _guard(facts: Facts) -> Iterator[Difference]:
    there = facts.kernel.guard
    if there.shape != spoofguard.shape():
        kernel = f"rules {there.shape.mark}" if there.shape else "no table"
        daemon = f"rules {spoofguard.shape().mark}"
        yield difference("guard-changed", str(spoofguard.TABLE), kernel=kernel, daemon=daemon)
        if there.shape is None:
            return
    found = defaultdict[str, set[spoofguard.Element]](set)
    for element in there.elements:
        found[spoofguard.port_of(element)].add(element)
    for row in settled(facts):
        wanted, has = spoofguard.elements(row), found[row.host_ifname]
        if has != wanted:
            kernel = _texts(has - wanted, "too many") or _texts(wanted - has, "missing")
            journal = ", ".join(map(str, row.addresses))
            yield difference("guard-elements", row.host_ifname, journal=journal, kernel=kernel)
    known = {row.host_ifname for row in facts.journal.attachments} | facts.kernel.links.keys()
    for port in sorted(found.keys() - known):
        yield difference("guard-stale", port, kernel=_texts(found[port], "there"), journal="no row")


def _texts(elements: Iterable[spoofguard.Element], what: str) -> str:
    listed = ", ".join(f"{each.set} {{ {spoofguard.text(each)} }}" for each in sorted(elements))
    return f"{what}: {listed}" if listed else ""


def _host_ports(facts: Facts) -> Iterator[Difference]:
    there = facts.kernel.host_ports
    rows = [row for row in settled(facts) if row.port_mappings]
    if rows and not there.whole:
        yield difference("host-ports-changed", hostport_rules.TABLE, kernel="other rules, or none", daemon="as made")
    for row in rows:
        if not facts.is_stranded(row) and not hostports.elements(row) <= there.elements:
            ports = ", ".join(map(hostports.describe, row.port_mappings))
            yield difference("host-port-missing", row.host_ifname, journal=ports, kernel="not all lead to the pod")
    addresses = {each.ip for row in facts.journal.attachments for each in row.addresses if row.port_mappings}
    strays = {hostports.target(each) for each in there.elements} - addresses
    for address in sorted(strays, key=str):
        yield difference(
            "host-port-stale", str(address), kernel="ports of the node lead to it", journal="no row with ports"
        )


def _limits(facts: Facts) -> Iterator[Difference]:
    for row in settled(facts):
        wrong = facts.kernel.limits.get(row.host_ifname)
        if wrong:
            yield difference("limit-changed", row.host_ifname, journal=_rates(row), kernel="; ".join(wrong))
    known = {row.host_ifname for row in facts.journal.attachments} | facts.journal.releasing.keys()
    for link in facts.kernel.links.values():
        wire = wire_of(link.name) if link.kind == "ifb" and not link.doomed else ""
        if wire and wire not in known and wire not in facts.kernel.links:
            yield difference("orphan-queue", link.name, kernel="an ifb device", journal=f"no row of {wire}")


def _rates(row: Attachment) -> str:
    return f"to the pod {row.bandwidth.ingress_rate} bit/s, from it {row.bandwidth.egress_rate} (0: no limit)"
