"""What both renderers write, held against the evaluator by packets: random clusters, every event, every moment between.

A tracer walks each flow through the rules as a fake kernel has them. After every event it must say what the evaluator
says; what grew must be what a renderer that starts anew would have made; and, at every commit on the way, nothing may
be open that is closed before and after, nor closed that is open before and after. With iptables and ipset, whose
changes are several commits, one thing may be closed on the way: what passes between two addresses that both change
hands by one event, as when a pod takes an address that another still has.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kube_proxy_lite.apply.nftables_fake import FakeNft
from kube_proxy_lite.apply.policy_iptables_fake import FakePolicyIptables
from kube_proxy_lite.model import Address, Network
from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.model import Flow
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.render.nftables_listing import TableListing
from kube_proxy_lite.render.policy_iptables import PolicyIptablesRenderer
from kube_proxy_lite.render.policy_nftables import TABLE, PolicyRenderer
from kube_proxy_lite.render.policy_tracer import passes_iptables, passes_nftables
from tests.policy_cases import BASE, CASES, Step, at, pod, pods, policy, spaces
from tests.policy_oracle import World
from tests.unit.test_policy_evaluator import put, remove
from tests.unit.test_policy_properties import (
    BEGIN,
    FLOWS,
    events,
    happen,
    namespaces_drawn,
    pods_drawn,
    policies_drawn,
    removed,
)

BLOCKS = frozenset({ipaddress.ip_network("10.0.0.0/24")})
NO_BLOCKS: frozenset[Network] = frozenset()
ALL = [
    Flow(source=ipaddress.ip_address(a), destination=ipaddress.ip_address(b), protocol=protocol, port=port)
    for a, b, protocol, port in FLOWS
]
ENDS = {end for flow in ALL for end in (flow.source, flow.destination)}


class Nft:
    """The nftables renderer before a fake kernel."""

    atomic = True

    def __init__(self) -> None:
        self.renderer, self.kernel = PolicyRenderer(), FakeNft()
        self.do(self.renderer.resync(None))

    def update(self, policies: Policies, blocks: frozenset[Network]) -> Iterator[Callable[[Flow], bool]]:
        """What passes after every commit that a change is."""
        for script in self.renderer.update(policies.drain(), blocks if policies.any else NO_BLOCKS):
            self.kernel.run(script)
            yield self.now()

    def do(self, scripts: tuple[str, ...]) -> None:
        for script in scripts:
            self.kernel.run(script)

    def now(self) -> Callable[[Flow], bool]:
        """What passes now."""
        return partial(passes_nftables, self.kernel.tables[TABLE])

    def state(self) -> Any:
        listing = self.kernel.tables[TABLE]
        return listing.sets, listing.chains, listing.hooks

    def drift(self) -> tuple[Any, ...]:
        listing = self.kernel.tables[TABLE]
        fresh = TableListing({k: dict(v) for k, v in listing.sets.items()}, dict(listing.chains), dict(listing.hooks))
        return self.renderer.resync(fresh)


class Iptables:
    """The iptables renderer before a fake kernel."""

    atomic = False

    def __init__(self) -> None:
        self.renderer, self.kernel = PolicyIptablesRenderer(), FakePolicyIptables()
        self.kernel.commit(self.renderer.resync(self.kernel.listing()))

    def update(self, policies: Policies, blocks: frozenset[Network]) -> Iterator[Callable[[Flow], bool]]:
        """What passes after every commit that a change is."""
        steps = self.renderer.update(policies.drain(), blocks if policies.any else NO_BLOCKS)
        for listing in self.kernel.each(steps):
            yield partial(passes_iptables, listing)

    def now(self) -> Callable[[Flow], bool]:
        """What passes now: listed once, for as many flows as are asked for."""
        return partial(passes_iptables, self.kernel.listing())

    def state(self) -> Any:
        listing = self.kernel.listing()
        return listing.sets, {version: (each.chains, each.jumps) for version, each in listing.rules.items()}

    def drift(self) -> tuple[Any, ...]:
        return self.renderer.resync(self.kernel.listing())


def resident(namespace: str, name: str, address: str, **found: str) -> dict[str, Any]:
    """A pod of this node."""
    meta = {"name": name, "namespace": namespace, "uid": f"{namespace}{name}", "labels": found}
    spec = {"nodeName": "n1", "containers": [{"ports": [{"name": "web", "containerPort": 80}]}]}
    return {"kind": "Pod", "metadata": meta, "spec": spec, "status": {"phase": "Running", "podIPs": [{"ip": address}]}}


RESIDENTS = [resident("x", "a", "10.0.0.1", k="v"), resident("y", "a", "10.0.1.1", l="v")]
busy = st.builds(
    lambda first, then: [*BEGIN, *RESIDENTS, *first, *then],
    st.lists(policies_drawn, min_size=3, max_size=4),
    st.lists(st.one_of(pods_drawn, pods_drawn, policies_drawn, namespaces_drawn, removed), min_size=3, max_size=10),
)
"""Events in a cluster in which pods are, and policies select them."""
BOTH = pytest.mark.parametrize("make", [Nft, Iptables])
some = settings(max_examples=120, deadline=None)


def uid_of(policies: Policies, address: Address) -> str | None:
    """Whose an address is."""
    owner = policies.owner(address)
    return owner.uid if owner else None


def allowed(policies: Policies, blocks: frozenset[Network], flow: Flow) -> bool:
    """What the evaluator says, and that an address of the node's blocks which nobody is known to have is closed."""
    if policies.any:
        for end in (flow.source, flow.destination):
            owner = policies.owner(end)
            if any(end in each for each in blocks) and (owner is None or not policies.is_protected(owner)):
                return False
    return judge(policies, flow).allowed


