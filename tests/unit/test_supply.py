"""How many blocks a node should have."""

from __future__ import annotations

import ipaddress

import pytest

from ipam_daemon.allocator import BlockUse
from ipam_daemon.model import Block, Pool
from ipam_daemon.supply import Claim, Return, decide, short_of

POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=24)
LIMIT, IDLE = 4, 60.0


def use(number: int, used: int, releasing: int = 0, cooling: int = 0) -> BlockUse:
    """A /24 with so many addresses in each state."""
    block = Block(
        cidr=ipaddress.ip_network(f"10.244.{number}.0/24"), pool="default", node="n", node_id="i", generation=1
    )
    free = 252 - used - releasing - cooling
    return BlockUse(block=block, used=used, releasing=releasing, cooling=cooling, reserved=4, free=free)


STORIES: dict[str, tuple[list[BlockUse], dict[int, float], float, str]] = {
    "no block yet": ([], {}, 0, "claim"),
    "a fresh block": ([use(1, 0)], {1: 0}, 1000, ""),
    "an eighth is left": ([use(1, 221)], {}, 0, ""),
    "less than an eighth is left": ([use(1, 222)], {}, 0, "claim"),
    "what cools counts as available": ([use(1, 200, cooling=52)], {}, 0, ""),
    "what is being released does not": ([use(1, 200, releasing=52)], {}, 0, "claim"),
    "blocks count together": ([use(1, 252), use(2, 200)], {}, 0, ""),
    "the limit is reached": ([use(n, 252) for n in range(1, 5)], {}, 0, ""),
    "an empty second block, for long": ([use(1, 100), use(2, 0)], {2: 0}, 60, "return 2"),
    "an empty second block, since just now": ([use(1, 100), use(2, 0)], {2: 1}, 60, ""),
    "an empty first block is kept": ([use(1, 0), use(2, 100)], {1: 0}, 60, ""),
    "the rest would run short soon": ([use(1, 195), use(2, 0)], {2: 0}, 60, ""),
    "of two empty ones the later goes first": ([use(1, 10), use(2, 0), use(3, 0)], {2: 0, 3: 0}, 60, "return 3"),
}


@pytest.mark.parametrize(("uses", "empty", "now", "expected"), STORIES.values(), ids=STORIES.keys())
def test_decision(uses: list[BlockUse], empty: dict[int, float], now: float, expected: str) -> None:
    since = {ipaddress.ip_network(f"10.244.{number}.0/24"): moment for number, moment in empty.items()}
    decision = decide(POOL, uses, since, now, limit=LIMIT, idle_s=IDLE)
    if isinstance(decision, Return):
        assert f"return {decision.block.cidr.network_address.packed[2]}" == expected
    else:
        assert ("claim" if isinstance(decision, Claim) else "") == expected


SHORTAGES: dict[str, tuple[list[BlockUse], set[int], set[int]]] = {
    "room in the one family": ([use(1, 0)], {4}, set()),
    "none in it": ([use(1, 252)], {4}, {4}),
    "room in another of its blocks": ([use(1, 252), use(2, 0)], {4}, set()),
    "what cools can be had": ([use(1, 200, cooling=52)], {4}, set()),
    "no block of a second family": ([use(1, 0)], {4, 6}, {6}),
}


@pytest.mark.parametrize(("uses", "families", "short"), SHORTAGES.values(), ids=SHORTAGES.keys())
def test_of_which_families_there_is_nothing_left(uses: list[BlockUse], families: set[int], short: set[int]) -> None:
    assert short_of(uses, frozenset(families)) == short


def test_pools_of_two_families_may_share_a_name() -> None:
    six = Pool(cidr=ipaddress.ip_network("fd00:10:244::/56"))
    assert POOL.has(use(1, 0).block)
    assert not six.has(use(1, 0).block)
