"""Whose business a port is besides ours: the fast path stands back with the next round, until they are gone."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec

from ipam_daemon import fastpath, tc_program
from ipam_daemon.fastpath_program import render_nothing
from ipam_daemon.netlink import index_of
from ipam_daemon.onlookers import Onlookers
from podwire.bpf import kernel, tcx
from podwire.bpf.syscall import bpf
from tests.netns.fastpath_rounds import Place, place
from tests.netns.node_fixtures import play

_ATTACH, _DETACH = 8, 9  # linux/bpf.h, enum bpf_cmd
STRANGER = "stranger"
Away = Callable[[], object]


def attached(way: tcx.Way) -> Callable[[Place, str], Away]:
    """A program of TCX."""

    def put(_: Place, port: str) -> Away:
        program, index = kernel.load(render_nothing(), STRANGER), index_of(port)
        place = struct.pack("=IIII", index, program, way, 0)
        bpf(_ATTACH, place)

        def take_away() -> None:
            bpf(_DETACH, place)
            os.close(program)

        return take_away

    return put


def matching(way: str) -> Callable[[Place, str], Away]:
    """A filter, with a place of its own where there is none."""

    def put(its: Place, port: str) -> Away:
        made = "clsact" not in its.node.run("tc", "qdisc", "show", "dev", port)
        if made:
            its.node.run("tc", "qdisc", "add", "dev", port, "clsact")
        about = ("dev", port, way, "prio", "7")
        its.node.run("tc", "filter", "add", *about, "protocol", "all", "u32", "match", "u32", "0", "0")
        undone = ("qdisc", "del", "dev", port, "clsact") if made else ("filter", "del", *about)
        return lambda: its.node.run("tc", *undone)

    return put


def misnamed(its: Place, port: str) -> Away:
    """A filter whose name is no text."""
    made = "clsact" not in its.node.run("tc", "qdisc", "show", "dev", port)
    index, channel = index_of(port), its.node.thread.channel
    if made:
        channel.exchange([tc_program.add_clsact(index)])
    program = kernel.load(render_nothing(), STRANGER)
    ours = tc_program.set_program(index, program, STRANGER)
    body = ours.body.replace(STRANGER.encode(), b"\xff\xfe\x80\xc3(\xf0\x9f\x92")
    body = body.replace(struct.pack("=I", 0xFFFF << 16 | socket.htons(3)), struct.pack("=I", 8 << 16 | socket.htons(3)))
    channel.exchange([msgspec.structs.replace(ours, body=body)])
    os.close(program)
    undone = ("qdisc", "del", "dev", port, "clsact") if made else ("filter", "del", "dev", port, "ingress", "prio", "8")
    return lambda: its.node.run("tc", *undone)


STRANGERS = {
    "a program of what comes": attached(tcx.Way.IN),
    "a program of what is sent": attached(tcx.Way.OUT),
    "a filter of what comes": matching("ingress"),
    "a filter of what is sent": matching("egress"),
    "a filter whose name is no text": misnamed,
}


def test_strangers_are_found_and_left_alone(tmp_path: Path) -> None:
    """At the ports of both kinds of pods, within a round; the pod is back with the round after they have gone."""

    async def story() -> None:
        async with place(tmp_path, True, False, True) as its:
            await its.rounds()
            usual = [await its.at(each) for each in its.ports]
            with its.talk(0, 1) as talk, its.talk(0, 2) as aside:
                for name, puts in STRANGERS.items():
                    for port in its.ports[:2]:
                        away = await its.run(puts, its, port)
                        before = await its.strangers_at(port)
                        assert before, name
                        for _ in range(2):
                            assert await its.round(), name
                            assert its.path.passed_over[port] == "it has filters or programs of somebody else", name
                            assert (await its.fast(talk), await its.fast(aside), its.path.known) == (
                                (0, 0, 2) if port == its.ports[0] else (0, 20, 2)
                            ), name
                            assert await its.strangers_at(port) == before, name
                        await its.run(away)
                        await its.round()
                        assert (its.path.passed_over.keys() & set(its.ports), its.path.known) == (set(), 3), name
                        assert await its.fast(talk) == 20, name
                        assert [await its.at(each) for each in its.ports] == usual, name

    play(story)


CHAINS = {
    "of family netdev": ("netdev", 'device "{}"'),
    "of family inet": ("inet", 'device "{}"'),
}


def test_nft_chains_at_ports_are_found(tmp_path: Path) -> None:
    """They see what comes; a port that waits for its program is asked for, too."""

    async def story() -> None:
        async with place(tmp_path, True, False, False) as its:
            await its.rounds()
            port = its.ports[0]
            wire = next(each for each in its.wires() if each.host_ifname == port)
            with its.talk(0, 1) as talk:
                for name, (family, devices) in CHAINS.items():
                    chain = f"chain look {{ type filter hook ingress {devices.format(port)} priority 0; counter; }};"
                    its.node.run("nft", "-f", "-", stdin=f"table {family} stranger {{ {chain} }}")
                    await its.round()
                    assert its.path.passed_over[port] == f"it has an nft chain of family {family}", name
                    await its.run(its.path._waiting.update, {port: wire})
                    assert await its.run(its.path.go_on), name
                    assert await its.fast(talk) == 0, name
                    its.node.run("nft", f"delete table {family} stranger")
                    await its.round()
                    assert (port in its.path.passed_over, await its.fast(talk)) == (False, 20), name

    play(story)


def test_a_start_leaves_strangers_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path, True, False) as its:
            await its.rounds()
            away = [await its.run(puts, its, port) for port in its.ports for puts in STRANGERS.values()]
            before = [await its.strangers_at(each) for each in its.ports]
            assert all(len(each) >= len(STRANGERS) for each in before)
            await its.run(fastpath.end, its.node.thread)
            await its.run(fastpath.remove, its.node.thread)
            assert [await its.strangers_at(each) for each in its.ports] == before
            for each in away:
                with contextlib.suppress(AssertionError):  # a place that went with another's
                    await its.run(each)

    play(story)


def test_ports_that_are_passed_over_are_no_work(tmp_path: Path) -> None:
    """Twenty with somebody's filters: a round is through, and so is the one in which a pod is taken."""

    async def story() -> None:
        async with place(tmp_path, *[True, False] * 10, True) as its:
            for port in its.ports[:20]:
                await its.run(matching("ingress"), its, port)
            for _ in range(2):
                assert (await its.round(), its.path.known) == (True, 1)
                assert its.path.passed_over.keys() >= set(its.ports[:20])

    play(story)


