"""When the fast path is looked at whole, and when at new ports alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.fastpath import FastPath
from ipam_daemon.fastpath_keeper import FastPathKeeper
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.plan import NodePlan


class Thread:
    """A netlink thread that is none."""

    async def run(self, what: Callable[..., Any], *of: object) -> Any:
        return what(*of)


class Path:
    """Answers what it is told to, and notes when it was asked for what: `w`hole looks, and looks at `n`ew ports."""

    known = 0

    def __init__(self, answers: list[bool | Exception], clock: Callable[[], float]) -> None:
        self.passed_over: dict[str, str] = {}
        self.asked: list[tuple[float, str]] = []
        self._answers: Iterator[bool | Exception] = iter(answers)
        self._clock = clock

    def ensure(self, *_: object) -> bool:
        return self._answer("w")

    def go_on(self) -> bool:
        return self._answer("n")

    def _answer(self, what: str) -> bool:
        answer = next(self._answers, None)
        if answer is None:
            raise asyncio.CancelledError
        self.asked.append((round(self._clock(), 3), what))
        if isinstance(answer, Exception):
            raise answer
        return answer


FAILURE = PlumbingFailed("no")
LOOKS: dict[str, tuple[list[bool | Exception], list[tuple[float, str]]]] = {
    "nothing new": ([True, True, True], [(0, "w"), (2, "w"), (4, "w")]),
    "more than fits": (
        [False, False, True, True, False, True, True],
        [(0, "w"), (0.1, "n"), (0.2, "n"), (2, "w"), (4, "w"), (4.1, "n"), (6, "w")],
    ),
    "more than fits between two": (
        [False] * 23,
        [(round(at / 10, 1), "n" if at % 20 else "w") for at in range(23)],
    ),
    "a whole look fails": ([FAILURE, True, True], [(0, "w"), (2, "w"), (4, "w")]),
    "a look at new ports fails": ([False, FAILURE, True, True], [(0, "w"), (0.1, "n"), (2.1, "w"), (4.1, "w")]),
}


@pytest.mark.parametrize(("answers", "asked"), LOOKS.values(), ids=LOOKS.keys())
def test_when_what_is_looked_at(
    answers: list[bool | Exception], asked: list[tuple[float, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ports wait for one another a moment; all is looked at every two seconds, whatever there was in between."""

    async def story() -> None:
        now = 0.0

        async def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        path = Path(answers, lambda: now)
        plan = cast("NodePlan", object())
        keeper = FastPathKeeper(cast("NetlinkThread", Thread()), lambda: plan, lambda: (), wanted=True)
        keeper._path = cast("FastPath", path)
        with pytest.raises(asyncio.CancelledError):
            await keeper.run_forever()
        assert path.asked == asked
        assert keeper.state == ("off: no" if answers[-1] is FAILURE else "on: 0 pods")

    asyncio.run(story())
