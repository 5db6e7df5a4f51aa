"""Limits on paper: what is asked for, and the numbers that the kernel is told."""

from __future__ import annotations

import pytest

from ipam_daemon.bandwidth import Bucket, Limits, check_bursts, parse, queue_names, queues, wire_of
from ipam_daemon.errors import CniError
from ipam_daemon.model import Attachment, AttachmentKey, Bandwidth

MBIT = 1_000_000
NOTHING = Limits()
ASKED: dict[str, tuple[Limits, Limits | None, Bandwidth]] = {
    "nothing": (NOTHING, None, Bandwidth()),
    "nothing, in so many words": (
        NOTHING,
        Limits(ingress_rate=0, ingress_burst=0, egress_rate=0, egress_burst=0),
        Bandwidth(),
    ),
    "by the runtime": (
        NOTHING,
        Limits(ingress_rate=MBIT, ingress_burst=8000),
        Bandwidth(ingress_rate=MBIT, ingress_burst=8000),
    ),
    "by the configuration, which goes before the runtime": (
        Limits(egress_rate=MBIT, egress_burst=8000),
        Limits(ingress_rate=MBIT, ingress_burst=8000),
        Bandwidth(egress_rate=MBIT, egress_burst=8000),
    ),
    "with the burst that containerd asks for": (
        NOTHING,
        Limits(egress_rate=10 * MBIT, egress_burst=(1 << 32) - 1),
        Bandwidth(egress_rate=10 * MBIT, egress_burst=(1 << 32) - 1),
    ),
}


@pytest.mark.parametrize(("own", "runtime", "expected"), ASKED.values(), ids=ASKED.keys())
def test_what_is_asked_for(own: Limits, runtime: Limits | None, expected: Bandwidth) -> None:
    assert parse(own, runtime) == expected


WRONG = {
    "a rate without a burst": (
        Limits(ingress_rate=MBIT),
        "bandwidth.ingressRate is 1000000 and ingressBurst is missing",
    ),
    "a burst without a rate": (Limits(egress_burst=8000), "egressBurst is 8000 and egressRate is missing"),
    "a burst of 4 GB": (
        Limits(ingress_rate=MBIT, ingress_burst=8 * ((1 << 32) - 1)),
        "ingressBurst is 34359738360, expected less",
    ),
    "a negative rate": (Limits(ingress_rate=-8, ingress_burst=8), "ingressRate is -8"),
    "a rate that no counter holds": (
        Limits(egress_rate=1 << 64, egress_burst=8000),
        "bandwidth.egressRate is 18446744073709551616, expected bits a second, 18446744073709551615 at the most",
    ),
    "less than a byte a second": (
        Limits(egress_rate=7, egress_burst=8000),
        "egressRate is 7, expected bits, at least 8",
    ),
}


@pytest.mark.parametrize(("limits", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(limits: Limits, said: str) -> None:
    with pytest.raises(CniError, match=said) as caught:
        parse(NOTHING, limits)
    assert caught.value.code == 7


def test_the_configurations_own_keys_are_named_as_they_are() -> None:
    with pytest.raises(CniError, match=r"^ingressRate is 1000000 and ingressBurst is missing"):
        parse(Limits(ingress_rate=MBIT), None)


def test_a_packet_has_to_fit_into_the_burst() -> None:
    check_bursts(Bandwidth(ingress_rate=MBIT, ingress_burst=8 * 1464), 1450)
    with pytest.raises(CniError, match="ingressBurst is 11711 bits, expected 11712 at least: a packet of 1450 bytes"):
        check_bursts(Bandwidth(ingress_rate=MBIT, ingress_burst=8 * 1464 - 1), 1450)


ROOM = {
    "as asked for": (1450, 0, 1500),
    "a packet of an MTU that grew": (8950, 0, 8964),
    "of one that it is being given": (1450, 8950, 8964),
    "of the one that an end may still have": (8950, 1450, 8964),
}


@pytest.mark.parametrize(("mtu", "resizing", "burst"), ROOM.values(), ids=ROOM.keys())
def test_there_is_room_for_a_packet(mtu: int, resizing: int, burst: int) -> None:
    attachment = Attachment(
        key=AttachmentKey("podnet", "c1", "eth0"),
        netns="",
        host_ifname="pw0123456789ab",
        mac="",
        mtu=mtu,
        resizing=resizing,
        addresses=(),
        bandwidth=Bandwidth(egress_rate=MBIT, egress_burst=12_000),
        created=0,
        created_ns=0,
    )
    assert [each.bucket.burst for each in queues(attachment)] == [burst]


def test_a_large_burst_is_not_a_long_queue() -> None:
    """10 Mbit/s with containerd's burst of 512 MB: at most a quarter of a second's packets wait, not seven minutes'."""
    assert Bucket(rate=1_250_000, burst=(1 << 29) - 1).limit < 1_250_000 / 3
    assert Bucket(rate=1_250_000, burst=20_000).limit == 31_250 + 20_000


REPORTED = {
    "as it is": (10_000_000, 781_250, True),
    "rounded": (10_000_000, 781_251, True),
    "another rate": (10_000_001, 781_250, False),
    "another burst": (10_000_000, 790_000, False),
}


@pytest.mark.parametrize(("rate", "ticks", "expected"), REPORTED.values(), ids=REPORTED.keys())
def test_what_the_kernel_reports(rate: int, ticks: int, expected: bool) -> None:
    assert Bucket(rate=10_000_000, burst=500_000).is_reported_as(rate, ticks) == expected


def test_a_burst_of_hours_is_reported_in_its_lower_bits() -> None:
    slow = Bucket(rate=125, burst=(1 << 32) - 2)
    assert slow.is_reported_as(125, ((1 << 32) - 2) * 8_000_000 // 64 % (1 << 32))


def test_a_device_tells_its_wire() -> None:
    wires = ["pw0123456789ab", "pwe123456789ab", "pwi123456789ab"]
    for wire in wires:
        assert [wire_of(each) for each in queue_names(wire)] == [wire, wire]
    assert [wire_of(each) for each in (*wires, "ifb0", "pw-vxlan", "pwi0")] == [""] * 6
