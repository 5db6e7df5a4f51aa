"""The nft table of ports of the node that lead to pods, in the kernel. Its rules are
ipam_daemon/hostport_rules.py's, its elements ipam_daemon/hostports.py's.

    ADD   open()   ─▶ one transaction of packed messages, 0.1 ms ─▶ connections of UDP and SCTP are forgotten
    DEL   close()  ─▶ the same; no packet is sent to the pod by its mappings when it returns
    start, and each round of reconciling: ensure() ─▶ what the journal says and the kernel lacks is added, the rest goes
                                          and those that it misled meanwhile are forgotten

The table is made when the first mapping is, by text, in an `nft` process of 5 ms; a node that never has one never has
the table nor the setting `route_localnet`. A table that somebody deleted or changed is mended by the next ADD or round.

One call at a time: `ensure` reads the journal while it holds the lock, in which a mapping is before it is opened, and
from which it goes right after it was closed.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from functools import partial

from ipam_daemon.conntrack import Entry, forget
from ipam_daemon.errors import PortTaken
from ipam_daemon.firewall import run_nft
from ipam_daemon.hostport_rules import NAME, ROUTE_LOCALNET, is_whole, render
from ipam_daemon.hostports import (
    MAPS,
    PAIRS,
    PROTOCOLS,
    Element,
    TableState,
    describe,
    elements,
    leads_to,
    overlap,
    places,
    sent_to,
    shadows,
    target,
)
from ipam_daemon.journal import Journal
from ipam_daemon.model import Address, Attachment, AttachmentKey, PortMapping
from ipam_daemon.netlink import NetlinkThread, read_sysctl, write_sysctl
from ipam_daemon.sockdiag import listening
from podwire.nfelements import Change, Family, Table, add, delete
from podwire.nfnetlink import ElementRefused, Nftables

_TABLE = Table(Family.INET, NAME)
_REMEMBERED = (PROTOCOLS["udp"], PROTOCOLS["sctp"])
"""Whose clients may keep their own port: what was decided for the first packet would hold for the next pod's."""
_TO_BE_MENDED = (errno.ENOENT, errno.EBUSY, errno.EEXIST)  # no table, or the port leads elsewhere

log = logging.getLogger(__name__)


def read_table(nftables: Nftables) -> TableState:
    """What the kernel has now. Raises OSError."""
    rules = nftables.rules(_TABLE)
    if not rules:
        return TableState(whole=False)
    found = set()
    for name in (*MAPS, *PAIRS):
        for key, data in (nftables.elements(_TABLE, name) or {}).items():
            found.add(Element(name, key, data if isinstance(data, bytes) else b""))
    return TableState(is_whole(rules), frozenset(found))


