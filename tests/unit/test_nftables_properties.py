"""Properties of the nftables renderer: after whatever has happened, the kernel is as if made from scratch.

Changes, removals, other settings and restarts come in any order, in pieces of any size. All that history decides is
which slot an endpoint sits in, and it leaves no holes and no more elements than there were.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kube_proxy_lite.model import Settings
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_elements import settle
from kube_proxy_lite.render.nftables_listing import TableListing
from tests.unit.nftables_stage import Node
from tests.unit.service_cases import plan
from tests.unit.service_events import Plans, events, plans, replay

PLANS = plans(("a", "b", "c"), st.lists(st.integers(1, 9), unique=True, max_size=8))


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


@given(happening=events(PLANS), limit=st.sampled_from((1, 7, 5000)))
@hypothesis_settings(max_examples=100, deadline=None)
def test_after_every_event_the_kernel_is_as_from_scratch(happening: list[object], limit: int) -> None:
    node = Node(limit=limit)

    def restart(there: Plans, settings: Settings) -> None:
        node.renderer = NftablesRenderer(settings, limit=limit)
        node.renderer.update(dict(there), {})
        assert node.resync() == (), "a restart changes nothing"

    for there, settings in replay(node, happening, restart):
        scratch = Node(*there.values(), settings=settings)
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
