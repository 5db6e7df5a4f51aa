"""The wall clock jumps, and nothing is reused early or kept for long: cooling follows the time since boot."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ipam_daemon.attachments import Attachments
from tests.netns.node_fixtures import engine, eventually, play, pods

COOLDOWNS = ((10_000.0, 1), (0.05, 0))  # seconds, and how many addresses cool in the end
YEAR = 365 * 86400.0


@pytest.mark.fault(
    "the wall clock jumps a year ahead", promises=("an address that cools goes on cooling, as long as it should",)
)
@pytest.mark.parametrize("jump", [YEAR], ids=["ahead"])
def test_an_address_cools_while_the_clock_jumps_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    jumped(tmp_path, monkeypatch, jump)


@pytest.mark.fault(
    "the wall clock jumps a year back", promises=("an address that cools goes on cooling, as long as it should",)
)
@pytest.mark.parametrize("jump", [-YEAR], ids=["back"])
def test_an_address_cools_while_the_clock_jumps_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    jumped(tmp_path, monkeypatch, jump)


def jumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """With the daemon's own clock, and a cooldown that is over within the test or never."""

    async def story() -> None:
        for cooldown, cooling in COOLDOWNS:
            async with engine(tmp_path / str(cooldown)) as it:
                it.attachments = Attachments(
                    journal=it.journal,
                    wires=it.wires,
                    thread=it.node.thread,
                    metrics=it.metrics,
                    cooldown=cooldown,
                )
                await it.start()
                with pods(1) as (a,):
                    await it.add("a", a.path)
                    await it.delete("a")
                    await it.reap()
                real = time.time
                with monkeypatch.context() as patch:
                    patch.setattr(time, "time", lambda real=real: real() + jump)
                    uses = it.attachments.addresses.uses
                    await eventually(lambda uses=uses, cooling=cooling: uses()[0].cooling == cooling)  # type: ignore[misc]

    for each in ("10000.0", "0.05"):
        (tmp_path / each).mkdir()
    play(story)


@pytest.mark.fault("a journal of an earlier version, with times of the wall clock", promises=("its addresses cool",))
def test_what_an_earlier_version_wrote_cools_for_the_cooldown_at_most(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                await it.delete("a")
                await it.reap()
            (one,) = it.journal.cooling()
            it.journal.begin_with([one], time.time() + YEAR, [])
            again = it.restarted()
            again.now = 1000.0  # seconds since boot
            await again.start()
            assert again.counts()["cooling"] == 1
            again.now = 1030.0
            assert again.counts()["cooling"] == 0
            again.journal.close()

    play(story)
