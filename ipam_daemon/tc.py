"""What a limited wire takes of the kernel, packed by hand: ifb devices, token buckets, the chains that lead to them.

    rtnetlink    make_ifb · add_bucket · get_bucket · join_group   Messages for an exchange (ipam_daemon/rtnl.py)
    nf_tables    Redirects   a chain of our netdev table at a link's ingress or egress: fwd to the ifb device

pyroute2 takes 0.3 ms for each of these requests, an `nft` process 5 ms for the chains; packed, all of a wire's take
0.5 ms. A chain is of one link and dies with it or, from 6.16 on, waits for another of that name: it is deleted with the
wire.

Source: linux/if_link.h, linux/rtnetlink.h, linux/pkt_sched.h, linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence

import msgspec

from ipam_daemon.bandwidth import TICK_NS, Bucket
from ipam_daemon.rtnl import Message
from podwire.nlattr import attribute, attributes, message, messages, nested

# rtnetlink
_NEWLINK, _NEWQDISC, _GETQDISC = 16, 36, 38
_ECHO, _EXCL, _CREATE = 0x8, 0x200, 0x400
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_TC = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_GROUP, _INFO_KIND = 3, 18, 27, 1
_ROOT, _HANDLE = 0xFFFFFFFF, 1 << 16
_KIND, _OPTIONS, _TBF_PARAMETERS, _TBF_RATE64, _TBF_BURST = 1, 2, 1, 4, 6
_RATE = struct.Struct("=BBHhHI")  # tc_ratespec: …, link layer, …, bytes a second
_TBF = struct.Struct("=12s12sIII")  # tc_tbf_qopt: rate, peak rate, limit, buffer, mtu
_ETHERNET, _MOST_U32 = 1, (1 << 32) - 1
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")

# nf_tables
_NETLINK_NETFILTER, _NETDEV, _NFTABLES = 12, 5, 10
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _APPEND = 0x1, 0x4, 0x300, 0x800
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _NEWCHAIN, _GETCHAIN, _DELCHAIN, _NEWRULE = ((_NFTABLES << 8) + number for number in (0, 3, 4, 5, 6))
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICE = 1, 2, 3
_INGRESS, _EGRESS = 0, 1
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _LIST_ELEMENT = 1, 2, 4, 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_REGISTER = 1
_BE32 = struct.Struct("!I")
_BUFFER, _TIMEOUT, _TIMEVAL = 1 << 16, 5, struct.Struct("@ll")
TABLE = "podwire_bandwidth"


# --- links and queues -----------------------------------------------------------------------------------------------


def make_ifb(ifname: str) -> Message:
    """Makes an ifb device, down: a queue is put on a link that is up at the price of a grace period."""
    body = (
        _LINK.pack(0, 0, 0, 0, 0)
        + attribute(_IFLA_IFNAME, ifname.encode() + b"\0")
        + attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, b"ifb"))
    )
    return Message(_NEWLINK, _CREATE | _EXCL, body, f"ifb {ifname}")


def join_group(index: int, group: int) -> Message:
    """Puts a link into a link group."""
    return Message(_NEWLINK, 0, _LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_GROUP, _U32.pack(group)), "link group")


def add_bucket(index: int, bucket: Bucket) -> Message:
    """Makes a token bucket the root queue of a link."""
    rate = _RATE.pack(0, _ETHERNET, 0, 0, 0, min(bucket.rate, _MOST_U32))
    options = attribute(_TBF_PARAMETERS, _TBF.pack(rate, b"", bucket.limit, 0, 0))
    options += attribute(_TBF_BURST, _U32.pack(bucket.burst))
    if bucket.rate > _MOST_U32:
        options += attribute(_TBF_RATE64, _U64.pack(bucket.rate))
    body = _TC.pack(0, index, _HANDLE, _ROOT, 0) + attribute(_KIND, b"tbf\0") + attribute(_OPTIONS, options)
    return Message(_NEWQDISC, _CREATE | _EXCL, body, "token bucket")


def get_bucket(index: int) -> Message:
    """Asks for the root queue of a link. Without ECHO the answer is for a multicast group alone (qdisc_notify())."""
    return Message(_GETQDISC, _ECHO, _TC.pack(0, index, 0, _ROOT, 0), "root queue")


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket as the kernel reports it: `rate` in bytes a second, `ticks` how long the burst takes at it."""

    rate: int
    ticks: int

    def as_bucket(self) -> Bucket:
        """The bucket that is reported like this, but for a burst of more than 275 s, of which the rest is reported."""
        return Bucket(rate=self.rate, burst=round(self.ticks * TICK_NS * self.rate / 1_000_000_000))


def read_bucket(answer: bytes) -> Found | None:
    """What an answer to `get_bucket` says; None when the queue is another."""
    found = dict(attributes(answer[_TC.size :]))
    if found.get(_KIND, b"").rstrip(b"\0") != b"tbf":
        return None
    options = dict(attributes(found[_OPTIONS]))
    rate, _, _, ticks, _ = _TBF.unpack_from(options[_TBF_PARAMETERS])
    speed = _U64.unpack(options[_TBF_RATE64])[0] if _TBF_RATE64 in options else _RATE.unpack(rate)[5]
    return Found(rate=speed, ticks=ticks)


