"""The fast path, looked after: whether this node has one, and a round every two seconds while it does.

    off: fastPath is false      packets take the long way, which is whole
    off: <what is missing>      the same: the kernel cannot; asked again now and then
    on: <how many> pods         rounds; one that fails is said and comes again, and without any for half a minute the
                                programs pass everything on by themselves

It is a task of the daemon's, and nothing waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from ipam_daemon import fastpath
from ipam_daemon.errors import CniError
from ipam_daemon.fastpath import FastPath, Unsupported, read_conntrack
from ipam_daemon.identity import boottime_ns
from ipam_daemon.model import Attachment, AttachmentKey, AttachmentState
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.plan import NodePlan

ROUND_S = 2.0
"""How often it is looked after."""
MORE_S = 0.1
"""How long new ports wait for one another: to attach a program by TCX holds up whoever else wants to change a link."""
AGAIN_S = 60.0
"""How often a kernel that cannot is asked again: it costs 50 ms, and what lacked may have been a file descriptor."""
_LONG_AGO_S = 60.0  # the plugins of an ADD that began so long before this daemon are through

log = logging.getLogger(__name__)


class FastPathKeeper:
    """The fast path of this node, if it has one."""

    def __init__(
        self,
        thread: NetlinkThread,
        plan: Callable[[], NodePlan | None],
        wires: Callable[[], Iterable[Attachment]],
        *,
        wanted: bool,
        after: float = 0.0,
    ) -> None:
        """`plan` is what the kernel was last brought to, `wires` are the node's own that are not cut off. A pod's
        packets take the fast way `after` so many seconds, when plugins that follow in the chain have done what they do,
        limits for example; at once where none follows.
        """
        self._thread = thread
        self._plan = plan
        self._wires = wires
        self._wanted = wanted
        self._after = after
        self._seen: dict[tuple[AttachmentKey, int], int] = {}  # attached since when, as far as this daemon knows
        self._path: FastPath | None = None
        self._due = 0.0  # when everything is looked at again, on the loop's clock
        self._obstacle = "the daemon has just started"

    @property
    def state(self) -> str:
        """What there is, in a line."""
        if self._path is None or self._obstacle:
            return f"off: {self._obstacle}"
        passed_over = [f"{name}: {why}" for name, why in sorted(self._path.passed_over.items())]
        return "; ".join((f"on: {self._path.known} pods", *passed_over[:5]))

    @property
    def known(self) -> int:
        """How many pods' packets may take the fast way."""
        return self._path.known if self._path is not None and not self._obstacle else 0

    def forget(self, host_ifname: str) -> None:
        """A wire is about to be killed. On the netlink thread; raises OSError."""
        if self._path is not None:
            self._path.forget(host_ifname)

    def taken(self) -> Mapping[str, int]:
        """Packets that took the fast way, by which. Raises OSError."""
        return self._path.taken() if self._path is not None else {}

    async def begin(self) -> None:
        """Ends what an earlier daemon has left; before any call is answered. What cannot be ended has a lease."""
        try:
            await self._thread.run(fastpath.end, self._thread)
        except Exception:  # nothing of the node waits for a fast path, whatever it is that went wrong
            log.exception("the fast path of the daemon before is still there, for %g s", fastpath.LEASE_S)

    async def run_forever(self) -> None:
        """Until cancelled; ends at once where none is wanted."""
        if not self._wanted:
            self._obstacle = "fastPath is false"
            with suppress(CniError):  # it passes everything on
                await self._thread.run(fastpath.remove, self._thread)
            return
        while True:
            plan, pause = self._plan(), ROUND_S
            if plan is not None:  # the firewall is there, and so is conntrack, which may be a module
                pause = await self._round(plan)
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Ports and VXLAN device keep their programs."""
        path, self._path = self._path, None
        if path is not None:
            await self._thread.run(path.close)

    async def _open(self) -> FastPath | None:
        try:
            self._path = await self._thread.run(FastPath, self._thread, *await asyncio.to_thread(read_conntrack))
        except (Unsupported, CniError, OSError) as error:
            self._say(str(error))
        except Exception as error:  # nothing of the node waits for a fast path, whatever it is that went wrong
            log.exception("the fast path's beginning")
            self._say(repr(error))
        return self._path

    async def _round(self, plan: NodePlan) -> float:
        """Returns after how many seconds there should be another."""
        path = self._path or await self._open()
        if path is None:
            return AGAIN_S
        clock = asyncio.get_running_loop().time
        try:
            if clock() < self._due:
                done = await self._thread.run(path.go_on)
            else:
                self._due = clock() + ROUND_S
                done = await self._thread.run(path.ensure, plan, *self._wires_and_young())
        except (CniError, OSError, sqlite3.Error) as error:
            self._say(str(error))
        except Exception as error:  # nothing of the node waits for a fast path, whatever it is that went wrong
            log.exception("the fast path's round")
            self._say(repr(error))
        else:
            self._obstacle = ""
            return max(0.0, self._due - clock()) if done else MORE_S
        return ROUND_S

    def _wires_and_young(self) -> tuple[list[Attachment], frozenset[str]]:
        """The node's wires, and the names of those that plugins may not be through with."""
        now = boottime_ns()
        wires = [each for each in self._wires() if each.state is AttachmentState.ATTACHED]
        long_ago, latest = now - int(_LONG_AGO_S * 1e9), now - int(self._after * 1e9)
        seen = {(each.key, each.created_ns): 0 if each.created_ns < long_ago else now for each in wires}
        self._seen = {wire: self._seen.get(wire, since) for wire, since in seen.items()}
        return wires, frozenset(each.host_ifname for each in wires if self._seen[each.key, each.created_ns] > latest)

    def _say(self, why: str) -> None:
        if why != self._obstacle:
            log.warning("packets between pods take the long way: %s", why)
        self._obstacle = why