@BOTH
@some
@given(busy, st.sampled_from((BLOCKS, NO_BLOCKS)))
def test_packets_pass_as_the_evaluator_says_and_at_no_moment_otherwise(
    make: Any, drawn: list[Any], blocks: frozenset[Network]
) -> None:
    world, policies, mode = World(), Policies("n1"), make()
    before = dict.fromkeys(ALL, True)
    for event in drawn:
        had = {end: uid_of(policies, end) for end in ENDS}
        happen(event, world, policies)
        after = {flow: allowed(policies, blocks, flow) for flow in ALL}
        passed_on = {end for end in ENDS if uid_of(policies, end) != had[end]}
        for passes in mode.update(policies, blocks):
            for flow in ALL:
                may_close = not mode.atomic and {flow.source, flow.destination} <= passed_on
                if before[flow] is after[flow] and not (after[flow] and may_close):
                    assert passes(flow) is after[flow], (flow, event)
        passes = mode.now()
        assert {flow: passes(flow) for flow in ALL} == after
        assert mode.drift() == ()
        before = after


@BOTH
@some
@given(busy)
def test_what_grew_is_what_a_new_one_would_have_made(make: Any, drawn: list[Any]) -> None:
    world, policies, grown = World(), Policies("n1"), make()
    for event in drawn:
        happen(event, world, policies)
        list(grown.update(policies, BLOCKS))
    fresh, made = Policies("n1"), make()
    for manifest in world.objects.values():
        put(fresh, manifest)
    list(made.update(fresh, BLOCKS))
    assert grown.state() == made.state()


@BOTH
@settings(max_examples=60, deadline=None)
@given(busy, st.lists(st.booleans(), min_size=30, max_size=30))
def test_several_events_in_one_run_end_as_one_by_one(make: Any, drawn: list[Any], ends: list[bool]) -> None:
    world, policies, mode = World(), Policies("n1"), make()
    for event, ends_here in zip(drawn, itertools.chain(ends[: len(drawn) - 1], [True]), strict=True):
        happen(event, world, policies)
        if not ends_here:
            continue
        list(mode.update(policies, BLOCKS))
        passes = mode.now()
        assert [flow for flow in ALL if passes(flow) is not allowed(policies, BLOCKS, flow)] == []
        assert mode.drift() == ()
    fresh, made = Policies("n1"), make()
    for manifest in world.objects.values():
        put(fresh, manifest)
    list(made.update(fresh, BLOCKS))
    assert mode.state() == made.state()


