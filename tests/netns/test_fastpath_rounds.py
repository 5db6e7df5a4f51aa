"""Rounds of the fast path, one at a time, on a node with pods and without a daemon: what runs where.

last      the port of a pod that no plugin follows: its place for filters (clsact) is made with it
other     that of any other: its program comes by TCX, one port at a time, and no place is ever made
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ipam_daemon import fastpath, tc_program
from ipam_daemon.devices import Devices
from ipam_daemon.fastpath_program import render_nothing
from ipam_daemon.netlink import index_of
from ipam_daemon.plan import NodePlan, PeersPlan, RoutePlan
from podwire.bpf import kernel, tcx
from tests.netns.fastpath_rounds import ARRIVING, BY_TCX, FILTER, FROM_POD, PLAN, Place, Running, place
from tests.netns.node_fixtures import Node, play
from tests.netns.test_devices import VXLAN


def test_the_vxlan_device_has_its_place_from_its_making() -> None:
    async def story() -> None:
        async with Node() as its:
            await its.thread.run(Devices(its.thread).ensure_vxlan, VXLAN)
            assert "clsact" in its.run("tc", "qdisc", "show", "dev", "pw-vxlan")

    play(story)


def test_what_arrives_by_vxlan_meets_a_program_of_tcx_where_the_kernel_can(tmp_path: Path) -> None:
    """It costs less than a filter. One that an earlier version has left there goes with its daemon."""

    async def story() -> None:
        async with place(tmp_path) as its:

            def filtered() -> None:
                index, program = index_of("pw-vxlan"), kernel.load(render_nothing(), ARRIVING)
                its.node.thread.channel.exchange([tc_program.set_program(index, program, ARRIVING)])
                os.close(program)

            await its.run(Devices(its.node.thread).ensure_vxlan, VXLAN)
            for _ in range(2):
                await its.rounds()
                assert await its.at("pw-vxlan") == ([], [ARRIVING], True)
                await its.end()
                await its.run(filtered)
                await its.begin()
            its.path._by_tcx = False
            for _ in range(2):
                await its.rounds()
                assert await its.at("pw-vxlan") == ([ARRIVING], [], True)

    play(story)


def with_blocks(*blocks: str) -> NodePlan:
    """A node that has these, and a peer straight on its underlay."""
    firewall = msgspec.structs.replace(PLAN.firewall, local_blocks=frozenset(map(ipaddress.ip_network, blocks)))
    way = RoutePlan(gateway=ipaddress.ip_address("192.0.2.2"), device="under0", onlink=False)
    routes = {ipaddress.ip_network("10.244.2.0/26"): way}
    return msgspec.structs.replace(PLAN, firewall=firewall, peers=PeersPlan(neighbours={}, fdb={}, routes=routes))


def test_programs_follow_the_blocks_of_the_node(tmp_path: Path) -> None:
    """Each in its place, and the underlay's without an end; the same addresses in other blocks change nothing."""

    async def story() -> None:
        async with place(tmp_path, True, False) as its:
            its.node.ip("link", "add", "under0", "type", "veth", "peer", "name", "under0-peer")

            def numbers() -> list[int]:
                links = ("under0", its.ports[1])
                return [number for link in links for number in tcx.programs(index_of(link), tcx.Way.IN)]

            async def turn(*blocks: str) -> list[int]:
                its.plan = with_blocks(*blocks)
                await its.rounds()
                assert (await its.at("under0"))[1] == [ARRIVING]
                return await its.run(numbers)  # type: ignore[no-any-return]

            seen = [await turn("10.244.1.0/26")]
            links = dict(its.path._links)
            with its.talk(0, 1) as talk:
                for blocks, fast in (
                    (("10.244.9.0/26", "10.244.1.0/26"), 20),
                    (("10.244.9.0/26",), 0),
                    ((), 0),
                    (("fd00:1::/64",), 0),
                    (("fd00:1::/64", "10.244.1.0/26"), 20),
                ):
                    seen.append(await turn(*blocks))
                    assert await its.fast(talk) == fast, blocks
                assert len({number for each in seen for number in each}) == 2 * len(seen), "others each time"
                assert its.path._links == links
                assert await turn("10.244.1.32/27", "10.244.1.0/27", "fd00:1::/64") == seen[-1]
                assert await its.fast(talk) == 20

    play(story)


