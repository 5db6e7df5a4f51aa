"""What an nft element is made of: a set or map of a table, a key, perhaps data. Pure; nfnetlink.py sends it.

A key of several fields (`ifname . ether_addr`) is their bytes one after another, each padded to four; addresses and
ports are in network order. The kernel compares bytes, and knows no types: those are nft's, for people.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

_NAME_SIZE = 16  # IFNAMSIZ


class Family(IntEnum):
    """The family of a table, as nft writes it and as the kernel numbers it."""

    INET = 1
    IP = 2
    NETDEV = 5
    BRIDGE = 7
    IP6 = 10


class Table(msgspec.Struct, frozen=True):
    """A table of a family."""

    family: Family
    name: str

    def __str__(self) -> str:
        return f"{self.family.name.lower()} {self.name}"


class Verdict(msgspec.Struct, frozen=True):
    """The data of a verdict map's element. `chain` is for jump and goto alone."""

    code: int
    chain: str = ""


DROP, ACCEPT = Verdict(0), Verdict(1)


def jump(chain: str) -> Verdict:
    """Evaluates `chain` and comes back."""
    return Verdict(-3, chain)


def goto(chain: str) -> Verdict:
    """Evaluates `chain` and does not come back."""
    return Verdict(-4, chain)


class Change(msgspec.Struct, frozen=True):
    """An element that is to be there, or not. `data` is a map's; a deletion needs none."""

    adds: bool
    table: Table
    set: str
    key: bytes
    data: bytes | Verdict | None = None

    def __str__(self) -> str:
        verb = "add" if self.adds else "delete"
        data = f" : {self.data.hex()}" if isinstance(self.data, bytes) else f" : {self.data}" if self.data else ""
        return f"{verb} element {self.table} {self.set} {{ {self.key.hex()}{data} }}"


def add(table: Table, name: str, key: bytes, data: bytes | Verdict | None = None) -> Change:
    """The element is there afterwards. In a map that has other data under this key, delete it first, in the same
    transaction."""
    return Change(True, table, name, key, data)


def delete(table: Table, name: str, key: bytes) -> Change:
    """The element is not there afterwards."""
    return Change(False, table, name, key)


def concat(*parts: bytes) -> bytes:
    """A key (or data) of several fields: each is padded to four bytes, as nft's registers are. One alone is not."""
    return b"".join(part + b"\0" * (-len(part) % 4) for part in parts)


def ifname(name: str) -> bytes:
    """An interface's name as a field. Raises ValueError when it has more than 15 bytes."""
    packed = name.encode()
    if len(packed) >= _NAME_SIZE:
        raise ValueError(f"interface name {name!r} has {len(packed)} bytes, expected at most {_NAME_SIZE - 1}")
    return packed.ljust(_NAME_SIZE, b"\0")
