"""An eBPF program at the ingress of a link, by way of tc, packed by hand: it stays there as long as the link.

    clsact qdisc ─▶ filter 65535: our program, which decides by itself what becomes of a packet (direct action)

Ours is the last of a link's filters: the kernel gives one without a number of its own the number before the first that
is there. tc's qdisc costs no grace period, where the newer hook (TCX) takes 8–16 ms of one a link, with RTNL held.

Source: linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h; net/sched/cls_bpf.c, tcf_auto_prio() in cls_api.c.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from ipam_daemon.rtnl import Message
from podwire.nlattr import attribute, attributes, nested

_NEWQDISC, _GETQDISC, _NEWFILTER, _DELFILTER, _GETFILTER = 36, 38, 44, 45, 46
_REPLACE, _EXCL, _CREATE = 0x100, 0x200, 0x400
_TC = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_CLSACT, _CLSACT_HANDLE, _INGRESS, _EGRESS = 0xFFFFFFF1, 0xFFFF0000, 0xFFFFFFF2, 0xFFFFFFF3
_KIND, _OPTIONS, _BPF_FD, _BPF_NAME, _BPF_FLAGS = 1, 2, 6, 7, 8
_DIRECT_ACTION, _ANY_PROTOCOL, _LAST = 1, 3, 0xFFFF
_U32 = struct.Struct("=I")
_HANDLE = 1
PLAIN = frozenset(("noqueue",))
"""What a veth has of its own accord, whatever its queues and net.core.default_qdisc: any other somebody has chosen."""


class Qdisc(msgspec.Struct, frozen=True):
    """A queueing discipline of a link."""

    ifindex: int
    kind: str


def add_clsact(ifindex: int) -> Message:
    """Makes the place for filters. EEXIST when the link has one, or another kind of `ingress`."""
    body = _TC.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT, 0) + attribute(_KIND, b"clsact\0")
    return Message(_NEWQDISC, _CREATE | _EXCL, body, "clsact")


def set_program(ifindex: int, program: int, name: str) -> Message:
    """Runs a program, by its descriptor, for what the link takes in, instead of the one that it ran."""
    options = (
        attribute(_BPF_FD, _U32.pack(program))
        + attribute(_BPF_NAME, name.encode() + b"\0")
        + attribute(_BPF_FLAGS, _U32.pack(_DIRECT_ACTION))
    )
    body = (
        _TC.pack(0, ifindex, _HANDLE, _INGRESS, _LAST << 16 | socket.htons(_ANY_PROTOCOL))
        + attribute(_KIND, b"bpf\0")
        + nested(_OPTIONS, options)
    )
    return Message(_NEWFILTER, _CREATE | _REPLACE, body, f"eBPF program {name}")


def delete_program(ifindex: int) -> Message:
    """Takes our program away, and leaves the filters of others."""
    body = _TC.pack(0, ifindex, _HANDLE, _INGRESS, _LAST << 16 | socket.htons(_ANY_PROTOCOL))
    return Message(_DELFILTER, 0, body + attribute(_KIND, b"bpf\0"), "eBPF program")


def list_qdiscs() -> Message:
    """Asks for the queueing disciplines of all links; for a dump."""
    return Message(_GETQDISC, 0, _TC.pack(0, 0, 0, 0, 0), "qdiscs")


def list_filters(ifindex: int) -> tuple[Message, Message]:
    """Asks for the filters of what a link takes in, and of what it sends; each for a dump."""
    one, other = (Message(_GETFILTER, 0, _TC.pack(0, ifindex, 0, way, 0), "filters") for way in (_INGRESS, _EGRESS))
    return one, other


def read_qdisc(answer: bytes) -> Qdisc:
    """What an answer to `list_qdiscs` says."""
    _, ifindex, _, _, _ = _TC.unpack_from(answer)
    return Qdisc(ifindex, dict(attributes(answer[_TC.size :])).get(_KIND, b"").rstrip(b"\0").decode(errors="replace"))


def read_filter_name(answer: bytes) -> str | None:
    """The name of the program in an answer to `list_filters`; "" for another kind of filter or one without a name, None
    for a head of filters, which is none itself."""
    _, _, handle, _, _ = _TC.unpack_from(answer)
    if not handle:
        return None
    found = dict(attributes(answer[_TC.size :]))
    if found.get(_KIND, b"").rstrip(b"\0") != b"bpf":
        return ""
    return dict(attributes(found.get(_OPTIONS, b""))).get(_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace")
