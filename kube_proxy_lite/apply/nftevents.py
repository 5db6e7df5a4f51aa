"""Who changes nftables: the kernel tells every transaction, with the process that made it.

    other's transaction that touches what is ours ──▶ `drift` is called ──▶ the sync reads the kernel, and repairs

A transaction is told as one message for each thing in it, and one at the end with its process (NFT_MSG_NEWGEN). Those
of our own `nft` processes are told apart by their number, those that touch nothing of ours are nobody's business here.
What the kernel could not tell, because the socket's buffer was full, may have been anything: it counts as drift, unless
the transaction that ends it is our own. Passing over an element of another's table costs 0.2 µs.

**Numbers of processes.** The end of a transaction says the number that the process has in the first PID namespace,
which means nothing in a container's. But a program that binds its socket without a wish, as nft does, gets its own
number for an address, as it sees it itself, and every message carries the address of who caused it. Either will do: the
second is another's by chance once in thousands, and then the periodic look finds what it did.

Source: linux/netfilter/nf_tables.h, nfnetlink(7); nf_tables_gen_notify() in net/netfilter/nf_tables_api.c,
netlink_autobind() in net/netlink/af_netlink.c.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable, Collection

from podwire.nlattr import attributes

Touches = Callable[[int, bytes], bool]
"""Whether a message of that type (NFT_MSG_…), with those attributes, is about something of ours."""

_NETLINK_NETFILTER, _GROUP_NFTABLES = 12, 7
_HEADER = struct.Struct("=IHHII")
_GENERIC_SIZE = 4
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF
_TABLE_NAME = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE …
_GEN_PROC_PID = 2
_DELTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWGEN = 2, 3, 5, 6, 8, 15
_CHAIN_NAME = {_NEWCHAIN: 3, _DELCHAIN: 3, _NEWRULE: 2, _DELRULE: 2}  # NFTA_CHAIN_NAME, NFTA_RULE_CHAIN
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BUFFER = 1 << 22
_SO_RCVBUFFORCE = 33  # Linux; Python has no name for it


def in_tables(names: Collection[str]) -> Touches:
    """Whatever happens in tables of these names, in whatever family."""
    ours = {name.encode() for name in names}

    def touches(_: int, body: bytes) -> bool:
        length, attribute = _ATTRIBUTE.unpack_from(body)
        return attribute & _TYPE_MASK == _TABLE_NAME and body[_ATTRIBUTE.size : length].rstrip(b"\0") in ours

    return touches


def in_iptables(chains: str, jumps: Collection[str], tables: Collection[str]) -> Touches:
    """What iptables' nft backend keeps in `tables`, which are everybody's: chains whose names begin with `chains`, and
    rules that are deleted from the chains `jumps`, from which ours are reached."""
    prefix, roots = chains.encode(), {name.encode() for name in jumps}
    is_table = in_tables(tables)

    def touches(kind: int, body: bytes) -> bool:
        if not is_table(kind, body):
            return False
        if kind == _DELTABLE:
            return True
        chain = dict(attributes(body)).get(_CHAIN_NAME.get(kind, 0), b"").rstrip(b"\0")
        return chain.startswith(prefix) or (kind in (_DELRULE, _DELCHAIN) and chain in roots)

    return touches


class NftEvents:
    """Watches the tables of this network namespace."""

    def __init__(self, touches: Touches, drift: Callable[[], None], is_own: Callable[[int], bool]) -> None:
        """Calls `drift` when somebody else has changed what `touches` says. `is_own`: whether a process is ours."""
        self._touches = touches
        self._drift = drift
        self._is_own = is_own
        self._touched = False

    async def watch_forever(self) -> None:
        """Watches until cancelled. Raises OSError when the kernel offers no such events."""
        channel = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        with channel:
            try:
                channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            except OSError:  # more than net.core.rmem_max takes CAP_NET_ADMIN of the first user namespace
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
            length, kind, _, _, sender = _HEADER.unpack_from(datagram, at)
            if kind >> 8 == _SUBSYSTEM:
                self._message(kind & 0xFF, sender, datagram[at + _HEADER.size + _GENERIC_SIZE : at + length])
            at += (max(length, _HEADER.size) + 3) & ~3

    def _message(self, kind: int, sender: int, body: bytes) -> None:
        if kind == _NEWGEN:
            touched, self._touched = self._touched, False
            if touched and not self._is_own(sender) and not self._is_own(_number(body, _GEN_PROC_PID)):
                self._drift()
        elif not self._touched and len(body) >= _ATTRIBUTE.size:
            self._touched = self._touches(kind, body)


def _number(body: bytes, wanted: int) -> int:
    return int.from_bytes(dict(attributes(body)).get(wanted, b""), "big")
