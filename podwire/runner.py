"""Work that is asked for often and done once: a run soon after each request, never two at a time.

    request ──┐                                        ┌── the next run: for all of them
    request ──┴──▶ run ─────────── request, request ───┘

Guarantees. After every request a run begins, so that what was changed before the request is seen by it. Runs do not
overlap; requests made while one goes on are served by one run after it. There is no fixed floor between runs: the
first request of a burst is served at once, and how many share the next run is decided by how long a run takes.
`min_interval`, from the start of one run to the start of the next, is for work that must not be done more often.
Without any request a run with `resync` comes every `max_interval` seconds, counted from the last such run, so that
changes, however many, do not put it off; but if such a run took long, the next is 200 times as long away (an hour at
most), so that of the changes that come one in 200 at most meets one, and a large table costs no more than a small
one. A run that raises TryAgain is repeated, with `resync`, after a pause that doubles from `first_retry` up to
`last_retry`; requests do not shorten it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from podwire.backoff import Backoff
from podwire.errors import TryAgain

log = logging.getLogger(__name__)
_REST, _LONGEST_REST = 200.0, 3600.0  # times as long as a periodic run took, and seconds


class Runner:
    """Does `work(resync)` as the module says. All times are in seconds."""

    def __init__(
        self,
        name: str,
        work: Callable[[bool], Awaitable[None]],
        *,
        max_interval: float,
        min_interval: float = 0.0,
        first_retry: float = 0.1,
        last_retry: float = 5.0,
    ) -> None:
        self.name = name
        self.failures = 0
        """Runs that have failed since one succeeded."""
        self.requested_at: float | None = None
        """When the oldest request that no run has served yet was made, on the loop's clock; None without one."""
        self.serving = 0.0
        """When the oldest request that the present run serves was made, or the last one did, on the loop's clock."""
        self.begun = False
        """Whether there has been a request."""
        self._work = work
        self._max_interval = max_interval
        self._min_interval = min_interval
        self._pauses = Backoff(first_retry, last_retry)
        self._wake = asyncio.Event()
        self._resync = True
        self._said = ""

    def request(self, resync: bool = False) -> None:
        """Asks for a run; with `resync` for one that looks at everything again."""
        self.begun = True
        self._resync = self._resync or resync
        if self.requested_at is None:
            self.requested_at = asyncio.get_running_loop().time()
        self._wake.set()

    async def run_forever(self) -> None:
        """Runs until it is cancelled, or `work` raises what is not TryAgain. The first run is at the first request."""
        clock = asyncio.get_running_loop().time
        await self._wake.wait()
        due = clock()
        while True:
            began = clock()
            resync, self._resync = self._resync or began >= due, False
            self._wake.clear()
            self.serving = began if self.requested_at is None else self.requested_at
            self.requested_at = None
            try:
                await self._work(resync)
            except TryAgain as error:
                self.failures += 1
                self.requested_at = self.serving
                self._resync = True
                self._say(str(error))
                await asyncio.sleep(self._pauses.next())
                continue
            self.failures = 0
            self._say("")
            self._pauses.reset()
            if resync:
                due = began + max(self._max_interval, min(_LONGEST_REST, _REST * (clock() - began)))
            await asyncio.sleep(max(0.0, began + self._min_interval - clock()))
            with suppress(TimeoutError):  # wait_for of Python 3.11 may lose a cancellation
                async with asyncio.timeout(max(0.0, due - clock())):
                    await self._wake.wait()

    def _say(self, wrong: str) -> None:
        """A reason is logged when it is a new one, not with every attempt."""
        if wrong and wrong != self._said:
            log.warning("%s failed, trying again: %s", self.name, wrong)
        elif self._said and not wrong:
            log.info("%s works again", self.name)
        self._said = wrong
