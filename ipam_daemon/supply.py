"""How many blocks a node should have: pure.

A node begins with one block of a pool. It claims another before it runs short, and returns one that has long been
empty, so that a node with many short-lived pods neither waits for etcd on an ADD nor keeps blocks from others:

    available = free + cooling, over the node's blocks of the pool
    reserve   = an eighth of a block's pod addresses, at least 2

    available < reserve                                            ──▶ claim one, up to the limit
    a block empty for `idle_s`, and available without it ≥ 2 × reserve  ──▶ return it

Cooling addresses count as available: they are handed out when nothing else is free, and a node that churns would claim
block after block otherwise. The first block of a pool is never returned: the node's VTEP is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ipam_daemon.allocator import BlockUse
from ipam_daemon.model import Block, Network, Pool


class Claim(msgspec.Struct, frozen=True):
    """Claim one more block of the pool."""

    pool: Pool


class Return(msgspec.Struct, frozen=True):
    """Return the block."""

    block: Block


def decide(
    pool: Pool,
    uses: Sequence[BlockUse],
    empty_since: Mapping[Network, float],
    now: float,
    *,
    limit: int,
    idle_s: float,
) -> Claim | Return | None:
    """What to do about `pool`, None for nothing.

    `uses` are the node's blocks of the pool, the first one first; `empty_since` says since when a block has no address
    in use, releasing or cooling; `limit` is the most blocks of a pool that a node may have.
    """
    if not uses:
        return Claim(pool)
    reserve = reserve_of(uses[0])
    if available(uses) < reserve:
        return Claim(pool) if len(uses) < limit else None
    for use in reversed(uses[1:]):
        since = empty_since.get(use.block.cidr)
        rest = [each for each in uses if each is not use]
        if since is not None and now - since >= idle_s and available(rest) >= 2 * reserve:
            return Return(use.block)
    return None


def available(uses: Sequence[BlockUse]) -> int:
    """Addresses that could be handed out now."""
    return sum(use.free + use.cooling for use in uses)


def short_of(uses: Sequence[BlockUse], families: frozenset[int]) -> frozenset[int]:
    """The families of which none could be, and so no pod be added."""
    return frozenset(
        family for family in families if not available([use for use in uses if use.block.cidr.version == family])
    )


def reserve_of(use: BlockUse) -> int:
    """How many addresses should be available at least."""
    return max(2, (use.block.cidr.num_addresses - use.reserved) // 8)


def is_empty(use: BlockUse) -> bool:
    """True when nobody has an address of the block, nor had one lately."""
    return not (use.used or use.releasing or use.cooling)
