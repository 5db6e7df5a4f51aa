"""Which address a pod gets: pure bookkeeping over the blocks that this node owns.

An address of a block is in exactly one state:

      reserved                         network, gateway, VTEP, broadcast: never handed out
      free ──allocate──▶ used ──release──▶ releasing ──cool──▶ cooling ──(time)──▶ free
        ▲                  │                                      │
        └──── give_back ───┘ (an ADD that never had a wire)       └──allocate, when nothing is free: oldest first

Free addresses wait in a queue, so that the one freed longest ago comes next: whoever still has an old flow or a stale
neighbour entry for an address has the longest possible time to forget it. `releasing` addresses are never handed out,
not even when the block is full: a wire with that address may still exist.

An address that is given back is where it was: the next one, or cooling as long as before. One that was free and asked
for by name comes last: whoever asked for it asks again, and must not find it with the next one who asked for none.

With several blocks, a free address of any of them goes before a cooling one, and of those the oldest comes first.

An allocation is one address of each family of the cluster's pools, or none at all.

Addresses that nobody has had yet are not enumerated: they are two ranges, from the last one handed out to the end and
from the beginning to there, and the few in them that are taken. So a block of 2^64 addresses costs what one of 256
does: memory for the addresses that are not fresh (~200 bytes each), O(1) an operation and O(blocks). An allocator is a
cache of the journal and can be rebuilt from it at any time; it does no I/O and takes the time as an argument (seconds,
any epoch).
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping

import msgspec

from ipam_daemon.errors import AddressUnavailable, CniError, Exhausted
from ipam_daemon.model import Address, Block, Interface, Network

COOLDOWN = 30.0
"""Seconds for which a freed address is not handed out while others are free."""


class BlockUse(msgspec.Struct, frozen=True, kw_only=True):
    """How many addresses of a block are in which state; the five add up to the size of the block."""

    block: Block
    used: int
    releasing: int
    cooling: int
    reserved: int
    free: int


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of a block that have a role. They are the same on every node, so that none has to be looked up."""

    gateway: Address
    vtep: Address
    reserved: frozenset[Address]

    @classmethod
    def of(cls, cidr: Network) -> Layout:
        """First the network's own address, then the gateway (on the bridge), then the VTEP; last the broadcast address.

        The network's own address stays unused although kernels from 5.14 take it for unicast: in IPv6 it is the
        subnet-router anycast address (RFC 4291, 2.6.1), and older kernels broadcast to it in IPv4.
        """
        gateway, vtep = cidr[1], cidr[2]
        last = {cidr.broadcast_address} if cidr.version == 4 else set()
        return cls(gateway=gateway, vtep=vtep, reserved=frozenset({cidr[0], gateway, vtep, *last}))


class _Fresh:
    """The addresses of a block that nobody has had, in turn: those after `last`, then the others. `count` says how
    many they are."""

    def __init__(self, cidr: Network, taken: Iterable[Address], last: Address | None) -> None:
        self._cidr = cidr
        self._out = {self._index(address) for address in taken}  # passed over when their turn comes
        size, begin = cidr.num_addresses, 0 if last is None else self._index(last) + 1
        self._ranges = deque([(begin, size), (0, begin)])
        self.count = size - len(self._out)

    def pop(self) -> Address | None:
        """The next one, no longer fresh; None when there is none."""
        while self._ranges:
            index, end = self._ranges.popleft()
            if index < end:
                self._ranges.appendleft((index + 1, end))
                if index not in self._out:
                    self.count -= 1
                    return self._cidr[index]
                self._out.remove(index)
        return None

    def take(self, address: Address) -> None:
        """Makes this one, which is fresh, no longer so."""
        self._out.add(self._index(address))
        self.count -= 1

    def _index(self, address: Address) -> int:
        return int(address) - int(self._cidr.network_address)


