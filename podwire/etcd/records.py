"""What is kept in etcd and what happens to it, and a small vocabulary for transactions. Pure values.

    await session.txn(
        when=[absent("/blocks/10.244.7.0/24")],
        then=[Put("/blocks/10.244.7.0/24", record)],
        otherwise=[Get("/blocks/10.244.7.0/24")],
    )

Keys are text. Bytes that are not UTF-8 (a foreign key under our prefix) survive as surrogate escapes.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

import msgspec


class Header(msgspec.Struct, frozen=True):
    """What every answer of etcd carries: the cluster, and the store's revision when it answered."""

    cluster_id: int
    revision: int


class MemberStatus(msgspec.Struct, frozen=True):
    """One member of the cluster. `leader` is 0 when it knows of none."""

    member: int
    leader: int
    version: str


class Item(msgspec.Struct, frozen=True):
    """A key with its value. `lease` is 0 without one; `mod_revision` is when it was last written."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int = 0
    lease: int = 0


class Listing(msgspec.Struct, frozen=True):
    """Items by ascending key, all as of `revision`."""

    items: tuple[Item, ...]
    revision: int


# --- a watch ------------------------------------------------------------------------------------------------------


class Snapshot(msgspec.Struct, frozen=True):
    """Everything under the prefix, as of `revision`: what is not in it, is not there."""

    items: tuple[Item, ...]
    revision: int


class Written(msgspec.Struct, frozen=True):
    """A key was created or changed."""

    item: Item


class Deleted(msgspec.Struct, frozen=True):
    """A key was deleted, by someone or with its lease."""

    key: str


class Changes(msgspec.Struct, frozen=True):
    """What happened since the snapshot or the changes before, in order, up to `revision`."""

    events: tuple[Written | Deleted, ...]
    revision: int


# --- a transaction ------------------------------------------------------------------------------------------------


class Target(Enum):
    """What of a key is compared. A key that is absent has version 0 and mod revision 0."""

    VERSION = "version"
    MOD_REVISION = "mod_revision"
    VALUE = "value"


class Compare(msgspec.Struct, frozen=True):
    """`target` of `key` must equal `operand`."""

    key: str
    target: Target
    operand: int | bytes


class Get(msgspec.Struct, frozen=True):
    """Reads one key."""

    key: str


class Put(msgspec.Struct, frozen=True):
    """Writes one key, under `lease` if that is not 0."""

    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """Deletes one key."""

    key: str


Operation: TypeAlias = Get | Put | Delete


class TxnResult(msgspec.Struct, frozen=True):
    """`succeeded`: the comparisons held. `found`: for each `Get` of the branch carried out, its item or None."""

    succeeded: bool
    revision: int
    found: tuple[Item | None, ...]


def absent(key: str) -> Compare:
    """version(key) == 0"""
    return Compare(key, Target.VERSION, 0)


def unchanged(key: str, mod_revision: int) -> Compare:
    """mod_revision(key) == n; 0 says that the key is absent."""
    return Compare(key, Target.MOD_REVISION, mod_revision)


def has_value(key: str, value: bytes) -> Compare:
    """value(key) == b"…" """
    return Compare(key, Target.VALUE, value)
