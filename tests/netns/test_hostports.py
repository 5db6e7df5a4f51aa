"""Ports of the node that lead to pods: real packets, from everywhere that a client may be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ipam_daemon.errors import PortTaken, UnsupportedField
from tests.netns.hostport_fixtures import (
    GATEWAY,
    NODE,
    OUTSIDE,
    REFUSED,
    SILENCE,
    add_call,
    ask,
    both_families,
    dual_stack,
    elements,
    mapping,
    serving,
)
from tests.netns.node_fixtures import Engine, Netns, key, play, pods

BOTH = [mapping(8080), mapping(8080, protocol="udp")]


def test_a_port_of_the_node_leads_to_the_pod_from_everywhere(tmp_path: Path) -> None:
    """And the pod sees who it is, unless an answer to that would not come back this way."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (web, other), serving(web, "web", 80):
                await it.attachments.add(add_call("web", web, *BOTH))
                await it.attachments.add(add_call("other", other))
                row = it.journal.get(key("other"))
                assert row is not None
                mine = {each.version: str(each.ip) for each in row.addresses}
                seen = {}
                for version, local in ((4, "127.0.0.1"), (6, "")):
                    for protocol in ("tcp", "udp"):
                        for name, where, address, expected in (
                            ("outside", outside, NODE[version], OUTSIDE[version]),
                            ("the node, at its address", it.node, NODE[version], NODE[version]),
                            ("the node, at localhost", it.node, local, GATEWAY[version]),
                            ("a pod, at the node's address", other, NODE[version], mine[version]),
                            ("a pod, at its gateway", other, GATEWAY[version], mine[version]),
                            ("the pod itself", web, NODE[version], GATEWAY[version]),
                        ):
                            if address:
                                got = ask(where, address, 8080, protocol, 3)
                                if got != f"web {expected}":
                                    seen[f"{name}, IPv{version}, {protocol}"] = got
                assert seen == {}
                assert ask(outside, NODE[4], 8081) == REFUSED, "a port that nobody asked for"
                assert ask(it.node, "::1", 8080) == REFUSED, "the kernel routes no ::1, so it is not mapped"
                assert ask(it.node, "127.0.0.53", 8080) == REFUSED, "where the node's resolver may be"

    play(story)
