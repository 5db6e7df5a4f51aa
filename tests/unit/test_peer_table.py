"""The plan for all peers, kept record by record: the same as planning them all, and it says what is another."""

from __future__ import annotations

import ipaddress
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam_daemon.model import BackendType, Block, Network, NodeRecord
from ipam_daemon.peer_table import PeerTable, Touched
from ipam_daemon.plan import is_complete, plan_peers, plan_record

OWN = "node-0"
ON_LINK = {ipaddress.ip_network("192.0.2.0/30"): "eth0"}


def record(name: str, number: int, *cidrs: str, address: int = 0, **changes: Any) -> NodeRecord:
    """A node with the blocks 10.244.<number>.0/24 and fd00:<number>::/64, or others."""
    addresses = tuple(ipaddress.ip_address(f"{net}{address or number}") for net in ("192.0.2.", "2001:db8::"))
    blocks = [
        Block(cidr=ipaddress.ip_network(cidr), pool="default", node=name, node_id=name, generation=1)
        for cidr in cidrs or (f"10.244.{number}.0/24", f"fd00:{number}::/64")
    ]
    return msgspec.structs.replace(plan_record(name, name, 1, addresses, blocks, "0.1"), **changes)


def known(*records: NodeRecord) -> dict[str, NodeRecord]:
    return {each.name: each for each in records}


def whole(records: dict[str, NodeRecord], own: NodeRecord | None = None, **circumstances: Any) -> tuple[Any, ...]:
    """What planning all of them at once says, without what is `own`."""
    addresses, blocks = (own.addresses, own.blocks) if own else ((), ())
    elsewhere = {
        name: msgspec.structs.replace(each, addresses=tuple(a for a in each.addresses if a not in addresses))
        for name, each in records.items()
    }
    others = [elsewhere[name] for name in sorted(elsewhere) if name != OWN and is_complete(elsewhere[name])]
    plan = plan_peers(others, **circumstances)
    vteps = {address for each in others for address in each.addresses}
    routes = {cidr: way for cidr, way in plan.routes.items() if cidr not in blocks}
    return dict(plan.neighbours), dict(plan.fdb), routes, vteps


def kept(table: PeerTable) -> tuple[Any, ...]:
    return dict(table.peers.neighbours), dict(table.peers.fdb), dict(table.peers.routes), set(table.vteps)


A, B = record("a", 1), record("b", 2)
THIEF = record("c", 1, address=3)
CHANGES: dict[str, tuple[dict[str, NodeRecord], dict[str, NodeRecord], int]] = {
    "a node joins": (known(A), known(A, B), 5),
    "a node leaves": (known(A, B), known(A), 5),
    "nothing changes": (known(A, B), known(A, B), 0),
    "the same record, read again": (known(A), known(record("a", 1)), 0),
    "a node gets another block": (known(A), known(record("a", 1, "10.244.1.0/24", "10.244.9.0/24")), 6),
    "a node moves": (known(A), known(record("a", 1, address=77)), 5),
    "this node changes": (known(A), known(A, record(OWN, 5)), 0),
    "a node that has no block yet": (known(A), known(A, msgspec.structs.replace(B, vtep_mac="", vtep_addresses=())), 0),
    "a block is claimed by a second node, which does not get it": (known(A), known(A, THIEF), 0),
    "a block is claimed by a node whose name comes first": (known(THIEF), known(A, THIEF), 5),
    "the node that had it lets go": (known(A, THIEF), known(THIEF), 5),
    "the node that did not get it lets go": (known(A, THIEF), known(A), 0),
    "both are gone": (known(A, THIEF), {}, 5),
    "all are gone": (known(A, B), {}, 10),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name: str) -> None:
    before, after, touched = CHANGES[name]
    table = PeerTable(OWN, plan_peers)
    table.update(before)
    table.settle()
    table.update(after)
    assert kept(table) == whole(after)
    assert sum(map(len, msgspec.structs.astuple(table.touched))) == touched


def test_what_was_touched_is_told_until_it_is_settled() -> None:
    table = PeerTable(OWN, plan_peers)
    table.update(known(A))
    first = table.touched
    table.update(known(A, B))
    assert first.routes == set(A.blocks)
    assert table.touched.routes == {*A.blocks, *B.blocks}
    table.settle()
    assert table.touched == Touched()


def test_what_was_handed_out_does_not_change() -> None:
    table = PeerTable(OWN, plan_peers)
    table.update(known(A))
    peers, vteps = table.peers, table.vteps
    table.update({})
    assert set(peers.routes) == set(A.blocks)
    assert vteps == set(A.addresses)


def test_a_record_at_this_nodes_own_address_leads_nowhere() -> None:
    table = PeerTable(OWN, partial(plan_peers, backend=BackendType.AUTO, on_link=ON_LINK), A.addresses)
    table.update(known(record("former", 2, address=1), B))
    assert kept(table) == whole(known(B), backend=BackendType.AUTO, on_link=ON_LINK)
    half = msgspec.structs.replace(B, addresses=(A.addresses[0], B.addresses[1]))
    table.update(known(half))
    assert table.vteps == {B.addresses[1]}, "at the other it may be reached"


def test_a_block_is_this_nodes_for_as_long_as_it_is() -> None:
    table = PeerTable(OWN, plan_peers)
    table.update(known(A, B), A.blocks[:1])
    assert set(table.peers.routes) == {*A.blocks[1:], *B.blocks}
    table.settle()
    table.update(known(A, B), A.blocks)
    assert set(table.peers.routes) == set(B.blocks)
    assert table.touched.routes == set(A.blocks[1:])
    table.settle()
    table.update(known(A, B))
    assert set(table.peers.routes) == {*A.blocks, *B.blocks}
    assert table.touched.routes == set(A.blocks)


NAMES, NUMBERS = st.sampled_from(["a", "b", "c", "d", OWN]), st.integers(1, 3)
RECORDS = st.builds(lambda name, number, address: record(name, number, address=address), NAMES, NUMBERS, NUMBERS)
CROWDS = st.lists(st.lists(RECORDS, max_size=5).map(lambda records: known(*records)), min_size=1, max_size=6)
CIRCUMSTANCES = st.sampled_from(
    [{}, *({"backend": backend, "on_link": ON_LINK, "underlay_family": 6} for backend in BackendType)]
)


@given(CROWDS, CIRCUMSTANCES, st.lists(st.sampled_from([(), A.blocks, B.blocks]), min_size=6, max_size=6))
def test_however_it_came_there_it_is_what_planning_all_at_once_says(
    crowds: list[dict[str, NodeRecord]], circumstances: dict[str, Any], blocks: list[tuple[Network, ...]]
) -> None:
    table = PeerTable(OWN, partial(plan_peers, **circumstances), A.addresses)
    for records, mine in zip(crowds, blocks, strict=False):
        before = kept(table)
        table.update(records, mine)
        assert kept(table) == whole(records, msgspec.structs.replace(A, blocks=mine), **circumstances)
        for told, old, new in zip(msgspec.structs.astuple(table.touched), before, kept(table), strict=False):
            assert {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} <= told
        table.settle()