class BlockAllocator:
    """The addresses of one block."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self._layout = Layout.of(block.cidr)
        self._used: set[Address] = set()
        self._releasing: set[Address] = set()
        self._cooling: OrderedDict[Address, float] = OrderedDict()  # address → when it is cool, oldest first
        # Used addresses whose turn it was not → when they would have been cool; None for those that were free.
        self._early: dict[Address, float | None] = {}
        # The queue of free addresses: what was given back, what nobody has had, what has cooled down.
        self._first: deque[Address] = deque()
        self._fresh = _Fresh(block.cidr, self._layout.reserved, None)
        self._cooled: OrderedDict[Address, None] = OrderedDict()

    def restore(
        self,
        used: Iterable[Address],
        releasing: Iterable[Address],
        cooling: Mapping[Address, float],
        last: Address | None,
    ) -> None:
        """Forgets everything and starts from what the journal says; the queue of free addresses begins after `last`.

        An address that was reused before its time is still among the cooling there: its wire, living or not, counts.
        """
        self._used, self._releasing = set(used), set(releasing)
        cold = [each for each in cooling.items() if each[0] not in self._used | self._releasing]
        self._cooling = OrderedDict(sorted(cold, key=_moment))
        self._early = {address: until for address, until in cooling.items() if address in self._used}
        taken = self._used | self._releasing | self._cooling.keys() | self._layout.reserved
        self._first.clear()
        self._fresh = _Fresh(self.block.cidr, taken, last)
        self._cooled.clear()

    def take_free(self, now: float) -> Address | None:
        """The address that is free for longest, now used; None when none is free."""
        self._thaw(now)
        address = self._first.popleft() if self._first else self._fresh.pop()
        if address is None and self._cooled:
            address, _ = self._cooled.popitem(last=False)
        if address is not None:
            self._used.add(address)
        return address

    def take(self, address: Address, now: float) -> str:
        """Makes one certain address of the block used. Returns why it cannot be had; empty when it is ours now."""
        self._thaw(now)
        if address in self._layout.reserved:
            return "is reserved (the network, its gateway, its VTEP or its broadcast address)"
        if address in self._used:
            return "is in use"
        if address in self._releasing:
            return "is still being released"
        until = self._cooling.pop(address, None)
        if address in self._first:
            self._first.remove(address)
        elif address in self._cooled:
            del self._cooled[address]
        elif until is None:
            self._fresh.take(address)
        self._early[address] = until
        self._used.add(address)
        return ""

    def oldest_cooling(self) -> float | None:
        """When the address that cools for longest will be cool; None when none is cooling."""
        return next(iter(self._cooling.values()), None)

    def take_cooling(self) -> Address:
        """The address that cools for longest, now used before its time; there must be one."""
        address, until = self._cooling.popitem(last=False)
        self._early[address] = until
        self._used.add(address)
        return address

    @property
    def held(self) -> frozenset[Address]:
        """The addresses that are somebody's: used and releasing."""
        return frozenset(self._used | self._releasing)

    def not_free(self) -> list[Address]:
        """Every address that is used, releasing or cooling."""
        return [*self._used, *self._releasing, *self._cooling]

    def give_back(self, address: Address) -> None:
        """A used address that no wire ever had is where it was; one that was asked for while it was free comes last."""
        self._used.remove(address)
        if address not in self._early:
            self._first.appendleft(address)
            return
        until = self._early.pop(address)
        if until is None:
            self._cooled[address] = None
        else:
            self._cooling = OrderedDict(sorted([*self._cooling.items(), (address, until)], key=_moment))

    def release(self, address: Address) -> None:
        """A used address whose wire is being deleted."""
        self._used.remove(address)
        self._early.pop(address, None)
        self._releasing.add(address)

    def cool(self, address: Address, until: float) -> None:
        """A releasing address whose wire was seen gone."""
        self._releasing.remove(address)
        self._cooling[address] = until

    def use(self, now: float) -> BlockUse:
        """How the block is used."""
        self._thaw(now)
        return BlockUse(
            block=self.block,
            used=len(self._used),
            releasing=len(self._releasing),
            cooling=len(self._cooling),
            reserved=len(self._layout.reserved),
            free=len(self._first) + self._fresh.count + len(self._cooled),
        )

    def _thaw(self, now: float) -> None:
        while self._cooling:
            address, until = next(iter(self._cooling.items()))
            if until > now:
                return
            del self._cooling[address]
            self._cooled[address] = None


