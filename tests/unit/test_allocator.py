"""The allocator: stories about single addresses, and laws that hold over random histories."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipam_daemon.allocator import Allocator, BlockAllocator, BlockUse, Layout
from ipam_daemon.errors import Exhausted
from ipam_daemon.model import Address, Block, Interface


def block(cidr: str, pool: str = "default") -> Block:
    return Block(cidr=ipaddress.ip_network(cidr), pool=pool, node="node-1", node_id="id-1", generation=1)


def allocator(*cidrs: str) -> Allocator:
    made = Allocator()
    for cidr in cidrs:
        made.add_block(block(cidr))
    return made


def take(of: Allocator, number: int, now: float = 0.0) -> list[str]:
    """The first (often only) address of each of so many allocations."""
    return [str(of.allocate(now)[0]) for _ in range(number)]


def free(of: Allocator, address: str, until: float) -> None:
    """DEL of `address`, its wire seen gone."""
    of.release([ipaddress.ip_interface(address)])
    of.cool([ipaddress.ip_interface(address)], until)


LAYOUTS = {
    "an IPv4 block": ("10.244.1.0/24", "10.244.1.1", "10.244.1.2", {"10.244.1.0", "10.244.1.255"}),
    "the smallest IPv4 block": ("10.244.1.8/29", "10.244.1.9", "10.244.1.10", {"10.244.1.8", "10.244.1.15"}),
    "an IPv6 block has no broadcast address": ("fd00:1::/120", "fd00:1::1", "fd00:1::2", {"fd00:1::"}),
}


@pytest.mark.parametrize(("cidr", "gateway", "vtep", "others"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_addresses_with_a_role(cidr: str, gateway: str, vtep: str, others: set[str]) -> None:
    layout = Layout.of(ipaddress.ip_network(cidr))
    assert (str(layout.gateway), str(layout.vtep)) == (gateway, vtep)
    assert {str(each) for each in layout.reserved} == {gateway, vtep, *others}


def rotation() -> list[str]:
    it = allocator("10.0.0.0/29")
    first = take(it, 1)
    free(it, first[0], until=0.0)
    return first + take(it, 4)


def an_add_that_failed() -> list[str]:
    it = allocator("10.0.0.0/29")
    got = it.allocate(0.0)
    it.give_back(got)
    return take(it, 1)


def asked_for_by_an_add_that_failed() -> list[str]:
    it = allocator("10.0.0.0/29")
    it.give_back(it.allocate(0.0, [ipaddress.ip_address("10.0.0.3")]))
    return take(it, 4)


def given_back_and_asked_for_by_an_add_that_failed() -> list[str]:
    it = allocator("10.0.0.0/29")
    it.give_back(it.allocate(0.0))
    it.give_back(it.allocate(0.0, [ipaddress.ip_address("10.0.0.3")]))
    return take(it, 4)


def cooling_and_asked_for_by_an_add_that_failed() -> list[str]:
    it = allocator("10.0.0.0/29")
    got = take(it, 2)
    free(it, got[0], until=30.0)
    free(it, got[1], until=31.0)
    it.give_back(it.allocate(1.0, [ipaddress.ip_address("10.0.0.3")]))
    return take(it, 4, now=2.0)


def reused_early_by_an_add_that_failed() -> list[str]:
    it = allocator("10.0.0.0/29", "10.0.1.0/29")
    got = take(it, 8)
    free(it, got[0], until=30.0)
    it.give_back(it.allocate(1.0))
    free(it, got[5], until=29.0)
    return take(it, 2, now=2.0)


def reused_early_when_the_daemon_counted_again() -> list[str]:
    it = Allocator()
    address = ipaddress.ip_address("10.0.0.3")
    it.add_block(block("10.0.0.0/29")).restore([address], (), {address: 30.0}, None)
    it.give_back([ipaddress.ip_interface("10.0.0.3/29")])
    return take(it, 4, now=1.0)


def cooling_while_others_are_free() -> list[str]:
    it = allocator("10.0.0.0/29")
    free(it, take(it, 1)[0], until=30.0)
    return take(it, 3, now=29.9)


def cooling_when_nothing_else_is_free() -> list[str]:
    it = allocator("10.0.0.0/29")
    got = take(it, 4)
    for address in (got[2], got[0]):
        free(it, address, until=30.0 if address == got[2] else 31.0)
    return take(it, 2, now=1.0)


def cooled_in_the_order_in_which_they_were_freed() -> list[str]:
    it = allocator("10.0.0.0/29")
    got = take(it, 4)
    for moment, address in enumerate((got[3], got[1], got[2])):
        free(it, address, until=30.0 + moment)
    return take(it, 3, now=100.0)


def a_second_block_before_cooling_ones() -> list[str]:
    it = allocator("10.0.0.0/29", "10.0.1.0/29")
    for address in take(it, 4):
        free(it, address, until=30.0)
    return take(it, 2, now=1.0)


def the_oldest_cooling_of_all_blocks() -> list[str]:
    it = allocator("10.0.0.0/29", "10.0.1.0/29")
    got = take(it, 8)
    for moment, address in enumerate((got[7], got[0], got[5])):
        free(it, address, until=30.0 + moment)
    return take(it, 3, now=1.0)


def after_the_last_one_that_was_given() -> list[str]:
    it = Allocator()
    it.add_block(block("10.0.0.0/29")).restore((), (), {}, ipaddress.ip_address("10.0.0.4"))
    return take(it, 4)


def after_the_last_one_of_the_block() -> list[str]:
    it = Allocator()
    it.add_block(block("10.0.0.0/29")).restore((), (), {}, ipaddress.ip_address("10.0.0.6"))
    return take(it, 4)


STORIES: dict[str, tuple[Callable[[], list[str]], list[int]]] = {
    "an address that was freed comes after all others": (rotation, [3, 4, 5, 6, 3]),
    "an address that no wire had comes next again": (an_add_that_failed, [3]),
    "one that was asked for comes last": (asked_for_by_an_add_that_failed, [4, 5, 6, 3]),
    "and so it does when it was the next": (given_back_and_asked_for_by_an_add_that_failed, [4, 5, 6, 3]),
    "one that was cooling cools on": (cooling_and_asked_for_by_an_add_that_failed, [5, 6, 3, 4]),
    "one that was reused early has its old moment": (reused_early_by_an_add_that_failed, [104, 3]),
    "as the journal has it": (reused_early_when_the_daemon_counted_again, [4, 5, 6, 3]),
    "a cooling address waits while others are free": (cooling_while_others_are_free, [4, 5, 6]),
    "cooling addresses go oldest first when nothing is free": (cooling_when_nothing_else_is_free, [5, 3]),
    "what has cooled comes in the order of freeing": (cooled_in_the_order_in_which_they_were_freed, [6, 4, 5]),
    "a free address of another block goes before a cooling one": (a_second_block_before_cooling_ones, [103, 104]),
    "the oldest cooling address of all blocks goes first": (the_oldest_cooling_of_all_blocks, [106, 3, 104]),
    "a restored block goes on after the last address": (after_the_last_one_that_was_given, [5, 6, 3, 4]),
    "a restored block goes on at its beginning": (after_the_last_one_of_the_block, [3, 4, 5, 6]),
}


@pytest.mark.parametrize(("story", "expected"), STORIES.values(), ids=STORIES.keys())
def test_which_address_comes_next(story: Callable[[], list[str]], expected: list[int]) -> None:
    """Expected numbers are the last byte, and 100 more in the second block."""
    assert story() == [f"10.0.{number // 100}.{number % 100}/29" for number in expected]


def test_one_address_of_each_family() -> None:
    assert [str(each) for each in allocator("fd00::/125", "10.0.0.0/29").allocate(0.0)] == [
        "10.0.0.3/29",
        "fd00::3/125",
    ]


def test_all_families_or_none() -> None:
    it = allocator("10.0.0.0/28", "fd00::/125")
    take(it, 5)
    before = it.use(0.0)
    with pytest.raises(Exhausted, match="fd00::/125"):
        it.allocate(0.0)
    assert it.use(0.0) == before


def test_exhaustion_names_the_pool_and_the_counts() -> None:
    it = Allocator()
    it.add_block(block("10.0.0.0/29", "blue"))
    got = take(it, 4)
    it.release([ipaddress.ip_interface(got[0])])
    with pytest.raises(Exhausted) as caught:
        it.allocate(0.0)
    assert "pool blue" in str(caught.value)
    assert "10.0.0.0/29: 3 used, 1 releasing, 0 cooling, 4 reserved" in str(caught.value)


def test_a_block_that_is_known_stays_as_it_is() -> None:
    it = allocator("10.0.0.0/29")
    take(it, 2)
    before = it.use(0.0)
    it.add_block(block("10.0.0.0/29"))
    assert it.use(0.0) == before


RESTORED = {
    "used": ({"used": ["10.0.0.3"]}, {"used": 1, "free": 3}),
    "releasing": ({"releasing": ["10.0.0.3"]}, {"releasing": 1, "free": 3}),
    "cooling": ({"cooling": {"10.0.0.3": 30.0}}, {"cooling": 1, "free": 3}),
    "cooled since": ({"cooling": {"10.0.0.3": 1.0}}, {"free": 4}),
    "used again before its time": ({"used": ["10.0.0.3"], "cooling": {"10.0.0.3": 30.0}}, {"used": 1, "free": 3}),
    "used again and released": (
        {"releasing": ["10.0.0.3"], "cooling": {"10.0.0.3": 30.0}},
        {"releasing": 1, "free": 3},
    ),
}


@pytest.mark.parametrize(("journal", "expected"), RESTORED.values(), ids=RESTORED.keys())
def test_restored_from_the_journal(journal: dict[str, list[str] | dict[str, float]], expected: dict[str, int]) -> None:
    it = BlockAllocator(block("10.0.0.0/29"))
    cooling = journal.get("cooling", {})
    assert isinstance(cooling, dict)
    it.restore(
        [ipaddress.ip_address(each) for each in journal.get("used", ())],
        [ipaddress.ip_address(each) for each in journal.get("releasing", ())],
        {ipaddress.ip_address(each): until for each, until in cooling.items()},
        None,
    )
    assert counts(it.use(2.0)) == {"used": 0, "releasing": 0, "cooling": 0, "reserved": 4, "free": 0, **expected}


def counts(use: BlockUse) -> dict[str, int]:
    return {name: getattr(use, name) for name in ("used", "releasing", "cooling", "reserved", "free")}


# --- laws over random histories -----------------------------------------------------------------------------------

CIDRS = ("10.0.0.0/29", "10.0.1.0/28")
COOLDOWN = 10.0


class Histories(RuleBasedStateMachine):
    """Against a model that is three sets and a clock: every address is in one state, and the rules of order hold."""

    def __init__(self) -> None:
        super().__init__()
        self.real = allocator(*CIDRS)
        self.now = 0.0
        self.used: set[Interface] = set()
        self.releasing: set[Interface] = set()
        self.cooling: dict[Interface, float] = {}
        self.rows: dict[Interface, float] = {}  # the journal's, from which an allocation before its time erases nothing
        self.last: dict[str, Address] = {}
        reserved = {a for cidr in CIDRS for a in Layout.of(ipaddress.ip_network(cidr)).reserved}
        self.usable = {
            ipaddress.ip_interface(f"{a}/{cidr.split('/')[1]}")
            for cidr in CIDRS
            for a in ipaddress.ip_network(cidr)
            if a not in reserved
        }

    def free(self) -> set[Interface]:
        cold = {each for each, until in self.cooling.items() if until > self.now}
        return self.usable - self.used - self.releasing - cold

    @rule()
    def allocate(self) -> None:
        free = self.free()
        cold = {each: until for each, until in self.cooling.items() if until > self.now}
        try:
            (got,) = self.real.allocate(self.now)
        except Exhausted:
            assert not free
            assert not cold
            return
        assert got in self.usable
        assert got not in self.used | self.releasing
        if free:
            assert got in free
        else:
            assert self.cooling[got] == min(cold.values()), "the oldest cooling address comes first"
        self.cooling.pop(got, None)
        self.used.add(got)
        self.last[str(got.network)] = got.ip

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        """By name, whether it is free or cooling."""
        able = sorted(self.usable - self.used - self.releasing)
        if able:
            wanted = data.draw(st.sampled_from(able))
            assert self.real.allocate(self.now, [wanted.ip]) == (wanted,)
            self.cooling.pop(wanted, None)
            self.used.add(wanted)
            self.last[str(wanted.network)] = wanted.ip

    @precondition(lambda self: self.cooling)
    @rule(data=st.data())
    def ask_for_a_cooling_one_and_fail(self, data: st.DataObject) -> None:
        """It goes on cooling, whatever the time is; one that has cooled is free."""
        wanted = data.draw(st.sampled_from(sorted(self.cooling)))
        self.real.give_back(self.real.allocate(self.now, [wanted.ip]))
        self.last[str(wanted.network)] = wanted.ip

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """An address that the journal says is cooling goes on with that."""
        address = data.draw(st.sampled_from(sorted(self.used)))
        self.used.remove(address)
        if address in self.rows:
            self.cooling[address] = self.rows[address]
        self.real.give_back([address])

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.used)))
        self.used.remove(address)
        self.releasing.add(address)
        self.real.release([address])

    @precondition(lambda self: self.releasing)
    @rule(data=st.data())
    def cool(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.releasing)))
        self.releasing.remove(address)
        self.cooling[address] = self.rows[address] = self.now + COOLDOWN
        self.real.cool([address], self.now + COOLDOWN)

    @rule(seconds=st.floats(0.5, 12.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def restart(self) -> None:
        """Another allocator, from what the journal says, stands where the old one stood."""
        again = Allocator()
        for cidr in map(ipaddress.ip_network, CIDRS):
            again.add_block(block(str(cidr))).restore(
                [each.ip for each in self.used if each.network == cidr],
                [each.ip for each in self.releasing if each.network == cidr],
                {each.ip: until for each, until in self.rows.items() if each.network == cidr},
                self.last.get(str(cidr)),
            )
        assert again.use(self.now) == self.real.use(self.now)
        self.real = again

    @invariant()
    def every_address_is_in_one_state(self) -> None:
        for use in self.real.use(self.now):
            assert sum(counts(use).values()) == use.block.cidr.num_addresses
        total = {
            name: sum(counts(use)[name] for use in self.real.use(self.now)) for name in ("used", "releasing", "free")
        }
        assert total == {"used": len(self.used), "releasing": len(self.releasing), "free": len(self.free())}


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class Queue(RuleBasedStateMachine):
    """Addresses that have cooled come in the order in which they became free: first in, first out. An ADD that fails
    changes nothing of that, but for an address that it asked for, which comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.real = allocator("10.0.0.0/28")
        self.queue = [f"10.0.0.{number}/28" for number in range(3, 15)]
        self.used: list[str] = []

    @precondition(lambda self: self.queue)
    @rule()
    def allocate(self) -> None:
        (got,) = take(self.real, 1)
        assert got == self.queue.pop(0)
        self.used.append(got)

    @precondition(lambda self: self.queue)
    @rule()
    def fail(self) -> None:
        self.real.give_back(self.real.allocate(0.0))

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def ask_and_fail(self, data: st.DataObject) -> None:
        wanted = data.draw(st.sampled_from(self.queue))
        self.queue.remove(wanted)
        self.queue.append(wanted)
        self.real.give_back(self.real.allocate(0.0, [ipaddress.ip_interface(wanted).ip]))

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(self.used))
        self.used.remove(address)
        self.queue.append(address)
        free(self.real, address, until=0.0)


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