def test_by_tcx_pods_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """Those that are young are not; those with a place for filters are, all together."""

    async def story() -> None:
        async with place(tmp_path, False, False, True, False, True) as its:
            assert await its.round(*its.ports)
            assert (its.path.known, [await its.at(each) for each in its.ports]) == (
                2,
                [FILTER if each in (2, 4) else ([], [], False) for each in range(5)],
            )
            said = [(await its.round(), its.path.known)]
            said += [(await its.run(its.path.go_on), its.path.known) for _ in range(3)]
            assert said == [(False, 3), (False, 4), (True, 5), (True, 5)]
            assert [await its.at(each) for each in its.ports] == [BY_TCX, BY_TCX, FILTER, BY_TCX, FILTER]
            with its.talk(0, 2) as talk:
                assert await its.fast(talk) == 20

    play(story)


def test_what_becomes_of_a_port_while_it_waits_is_seen(tmp_path: Path) -> None:
    """One gets a queue, one dies, and the name of one goes to another link."""

    async def story() -> None:
        async with place(tmp_path, *[False] * 5) as its:
            assert not await its.round()
            first = set(its.ports) - its.path._waiting.keys()
            limited, dead, replaced, left = list(its.path._waiting)
            its.node.run(*f"tc qdisc add dev {limited} root tbf rate 1mbit burst 10k latency 9ms".split())
            await its.run(its.path.forget, dead)
            its.node.ip("link", "delete", replaced)
            its.node.ip("link", "add", replaced, "type", "veth", "peer", "name", "peer")
            while not await its.run(its.path.go_on):
                continue
            assert its.path._ports.keys() == {*first, left}
            assert "queueing" in its.path.passed_over[limited]
            assert [await its.at(each) for each in (limited, dead, replaced)] == [([], [], False)] * 3
            assert await its.at(left) == BY_TCX

    play(story)


def test_what_an_earlier_daemon_has_left_passes_everything_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path, True, False) as its:
            await its.rounds()
            with its.talk(0, 1) as talk:
                for _ in range(2):
                    assert await its.fast(talk) == 20
                    await its.run(fastpath.end, its.node.thread)
                    assert await its.fast(talk) == 0, "though its lease has not run out, and the pods are in its map"
                    assert [await its.at(each) for each in its.ports] == [([], [], True), BY_TCX]
                    await its.end()
                    await its.begin()
                    await its.rounds()
                    assert [await its.at(each) for each in its.ports] == [FILTER, BY_TCX], "one for each"
                assert await its.fast(talk) == 20
                await its.run(fastpath.end, its.node.thread)
                await its.run(fastpath.remove, its.node.thread)
                assert [await its.at(each) for each in its.ports] == [([], [], True), ([], [], False)]
                assert await its.fast(talk) == 0

    play(story)


# --- what somebody takes away -------------------------------------------------------------------------------------


def unfiltered(its: Place, port: str) -> None:
    its.node.run("tc", "filter", "del", "dev", port, "ingress")


def without_place(its: Place, port: str) -> None:
    its.node.run("tc", "qdisc", "del", "dev", port, "clsact")


def with_place(its: Place, port: str) -> None:
    its.node.run("tc", "qdisc", "add", "dev", port, "clsact")


def detached(_: Place, port: str) -> None:
    tcx.detach(index_of(port), frozenset({FROM_POD}))


LOSSES = {
    "our filter": (0, unfiltered, FILTER),
    "the place for filters": (0, without_place, BY_TCX),
    "our program of TCX": (1, detached, BY_TCX),
    "nothing, and makes a place": (1, with_place, FILTER),
}


@pytest.mark.parametrize(("pod", "lose", "then"), LOSSES.values(), ids=LOSSES.keys())
def test_what_somebody_takes_away_is_put_back(
    tmp_path: Path, pod: int, lose: Callable[[Place, str], None], then: Running
) -> None:
    """Without a place that nobody made, and one program for each port; a start after it makes no difference."""

    async def story() -> None:
        async with place(tmp_path, True, False) as its:
            await its.rounds()
            with its.talk(0, 1) as talk:
                assert await its.fast(talk) == 20
                await its.run(lose, its, its.ports[pod])
                for _ in range(2):
                    await its.round()
                    assert (await its.at(its.ports[pod]), await its.fast(talk)) == (then, 20)
                await its.end()
                await its.begin()
                await its.rounds()
                assert (await its.at(its.ports[pod]), await its.fast(talk)) == (then, 20)

    play(story)
