"""Properties of the nftables renderer: after whatever has happened, the kernel is as if made from scratch.

Changes, removals, other settings and restarts come in any order, in pieces of any size. All that history decides is
which slot an endpoint sits in, and it leaves no holes and no more elements than there were.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kube_proxy_lite.model import PortKey, PortPlan, Protocol
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_elements import settle
from kube_proxy_lite.render.nftables_listing import TableListing
from tests.unit.nftables_stage import Node
from tests.unit.service_cases import BACKENDS, SETTINGS, VARIANTS, plan

NAMES = ("a", "b", "c")
PLANS = st.builds(
    lambda name, backends, version, protocol, internal, external, affinity, ranges: plan(
        name,
        *backends,
        version=version,
        protocol=protocol,
        number=NAMES.index(name) + 1,
        internal_local=internal,
        external_local=external,
        affinity=affinity,
        ranges=ranges,
    ),
    st.sampled_from(NAMES),
    st.one_of(
        st.sampled_from(list(BACKENDS.values())),
        st.lists(st.integers(1, 9), unique=True, max_size=8).map(
            lambda hosts: (
                tuple(f"10.244.{h % 3}.{h}" for h in hosts),
                tuple(f"10.244.1.{h}" for h in hosts if h % 3 == 1),
            )
        ),
    ),
    st.sampled_from((4, 6)),
    st.sampled_from(list(Protocol)),
    st.booleans(),
    st.booleans(),
    st.sampled_from((0, 60, 10800)),
    st.sampled_from(((), ("10.0.0.0/8",), ("10.0.0.0/16", "192.0.2.0/24"))),
)
EVENTS = st.lists(
    st.one_of(
        st.lists(PLANS, min_size=1, max_size=3),  # set
        st.integers(0, 20),  # remove one
        st.sampled_from(list(VARIANTS)),  # configure
        st.none(),  # restart
    ),
    max_size=12,
)


def without_order(tables: dict[str, TableListing]) -> dict[str, object]:
    """Tables with the endpoints of a place as a set: which slot one sits in is history."""
    shown: dict[str, object] = {}
    for name, table in tables.items():
        sets: dict[str, object] = {}
        for which, items in table.sets.items():
            if which.startswith(("eps_", "np_")):
                places: dict[str, list[str]] = {}
                slots: dict[str, list[str]] = {}
                for key, endpoint in items.items():
                    place, _, slot = key.rpartition(" . ")
                    places.setdefault(place, []).append(endpoint)
                    slots.setdefault(place, []).append(slot)
                sets[which] = {place: (sorted(found), sorted(slots[place])) for place, found in places.items()}
            else:
                sets[which] = items
        shown[name] = (sets, table.chains, table.hooks)
    return shown


@given(events=EVENTS, limit=st.sampled_from((1, 7, 5000)))
@hypothesis_settings(max_examples=100, deadline=None)
def test_after_every_event_the_kernel_is_as_from_scratch(events: list[object], limit: int) -> None:
    node, settings = Node(limit=limit), SETTINGS
    plans: dict[PortKey, PortPlan] = {}
    for event in events:
        changes: dict[PortKey, PortPlan | None] = {}
        if isinstance(event, list):
            changes = {each.key: each for each in event}
        elif isinstance(event, int) and plans:
            changes = {sorted(plans)[event % len(plans)]: None}
        elif isinstance(event, str):
            settings = VARIANTS[event]
            node.kernel.commit(node.renderer.configure(settings))
        elif event is None:
            node.renderer = NftablesRenderer(settings, limit=limit)
            node.renderer.update(dict(plans), {})
            assert node.resync() == (), "a restart changes nothing"
        plans = {key: each for key, each in (plans | changes).items() if each is not None}
        node.kernel.commit(node.renderer.update(changes, {}))
        scratch = Node(*plans.values(), settings=settings)
        assert without_order(node.kernel.tables) == without_order(scratch.kernel.tables)
    assert node.resync() == ()


@given(
    wanted=st.lists(st.integers(0, 30).map(str), unique=True),
    there=st.dictionaries(st.integers(0, 30), st.integers(0, 30).map(str)),
)
def test_endpoints_settle_without_holes_and_move_little(wanted: list[str], there: dict[int, str]) -> None:
    slots = settle(wanted, there)
    assert sorted(slots) == sorted(wanted)
    kept = {endpoint for slot, endpoint in there.items() if slot < len(slots) and slots[slot] == endpoint}
    could_stay = {endpoint for slot, endpoint in there.items() if slot < len(wanted) and endpoint in wanted}
    assert kept == could_stay


def test_slots_do_not_follow_from_the_order_of_events_alone() -> None:
    """A thousand changes later there are no more elements than at the start."""
    node, dice = Node(plan()), random.Random(1)
    hosts = [f"10.244.2.{host}" for host in range(2, 40)]
    for _ in range(300):
        node.change(plan(cluster=tuple(dice.sample(hosts, dice.randint(0, 20)))))
    node.change(plan())
    assert without_order(node.kernel.tables) == without_order(Node(plan()).kernel.tables)
