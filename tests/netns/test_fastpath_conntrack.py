"""What conntrack makes of connections that it hardly sees: they are kept, end as they should, and nothing is INVALID.

A packet on the fast way is none that conntrack counts. So what it knows of a connection is old: the seconds that are
left of it, and of TCP the numbers that it expects.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from podwire.lab.state import LabState
from tests.netns.containers import on_node, wait
from tests.netns.fast_fixtures import Flow, Pod, Tcp, Udp, lab, succeed, sysctl, tracked, trio

__all__ = ["lab", "trio"]

MEGABYTES = 32
UDP_TIMEOUTS = ("net.netfilter.nf_conntrack_udp_timeout", "net.netfilter.nf_conntrack_udp_timeout_stream")
LIBERAL = "net.netfilter.nf_conntrack_tcp_be_liberal"
COUNT_INVALID = """
table inet test_invalid {
  counter invalid { }
  chain forward { type filter hook forward priority -10; ct state invalid counter name invalid; }
}
"""


@contextmanager
def set_to(lab: LabState, name: str, keys: tuple[str, ...], value: str) -> Iterator[None]:
    """With these settings on a node, and the usual ones afterwards."""
    usual = {key: sysctl(lab, name, key) for key in keys}
    try:
        for key in keys:
            sysctl(lab, name, key, value)
        yield
    finally:
        for key, before in usual.items():
            sysctl(lab, name, key, before)


@contextmanager
def nothing_invalid(lab: LabState, *nodes: str) -> Iterator[None]:
    """That no packet is taken for one of no connection; bridged packets meet `inet` chains, too."""
    try:
        for name in nodes:
            done = on_node(lab, name, "nft", COUNT_INVALID)
            assert done.returncode == 0, done.stderr
        yield
        for name in nodes:
            said = succeed(lab, name, "nft list counters table inet test_invalid")
            assert "packets 0 " in said, (name, said)
    finally:
        for name in nodes:
            on_node(lab, name, "nft", "delete table inet test_invalid")


# --- how long it knows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_flow_that_is_fast_for_long_stays_known(trio: list[Pod], family: int) -> None:
    """What conntrack would forget in 20 s it is shown: so an entry of 23 s never has less than 19 left."""
    here, _, there = trio
    with set_to(here.lab, "node1", UDP_TIMEOUTS, "23"), Udp(here, there, family) as flow:
        flow.until_fast()
        least, until = 23, time.monotonic() + 6
        while time.monotonic() < until:
            flow.exchange()
            ((left, _),) = tracked(here.lab, "node1", flow)
            least = min(least, left)
        assert least >= 19
        flow.until_fast()


@pytest.mark.slow
def test_a_flow_outlives_its_timeout(trio: list[Pod]) -> None:
    """The same, seen with patience: it sends for longer than conntrack keeps what it does not see."""
    here, _, there = trio
    with (
        set_to(here.lab, "node1", UDP_TIMEOUTS, "25"),
        set_to(here.lab, "node2", UDP_TIMEOUTS, "25"),
        Udp(here, there) as flow,
        nothing_invalid(here.lab, "node1", "node2"),
    ):
        flow.until_fast()
        until = time.monotonic() + 40
        while time.monotonic() < until:
            flow.exchange()
            assert len(tracked(here.lab, "node1", flow)) == 1
        assert flow.is_fast()


def test_what_conntrack_forgets_sooner_is_never_fast(trio: list[Pod]) -> None:
    here, beside, _ = trio
    with set_to(here.lab, "node1", UDP_TIMEOUTS, "15"), Udp(here, beside) as flow:
        flow.exchange()
        assert flow.is_slow()
        with Tcp(here, beside) as other:
            other.until_fast()  # so the pods are known
        flow.exchange()
        assert flow.is_slow()
    with Udp(here, beside) as flow:
        flow.until_fast()


# --- how a connection ends ----------------------------------------------------------------------------------------


def reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def client_closes(flow: Tcp) -> None:
    flow.client.close()
    assert flow.server.recv(1) == b""
    flow.server.close()


def server_closes(flow: Tcp) -> None:
    flow.server.close()
    assert flow.client.recv(1) == b""
    flow.client.close()


def half_closes(flow: Tcp) -> None:
    """One end has said all; the other has not, for megabytes."""
    flow.client.shutdown(socket.SHUT_WR)
    assert flow.server.recv(1) == b""
    flow.send(flow.server, flow.client, MEGABYTES << 20)
    flow.server.close()
    assert flow.client.recv(1) == b""


def client_resets(flow: Tcp) -> None:
    reset(flow.client)
    with pytest.raises(ConnectionResetError):
        flow.server.recv(1)


def server_resets(flow: Tcp) -> None:
    reset(flow.server)
    with pytest.raises(ConnectionResetError):
        flow.client.recv(1)


ENDS: dict[str, Callable[[Tcp], None]] = {
    "the client closes": client_closes,
    "the server closes": server_closes,
    "one half closes first": half_closes,
    "the client resets": client_resets,
    "the server resets": server_resets,
}


def has_ended(lab: LabState, name: str, flow: Flow) -> bool:
    """Conntrack knows that it is over: what comes next is that it is forgotten. A reset whose number is not the one
    that it expects leaves the state as it was, for ten seconds (nf_conntrack_tcp_timeout_close)."""
    return all(
        state in ("TIME_WAIT", "CLOSE", "LAST_ACK") or (state == "ESTABLISHED" and left <= 10)
        for left, state in tracked(lab, name, flow)
    )


@pytest.mark.parametrize("place", [1, 2], ids=["on a node", "across"])
@pytest.mark.parametrize("ending", ENDS.values(), ids=ENDS.keys())
def test_a_fast_connection_ends_as_any_does(trio: list[Pod], ending: Callable[[Tcp], None], place: int) -> None:
    here, there = trio[0], trio[place]
    nodes = {here.node, there.node}
    for family in (4, 6):
        with Tcp(here, there, family) as flow:
            flow.until_fast()
            with nothing_invalid(here.lab, *nodes):
                flow.carry(MEGABYTES << 20)
                assert flow.is_fast()
                ending(flow)
                for name in nodes:
                    wait(lambda: has_ended(here.lab, name, flow), f"{name} to know that it is over")  # noqa: B023


@pytest.mark.slow
def test_a_reset_after_gigabytes_is_no_stranger_s(trio: list[Pod]) -> None:
    """The last number that conntrack saw is more than half of all numbers behind: it seems to be ahead."""
    here, beside, _ = trio
    with Tcp(here, beside) as flow:
        flow.until_fast()
        with nothing_invalid(here.lab, "node1"):
            flow.send(flow.client, flow.server, 5 << 29)
            assert flow.is_fast()
            client_resets(flow)
            wait(lambda: has_ended(here.lab, "node1", flow), "node1 to know that it is over")


def test_what_conntrack_has_to_tolerate_is_set_again(trio: list[Pod]) -> None:
    here, _, there = trio
    with Tcp(here, there) as flow:
        flow.until_fast()
        sysctl(here.lab, "node1", LIBERAL, "0")
        wait(lambda: sysctl(here.lab, "node1", LIBERAL) == "1", "a round to set it")
        with nothing_invalid(here.lab, "node1", "node2"):
            flow.carry(MEGABYTES << 20)
            client_closes(flow)


def test_a_connection_that_is_cut_by_hand_is_cut(trio: list[Pod]) -> None:
    """Conntrack forgets it: what comes next takes the long way, where it begins anew."""
    here, _, there = trio
    with Udp(here, there) as flow:
        flow.until_fast()
        for name in ("node1", "node2"):
            with suppress(AssertionError):
                succeed(here.lab, name, f"conntrack -D -p udp --orig-port-src {flow.source_port}")
        taken = flow.taken(lambda: flow.carry(1))
        assert taken["node1", "node"] == 0
        flow.until_fast()
