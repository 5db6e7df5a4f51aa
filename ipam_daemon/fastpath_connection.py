"""The fast path's questions to conntrack about a packet's connection. Pure.

    look-up ─▶ status, state, ends ─▶ what is left of the entry ─▶ renewed ─▶ released ─▶ on, or the fast way

The entry is held from the look-up until it is released, so nothing may leave in between: r7 collects what is wrong of
it. What is asked, and why, is fastpath_program's.

Source: bpf_skb_ct_lookup(), bpf_ct_change_timeout() and bpf_ct_release() in net/netfilter/nf_conntrack_bpf.c; enum
ip_conntrack_status in linux/netfilter/nf_conntrack_common.h; TCP's states in nf_conntrack_tcp.h.
"""

from __future__ import annotations

from ipam_daemon.fastpath_part import ENTRY, LEFT, OPTIONS, STATE, TUPLE, UDP, B, D, H, Part, W
from podwire.bpf.assembler import R0, R1, R2, R3, R4, R5, R6, R7, R9, R10, Sum, Test

LEAST_LEFT = 20
"""Seconds. A connection that conntrack would forget earlier is shown to it."""
_SELDOM = 2  # seconds between two renewals of an entry
_MOST_SECONDS = 1_000_000  # half of what 32 bits of jiffies can tell apart, at 1,000 a second
_JIFFIES = 118  # enum bpf_func_id
# enum ip_conntrack_status
_SEEN_REPLY, _ASSURED, _CONFIRMED = 1 << 1, 1 << 2, 1 << 3
_IN_THE_WAY = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13
"""Source or destination translated, sequence numbers changed, dying, a template, untracked, a helper."""
_TCP_ESTABLISHED = 3


class Connection(Part):
    """The questions about a packet's connection."""

    def write(self) -> None:
        """Adds them to the program."""
        program, of = self._program, self._conntrack
        program.store_number(W, R10, OPTIONS, -1)  # this namespace
        program.store_number(W, R10, OPTIONS + 4, 0)
        program.store_number(W, R10, OPTIONS + 8, 0)
        program.store(B, R10, OPTIONS + 8, R9)
        program.copy(R1, R6)
        program.frame(R2, TUPLE)
        program.set(R3, 2 * self._family.length + 4)
        program.frame(R4, OPTIONS)
        program.set(R5, 12)
        program.call_kernel(of.lookup, of.module)
        program.jump_if(Test.EQUAL, R0, 0, "on")
        # it is held until it is released, so nothing may leave in between: r7 collects what is wrong of it
        program.load(D, R7, R0, of.status)
        program.compute(Sum.AND, R7, _SEEN_REPLY | _ASSURED | _CONFIRMED | _IN_THE_WAY)
        program.load(B, R1, R0, of.tcp_state)
        program.store(B, R10, STATE, R1)
        program.load(W, R1, R0, of.timeout)
        program.store(W, R10, LEFT, R1)
        self._compare_ends()
        program.store(D, R10, ENTRY, R0)
        program.call(_JIFFIES)
        program.load(W, R1, R10, LEFT)
        program.compute32_with(Sum.SUBTRACT, R1, R0)
        program.store(W, R10, LEFT, R1)
        self._renew()
        program.load(D, R1, R10, ENTRY)
        program.call_kernel(of.release, of.module)
        program.compute(Sum.AND, R7, ~_ASSURED)
        program.jump_if(Test.DIFFERENT, R7, _SEEN_REPLY | _CONFIRMED, "on")
        self._check_state()

    def _renew(self) -> None:
        """What a packet on the long way does to an entry: it lasts as if this were its first second. Once in a few
        seconds, and neither for what is going to be shown to conntrack anyway nor where a rule has given the entry
        another time. r1 is what is left of it."""
        program, of, udp, aged, fresh = self._program, self._conntrack, *map(self._label, ("sent", "aged", "fresh"))
        program.jump_if(Test.DIFFERENT, R7, _SEEN_REPLY | _ASSURED | _CONFIRMED, fresh)
        program.jump32_if(Test.LESS_SIGNED, R1, LEAST_LEFT * of.hz, fresh)
        program.jump_if(Test.EQUAL, R9, UDP, udp)
        program.load(B, R2, R10, STATE)
        program.jump_if(Test.DIFFERENT, R2, _TCP_ESTABLISHED, fresh)
        self._ask_age(self._node.tcp_lasts, aged)
        program.jump(fresh)
        program.label(udp)
        self._ask_age(self._node.udp_lasts, aged)
        program.jump(fresh)
        program.label(aged)
        program.load(D, R1, R10, ENTRY)
        if of.own_timeout is not None:  # its members are read by way of null pointers, too: that is 0
            program.load(D, R3, R1, of.extensions)
            program.load(B, R3, R3, of.own_timeout)
            program.jump_if(Test.DIFFERENT, R3, 0, fresh)
        program.call_kernel(of.renew, of.module)
        program.label(fresh)

    def _ask_age(self, lasts: int, aged: str) -> None:
        """r2 = what the entry gets, in milliseconds, where it is `aged`."""
        seconds = min(lasts, _MOST_SECONDS)
        self._program.set(R2, seconds * 1000)
        self._program.jump32_if(Test.LESS_SIGNED, R1, max(seconds - _SELDOM, 0) * self._conntrack.hz, aged)

    def _compare_ends(self) -> None:
        """Who answers is who was asked. IPVS translates without saying so in the status."""
        program = self._program
        (asked, asked_port), (answers, answers_port) = self._conntrack.original_to, self._conntrack.reply_from
        pairs = [(W, asked + word, answers + word) for word in range(0, self._family.length, 4)]
        for size, one, other in (*pairs, (H, asked_port, answers_port)):
            program.load(size, R1, R0, one)
            program.load(size, R2, R0, other)
            program.compute32_with(Sum.SUBTRACT, R1, R2)
            program.compute(Sum.LEFT, R1, 32)
            program.compute_with(Sum.OR, R7, R1)

    def _check_state(self) -> None:
        program, lasting = self._program, self._label("lasting")
        program.jump_if(Test.EQUAL, R9, UDP, lasting)
        program.load(B, R1, R10, STATE)
        program.jump_if(Test.DIFFERENT, R1, _TCP_ESTABLISHED, "on")
        program.label(lasting)
        program.load(W, R1, R10, LEFT)
        program.jump32_if(Test.LESS_SIGNED, R1, LEAST_LEFT * self._conntrack.hz, "on")
