"""The nodes of the cluster as etcd has them, for people: who they are, whether they live, and how one is forgotten.

    podwire node forget    one transaction: nobody lives under the name, nothing of it has changed since it was read
                           ──▶ its record, its blocks and a live key that no lease ends are deleted,
                               forgotten/<name> says that it was forgotten (ipam_daemon.restoration)

The record goes with the blocks: a record that outlived them would lead the peers of a block's next owner to the dead
node. A node with more blocks than a transaction takes loses the record with the first of them, and forgetting goes on
until none is left; broken off, it can be repeated. The others' watches bring the deletion, and their routes go.

A node that comes back claims its blocks again where nobody else has them; where somebody has, it cuts the pods in them
off and adds none until they are gone (Agent). Forgetting a node that lives after all endangers its pods, not others'.
It needs the rights of an administrator in etcd: a node may write only what is its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from ipam_daemon.departures import Gone
from ipam_daemon.facts import Registered
from ipam_daemon.live_name import Live
from ipam_daemon.model import Block, NodeRecord, decode, encode
from ipam_daemon.registry import ROOT
from ipam_daemon.restoration import Forgotten
from podwire.errors import PodwireError, TryAgain
from podwire.etcd import EtcdSession
from podwire.etcd.records import Delete, Item, Put, unchanged

_BLOCKS_A_TXN = 100  # etcd takes 128 operations in one
T = TypeVar("T")


class NodeUnknown(PodwireError):
    """etcd has nothing of a node of this name."""


class NodeLives(TryAgain):
    """The node's daemon lives, or did a moment ago."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """What etcd has of one node. `live` is the id of the machine that holds the name, empty when none does; then
    `gone` is since when, in seconds since the epoch, 0 when nobody saw it go."""

    name: str
    record: NodeRecord | None = None
    blocks: tuple[Block, ...] = ()
    live: str = ""
    gone: float = 0.0
    damaged: tuple[str, ...] = ()
    """Keys of the node that cannot be read."""


async def list_nodes(session: EtcdSession, root: str = ROOT) -> tuple[NodeView, ...]:
    """Every node of which etcd has anything, by name. Raises EtcdUnavailable, EtcdError."""
    listing = await session.get_prefix(root)
    return views(listing.items, root)


def views(items: Iterable[Item], root: str = ROOT) -> tuple[NodeView, ...]:
    """The nodes that the keys below `root` tell of, by name."""
    records: dict[str, NodeRecord] = {}
    live: dict[str, str] = {}
    blocks: dict[str, list[Block]] = {}
    damaged: dict[str, list[str]] = {}
    gone: dict[str, float] = {}
    for item in items:
        place, _, name = item.key.removeprefix(root).partition("/")
        if place == "nodes":
            record = _readable(item, NodeRecord)
            if record is None:
                damaged.setdefault(name, []).append(item.key)
            else:
                records[name] = record
        elif place == "live":
            holder = _readable(item, Live)
            live[name] = holder.node_id if holder is not None else "unknown"
        elif place == "gone" and (went := _readable(item, Gone)) is not None:
            gone[name] = went.at
        elif place == "blocks" and (block := _readable(item, Block)) is not None:
            blocks.setdefault(block.node, []).append(block)
    names = records.keys() | live.keys() | blocks.keys() | damaged.keys()
    return tuple(
        NodeView(
            name=name,
            record=records.get(name),
            blocks=tuple(sorted(blocks.get(name, ()), key=lambda block: block.cidr.network_address.packed)),
            live=live.get(name, ""),
            gone=0.0 if name in live else gone.get(name, 0.0),
            damaged=tuple(damaged.get(name, ())),
        )
        for name in sorted(names)
    )


async def read_registered(session: EtcdSession, name: str, root: str = ROOT) -> Registered:
    """What etcd says of one node, and the blocks of all. Raises EtcdUnavailable, EtcdError."""
    record = await session.get(f"{root}nodes/{name}")
    live = await session.get(f"{root}live/{name}")
    items = (await session.get_prefix(f"{root}blocks/")).items
    holder = None if live is None else _readable(live, Live)
    return Registered(
        blocks=tuple(block for item in items if (block := _readable(item, Block)) is not None),
        record=None if record is None else _readable(record, NodeRecord),
        live="" if holder is None else holder.node_id,
    )


async def forget(session: EtcdSession, name: str, root: str = ROOT) -> tuple[Block, ...]:
    """Deletes everything of a node that is gone for good. Returns its former blocks.

    Raises NodeLives, NodeUnknown, EtcdUnavailable, EtcdError.
    """
    node_key, live_key = f"{root}nodes/{name}", f"{root}live/{name}"
    released: list[Block] = []
    while True:
        record, live = await session.get(node_key), await session.get(live_key)
        if live is not None and live.lease:
            raise NodeLives(_lives(name, live, record))
        found = (await session.get_prefix(f"{root}blocks/")).items
        blocks = [(item, block) for item in found if (block := _readable(item, Block)) and block.node == name]
        if record is None and live is None and not blocks:
            if released:
                return tuple(released)
            raise NodeUnknown(f"etcd has no node {name!r}; `podwire node list` says which there are")
        some = blocks[:_BLOCKS_A_TXN]
        keys = [(each.key, each.mod_revision) for each, _ in some]
        keys += [(key, item.mod_revision if item else 0) for key, item in ((node_key, record), (live_key, live))]
        result = await session.txn(
            [unchanged(key, revision) for key, revision in keys],
            [
                *(Delete(key) for key, revision in keys if revision),
                Delete(f"{root}gone/{name}"),
                Put(f"{root}forgotten/{name}", encode(Forgotten(at=time.time()))),
            ],
        )
        if result.succeeded:
            released += [block for _, block in some]
            if len(some) == len(blocks):
                return tuple(released)


def _lives(name: str, live: Item, record: Item | None) -> str:
    holder, node = _readable(live, Live), None if record is None else _readable(record, NodeRecord)
    where = f" ({', '.join(map(str, node.addresses))})" if node is not None else ""
    return (
        f"node {name!r} lives: machine {holder.node_id if holder else 'unknown'}{where} holds its name. "
        f"Stop the daemon there first; one that died lets go of the name within 10 s"
    )


def _readable(item: Item, kind: type[T]) -> T | None:
    try:
        return decode(item.value, kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
