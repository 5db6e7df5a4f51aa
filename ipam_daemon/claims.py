"""The rules of who may have what: blocks of a pool, the name of a node, the configuration of the cluster. Pure.

The registry (etcd) and its fake carry these rules out; neither has rules of its own.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import msgspec

from ipam_daemon.model import Address, Backend, Block, ClusterConfig, Network, NodeRecord, Pool, encode
from podwire.config import ConfigError
from podwire.errors import PodwireError, TryAgain


class ConfigMismatch(PodwireError):
    """This node's idea of the cluster's configuration is not the cluster's."""


class NodeNameTaken(PodwireError):
    """Another machine lives under this node's name."""


class PoolExhausted(PodwireError):
    """Every block of a pool is claimed."""


class RecordDamaged(PodwireError):
    """A record that is needed cannot be decoded."""


class StoreRestored(TryAgain):
    """etcd was wiped or restored: what is not in it may yet be somebody's, so nothing new is given out for a while."""


class ConfigMissing(TryAgain):
    """The store has no configuration, and this node may not write it."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A node that has entered: its name is live. `reowned` are the blocks taken over from the name's former machine."""

    name: str
    node_id: str
    generation: int
    reowned: tuple[Block, ...] = ()


# --- blocks -----------------------------------------------------------------------------------------------------


def free_blocks(pool: Pool, taken: Iterable[Network], node: str) -> Iterator[Network]:
    """Blocks of `pool` that overlap nothing in `taken`, each once, beginning at a place that hangs on the node's name.

    The beginning is hashed so that nodes that claim in the same moment rarely want the same block. Runs of taken blocks
    are jumped over, so a pool may be as large as IPv6 allows: the cost grows with `taken` and with what is drawn.
    """
    count, spans = block_count(pool), _taken_spans(pool, taken)
    start = int.from_bytes(hashlib.blake2b(node.encode(), digest_size=16).digest()) % count
    gaps = list(_gaps(spans, count))
    indexes = chain(
        *(range(max(first, start), end) for first, end in gaps if end > start),
        *(range(first, min(end, start)) for first, end in gaps if first < start),
    )
    step = 1 << (pool.cidr.max_prefixlen - pool.block_size)
    base = int(pool.cidr.network_address)
    family = type(pool.cidr)
    return (family((base + index * step, pool.block_size)) for index in indexes)


def block_count(pool: Pool) -> int:
    """How many blocks the pool is cut into. Raises ConfigError for a block size that does not fit the pool."""
    if not pool.cidr.prefixlen <= pool.block_size <= pool.cidr.max_prefixlen:
        raise ConfigError(
            f"pool {pool.name}: blockSize {pool.block_size} does not fit {pool.cidr}: "
            f"it must be from {pool.cidr.prefixlen} to {pool.cidr.max_prefixlen}"
        )
    return 1 << (pool.block_size - pool.cidr.prefixlen)


def exhausted(pool: Pool, taken: Collection[Network]) -> PoolExhausted:
    """The error for a pool in which nothing is free."""
    inside = sum(overlap(pool.cidr, network) for network in taken)
    count = block_count(pool)
    return PoolExhausted(
        f"pool {pool.name} ({pool.cidr}) has no free block: all {count} of size /{pool.block_size} are covered by "
        f"{inside} claimed; enlarge the pool, or release the blocks of nodes that are gone"
    )


def _taken_spans(pool: Pool, taken: Iterable[Network]) -> list[tuple[int, int]]:
    """Ranges of block indexes, end excluded, that something in `taken` overlaps; sorted."""
    shift = pool.cidr.max_prefixlen - pool.block_size
    base, count = int(pool.cidr.network_address), block_count(pool)
    spans = []
    for network in taken:
        if overlap(pool.cidr, network):
            first = (int(network.network_address) - base) >> shift
            last = (int(network.broadcast_address) - base) >> shift
            spans.append((max(first, 0), min(last + 1, count)))
    return sorted(spans)


