"""Somebody else has changed our rules: a look at the whole, soon, and not again and again.

The first time it is asked for at once. Who goes on changing them is answered ever more rarely, up to every `most`
seconds: two proxies that know different things of the cluster for a while, as during an upgrade, take each other's
repairs for damage, and would keep the node busy with reading and repairing. What is quiet for `quiet` seconds is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from podwire.backoff import Backoff
from podwire.runner import Runner

log = logging.getLogger(__name__)
QUIET = 10.0


class Drift:
    """Drift of what a runner keeps. `noted` is called each time; times are in seconds."""

    def __init__(self, runner: Runner, noted: Callable[[], None], *, most: float = 30.0, quiet: float = QUIET) -> None:
        self._runner = runner
        self._noted = noted
        self._quiet = quiet
        self._pauses = Backoff(0.25, most)
        self._next = 0.0  # when a look may be asked for again, on the loop's clock
        self._asking: asyncio.TimerHandle | None = None

    def note(self) -> None:
        """Something of ours was changed."""
        self._noted()
        if not self._runner.begun or self._asking is not None:
            return  # the first run reads the kernel anyway; what is asked for sees this, too
        loop = asyncio.get_running_loop()
        if loop.time() > self._next + self._quiet:
            self._pauses.reset()
            log.warning("somebody else has changed the rules of Podwire; looking at them again")
        self._asking = loop.call_at(max(loop.time(), self._next), self._ask)

    def _ask(self) -> None:
        self._asking = None
        self._next = asyncio.get_running_loop().time() + self._pauses.next()
        self._runner.request(resync=True)