LARGE = {
    "as many as Kubernetes gives a node": "fd00:1::/64",
    "65,536": "fd00:1::/112",
    "a /16 of IPv4": "10.9.0.0/16",
}


@pytest.mark.parametrize("cidr", LARGE.values(), ids=LARGE.keys())
def test_a_large_block_is_not_enumerated(cidr: str) -> None:
    network = ipaddress.ip_network(cidr)
    it = allocator(cidr)
    assert it.use(0)[0].free == network.num_addresses - len(Layout.of(network).reserved)
    first = take(it, 3)
    assert first == [f"{network[number]}/{network.prefixlen}" for number in (3, 4, 5)]
    free(it, first[0], until=0.0)
    assert take(it, 1) == [f"{network[6]}/{network.prefixlen}"], "what was freed comes last"
    wanted = network[network.num_addresses - 2]
    assert str(it.allocate(0, [wanted])[0].ip) == str(wanted)
    block = it.add_block(Block(cidr=network, pool="default", node="node-1", node_id="id-1", generation=1))
    block.restore([network[8]], [], {}, network[6])
    assert take(it, 2) == [f"{network[number]}/{network.prefixlen}" for number in (7, 9)], "rotation goes on"


def test_what_was_asked_for_and_freed_waits_for_its_turn() -> None:
    it = allocator("10.0.0.0/29")
    asked = it.allocate(0, [ipaddress.ip_address("10.0.0.5")])
    it.release(asked)
    it.cool(asked, until=0.0)
    assert take(it, 4, now=1.0) == [f"10.0.0.{number}/29" for number in (3, 4, 6, 5)]


def test_a_family_of_which_the_node_has_no_block_yet() -> None:
    it = allocator("10.0.0.0/29")
    it.families = frozenset({4, 6})
    with pytest.raises(Exhausted, match="this node has no block of IPv6 addresses"):
        it.allocate(0)
    assert it.use(0)[0].used == 0
