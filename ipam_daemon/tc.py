"""What a limited wire takes of the kernel, packed by hand: ifb devices, token buckets, the chains that lead to them.

    rtnetlink    make_ifb · add_bucket · get_bucket · join_group   Messages for an exchange (ipam_daemon/rtnl.py)
    nf_tables    lead · drop_chains   Steps for a batch (podwire/nfnetlink.py): a chain of our netdev table at a
                                      link's ingress or egress, which forwards to the ifb device

pyroute2 takes 0.3 ms for each of these requests, an `nft` process 5 ms for the chains; packed, all of a wire's take
0.5 ms. A chain is of one link and dies with it or, from 6.16 on, waits for another of that name: it is deleted with the
wire.

Source: linux/if_link.h, linux/rtnetlink.h, linux/pkt_sched.h, linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import msgspec

from ipam_daemon.bandwidth import TICK_NS, Bucket
from ipam_daemon.rtnl import Message
from podwire.nfelements import Family, Table
from podwire.nfnetlink import Step
from podwire.nlattr import attribute, attributes, nested

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
_NFTABLES, _APPEND = 10, 0x800
_NEWTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE = ((_NFTABLES << 8) + number for number in (0, 3, 5, 6))
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICE = 1, 2, 3
_INGRESS, _EGRESS = 0, 1
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _LIST_ELEMENT = 1, 2, 4, 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_REGISTER = 1
_BE32 = struct.Struct("!I")
TABLE = Table(Family.NETDEV, "podwire_bandwidth")
"""The table of redirects: a chain for each."""


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


def lead(redirects: Iterable[Redirect]) -> list[Step]:
    """The steps that make them, and the table if there is none; for family netdev."""
    steps = [Step(_NEWTABLE, _CREATE, attribute(_TABLE_NAME, _text(TABLE.name)))]
    for each in redirects:
        steps += [Step(_NEWCHAIN, _CREATE, _chain(each)), Step(_NEWRULE, _CREATE | _APPEND, _rule(each))]
    return steps


def drop_chains(chains: Iterable[str]) -> list[Step]:
    """The steps that delete chains that are there, with their rules."""
    return [
        Step(_DELCHAIN, 0, attribute(_CHAIN_TABLE, _text(TABLE.name)) + attribute(_CHAIN_NAME, _text(chain)))
        for chain in chains
    ]


def _chain(redirect: Redirect) -> bytes:
    hook = (
        attribute(_HOOK_NUMBER, _BE32.pack(_EGRESS if redirect.egress else _INGRESS))
        + attribute(_HOOK_PRIORITY, _BE32.pack(0))
        + attribute(_HOOK_DEVICE, _text(redirect.link))
    )
    return (
        attribute(_CHAIN_TABLE, _text(TABLE.name))
        + attribute(_CHAIN_NAME, _text(redirect.chain))
        + nested(_CHAIN_HOOK, hook)
        + attribute(_CHAIN_TYPE, _text("filter"))
    )


def _rule(redirect: Redirect) -> bytes:
    """`fwd to <index>`: the index into a register, then the statement."""
    register, value = _BE32.pack(_REGISTER), nested(2, attribute(1, _U32.pack(redirect.to)))
    expressions = _expression("immediate", attribute(1, register) + value) + _expression("fwd", attribute(1, register))
    return (
        attribute(_RULE_TABLE, _text(TABLE.name))
        + attribute(_RULE_CHAIN, _text(redirect.chain))
        + nested(_RULE_EXPRESSIONS, expressions)
    )


def _expression(name: str, data: bytes) -> bytes:
    return nested(_LIST_ELEMENT, attribute(_EXPRESSION_NAME, _text(name)) + nested(_EXPRESSION_DATA, data))


def _text(name: str) -> bytes:
    return name.encode() + b"\0"