def _gaps(spans: Iterable[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    free_from = 0
    for first, end in spans:
        if first > free_from:
            yield free_from, first
        free_from = max(free_from, end)
    if free_from < count:
        yield free_from, count


def overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def parse_network(text: str) -> Network | None:
    """A network in canonical text, else None."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        return None
    return network if str(network) == text else None


# --- names ------------------------------------------------------------------------------------------------------


def next_generation(node_id: str, record: NodeRecord | None, blocks: Iterable[Block]) -> int:
    """The generation of `node_id` under a name whose last record and blocks are given.

    Its own is kept, and it is above that of every other machine that had the name. Asked again after a crash half way
    through taking blocks over, it answers the same.
    """
    known = [(block.node_id, block.generation) for block in blocks]
    if record is not None:
        known.append((record.node_id, record.generation))
    own = [generation for owner, generation in known if owner == node_id]
    others = [generation + 1 for owner, generation in known if owner != node_id]
    return max([1, *own, *others])


def may_publish(record: NodeRecord, stored: NodeRecord | None) -> bool:
    """A record replaces none, its own, or one of a former machine of the name."""
    return stored is None or stored.node_id == record.node_id or stored.generation < record.generation


def name_taken(name: str, holder_id: str, addresses: Iterable[Address]) -> NodeNameTaken:
    """The error for a name that another machine has; says which, and where."""
    where = ", ".join(str(address) for address in addresses) or "addresses not published"
    return NodeNameTaken(
        f"node name {name!r} is in use by machine {holder_id} ({where}): give this node another name, "
        f"or stop the daemon there"
    )


def still_lives(block: Block) -> TryAgain:
    """The error for a block of this machine under a former name of its, while a daemon holds that name."""
    return TryAgain(
        f"block {block.cidr} is this machine's by its id {block.node_id}, and node {block.node!r} has it, which lives: "
        f"that is over in seconds if this machine had that name, and if it is a copy of that one "
        f"remove what it has under /var/lib/podwire"
    )


def keep_former(former: Mapping[str, NodeRecord], known: Mapping[str, NodeRecord]) -> dict[str, NodeRecord]:
    """Those of `former` that a wiped or restored store does not know, and whose blocks nobody else says to have.

    Their pods run on: they are not given up until somebody else shows the same block, or the node says again who it is.
    """
    taken = {block for record in known.values() for block in record.blocks}
    lengths = {(block.version, block.prefixlen) for block in taken}

    def is_taken(block: Network) -> bool:
        same = {length for version, length in lengths if version == block.version}
        return any(
            block.supernet(new_prefix=length) in taken
            if length <= block.prefixlen
            else any(overlap(block, other) for other in taken if other.prefixlen == length)
            for length in same
        )

    return {
        name: record
        for name, record in former.items()
        if name not in known and not any(is_taken(block) for block in record.blocks)
    }


# --- the cluster's configuration --------------------------------------------------------------------------------


def check_same(ours: ClusterConfig, theirs: ClusterConfig, where: str) -> None:
    """Raises ConfigMismatch, naming the first field that differs, both values and the remedy.

    The backend may differ: the cluster's holds, and a node's own is only what the first one of a cluster begins with.
    """
    ours = msgspec.structs.replace(ours, backend=theirs.backend)
    found = _difference("", msgspec.json.decode(encode(ours)), msgspec.json.decode(encode(theirs)))
    if found is not None:
        field, mine, other = found
        raise ConfigMismatch(
            f"{field} is {_text(mine)} in this node's configuration, but {_text(other)} in the cluster's ({where}): "
            f"set it to {_text(other)} here; to change the cluster, stop every daemon and delete that key"
        )


def wrong_backend(backend: Backend) -> str:
    """What no backend can be, in words; empty when all is well."""
    if not 1 <= backend.port <= 65535:
        return f"backend.port is {backend.port}, expected 1 to 65535"
    if not 1 <= backend.vni < 1 << 24:
        return f"backend.vni is {backend.vni}, expected 1 to 16777215"
    return ""


def _difference(path: str, ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """(path, our value, their value) of the first difference; a value that is missing is None."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        parts = [(f"{path}.{key}" if path else key, key) for key in {**ours, **theirs}]
    elif isinstance(ours, list) and isinstance(theirs, list):
        parts = [(f"{path}[{index}]", index) for index in range(max(len(ours), len(theirs)))]
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    else:
        return None if ours == theirs else (path, ours, theirs)
    differences = (_difference(name, ours.get(key), theirs.get(key)) for name, key in parts)
    return next((found for found in differences if found is not None), None)


def _text(value: Any) -> str:
    return "not set" if value is None else msgspec.json.encode(value).decode()