class HostPorts:
    """The table in the kernel of this node."""

    def __init__(
        self,
        thread: NetlinkThread,
        journal: Journal,
        wanted: Callable[[], Iterable[Attachment]],
        nft: Sequence[str] = ("nft",),
    ) -> None:
        """`wanted` gives the attachments that have their ports now; `nft` is the command, with what goes before it to
        run it in another namespace."""
        self._thread = thread
        self._journal = journal
        self._wanted = wanted
        self._nft = tuple(nft)
        self._lock = asyncio.Lock()

    async def refuse_listened(self, mappings: Iterable[PortMapping]) -> None:
        """Raises PortTaken when a socket of the node itself listens on one of the ports: its connections would go to
        the pod."""
        for mapping in mappings:
            addresses = await self._thread.run(listening, mapping.protocol, mapping.host_port)
            if any(shadows(mapping, address) for address in addresses):
                raise PortTaken(
                    f"{describe(mapping)} is the node's own: a socket listens on "
                    f"{', '.join(sorted(map(str, addresses)))}"
                )

    def refuse_taken(self, mappings: Iterable[PortMapping]) -> None:
        """Raises PortTaken, with the owner's name, when one of the ports is another attachment's. Nothing may come
        between this and the journal's intent."""
        for mapping in mappings:
            for host_ip, key in self._journal.claimants(mapping.protocol, mapping.host_port):
                if overlap(mapping.host_ip, host_ip):
                    owner = _describe_owner(self._journal.get(key), key)
                    raise PortTaken(f"{describe(mapping)} of this node is taken by {owner}")

    async def open(self, attachment: Attachment) -> None:
        """Leads the attachment's ports to it. Raises PlumbingFailed."""
        wanted = elements(attachment)
        async with self._lock:
            if not await self._thread.run(self._commit, [_add(each) for each in wanted]):
                await self._ensure()
            await self._thread.run(self._forget_connections, wanted)

    async def close(self, attachment: Attachment) -> None:
        """Nothing is led to the attachment any more when this returns. Raises PlumbingFailed."""
        doomed = elements(attachment)
        async with self._lock:
            await self._thread.run(self._commit, [_delete(each) for each in doomed])
            await self._thread.run(self._forget_connections, doomed)

    async def ensure(self, undecided: Container[Address] = ()) -> int:
        """Brings the table to what is wanted. Returns how much had to be done. Raises PlumbingFailed.

        What leads to an address of `undecided` stays: its wire may be taken into the journal yet, with its ports.
        """
        async with self._lock:
            return await self._ensure(undecided)

    async def missing(self, attachment: Attachment) -> list[str]:
        """What of the attachment's mappings is not in the kernel, in words."""
        state = await self._thread.run(self._read)
        found = [] if state.whole else ["the rules for ports of the node are not there"]
        if not elements(attachment) <= state.elements:
            ports = ", ".join(map(describe, attachment.port_mappings))
            found.append(f"not all of {ports} leads to the pod")
        return found

    # --- steps, under the lock

    async def _ensure(self, undecided: Container[Address] = ()) -> int:
        done = 0
        state = await self._thread.run(self._read)
        wanted = frozenset(each for attachment in self._wanted() for each in elements(attachment))
        lacking, surplus = wanted - state.elements, {e for e in state.elements - wanted if target(e) not in undecided}
        changed = lacking | surplus
        if wanted and not state.whole:
            await run_nft(*self._nft, "-f", "-", stdin=render())
            done += 1
            changed |= wanted  # what was sent while there were no rules went by none of them
        if wanted:
            done += await self._thread.run(_set_route_localnet)
        changes = [*map(_delete, surplus), *map(_add, lacking)]
        await self._thread.run(self._commit_or_raise, changes)
        await self._thread.run(self._forget_connections, changed, wanted)
        return done + len(changes)

    def _read(self) -> TableState:
        return read_table(self._thread.nftables)

    def _commit(self, changes: Sequence[Change]) -> bool:
        """False when the table is not as it should be, and nothing has changed."""
        try:
            self._thread.nftables.commit(changes)
        except ElementRefused as error:
            if error.errno not in _TO_BE_MENDED:
                raise
            return False
        return True

    def _commit_or_raise(self, changes: Sequence[Change]) -> None:
        self._thread.nftables.commit(changes)

    def _forget_connections(self, changed: Collection[Element], wanted: Collection[Element] = ()) -> None:
        """Those to the ports of `changed`, but for those that lead where `wanted` says."""
        for protocol in _REMEMBERED:
            ports = {sent_to(each)[1] for each in changed if each.name in MAPS and sent_to(each)[0] == protocol}
            if ports:
                forget(protocol, ports, partial(self._misled, protocol, changed, wanted))

    def _misled(
        self, protocol: int, changed: Iterable[Element], wanted: Iterable[Element], entries: Iterable[Entry]
    ) -> list[Entry]:
        found = {(each.name, each.key) for each in changed}
        right = {(each.name, each.key): each.data for each in wanted}
        mine = self._addresses()
        misled = []
        for entry in entries:
            specific, everywhere = places(protocol, entry.destination, entry.port)
            is_concerned = specific in found or (everywhere in found and entry.destination in mine)
            if is_concerned and leads_to(*entry.leads_to) != right.get(specific, right.get(everywhere)):
                misled.append(entry)
        return misled

    def _addresses(self) -> frozenset[Address]:
        """Those of the node, in its own namespace."""
        host = self._thread.host
        return frozenset(ipaddress.ip_address(each.get("local") or each.get("address")) for each in host.get_addr())


def _set_route_localnet() -> int:
    """After the rules, which keep pods from what it would open to them. 1 when it had to be done."""
    before = read_sysctl(ROUTE_LOCALNET)
    if before in ("", "1"):
        return 0
    write_sysctl(ROUTE_LOCALNET, "1")
    return 1


def _add(element: Element) -> Change:
    return add(_TABLE, element.name, element.key, element.data or None)


def _delete(element: Element) -> Change:
    return delete(_TABLE, element.name, element.key)


def _describe_owner(owner: Attachment | None, key: AttachmentKey) -> str:
    """Who has something, for a person: the pod if its runtime named it."""
    if owner is None or not owner.pod.name:
        return f"container {key.container_id}"
    return f"pod {owner.pod.namespace}/{owner.pod.name} (container {key.container_id})"
