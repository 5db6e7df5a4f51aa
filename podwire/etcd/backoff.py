"""Waiting between attempts: exponential, with jitter, on a clock that tests can replace."""

from __future__ import annotations

import asyncio
import random
import time
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
    """Delays in seconds that double from `first` up to `most`, each shortened by up to a half at random.

    The jitter keeps a hundred nodes, which lost their server in the same instant, from coming back in the same instant.
    """

    def __init__(self, first: float = 0.1, most: float = 3.0) -> None:
        self._first = first
        self._most = most
        self._failures = 0

    def next(self) -> float:
        """The next delay."""
        delay = min(self._most, self._first * 2.0**self._failures)
        self._failures = min(self._failures + 1, 32)
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Something has worked: the next delay is a short one."""
        self._failures = 0