@BOTH
@some
@given(busy, events)
def test_a_restart_after_changes_that_nobody_saw_leaves_what_should_be(
    make: Any, drawn: list[Any], unseen: list[Any]
) -> None:
    world, policies, mode = World(), Policies("n1"), make()
    for event in drawn:
        happen(event, world, policies)
    list(mode.update(policies, BLOCKS))
    for event in unseen:
        happen(event, world, policies)
    fresh, after = Policies("n1"), make()
    for manifest in world.objects.values():
        put(fresh, manifest)
    after.kernel = mode.kernel
    after.renderer = type(after.renderer)()
    after.renderer.update(fresh.drain(), BLOCKS if fresh.any else NO_BLOCKS)
    if make is Nft:
        listing = mode.kernel.tables[TABLE]
        after.do(after.renderer.resync(listing_of(listing)))
    else:
        mode.kernel.commit(after.renderer.resync(mode.kernel.listing()))
    passes = after.now()
    wrong = [flow for flow in ALL if passes(flow) is not allowed(fresh, BLOCKS, flow)]
    assert wrong == []
    assert after.drift() == ()


def listing_of(listing: TableListing) -> TableListing:
    """A copy, since a renderer keeps what it is given."""
    return TableListing({k: dict(v) for k, v in listing.sets.items()}, dict(listing.chains), dict(listing.hooks))


@BOTH
def test_a_node_with_hundreds_of_pods_is_as_one_that_is_rendered_anew(make: Any) -> None:
    """The tree of addresses grows, divides, and shrinks again."""
    dice, policies, mode = Random(7), Policies("n1"), make()
    blocks = frozenset({ipaddress.ip_network("10.1.0.0/22")})
    put(policies, BEGIN[0])
    for role in "abc":
        put(policies, policy(f"x/{role}", select={"role": role}, ingress=[{"from": [pods(role=role)]}]))
    there: dict[str, dict[str, Any]] = {}
    for round_ in range(60):
        for _ in range(10):
            name = f"p{dice.randrange(400)}"
            if name in there and dice.random() < (0.2 if round_ < 40 else 0.9):
                remove(policies, "Pod", "x", there.pop(name)["metadata"]["name"])
            elif round_ < 40 or name in there:
                address = str(ipaddress.ip_address("10.1.0.0") + 2 * int(name[1:]) + 1)
                there[name] = resident("x", name, address, role=dice.choice("abcd"))
                put(policies, there[name])
        list(mode.update(policies, blocks))
        assert mode.drift() == ()
        ends = [ipaddress.ip_address("10.1.0.0") + dice.randrange(802) for _ in range(24)]
        flows = [Flow(source=a, destination=b, protocol="TCP", port=80) for a, b in itertools.pairwise(ends)]
        passes = mode.now()
        assert [flow for flow in flows if passes(flow) is not allowed(policies, blocks, flow)] == []
    assert len(there) > 50


# --- moments, as stories ------------------------------------------------------------------------------------------

PLACES = ("x/a", "x/b", "y/a", "z/a")
PAIRS = [
    Flow(source=ipaddress.ip_address(at(a)), destination=ipaddress.ip_address(at(b)), protocol="TCP", port=port)
    for a in PLACES
    for b in PLACES
    if a != b
    for port in (80, 81)
]
POD_BLOCKS = frozenset({ipaddress.ip_network("10.244.0.0/24"), ipaddress.ip_network("10.244.2.0/24")})
FRIENDS_ONLY = policy("z/in", ingress=[{"from": [spaces() | pods(role="friend")]}])
EITHER = policy("z/in", ingress=[{"from": [spaces() | pods(role="friend"), spaces() | pods(role="guest")]}])


def egress_of(role: str, **spec: Any) -> dict[str, Any]:
    """A policy for what pods of a role may send."""
    return policy(f"x/{role}-out", select={"role": role}, policyTypes=["Egress"], **spec)


