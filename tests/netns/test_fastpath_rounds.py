"""Rounds of the fast path, one at a time, on a node with pods and without a daemon: what runs where, and whose it is.

last      the port of a pod that no plugin follows: its place for filters (clsact) is made with it
other     that of any other: its program comes by TCX, one port at a time, and no place is ever made
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipam_daemon import fastpath, tc_program
from ipam_daemon.cni import NetworkConfig
from ipam_daemon.devices import Devices
from ipam_daemon.fastpath import FastPath, read_conntrack
from ipam_daemon.fastpath_program import Where, render_nothing
from ipam_daemon.model import Attachment
from ipam_daemon.netlink import index_of
from ipam_daemon.onlookers import Onlookers
from ipam_daemon.plan import FirewallPlan, NodePlan, PeersPlan, RoutePlan
from podwire.bpf import kernel, tcx
from podwire.bpf.syscall import bpf
from tests.netns.busy_flows import inside
from tests.netns.node_fixtures import Engine, Netns, Node, bridge_plan, call, engine, play
from tests.netns.node_fixtures import pods as namespaces
from tests.netns.test_devices import VXLAN

CIDR = ipaddress.ip_network("10.244.1.0/26")
NONE = frozenset[Any]()
PLAN = NodePlan(
    bridge=msgspec.structs.replace(bridge_plan(CIDR), pools=(CIDR,)),
    vxlan=VXLAN,
    peers=None,
    firewall=FirewallPlan(local_blocks=frozenset((CIDR,)), unmasqueraded=NONE, vteps=None, vxlan_port=4789),
)
TRACKING = "table inet tracking { chain every { type filter hook forward priority 0; ct state established accept; }; }"


class Place:
    """A node with pods and without a daemon, whose rounds are asked for."""

    def __init__(self, of: Engine, spaces: list[Netns]) -> None:
        self.engine, self.node, self.spaces = of, of.node, spaces
        self.path: FastPath
        self.plan = PLAN
        self.ports: list[str] = []
        self.addresses: list[str] = []

    async def begin(self) -> None:
        """As a daemon does that starts."""
        await self.run(fastpath.end, self.node.thread)
        self.path = await self.run(FastPath, self.node.thread, *read_conntrack())

    async def end(self) -> None:
        """As one that ends."""
        await self.run(self.path.close)

    async def run(self, what: Callable[..., Any], *of: object) -> Any:
        """On the netlink thread."""
        return await self.node.thread.run(what, *of)

    async def add(self, *lasts: bool) -> None:
        """A pod for each."""
        for last in lasts:
            space = self.spaces[len(self.ports)]
            config = NetworkConfig(name="podnet", cni_version="1.1.0", last=last)
            made = json.loads(await self.engine.attachments.add(call("ADD", space.name, space.path, config=config)))
            self.ports.append(next(each["name"] for each in made["interfaces"] if "sandbox" not in each))
            self.addresses.append(made["ips"][0]["address"].split("/")[0])

    async def round(self, *young: str) -> bool:
        """One, with these wires young; whether it was through."""
        return bool(await self.run(self.path.ensure, self.plan, self.wires(), frozenset(young)))

    async def rounds(self) -> None:
        """Until all is done."""
        done = await self.round()
        while not done:
            done = await self.run(self.path.go_on)

    def wires(self) -> Sequence[Attachment]:
        return self.engine.journal.attachments()

    async def at(self, port: str) -> tuple[list[str], list[str], bool]:
        """What runs there: filters, programs of TCX, and whether there is a place for filters."""

        def look() -> tuple[list[str], list[str], bool]:
            index = index_of(port)
            channel = self.node.thread.channel
            shown = [each for asked in tc_program.list_filters(index) for each in channel.dump(asked)]
            names = [each for each in map(tc_program.read_filter_name, shown) if each is not None]
            found = {tc_program.read_qdisc(each) for each in channel.dump(tc_program.list_qdiscs())}
            beside = [each for way in tcx.Way for each in tcx.programs(index, way).values()]
            return names, beside, tc_program.Qdisc(index, "clsact") in found

        return await self.run(look)  # type: ignore[no-any-return]

    async def strangers_at(self, port: str) -> list[str]:
        """Names of what runs there and is not ours."""
        filters, beside, _ = await self.at(port)
        return [each for each in filters + beside if each not in (FROM_POD, ARRIVING)]

    def talk(self, here: int, there: int, protocol: str = "udp") -> Talk:
        """A connection between two pods."""
        return Talk(self.spaces[here], self.spaces[there], self.addresses[there], protocol)

    async def fast(self, talk: Talk) -> int:
        """How many packets are fast while twenty are exchanged."""
        before = sum((await self.run(self.path.taken)).values())
        talk.exchange(10)
        return int(sum((await self.run(self.path.taken)).values()) - before)


class Talk:
    """A connection of UDP or TCP, answered once. Its ends may change places."""

    def __init__(self, here: Netns, there: Netns, at: str, protocol: str) -> None:
        self.protocol, kind = protocol, {"udp": socket.SOCK_DGRAM, "tcp": socket.SOCK_STREAM}[protocol]
        made = (inside(each.path, lambda: socket.socket(type=kind)) for each in (here, there))
        self.client, self.server = made
        self.server.bind((at, 0))
        if protocol == "tcp":
            with self.server as listening:
                listening.listen()
                self.client.connect(listening.getsockname())
                self.server, _ = listening.accept()
        else:
            self.client.connect(self.server.getsockname())
            self.client.send(b"?")
            self.server.connect(self.server.recvfrom(16)[1])
        for each in (self.client, self.server):
            each.settimeout(30)
        self.exchange(1)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()

    def exchange(self, times: int) -> None:
        """Something there, and something back."""
        for _ in range(times):
            for one, other in ((self.client, self.server), (self.server, self.client)):
                one.send(b"?")
                assert other.recv(16) == b"?"


FROM_POD, ARRIVING = (each.value for each in Where)
Running = tuple[list[str], list[str], bool]
FILTER: Running = ([FROM_POD], [], True)
BY_TCX: Running = ([], [FROM_POD], False)
"""What runs at the port of a pod that nothing follows, and at that of any other."""


@contextlib.asynccontextmanager
async def place(folder: Path, *lasts: bool) -> AsyncIterator[Place]:
    """A node with these pods, on which a daemon has begun."""
    with namespaces(len(lasts)) as spaces:
        async with engine(folder, str(CIDR)) as made:
            made.wires._filtered = True
            made.node.run("nft", "-f", "-", stdin=TRACKING)
            its = Place(made, spaces)
            await its.begin()
            try:
                await its.add(*lasts)
                yield its
            finally:
                await its.end()


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


# --- strangers ----------------------------------------------------------------------------------------------------


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
