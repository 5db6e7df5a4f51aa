"""200 new connections a second through a ClusterIP, while everything about the proxy changes: none fails.

Allowed are those to a backend that was killed without draining, and those within two seconds of a flush by hand.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.node_fixtures import Netns
from tests.netns.proxy_fixtures import (
    PATIENCE,
    SERVICE_CIDRS,
    Proxy,
    ProxyStage,
    clean,
    endpoints,
    node,
    proxy_stage,
    service,
    until,
)
from tests.unit.service_cases import LOCAL, LOCAL_2, REMOTE, REMOTE_2

STORM = Path(__file__).with_name("connection_storm.py")
RATE = 200
FLUSHED = 2.0
MODES = pytest.mark.parametrize("mode", ["nftables", "iptables"])
NFTABLES_FIRST = pytest.mark.parametrize("mode", ["nftables", pytest.param("iptables", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyStage]:
    with proxy_stage(tmp_path_factory.mktemp("proxy")) as made:
        yield made


@pytest.fixture
def place(whole: ProxyStage) -> Iterator[ProxyStage]:
    clean(whole)
    yield whole
    clean(whole)


class Storm:
    """What became of connections: who answered how many, and those that went wrong as (began, seconds, why)."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.wrong: list[tuple[float, float, str]] = []

    def wrong_outside(self, began: float, ended: float) -> list[tuple[float, float, str]]:
        """Those that no part of happened between two times."""
        return [each for each in self.wrong if each[0] > ended or each[0] + each[1] < began]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@contextlib.contextmanager
def storm(place: Netns, to: str, port: int = 80) -> Iterator[Storm]:
    """Connections from a namespace during the block; the result is there after it."""
    command = ["ip", "netns", "exec", place.name, sys.executable, "-IS", str(STORM), to, str(port), str(RATE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    made = Storm()
    try:
        assert process.stdout.readline() == "ready\n"
        yield made
        process.send_signal(signal.SIGINT)
        *wrong, counts = process.communicate(timeout=PATIENCE)[0].splitlines()
        made.wrong, made.counts = [tuple(json.loads(each)) for each in wrong], json.loads(counts)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


class Story:
    """The steps of a storm; `pause` is what lies between two of them, in seconds."""

    def __init__(self, place: ProxyStage, mode: str, pause: float) -> None:
        self.place, self.mode, self.pause = place, mode, pause
        place.api.put(service("web"), endpoints("web", LOCAL), SERVICE_CIDRS, node())
        self.proxy = self.another()

    def another(self) -> Proxy:
        return self.place.start(mode=self.mode, syncPeriod=3600)

    def leads_to(self, host: str) -> bool:
        """Whether a connection may go there."""
        if self.mode == "nftables":
            return any(each.startswith(f"{host} ") for each in self.place.elements("eps_tcp").values())
        return f"--to-destination {host}:" in self.place.node.run("iptables-save", "-t", "nat")

    def now(self, *hosts: str, terminating: tuple[str, ...] = ()) -> None:
        self.place.api.put(endpoints("web", *hosts, terminating=terminating))
        time.sleep(self.pause)

    def backends_come_and_go(self) -> None:
        """Added, drained, replaced."""
        self.now(LOCAL, LOCAL_2)
        self.now(LOCAL, LOCAL_2, REMOTE)
        self.now(LOCAL_2, REMOTE, terminating=(LOCAL,))
        self.now(LOCAL_2, REMOTE)
        self.now(REMOTE_2, REMOTE, terminating=(LOCAL_2,))
        self.now(REMOTE_2, REMOTE)
        self.now(LOCAL, REMOTE_2)

    def restart(self) -> None:
        self.proxy.end()
        self.proxy = self.another()

    def kill(self) -> None:
        self.proxy.end(signal.SIGKILL)
        self.place.api.put(endpoints("web", LOCAL, LOCAL_2, REMOTE))
        self.proxy = self.another()

    def upgrade(self) -> None:
        new = self.another()
        self.now(LOCAL, REMOTE_2)
        self.proxy.end()
        self.proxy = new
        self.now(LOCAL, LOCAL_2)


def play(story: Story, *steps: Callable[[], None]) -> Storm:
    with storm(story.place.stage.client, "10.96.0.1") as seen:
        for step in steps:
            step()
            time.sleep(story.pause)
    return seen


@MODES
def test_no_connection_fails_in_seconds_of_changes(place: ProxyStage, mode: str) -> None:
    story = Story(place, mode, 0.1)
    seen = play(story, story.backends_come_and_go, story.restart, story.kill, story.upgrade)
    assert seen.wrong == []
    assert seen.counts.keys() == {LOCAL, LOCAL_2, REMOTE, REMOTE_2}


@pytest.mark.slow
@MODES
def test_no_connection_fails_in_a_quarter_of_a_minute_of_changes(place: ProxyStage, mode: str) -> None:
    story = Story(place, mode, 0.5)
    began = time.monotonic()
    with storm(place.stage.client, "10.96.0.1") as seen:
        while time.monotonic() < began + 15:
            for step in (story.backends_come_and_go, story.restart, story.kill, story.upgrade):
                step()
    assert seen.wrong == []
    assert seen.total > 1500


@NFTABLES_FIRST
def test_who_is_flushed_by_hand_is_back_within_two_seconds(place: ProxyStage, mode: str) -> None:
    story = Story(place, mode, 0.1)
    with storm(place.stage.client, "10.96.0.1") as seen:
        time.sleep(0.5)
        flushed = time.time()
        place.node.run("nft", "flush", "ruleset")
        until(lambda: place.answers() == LOCAL)
        back = max(time.time(), flushed + FLUSHED)
        time.sleep(FLUSHED)
    assert seen.wrong_outside(flushed, back) == []
    assert story.proxy.metric("podwire_proxy_drift_total") == 1


@NFTABLES_FIRST
def test_a_backend_that_is_killed_costs_its_own_connections_until_it_is_gone(place: ProxyStage, mode: str) -> None:
    """Without draining: those sent to it are lost, those after the slice says so are not."""
    story = Story(place, mode, 0.3)
    story.now(LOCAL, REMOTE)
    with storm(place.stage.client, "10.96.0.1") as seen:
        time.sleep(0.3)
        killed = time.time()
        place.stage.local.run(
            "nft", "-f", "-", stdin="table inet void { chain in { type filter hook input priority 0; policy drop; }; }"
        )
        try:
            until(lambda: "SYN_SENT" in place.node.run("conntrack", "-L", "-p", "tcp", "--orig-dst", "10.96.0.1"))
            story.now(REMOTE)
            until(lambda: not story.leads_to(LOCAL))
            gone = time.time()
            time.sleep(0.5)
        finally:
            place.stage.local.run("nft", "flush", "ruleset")
    assert seen.wrong, "or nobody was killed"
    assert seen.wrong_outside(killed, gone) == []
