"""The fast path's programs at their places: where a frame comes out that a pod, or another node, has put on the wire.

A bridge that passes nothing on shows that the frames went past it. Also how tc takes the programs and lets them go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from ipam_daemon import tc_program
from ipam_daemon.fastpath_program import Where
from ipam_daemon.rtnl import Channel
from podwire.netns import netlink_socket
from tests.netns import fastpath_stage
from tests.netns.fastpath_stage import (
    BESIDE,
    FROM_NEAR,
    FROM_NODE,
    HEADER,
    THEIR_MAC,
    TO_NEAR,
    TO_NODE,
    UNDER_MAC,
    Stage,
    expected,
    flow,
)
from tests.netns.frames import SERVICE_VLAN, VLAN, ethernet, mac_bytes, raw, tagged, udp
from tests.netns.node_fixtures import play

THEIRS = ("tc", "filter", "add", "dev", "pwb")
MATCH = ("protocol", "ip", "u32", "match", "u32", "0", "0")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with fastpath_stage.stage() as made:
        yield made


@pytest.fixture
def attached(stage: Stage) -> Iterator[Stage]:
    """The programs at their places, and a bridge that passes nothing on."""
    places = {"pwa": Where.FROM_POD, "pw-vxlan": Where.ARRIVING, "under0": Where.ARRIVING}
    closed = "table bridge closed { chain everything { type filter hook prerouting priority 0; policy drop; }; }"
    stage.netns.run("nft", "-f", "-", stdin=closed)
    with stage.inside():
        channel = Channel(netlink_socket())
    with closing(channel):
        try:
            for name, where in places.items():
                channel.exchange([tc_program.add_clsact(stage.index[name])])
                channel.exchange([tc_program.set_program(stage.index[name], stage.programs[where], where.value)])
            yield stage
        finally:
            for name in places:
                stage.netns.run("tc", "qdisc", "del", "dev", name, "clsact")
            stage.netns.run("nft", "delete table bridge closed")


def by_tunnel(frame: bytes) -> bytes:
    """A frame as the other node sends it in VXLAN (RFC 7348, 5.)."""
    packet = udp("192.0.2.2", "192.0.2.1", b"\x08\0\0\0\0\0\1\0" + frame, port=4789)
    return ethernet(THEIR_MAC, UNDER_MAC, 0x0800, packet)


@pytest.mark.parametrize("version", [4, 6])
def test_a_frame_comes_out_where_it_should(attached: Stage, version: int) -> None:
    async def story() -> None:
        pod, beside = await raw(attached.a.path), await raw(attached.b.path)
        wire = await raw(attached.netns.path, "under0-peer")
        with closing(pod), closing(beside), closing(wire):
            for way, mouth, ear in (
                (BESIDE, pod, beside),
                (TO_NODE, pod, wire),
                (TO_NEAR, pod, wire),
                (FROM_NODE, wire, pod),
                (FROM_NEAR, wire, pod),
            ):
                it = flow(way, version)
                sent = attached.begin(it)
                comes = expected(it, sent)
                if way == TO_NEAR:
                    comes = mac_bytes(THEIR_MAC) + mac_bytes(UNDER_MAC) + comes[12:]
                if way == FROM_NODE:
                    sent = by_tunnel(sent)
                mouth.send(sent)
                heard = (await ear.hear(comes))[-1]
                if way == TO_NODE:
                    assert heard[:14] == mac_bytes(THEIR_MAC) + mac_bytes(UNDER_MAC) + b"\x08\0"
                    assert heard[50:] == comes, way
                else:
                    assert heard == comes, way

    play(story)


@pytest.mark.parametrize("version", [4, 6])
def test_a_frame_with_a_vlan_s_tag_or_cut_off_goes_on(attached: Stage, version: int) -> None:
    """The tag is no longer in the frame that the program sees. One that is whole tells when the others have been."""

    async def story() -> None:
        pod, beside = await raw(attached.a.path), await raw(attached.b.path)
        wire = await raw(attached.netns.path, "under0-peer")
        with closing(pod), closing(beside), closing(wire):
            for way, mouth, ear, place in ((BESIDE, pod, beside, 0), (FROM_NEAR, wire, pod, 2)):
                it = flow(way, version)
                sent = attached.begin(it)
                counted = attached.taken()
                counted[place] += 1
                mouth.send(*(tagged(sent, kind) for kind in (VLAN, SERVICE_VLAN)))
                mouth.send(*(sent[:length] for length in range(14, 14 + HEADER[version] + 8)))
                mouth.send(sent)
                heard = await ear.hear(expected(it, sent)[20:])
                assert attached.taken() == counted, way
                assert heard[-1] == expected(it, sent)

    play(story)


def test_what_was_set_is_there_and_what_was_taken_away_is_gone(stage: Stage) -> None:
    """Ours is the last of the filters; those of others stay when it goes, and it replaces itself."""
    with stage.inside():
        channel = Channel(netlink_socket())
    index, name = stage.index["pwb"], Where.FROM_POD.value

    def names() -> set[str | None]:
        return {
            tc_program.read_filter_name(answer)
            for asked in tc_program.list_filters(index)
            for answer in channel.dump(asked)
        } - {None}

    def kinds() -> set[str]:
        found = map(tc_program.read_qdisc, channel.dump(tc_program.list_qdiscs()))
        return {each.kind for each in found if each.ifindex == index}

    with closing(channel):
        assert kinds() == {"noqueue"}
        channel.exchange([tc_program.add_clsact(index)])
        try:
            assert kinds() == {"noqueue", "clsact"}
            with pytest.raises(FileExistsError):
                channel.exchange([tc_program.add_clsact(index)])
            for where in (Where.ARRIVING, Where.FROM_POD):
                channel.exchange([tc_program.set_program(index, stage.programs[where], where.value)])
                assert names() == {where.value}
            stage.netns.run(*THEIRS, "ingress", *MATCH)
            stage.netns.run(*THEIRS, "egress", *MATCH)
            listed = stage.netns.run("tc", "filter", "show", "dev", "pwb", "ingress")
            assert listed.index("u32") < listed.index(f"pref 65535 bpf chain 0 handle 0x1 {name} direct-action")
            assert names() == {name, ""}
            channel.exchange([tc_program.delete_program(index)])
            assert names() == {""}
            assert "u32" in stage.netns.run("tc", "filter", "show", "dev", "pwb", "ingress")
        finally:
            stage.netns.run("tc", "qdisc", "del", "dev", "pwb", "clsact")
        assert kinds() == {"noqueue"}
