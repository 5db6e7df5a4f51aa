"""How fast a pod may talk (the capability `bandwidth`), pure: what is asked for, and what the kernel is told.

    to the pod     bridge port ──netdev egress──▶ fwd ─▶ pwi… (ifb, tbf) ─▶ the wire ─▶ pod
    from the pod   pod ─▶ the wire ──netdev ingress──▶ fwd ─▶ pwe… (ifb, tbf) ─▶ bridge port

A token bucket (tbf) needs a queue, and a queue a device that sends. So each limited direction has an ifb device, which
hands what it has sent back to where it was taken from. Ours are taken by a chain of nftables at the wire's end on the
node, and not by tc, because a link has one root queue and one ingress hook of tc: the reference plugin `bandwidth`
insists on making both itself, and would fail after us. This way both may limit one pod, and the lower limit counts.
The queue is on the node, where nobody in the pod can take it away. What else was thought of: docs/adr/0008.

**Which limit.** Rates are bits a second, bursts are bits, as the capability has it; the configuration's own keys go
before those of the runtime, as the reference has it. What may wait in a queue is what the rate sends in 25 ms, and the
burst up to 256 kB of it: runtimes ask for a burst of 512 MB, and a queue of that size would delay a packet by minutes.
A bucket has room for a packet of the wire's MTU at least: an ADD that asks for less is refused, but the MTU may grow.

Source: the CNI conventions, capability `bandwidth`; net/sched/sch_tbf.c; linux/pkt_sched.h.
"""

from __future__ import annotations

import msgspec

from ipam_daemon.errors import InvalidConfig
from ipam_daemon.model import Attachment, Bandwidth

_BITS = 8
_LATENCY_S = 0.025
_BURST_IN_QUEUE = 256 << 10
_MOST_BYTES = (1 << 32) - 1
_MOST_RATE = (1 << 64) - 1  # bits a second: what the kernel, the daemon's own calls and the reference count in
TICK_NS = 64  # PSCHED_SHIFT is 6
_FRAME = 14  # bytes of an Ethernet header, which tbf counts


class Limits(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The four keys as `runtimeConfig.bandwidth`, or a configuration itself, has them."""

    ingress_rate: int | None = None
    ingress_burst: int | None = None
    egress_rate: int | None = None
    egress_burst: int | None = None


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket: `rate` in bytes a second, `burst` in bytes."""

    rate: int
    burst: int

    @property
    def limit(self) -> int:
        """The bytes that may wait."""
        return min(round(self.rate * _LATENCY_S) + min(self.burst, _BURST_IN_QUEUE), _MOST_BYTES)

    def is_reported_as(self, rate: int, ticks: int) -> bool:
        """Whether this is what the kernel reports as `rate` and `ticks`, which are how long the burst takes at that
        rate in units of 64 ns. It tells their lower 32 bits, and rounds."""
        expected = self.burst * 1_000_000_000 // self.rate // TICK_NS
        off = (expected - ticks) % (1 << 32)
        return rate == self.rate and min(off, (1 << 32) - off) <= 2 + expected // 1000


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A limited direction of a wire: the ifb device that its packets wait in."""

    ifname: str
    to_pod: bool
    bucket: Bucket


def parse(own: Limits, runtime: Limits | None) -> Bandwidth:
    """What is asked for, by the configuration itself or by the runtime. Raises InvalidConfig, naming field and value.

    A rate needs a burst and a burst a rate; a burst is less than 4 GB, since the kernel counts it in 32 bits, and a
    rate less than 2^64.
    """
    where, chosen = ("", own) if own != Limits() or runtime is None else ("runtimeConfig.bandwidth.", runtime)
    bandwidth = Bandwidth(
        ingress_rate=chosen.ingress_rate or 0,
        ingress_burst=chosen.ingress_burst or 0,
        egress_rate=chosen.egress_rate or 0,
        egress_burst=chosen.egress_burst or 0,
    )
    for way, rate, burst in (
        ("ingress", bandwidth.ingress_rate, bandwidth.ingress_burst),
        ("egress", bandwidth.egress_rate, bandwidth.egress_burst),
    ):
        for name, value in ((f"{way}Rate", rate), (f"{way}Burst", burst)):
            if value < 0 or (0 < value < _BITS):
                raise InvalidConfig(f"{where}{name} is {value}, expected bits, at least {_BITS}")
        if rate > _MOST_RATE:
            raise InvalidConfig(f"{where}{way}Rate is {rate}, expected bits a second, {_MOST_RATE} at the most")
        if bool(rate) != bool(burst):
            there, missing = (f"{way}Rate", f"{way}Burst") if rate else (f"{way}Burst", f"{way}Rate")
            raise InvalidConfig(f"{where}{there} is {rate or burst} and {missing} is missing, expected both or none")
        if burst // _BITS >= _MOST_BYTES:
            raise InvalidConfig(
                f"{where}{way}Burst is {burst}, expected less than 4 GB, which is {_MOST_BYTES * _BITS}"
            )
    return bandwidth


def check_bursts(bandwidth: Bandwidth, mtu: int) -> None:
    """Raises InvalidConfig for a burst that no packet of this MTU fits into: it would never be sent."""
    least = (mtu + _FRAME) * _BITS
    for name, burst in (("ingressBurst", bandwidth.ingress_burst), ("egressBurst", bandwidth.egress_burst)):
        if 0 < burst < least:
            raise InvalidConfig(
                f"bandwidth: {name} is {burst} bits, expected {least} at least: "
                f"a packet of {mtu} bytes would never pass"
            )


def queue_names(host_ifname: str) -> tuple[str, str]:
    """The ifb devices of a wire, towards the pod and from it, by the name of its end on the node (pw…)."""
    return f"pwi{host_ifname[2:]}", f"pwe{host_ifname[2:]}"


def wire_of(ifb: str) -> str:
    """The end on the node of the wire that an ifb device is of; empty when its name is not one of ours."""
    return f"pw{ifb[3:]}" if ifb.startswith(("pwi", "pwe")) and len(ifb) == len("pwi") + 12 else ""


def queues(attachment: Attachment) -> tuple[Queue, ...]:
    """The queues of an attachment; none for one without limits. They depend on its MTU when a burst is smaller."""
    to_pod, from_pod = queue_names(attachment.host_ifname)
    asked, least = attachment.bandwidth, max(attachment.mtu, attachment.resizing) + _FRAME
    found = (
        (to_pod, True, asked.ingress_rate, asked.ingress_burst),
        (from_pod, False, asked.egress_rate, asked.egress_burst),
    )
    return tuple(
        Queue(ifname=name, to_pod=towards, bucket=Bucket(rate=rate // _BITS, burst=max(burst // _BITS, least)))
        for name, towards, rate, burst in found
        if rate
    )