# --- chains ---------------------------------------------------------------------------------------------------------


class Redirect(msgspec.Struct, frozen=True, kw_only=True):
    """Packets that a link takes in (`egress` False) or sends go to the link with index `to` instead."""

    link: str
    egress: bool
    to: int

    @property
    def chain(self) -> str:
        """The name of its chain: the hook, and the link that it is of."""
        return f"{'out' if self.egress else 'in'}_{self.link}"


class Redirects:
    """The table `netdev podwire_bandwidth`: a chain for each redirect. It belongs to the namespace it is made in."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(_TIMEOUT, 0))  # for listings

    def add(self, redirects: Iterable[Redirect]) -> None:
        """Makes all of them or none, and the table if there is none. Raises OSError."""
        steps = [(_NEWTABLE, _CREATE, attribute(_TABLE_NAME, _text(TABLE)))]
        for each in redirects:
            steps += [(_NEWCHAIN, _CREATE, _chain(each)), (_NEWRULE, _CREATE | _APPEND, _rule(each))]
        self._commit(steps)

    def delete(self, chains: Iterable[str]) -> None:
        """Deletes chains that are there, with their rules. Raises OSError."""
        named = [attribute(_CHAIN_TABLE, _text(TABLE)) + attribute(_CHAIN_NAME, _text(chain)) for chain in chains]
        if named:
            self._commit([(_DELCHAIN, 0, body) for body in named])

    def chains(self) -> frozenset[str]:
        """The names of the chains that there are."""
        self._socket.send(message(_GETCHAIN, _REQUEST | _DUMP, 0, _GENERIC.pack(_NETDEV, 0, 0)))
        found: set[str] = set()
        while True:
            for kind, _, body in messages(self._socket.recv(_BUFFER)):
                if kind == _DONE:
                    return frozenset(found)
                if kind == _ERROR:
                    _raise(body, "listing chains")
                chain = dict(attributes(body[_GENERIC.size :]))
                if _string(chain[_CHAIN_TABLE]) == TABLE:
                    found.add(_string(chain[_CHAIN_NAME]))

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def _commit(self, steps: Sequence[tuple[int, int, bytes]]) -> None:
        """One batch. Only the last step asks for an answer: a step that fails answers unasked."""
        batch, last = _GENERIC.pack(0, 0, _NFTABLES), len(steps)
        parts = [message(_BATCH_BEGIN, _REQUEST, 0, batch)]
        for number, (kind, flags, body) in enumerate(steps, 1):
            asked = _ACK if number == last else 0
            parts.append(message(kind, _REQUEST | flags | asked, number, _GENERIC.pack(_NETDEV, 0, 0) + body))
        self._socket.send(b"".join([*parts, message(_BATCH_END, _REQUEST, last + 1, batch)]))
        answers: list[bytes] = []
        while True:
            try:
                datagram = self._socket.recv(_BUFFER, socket.MSG_DONTWAIT)  # the kernel answers before send() returns
            except BlockingIOError:
                break
            answers += [body for kind, _, body in messages(datagram) if kind == _ERROR]
        if not answers:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO), f"{TABLE}: a batch without an answer")
        for body in answers:
            _raise(body, f"table netdev {TABLE}")


def _chain(redirect: Redirect) -> bytes:
    hook = (
        attribute(_HOOK_NUMBER, _BE32.pack(_EGRESS if redirect.egress else _INGRESS))
        + attribute(_HOOK_PRIORITY, _BE32.pack(0))
        + attribute(_HOOK_DEVICE, _text(redirect.link))
    )
    return (
        attribute(_CHAIN_TABLE, _text(TABLE))
        + attribute(_CHAIN_NAME, _text(redirect.chain))
        + nested(_CHAIN_HOOK, hook)
        + attribute(_CHAIN_TYPE, _text("filter"))
    )


def _rule(redirect: Redirect) -> bytes:
    """`fwd to <index>`: the index into a register, then the statement."""
    register, value = _BE32.pack(_REGISTER), nested(2, attribute(1, _U32.pack(redirect.to)))
    expressions = _expression("immediate", attribute(1, register) + value) + _expression("fwd", attribute(1, register))
    return (
        attribute(_RULE_TABLE, _text(TABLE))
        + attribute(_RULE_CHAIN, _text(redirect.chain))
        + nested(_RULE_EXPRESSIONS, expressions)
    )


def _expression(name: str, data: bytes) -> bytes:
    return nested(_LIST_ELEMENT, attribute(_EXPRESSION_NAME, _text(name)) + nested(_EXPRESSION_DATA, data))


def _raise(answer: bytes, what: str) -> None:
    number = -struct.unpack_from("=i", answer)[0]
    if number:
        raise OSError(number, os.strerror(number), what)


def _text(name: str) -> bytes:
    return name.encode() + b"\0"


def _string(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode()
