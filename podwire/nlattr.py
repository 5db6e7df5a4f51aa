"""The frame of netlink: messages in a datagram, attributes in a message (netlink(7)). Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator

NESTED = 0x8000
"""Added to the type of an attribute that holds attributes."""
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_TYPE_MASK = 0x3FFF


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """A message. Bodies are padded to four bytes."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body + b"\0" * (-len(body) % 4)


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence and body of every message."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(datagram, at)
        yield kind, flags, sequence, datagram[at + _HEADER.size : at + length]
        at += (max(length, _HEADER.size) + 3) & ~3


def attribute(kind: int, payload: bytes) -> bytes:
    """An attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nested(kind: int, payload: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NESTED, payload)


def attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of every attribute."""
    at = 0
    while at + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        yield kind & _TYPE_MASK, payload[at + _ATTRIBUTE.size : at + length]
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3
