"""Links as they are read by hand, beside pyroute2, which reads the same answers of the kernel."""

from __future__ import annotations

from typing import Any

import pytest

from ipam_daemon.links import Link, Port, get_link, list_links, read_link
from tests.netns.node_fixtures import Node, play

SETUP = """
link add pw0 type bridge
link add pw1 mtu 1400 group 7 master pw0 type veth peer name peer1
link set pw1 alias podwire/a/b
link set pw1 type bridge_slave hairpin on group_fwd_mask 0xfffd
link add pw2 master pw0 type veth peer name peer2
link add ifb-of-pw1 type ifb
link set pw0 up
link set pw1 up
link set peer1 up
link set lo up
"""


def as_pyroute2_says(link: Any) -> Link:
    port = link.get(("linkinfo", "slave_data"))
    return Link(
        index=link["index"],
        name=link.get("ifname"),
        is_ethernet=link["ifi_type"] == 1,
        is_up=link["state"] == "up",
        is_sending=link.get("operstate") == "UP",
        mtu=link.get("mtu"),
        master=link.get("master") or 0,
        group=link.get("group"),
        alias=link.get("ifalias") or "",
        port=Port(hairpin=bool(port.get("mode")), forwarded_groups=port.get("group_fwd_mask")) if port else None,
    )


def test_links_are_what_pyroute2_says_of_them() -> None:
    async def story() -> None:
        async with Node() as node:
            for line in SETUP.strip().splitlines():
                node.ip(*line.split())

            def look() -> None:
                channel = node.thread.channel
                theirs = {link.index: link for link in map(as_pyroute2_says, node.thread.host.get_links())}
                assert {link.index: link for link in map(read_link, channel.dump(list_links()))} == theirs
                alone = channel.exchange([get_link(index) for index in theirs])
                assert [read_link(each) for each in alone] == list(theirs.values())
                assert [read_link(each).name for each in channel.dump(list_links("ifb"))] == ["ifb-of-pw1"]
                named = {link.name: link for link in theirs.values()}
                assert named["pw1"].is_sending
                assert named["pw1"].is_port_of(named["pw0"].index)
                assert not named["pw2"].is_port_of(named["pw0"].index), "it is down"
                assert [named[name].port for name in ("pw1", "pw2", "pw0")] == [
                    Port(hairpin=True, forwarded_groups=0xFFFD),
                    Port(hairpin=False, forwarded_groups=0),
                    None,
                ]
                assert not named["lo"].is_ethernet
                with pytest.raises(OSError, match="No such device"):
                    channel.exchange([get_link(max(theirs) + 1)])

            await node.thread.run(look)

    play(story)


def test_what_a_link_does_not_say_is_nothing() -> None:
    nothing = Link(
        index=0,
        name="",
        is_ethernet=False,
        is_up=False,
        is_sending=False,
        mtu=0,
        master=0,
        group=0,
        alias="",
        port=None,
    )
    assert read_link(bytes(16)) == nothing
