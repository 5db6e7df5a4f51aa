"""Who changes nftables: the kernel tells every transaction, with the process that made it.

    other's transaction that touches one of our tables ──▶ `drift` is called ──▶ the sync reads the kernel, and repairs

A transaction is told as one message for each thing in it, and one at the end with its process (NFT_MSG_NEWGEN). Those
of our own `nft` processes are told apart by their number, those that touch no table of ours are nobody's business here.
What the kernel could not tell, because the socket's buffer was full, may have been anything: it counts as drift, unless
the transaction that ends it is our own. Passing over an element of another's table costs 0.2 µs.

Source: linux/netfilter/nf_tables.h, nfnetlink(7); nf_tables_gen_notify() in net/netfilter/nf_tables_api.c.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable, Collection

_NETLINK_NETFILTER, _GROUP_NFTABLES = 12, 7
_HEADER = struct.Struct("=IHHII")
_GENERIC_SIZE = 4
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF
_TABLE_NAME = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE …
_GEN_PROC_PID = 2
_NEWGEN = 15
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BUFFER = 1 << 22


class NftEvents:
    """Watches the tables of this network namespace."""

    def __init__(self, tables: Collection[str], drift: Callable[[], None], is_own: Callable[[int], bool]) -> None:
        """Calls `drift` after somebody else has changed one of `tables`. `is_own` says whether a process is ours."""
        self._tables = {name.encode() for name in tables}
        self._drift = drift
        self._is_own = is_own
        self._touched = False

    async def watch_forever(self) -> None:
        """Watches until cancelled. Raises OSError when the kernel offers no such events."""
        channel = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        with channel:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            channel.bind((0, 1 << (_GROUP_NFTABLES - 1)))
            loop = asyncio.get_running_loop()
            while True:
                try:
                    datagram = await loop.sock_recv(channel, 1 << 16)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    self._touched = True  # until the next transaction says whose it was
                    continue
                self.take(datagram)

    def take(self, datagram: bytes) -> None:
        """What the kernel has told in one datagram."""
        at = 0
        while at + _HEADER.size <= len(datagram):
            length, kind, _, _, _ = _HEADER.unpack_from(datagram, at)
            if kind >> 8 == _SUBSYSTEM:
                self._message(kind & 0xFF, datagram[at + _HEADER.size + _GENERIC_SIZE : at + length])
            at += (max(length, _HEADER.size) + 3) & ~3

    def _message(self, kind: int, body: bytes) -> None:
        if kind == _NEWGEN:
            touched, self._touched = self._touched, False
            if touched and not self._is_own(_number(body, _GEN_PROC_PID)):
                self._drift()
        elif not self._touched:
            length, attribute = _ATTRIBUTE.unpack_from(body)
            if attribute & _TYPE_MASK == _TABLE_NAME:
                self._touched = body[_ATTRIBUTE.size : length].rstrip(b"\0") in self._tables


def _number(body: bytes, wanted: int) -> int:
    at = 0
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind & _TYPE_MASK == wanted:
            return int.from_bytes(body[at + _ATTRIBUTE.size : at + length], "big")
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3
    return 0
