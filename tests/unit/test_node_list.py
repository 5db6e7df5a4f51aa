"""The nodes as a watch tells of them: who did not change is the same object, and who is lost is kept."""

from __future__ import annotations

import ipaddress

import pytest

from ipam_daemon.model import NodeRecord, encode
from ipam_daemon.node_list import NodeList
from podwire.etcd.records import Changes, Deleted, Item, Snapshot, Written

PREFIX = "/podwire/v1/nodes/"


def record(name: str, last: int = 1) -> NodeRecord:
    return NodeRecord(name=name, node_id=f"id-{name}", addresses=(ipaddress.ip_address(f"192.0.2.{last}"),))


def item(name: str, last: int = 1) -> Item:
    return Item(PREFIX + name, encode(record(name, last)), mod_revision=last)


def snapshot(*items: Item) -> Snapshot:
    return Snapshot(items, revision=9)


AGAIN = {
    "another snapshot": snapshot(item("a"), item("b", 2)),
    "an event that says the same": Changes((Written(item("a")),), revision=10),
    "an event of another node": Changes((Written(item("c")),), revision=10),
    "another node leaves": Changes((Deleted(PREFIX + "b"),), revision=10),
}


@pytest.mark.parametrize("batch", AGAIN.values(), ids=AGAIN.keys())
def test_a_node_that_did_not_change_is_the_same_object(batch: Snapshot | Changes) -> None:
    nodes = NodeList(PREFIX)
    nodes.take(snapshot(item("a"), item("b")))
    before = nodes.mapping()
    nodes.take(batch)
    assert nodes.mapping()["a"] is before["a"]
    assert set(before) == {"a", "b"}, "what was handed out does not change"


def test_a_node_that_changed_is_another() -> None:
    nodes = NodeList(PREFIX)
    nodes.take(snapshot(item("a")))
    nodes.take(Changes((Written(item("a", 7)),), revision=10))
    assert nodes.mapping() == {"a": record("a", 7)}


def test_who_a_restored_etcd_has_lost_is_kept_until_it_is_back() -> None:
    nodes = NodeList(PREFIX, own="me")
    nodes.take(snapshot(item("a"), item("me")))
    lost = nodes.mapping()["a"]
    nodes.history_broke()
    nodes.take(snapshot())
    assert dict(nodes.mapping()) == {"a": lost}
    nodes.take(Changes((Written(item("a", 3)),), revision=10))
    assert nodes.mapping() == {"a": record("a", 3)}
