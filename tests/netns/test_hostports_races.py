"""Ports of the node, when an ADD and a round of reconciling meet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from ipam_daemon.errors import InvalidNetns
from tests.netns.hostport_fixtures import NODE, REFUSED, add_call, ask, dual_stack, elements, mapping, serving
from tests.netns.node_fixtures import hold, play, pods, settle


def test_an_add_that_fails_beside_a_round_leaves_no_port_to_the_next_pod(tmp_path: Path) -> None:
    """The round opens what the journal intends; the address, that nobody ever had, is free again at once."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (first, other), serving(other, "other", 80):
                await it.attachments.add(add_call("first", first, mapping(9000)))
                before = elements(it)
                goes_on = await hold(it.node)
                impossible = msgspec.structs.replace(add_call("bad", first, mapping(8080)), netns="/run/netns/none")
                adding = asyncio.create_task(it.attachments.add(impossible))
                await settle()
                mending = asyncio.create_task(it.attachments.mend_host_ports())
                await settle()
                goes_on.set()
                with pytest.raises(InvalidNetns):
                    await adding
                assert await mending > 0, "the round has opened it"
                assert elements(it) == before
                await it.attachments.add(add_call("other", other))
                assert ask(outside, NODE[4], 8080) == REFUSED

    play(story)