MOMENTS: dict[str, tuple[tuple[Any, ...], Step, tuple[str, str, bool]]] = {
    "let in where it may not go any more": (
        (FRIENDS_ONLY, egress_of("friend"), pod("x/a", role="none")),
        Step(put=(pod("x/a", role="friend"),)),
        ("x/a", "z/a", False),
    ),
    "free to go where it is let in no more": (
        (FRIENDS_ONLY, egress_of("friend"), pod("x/a", role="friend")),
        Step(put=(pod("x/a", role="none"),)),
        ("x/a", "z/a", False),
    ),
    "let in as a friend, then as a guest": (
        (EITHER, pod("x/a", role="friend")),
        Step(put=(pod("x/a", role="guest"),)),
        ("x/a", "z/a", True),
    ),
    "the same, by another class of its own": (
        (
            EITHER,
            egress_of("friend", egress=[{"to": [spaces(ns="z")]}]),
            egress_of("guest", egress=[{}]),
            pod("x/a", role="friend"),
        ),
        Step(put=(pod("x/a", role="guest"),)),
        ("x/a", "z/a", True),
    ),
    "asked by a peer that it was hidden from, and now shuts out": (
        (
            policy("z/out", policyTypes=["Egress"], egress=[{"to": [spaces() | pods(role="open")]}]),
            policy("x/in", select={"role": "open"}),
            pod("x/a", role="none"),
        ),
        Step(put=(pod("x/a", role="open"),)),
        ("z/a", "x/a", False),
    ),
    "a pod that comes with its policies": (
        (("Pod", "x", "a"), FRIENDS_ONLY, egress_of("friend")),
        Step(put=(pod("x/a", role="friend"),)),
        ("x/a", "z/a", False),
    ),
    "another policy that says the same": (
        (policy("z/in", ingress=[{"from": [spaces(ns="x")]}]),),
        Step(put=(policy("z/in", ingress=[{"from": [spaces(ns="x") | pods(pod="a"), spaces(ns="x")]}]),)),
        ("x/a", "z/a", True),
    ),
}


@BOTH
@pytest.mark.parametrize("blocks", [NO_BLOCKS, POD_BLOCKS], ids=["no blocks", "blocks"])
@pytest.mark.parametrize(("given_", "step", "says"), MOMENTS.values(), ids=MOMENTS.keys())
def test_a_moment_opens_nothing_and_closes_nothing(
    make: Any, blocks: frozenset[Network], given_: tuple[Any, ...], step: Step, says: tuple[str, str, bool]
) -> None:
    policies, mode = Policies("node1"), make()
    for each in (*BASE, *given_):
        happen(each, World(BASE), policies)
    list(mode.update(policies, blocks))
    before = {flow: allowed(policies, blocks, flow) for flow in PAIRS}
    for manifest in step.put:
        put(policies, manifest)
    after = {flow: allowed(policies, blocks, flow) for flow in PAIRS}
    asked = [flow for flow in PAIRS if (str(flow.source), str(flow.destination)) == (at(says[0]), at(says[1]))]
    assert asked
    assert {before[flow] for flow in asked} == {after[flow] for flow in asked} == {says[2]}
    for passes in mode.update(policies, blocks):
        wrong = [flow for flow in PAIRS if before[flow] is after[flow] is not passes(flow)]
        assert wrong == []
    passes = mode.now()
    assert [flow for flow in PAIRS if passes(flow) is not after[flow]] == []


@BOTH
@pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys())
def test_every_case_is_rendered_as_it_is_judged(make: Any, steps: tuple[Step, ...]) -> None:
    policies, mode = Policies("node1"), make()
    for manifest in BASE:
        put(policies, manifest)
    for step in steps:
        for gone in step.remove:
            remove(policies, *gone)
        for manifest in step.put:
            put(policies, manifest)
        list(mode.update(policies, POD_BLOCKS))
        passes = mode.now()
        assert [flow for flow in PAIRS if passes(flow) is not allowed(policies, POD_BLOCKS, flow)] == []
        assert mode.drift() == ()
