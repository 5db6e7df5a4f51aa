"""What is sent to the node at an address of a link is the node's, whatever ports lead to pods."""

from __future__ import annotations

from pathlib import Path

from ipam_daemon.hostport_rules import MARK, render
from tests.netns.hostport_fixtures import (
    NODE,
    OUTSIDE,
    REFUSED,
    add_call,
    ask,
    both_families,
    dual_stack,
    mapping,
    running,
    serving,
)
from tests.netns.node_fixtures import Engine, Netns, play, pods
from tests.netns.test_hostports import BOTH, table

MINE, THEIRS = "fe80::99", "fe80::98"
ASK_BY_LINK = """
import socket, sys
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    with socket.socket(socket.AF_INET6, kind) as client:
        client.settimeout(60)
        try:
            client.connect((sys.argv[1], 8080, 0, socket.if_nametoindex("under0")))
            client.send(b"who?")
            print(client.recv(99).decode())
        except OSError as error:
            print(type(error).__name__)
"""


def by_link(outside: Netns) -> list[str]:
    """What a neighbour is answered that asks at the node's address of the link, by TCP and by UDP."""
    return outside.run("python3", "-IS", "-c", ASK_BY_LINK, MINE).split("\n")[:2]


def test_a_port_is_not_mapped_at_an_address_of_a_link(tmp_path: Path) -> None:
    """No router may pass that on: the neighbour is refused, as before, and does not wait for what finds no way."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            for machine, address in ((it.node, MINE), (outside, THEIRS)):
                machine.ip("addr", "add", f"{address}/64", "dev", "under0", "nodad")
            with pods(1) as (web,), serving(web, "web", 80):
                await it.attachments.add(add_call("web", web, *BOTH))
                assert by_link(outside) == [REFUSED, REFUSED]
                assert ask(outside, NODE[6], 8080) == f"web {OUTSIDE[6]}"

    play(story)


def test_a_socket_at_an_address_of_a_link_keeps_no_port_from_a_pod(tmp_path: Path) -> None:
    """A DHCP client of IPv6 listens there alone."""
    listen = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
    server.bind(("fe80::99", 8080, 0, socket.if_nametoindex("under0")))
    print("ready", flush=True)
    while True:
        _, peer = server.recvfrom(99)
        server.sendto(b"node", peer)
"""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            for machine, address in ((it.node, MINE), (outside, THEIRS)):
                machine.ip("addr", "add", f"{address}/64", "dev", "under0", "nodad")
            with pods(1) as (web,), running(it.node, listen), serving(web, "web", 80):
                await it.attachments.add(add_call("web", web, mapping(8080, protocol="udp")))
                assert by_link(outside) == [REFUSED, "node"]
                assert ask(outside, NODE[4], 8080, "udp") == f"web {OUTSIDE[4]}"

    play(story)


def test_the_table_of_an_older_daemon_becomes_this_ones_at_the_start(tmp_path: Path) -> None:
    """Its elements stay where they are: no connection meets a table without them."""
    older = render().replace("{ ::1, fe80::/10 }", "::1").replace(MARK, "c55c1aaf14c382d7")

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(1) as (web,), serving(web, "web", 80):
                await it.attachments.add(add_call("web", web, *BOTH))
                whole = table(it.node)
                it.node.run("nft", "-f", "-", stdin=older)
                assert table(it.node) != whole
                again: Engine = await it.restarted().start()
                await both_families(again)
                assert table(again.node) == whole
                assert ask(outside, NODE[4], 8080) == f"web {OUTSIDE[4]}"
                again.journal.close()

    play(story)
