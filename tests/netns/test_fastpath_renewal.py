"""How long conntrack keeps a connection that is fast: as long as one that it sees, which outlives a pause.

What a program does to an entry is asked of the stage (fastpath_stage.py), packet by packet; that connections live by it
is told with pods and rounds (fastpath_rounds.py).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ipam_daemon import fastpath_connection
from ipam_daemon.fastpath_connection import LEAST_LEFT
from tests.netns import fastpath_stage
from tests.netns.fastpath_rounds import Place, Talk, place
from tests.netns.fastpath_stage import FAST, HEADER, ON, TCP, UDP, WAYS, Flow, Stage, flow
from tests.netns.node_fixtures import play

LASTS = {TCP: 432000, UDP: 120}  # of the stage's programs
NAMES = {TCP: "tcp", UDP: "udp"}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with fastpath_stage.stage() as made:
        yield made


class Case(NamedTuple):
    """What is said of an entry before a packet, and whether it is renewed by it. `seconds` for what it lasts when it is
    fresh."""

    changes: dict[str, Any]
    renewed: bool = False
    says: int = FAST
    protocols: tuple[int, ...] = (TCP, UDP)


CASES = {
    "half of its time": Case({"seconds": 60}, renewed=True),
    "what data that nobody has acknowledged leaves of it": Case({"seconds": 300}, renewed=True, protocols=(TCP,)),
    "as little as may be": Case({"seconds": LEAST_LEFT + 3}, renewed=True),
    "what conntrack is to see again": Case({"seconds": LEAST_LEFT - 1}, says=ON),
    "more than it would get": Case({"seconds": 500_000}),
    "a time that somebody has fixed": Case({"seconds": 60, "status": "SEEN_REPLY,ASSURED,FIXED_TIMEOUT"}),
    "not assured": Case({"seconds": 60, "status": "SEEN_REPLY"}),
    "not answered": Case({"seconds": 60, "status": ""}, says=ON),
    "half closed": Case({"seconds": 60, "state": "CLOSE_WAIT"}, says=ON, protocols=(TCP,)),
    "translated": Case({"seconds": 60, "asked_port": 80}, says=ON),
}


def left(stage: Stage, it: Flow, frame: bytes) -> int:
    """The seconds that are left of the entry of a frame's connection."""
    ports = struct.unpack_from("!HH", frame, 14 + HEADER[it.version])
    asking = ("-p", NAMES[it.protocol], "--orig-port-src", str(ports[1 if it.answers else 0]))
    (line,) = stage.command("conntrack", "-L", "-f", f"ipv{it.version}", *asking).splitlines()
    return int(line.split()[2])


@pytest.mark.parametrize("name", CASES)
def test_an_entry_has_its_whole_time_again(stage: Stage, name: str) -> None:
    case, wrong = CASES[name], []
    for way in WAYS:
        for version in (4, 6):
            for protocol in case.protocols:
                for answers in (False, True):
                    it = flow(way, version, protocol).but(answers=answers, **case.changes)
                    frame = stage.begin(it)
                    wanted = LASTS[protocol] if case.renewed else it.seconds
                    said, found = stage.say(it, frame)[0], left(stage, it, frame)
                    if said != case.says or not wanted - 15 < found <= wanted:
                        wrong.append((way, version, NAMES[protocol], answers, said, found))
    assert not wrong


# --- connections --------------------------------------------------------------------------------------------------

ISOLATED = "insert rule inet tracking every ct state new drop"
"""As a policy that lets nobody in, nor out: who is not known is not heard again."""


class Wait(NamedTuple):
    """Seconds: what the program shows to conntrack, what an entry gets, what is left of it before a packet, and the
    pause after it."""

    least: int
    lasts: int
    left: int
    pause: float


WAITS = [
    pytest.param(Wait(1, 9, 4, 6), id="short"),
    pytest.param(Wait(LEAST_LEFT, 40, LEAST_LEFT + 3, LEAST_LEFT + 5), id="long", marks=pytest.mark.slow),
]


def age(its: Place, talk: Talk, seconds: int) -> None:
    """So much is left of a connection, which is assured."""
    here, there = talk.client.getsockname(), talk.server.getsockname()
    its.node.run("conntrack", "-D", "-p", talk.protocol, "--orig-port-src", str(here[1]))
    words = ["-s", here[0], "-d", there[0], "--sport", str(here[1]), "--dport", str(there[1]), "-t", str(seconds)]
    words += ["-u", "SEEN_REPLY,ASSURED", *(["--state", "ESTABLISHED"] if talk.protocol == "tcp" else [])]
    its.node.run("conntrack", "-I", "-p", talk.protocol, *words)


SHORT = """table ip stranger {
    ct timeout short { protocol tcp; l3proto ip; policy = { established : 60, syn_sent : 40 }; };
    chain every { type filter hook prerouting priority 0; ip protocol tcp ct timeout set "short"; };
}"""


def test_a_time_that_a_rule_has_given_is_kept(tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path, True, True) as its:
            its.node.run("nft", "-f", "-", stdin=SHORT)
            await its.rounds()
            with its.talk(0, 1, "tcp") as talk:
                assert await its.fast(talk) == 20
                (line,) = its.node.run("conntrack", "-L", "-p", "tcp").splitlines()
                assert 20 < int(line.split()[2]) <= 60

    play(story)


@pytest.mark.parametrize("about", WAITS)
def test_who_was_busy_and_rests_is_heard_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, about: Wait) -> None:
    """Whoever speaks first, and whichever way the packets went; what is not busy is forgotten, as ever."""
    monkeypatch.setattr(fastpath_connection, "LEAST_LEFT", about.least)

    async def story() -> None:
        async with place(tmp_path, True, False) as its:
            for name in ("tcp_timeout_established", "udp_timeout_stream"):
                its.node.run("sysctl", "-qw", f"net.netfilter.nf_conntrack_{name}={about.lasts}")
            await its.rounds()
            with (
                its.talk(0, 1) as one,
                its.talk(1, 0) as other,
                its.talk(0, 1, "tcp") as stream,
                its.talk(0, 1) as idle,
            ):
                talks = [one, other, stream]
                for each in (*talks, idle):
                    age(its, each, about.left)
                its.node.run("nft", ISOLATED)
                assert min([await its.fast(each) for each in talks]) >= 20
                await asyncio.sleep(about.pause)
                for each in (other, stream):
                    each.client, each.server = each.server, each.client
                for each in talks:
                    each.exchange(1)
                idle.client.settimeout(0.3)
                idle.server.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    idle.exchange(1)

    play(story)
