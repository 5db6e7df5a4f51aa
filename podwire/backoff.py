"""Waiting between attempts: exponential, with jitter, on a clock that tests can replace."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds, and waiting for some to pass."""

    def now(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The real one."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Backoff:
    """Delays in seconds that double from `first` up to `most`, each shortened at random to no less than `least` of it.

    The jitter keeps a hundred nodes, which lost their server in the same instant, from coming back in the same instant;
    `least` 0 spreads them best (full jitter). `chance` gives numbers from 0 to 1.
    """

    def __init__(
        self,
        first: float = 0.1,
        most: float = 3.0,
        *,
        least: float = 0.5,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first = first
        self._most = most
        self._least = least
        self._chance = chance
        self._failures = 0

    def next(self) -> float:
        """The next delay."""
        delay = min(self._most, self._first * 2.0**self._failures)
        self._failures = min(self._failures + 1, 32)
        return delay * (self._least + (1.0 - self._least) * self._chance())

    def reset(self) -> None:
        """Something has worked: the next delay is a short one."""
        self._failures = 0
