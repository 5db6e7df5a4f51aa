"""A port that a socket of the node listens on is no pod's, in whichever way the socket was bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipam_daemon.errors import PortTaken
from tests.netns.hostport_fixtures import NODE, OUTSIDE, add_call, ask, dual_stack, mapping, running, serving
from tests.netns.node_fixtures import play, pods

LISTEN = """
import socket, sys
with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(sys.argv[3]))
    server.bind(socket.getaddrinfo(sys.argv[1], int(sys.argv[2]))[0][4])
    server.listen()
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        client.sendall(b"node")
        client.close()
"""
BOTH, ONLY_SIX = "0", "1"


def test_a_listener_that_writes_ipv4_as_ipv6_keeps_its_port(tmp_path: Path) -> None:
    """Java binds 192.0.2.1 as ::ffff:192.0.2.1; the packets are IPv4's all the same."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with (
                pods(1) as (web,),
                running(it.node, LISTEN, f"::ffff:{NODE[4]}", "9200", BOTH),
                running(it.node, LISTEN, "::ffff:127.0.0.1", "9300", BOTH),
            ):
                for port, host_ip in (
                    (9200, ""),
                    (9200, "0.0.0.0"),
                    (9200, NODE[4]),
                    (9300, ""),
                    (9300, "0.0.0.0"),
                    (9300, "127.0.0.1"),
                ):
                    with pytest.raises(PortTaken, match=rf"{port}/tcp is the node's own"):
                        await it.attachments.add(add_call("web", web, mapping(port, host_ip=host_ip)))
                assert ask(outside, NODE[4], 9200) == "node"
                assert ask(it.node, "127.0.0.1", 9300) == "node"
                with serving(web, "web", 80):
                    await it.attachments.add(add_call("web", web, mapping(9300, host_ip=NODE[4])))
                    assert ask(outside, NODE[4], 9300) == f"web {OUTSIDE[4]}", "an address that nobody listens at"

    play(story)


def test_a_listener_of_ipv6_alone_leaves_ipv4_to_a_pod(tmp_path: Path) -> None:
    """A socket on :: takes IPv4 as well only while nobody said IPV6_V6ONLY, as nginx does for one."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with (
                pods(1) as (web,),
                running(it.node, LISTEN, "::", "9200", ONLY_SIX),
                running(it.node, LISTEN, "::", "9300", BOTH),
                serving(web, "web", 80),
            ):
                for port, host_ip in ((9200, ""), (9200, "::"), (9200, NODE[6]), (9300, "0.0.0.0"), (9300, NODE[4])):
                    with pytest.raises(PortTaken, match=rf"{port}/tcp is the node's own"):
                        await it.attachments.add(add_call("web", web, mapping(port, host_ip=host_ip)))
                await it.attachments.add(add_call("web", web, mapping(9200, host_ip="0.0.0.0")))
                assert ask(outside, NODE[4], 9200) == f"web {OUTSIDE[4]}"
                assert ask(outside, NODE[6], 9200) == "node"

    play(story)
