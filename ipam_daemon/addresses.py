"""The addresses of this node: the allocator, and the journal that it is a cache of.

    etcd ─▶ blocks ─▶ use_blocks(): what the journal says of a new one ─▶ allocate ─▶ release ─▶ cool

A block counts from when etcd has said that it is this node's, or the journal remembers it. Before that there may be
attachments with addresses of no known block; they are in the journal, and are restored with their block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from ipam_daemon.allocator import Allocator, BlockUse
from ipam_daemon.journal import Journal
from ipam_daemon.model import Address, Attachment, Block, Interface, Network
from ipam_daemon.plan import gateways


class Addresses:
    """Which address is in which state. For one event loop."""

    def __init__(
        self, journal: Journal, cooldown: float, clock: Callable[[], float], told: Callable[[], None] = lambda: None
    ) -> None:
        """`cooldown` in seconds; `clock` gives the seconds since boot; `told` is called when there are other blocks."""
        self._journal = journal
        self._cooldown = cooldown
        self._clock = clock
        self._told = told
        self.allocator = Allocator()
        self.gateways: Mapping[Network, Address] = {}
        """Block → the gateway of the pods in it."""
        self.allocated = asyncio.Event()
        """Set after every allocation: somebody may want to look at what is left."""
        self.changed = asyncio.Event()
        """Set whenever an address is taken or let go: somebody may want to write down which are held."""

    # --- blocks

    def use_blocks(self, blocks: Iterable[Block]) -> None:
        """Takes addresses from `blocks`, and no others; what the journal says of a new one is restored first."""
        blocks = tuple(blocks)
        self.allocator.keep_blocks({block.cidr for block in blocks})
        known = {block.cidr for block in self.allocator.blocks}
        added = [block for block in blocks if block.cidr not in known]
        used = [each.ip for attachment in self._journal.attachments() for each in attachment.addresses]
        releasing = [each.ip for wire in self._journal.releasing() for each in wire.addresses]
        latest = self._clock() + self._cooldown  # whatever a journal says that an earlier version wrote
        cooling, last = self._journal.cooling(), self._journal.last()
        for block in added:
            self.allocator.add_block(block).restore(
                used=[a for a in used if a in block.cidr],
                releasing=[a for a in releasing if a in block.cidr],
                cooling={a: min(until, latest) for a, until in cooling.items() if a in block.cidr},
                last=next((a for a in last if a in block.cidr), None),
            )
        self.gateways = gateways(self.allocator.blocks)
        self.changed.set()
        self._told()

    def retire_block(self, block: Block) -> bool:
        """Hands out no more addresses of a block in which none is in use. False when one is, and nothing changes."""
        uses = {use.block.cidr: use for use in self.uses()}
        use = uses.get(block.cidr)
        if use is None or use.used or use.releasing or use.cooling:
            return False
        self.use_blocks([each for each in self.allocator.blocks if each.cidr != block.cidr])
        return True

    def recount(self) -> None:
        """Counts all addresses again from the journal."""
        blocks = self.allocator.blocks
        self.allocator.keep_blocks(())
        self.use_blocks(blocks)

    def uses(self) -> tuple[BlockUse, ...]:
        """How each block is used now."""
        return self.allocator.use(self._clock())

    def is_stranded(self, attachment: Attachment) -> bool:
        """Whether it has an address of a block that is not this node's (any more)."""
        return len(self._known(attachment.addresses)) < len(attachment.addresses)

    # --- addresses

    def allocate(self, wanted: Iterable[Address]) -> tuple[Interface, ...]:
        """As Allocator.allocate, now."""
        found = self.allocator.allocate(self._clock(), wanted)
        self.allocated.set()
        self.changed.set()
        return found

    def give_back(self, interfaces: Iterable[Interface]) -> None:
        """Frees addresses that no wire ever had."""
        self._count(self.allocator.give_back, interfaces)

    def release(self, interfaces: Iterable[Interface]) -> None:
        """Their wire is dead, and being deleted."""
        self._count(self.allocator.release, self._known(interfaces))
        self.changed.set()

    def cool(self, interfaces: Iterable[Interface], until: float) -> None:
        """Their wire is gone; they cool until then, in seconds since boot."""
        self._count(lambda known: self.allocator.cool(known, until), self._known(interfaces))
        self.changed.set()

    def _count(self, change: Callable[[Iterable[Interface]], None], interfaces: Iterable[Interface]) -> None:
        """Where they are not in the state that they leave, somebody has written into the journal: it says what is."""
        try:
            change(interfaces)
        except KeyError:
            self.recount()

    def _known(self, interfaces: Iterable[Interface]) -> list[Interface]:
        """Those of a block that this node has now: before etcd was first read there may be none."""
        return [each for each in interfaces if each.network in self.gateways]