class Allocator:
    """The addresses of all blocks of this node. An allocation is one address of each family, or none at all."""

    def __init__(self) -> None:
        self._blocks: dict[Network, BlockAllocator] = {}
        self.families: frozenset[int] = frozenset()
        """The families of the cluster's pools: an allocation has an address of each, though the node may have no block
        of one yet."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that addresses come from, in the order in which they were added."""
        return tuple(each.block for each in self._blocks.values())

    def add_block(self, block: Block) -> BlockAllocator:
        """Takes addresses of `block`, too. A block that is known already stays as it is."""
        return self._blocks.setdefault(block.cidr, BlockAllocator(block))

    def keep_blocks(self, cidrs: Collection[Network]) -> None:
        """Forgets every block but these, with all that it knew of their addresses."""
        self._blocks = {cidr: each for cidr, each in self._blocks.items() if cidr in cidrs}

    def allocate(self, now: float, wanted: Iterable[Address] = ()) -> tuple[Interface, ...]:
        """One address of each family of the pools, with the block's prefix length; those of `wanted` for their
        families, any for the others.

        Raises AddressUnavailable for a wanted one that cannot be had, Exhausted when a family has none; whatever was
        taken of another family is given back.
        """
        by_family: dict[int, Address] = {address.version: address for address in wanted}
        families = sorted({cidr.version for cidr in self._blocks} | self.families | by_family.keys())
        got: list[Interface] = []
        try:
            for family in families:
                address = by_family.get(family)
                got.append(self._allocate_of(family, now) if address is None else self.take(address, now))
        except CniError:
            self.give_back(got)
            raise
        return tuple(got)

    def give_back(self, interfaces: Iterable[Interface]) -> None:
        """Frees addresses that no wire ever had."""
        for interface in interfaces:
            self._of(interface).give_back(interface.ip)

    def release(self, interfaces: Iterable[Interface]) -> None:
        """Marks used addresses as releasing: their wire is being deleted."""
        for interface in interfaces:
            self._of(interface).release(interface.ip)

    def cool(self, interfaces: Iterable[Interface], until: float) -> None:
        """Marks releasing addresses as cooling until `until`: their wire was seen gone."""
        for interface in interfaces:
            self._of(interface).cool(interface.ip, until)

    def use(self, now: float) -> tuple[BlockUse, ...]:
        """How each block is used."""
        return tuple(each.use(now) for each in self._blocks.values())

    def not_free(self) -> tuple[Address, ...]:
        """Every address of any block that is used, releasing or cooling, in order."""
        addresses = [address for each in self._blocks.values() for address in each.not_free()]
        return tuple(sorted(addresses, key=lambda address: (address.version, int(address))))

    @property
    def held(self) -> frozenset[Address]:
        """The addresses of all blocks that are somebody's: used and releasing."""
        return frozenset(address for each in self._blocks.values() for address in each.held)

    def take(self, address: Address, now: float) -> Interface:
        """Makes one certain address used. Raises AddressUnavailable, saying why it cannot be had."""
        cidr = next((cidr for cidr in self._blocks if address in cidr), None)
        if cidr is None:
            raise AddressUnavailable(
                f"{address} was asked for and is not of this node's {', '.join(map(str, self._blocks))}"
            )
        why = self._blocks[cidr].take(address, now)
        if why:
            raise AddressUnavailable(f"{address} was asked for and {why}")
        return _with_prefix(address, cidr)

    def _allocate_of(self, family: int, now: float) -> Interface:
        """A free address of any block of the family; without one, of all cooling addresses the oldest."""
        blocks = [each for cidr, each in self._blocks.items() if cidr.version == family]
        for each in blocks:
            if (address := each.take_free(now)) is not None:
                return _with_prefix(address, each.block.cidr)
        cooling = [(until, each) for each in blocks if (until := each.oldest_cooling()) is not None]
        if not cooling:
            raise Exhausted(self._exhaustion(family, now))
        _, oldest = min(cooling, key=lambda pair: pair[0])
        return _with_prefix(oldest.take_cooling(), oldest.block.cidr)

    def _of(self, interface: Interface) -> BlockAllocator:
        return self._blocks[interface.network]

    def _exhaustion(self, family: int, now: float) -> str:
        uses = [use for use in self.use(now) if use.block.cidr.version == family]
        if not uses:
            return f"this node has no block of IPv{family} addresses"
        pools = ", ".join(sorted({use.block.pool for use in uses}))
        cidrs = ", ".join(str(use.block.cidr) for use in uses)
        return (
            f"pool {pools}: no address is free in this node's {cidrs}: {sum(use.used for use in uses)} used, "
            f"{sum(use.releasing for use in uses)} releasing, {sum(use.cooling for use in uses)} cooling, "
            f"{sum(use.reserved for use in uses)} reserved"
        )


def _moment(item: tuple[Address, float]) -> float:
    return item[1]


def _with_prefix(address: Address, cidr: Network) -> Interface:
    return ipaddress.ip_interface(f"{address}/{cidr.prefixlen}")
