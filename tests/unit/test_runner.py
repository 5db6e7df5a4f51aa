"""The runner's guarantees, as stories on the event loop's own clock, which these tests move."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from podwire.errors import TryAgain
from podwire.runner import Runner


class _Leaping(selectors.SelectSelector):
    """Does not wait: what would have been waited is put on the clock, and nothing else is."""

    leapt = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout:
            self.leapt += timeout
        return found


def play(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a story on a loop whose time passes at once, and only where it waits: however slow the machine is."""
    selector = _Leaping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.leapt  # type: ignore[method-assign]
    try:
        loop.run_until_complete(story())
    finally:
        loop.close()


class Work:
    """Notes when it was done; takes `seconds`, fails as often as told."""

    def __init__(self, seconds: float = 0.0, failures: int = 0) -> None:
        self.runs: list[tuple[float, bool]] = []
        self.running = self.most = 0
        self._seconds, self._failures = seconds, failures

    async def __call__(self, resync: bool) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.runs.append((asyncio.get_running_loop().time(), resync))
        await asyncio.sleep(self._seconds)
        self.running -= 1
        if self._failures:
            self._failures -= 1
            raise TryAgain("not now")


async def during(runner: Runner, what: Awaitable[None]) -> None:
    task = asyncio.create_task(runner.run_forever())
    try:
        await what
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_nothing_runs_before_the_first_request() -> None:
    async def story() -> None:
        work = Work()
        await during(Runner("w", work, max_interval=1.0), asyncio.sleep(10))
        assert work.runs == []

    play(story)


def test_the_first_run_looks_at_everything_and_later_ones_at_changes() -> None:
    async def story() -> None:
        work = Work()
        runner = Runner("w", work, max_interval=100.0)

        async def requests() -> None:
            for _ in range(3):
                runner.request()
                await asyncio.sleep(1)

        await during(runner, requests())
        assert [resync for _, resync in work.runs] == [True, False, False]

    play(story)


def test_requests_during_a_run_share_the_next_and_runs_do_not_overlap() -> None:
    async def story() -> None:
        work = Work(seconds=5.0)
        runner = Runner("w", work, max_interval=1000.0)

        async def burst() -> None:
            for _ in range(20):
                runner.request()
                await asyncio.sleep(0.1)
            await asyncio.sleep(30)

        await during(runner, burst())
        assert (len(work.runs), work.most) == (2, 1)

    play(story)


def test_a_request_is_served_at_once_and_not_after_an_interval() -> None:
    async def story() -> None:
        work = Work()
        runner = Runner("w", work, max_interval=1000.0)
        waits: list[float] = []

        async def requests() -> None:
            for _ in range(5):
                asked = asyncio.get_running_loop().time()
                runner.request()
                await asyncio.sleep(0.5)
                waits.append(work.runs[-1][0] - asked)

        await during(runner, requests())
        assert len(work.runs) == 5
        assert max(waits) < 0.5

    play(story)


def test_runs_begin_no_closer_than_the_least_interval() -> None:
    async def story() -> None:
        work = Work()
        runner = Runner("w", work, max_interval=1000.0, min_interval=2.0)

        async def requests() -> None:
            for _ in range(50):
                runner.request()
                await asyncio.sleep(0.1)
            await asyncio.sleep(3)

        await during(runner, requests())
        starts = [moment for moment, _ in work.runs]
        assert min(after - before for before, after in itertools.pairwise(starts)) >= 2.0
        assert 3 <= len(starts) <= 4

    play(story)


def test_everything_is_looked_at_periodically_however_many_changes_there_are() -> None:
    async def story() -> None:
        work = Work()
        runner = Runner("w", work, max_interval=10.0)

        async def requests() -> None:
            for _ in range(350):
                runner.request()
                await asyncio.sleep(0.1)

        await during(runner, requests())
        assert sum(resync for _, resync in work.runs) == 4  # at 0, 10, 20 and 30 s

    play(story)


def test_without_requests_it_is_looked_at_periodically_too() -> None:
    async def story() -> None:
        work = Work()
        runner = Runner("w", work, max_interval=10.0)

        async def once() -> None:
            runner.request()
            await asyncio.sleep(35)

        await during(runner, once())
        assert [resync for _, resync in work.runs] == [True] * 4

    play(story)


def test_looks_at_everything_that_take_long_are_had_more_rarely() -> None:
    async def story() -> None:
        looks: list[float] = []

        async def work(resync: bool) -> None:
            if resync:
                looks.append(asyncio.get_running_loop().time())
                await asyncio.sleep(2)

        runner = Runner("w", work, max_interval=10.0)

        async def once() -> None:
            runner.request()
            await asyncio.sleep(1000)

        await during(runner, once())
        assert [round(after - before) for before, after in itertools.pairwise(looks)] == [400, 400]

    play(story)


def test_what_failed_is_tried_again_with_a_look_at_everything_and_waits_longer_each_time() -> None:
    async def story() -> None:
        work = Work(failures=6)
        runner = Runner("w", work, max_interval=1000.0, first_retry=1.0, last_retry=4.0)

        async def once() -> None:
            runner.request()
            await asyncio.sleep(40)

        await during(runner, once())
        starts = [moment for moment, _ in work.runs]
        pauses = [after - before for before, after in itertools.pairwise(starts)]
        assert len(pauses) == 6
        assert [resync for _, resync in work.runs] == [True] * 7
        assert pauses[0] <= 1.1
        assert 2.0 <= pauses[-1] <= 4.1
        assert runner.failures == 0

    play(story)


def test_requests_do_not_shorten_the_pause_after_a_failure() -> None:
    async def story() -> None:
        work = Work(failures=1)
        runner = Runner("w", work, max_interval=1000.0, first_retry=8.0, last_retry=8.0)

        async def requests() -> None:
            for _ in range(30):
                runner.request()
                await asyncio.sleep(0.1)

        await during(runner, requests())
        assert len(work.runs) == 1

    play(story)


def test_the_oldest_request_is_known_while_it_waits_and_while_it_is_served() -> None:
    async def story() -> None:
        work = Work(seconds=5.0)
        runner = Runner("w", work, max_interval=1000.0)

        async def two() -> None:
            runner.request()
            await asyncio.sleep(1)
            first = work.runs[0][0]
            assert runner.serving == pytest.approx(first, abs=0.1)
            runner.request()
            assert runner.requested_at == pytest.approx(first + 1, abs=0.1)
            await asyncio.sleep(5)
            assert runner.serving == pytest.approx(first + 1, abs=0.1)
            assert runner.requested_at is None

        await during(runner, two())

    play(story)


def test_what_is_no_reason_to_try_again_ends_it() -> None:
    async def broken(_resync: bool) -> None:
        raise ZeroDivisionError

    async def story() -> None:
        runner = Runner("w", broken, max_interval=1.0)
        runner.request()
        with pytest.raises(ZeroDivisionError):
            await runner.run_forever()

    play(story)