# --- ports ----------------------------------------------------------------------------------------------------------


def set_link(*words: str) -> Callable[[Place, str], object]:
    return lambda its, port: its.node.ip("link", "set", port, *words)


def set_port(*words: str) -> Callable[[Place, str], object]:
    return lambda its, port: its.node.run("bridge", "link", "set", "dev", port, *words)


PORTS = {
    "no port any more": (set_link("nomaster"), set_link("master", "pw0")),
    "another bridge's": (set_link("master", "other"), set_link("master", "pw0")),
    "blocking": (set_port("state", "0"), set_port("state", "3")),
    "learning": (set_port("state", "2"), set_port("state", "3")),
    "isolated": (set_port("isolated", "on"), set_port("isolated", "off")),
    "down": (set_link("down"), set_link("up")),
}


def test_what_the_bridge_does_not_forward_does_not_go_past_it(tmp_path: Path) -> None:
    """A port that is known, and one that is new; both are fast with the round after it is over."""

    async def story() -> None:
        async with place(tmp_path, True, False, True) as its:
            its.node.ip("link", "add", "other", "up", "type", "bridge")
            await its.rounds()
            with its.talk(0, 1) as talk, its.talk(0, 2) as aside:
                for name, (put, back) in PORTS.items():
                    for port in its.ports[:2]:
                        put(its, port)
                        for _ in range(2):
                            await its.rounds()
                            assert its.path.passed_over[port] == "the bridge does not forward for it", name
                            assert its.path.known == 2, name
                        back(its, port)
                        await its.rounds()
                        assert (its.path.passed_over.keys() & set(its.ports), its.path.known) == (set(), 3), name
                        assert (await its.fast(talk), await its.fast(aside)) == (20, 20), name

    play(story)


def test_ports_that_come_and_go_under_a_look_are_asked_for_one_by_one(tmp_path: Path) -> None:
    """A dump may leave out what was there all the time."""

    async def story() -> None:
        async with place(tmp_path, True, True) as its:
            await its.rounds()

            def look() -> list[bool]:
                onlookers, bridge = Onlookers(its.node.thread), index_of("pw0")
                onlookers._ports.clear()
                return [onlookers.is_forwarded(index_of(each), bridge) for each in (*its.ports, "pw0", "lo")]

            assert await its.run(look) == [True, True, False, False]

    play(story)
