"""The lab's balancer: asks the nodes how they are, and keeps the routes of its namespace at what they answer.

    every _BEAT_SECONDS   every node's check, at once ─▶ who is healthy ─▶ load_balancers.plan_groups ─▶ `ip -batch`

Health is asked from the balancer itself: the proxy's own /healthz, and with the policy Local the Service's
healthCheckNodePort, which answers 200 where it has ready endpoints. A node leaves after _MISSES bad answers and is back
after a good one. No node left: the network is unreachable, and clients are told so. When the supervisor ends, the
routes stay as they are.
"""

from __future__ import annotations

import asyncio
import logging

from podwire.lab.api.kinds import NODES, SERVICES
from podwire.lab.api.store import Store
from podwire.lab.load_balancers import (
    Check,
    check_of,
    ingress_of,
    is_balanced,
    plan_commands,
    plan_groups,
    plan_hops,
)
from podwire.lab.probes import HttpGet, Probe
from podwire.lab.probing import Prober, SocketOpener
from podwire.lab.state import LabState

EXCLUDED_LABEL = "node.kubernetes.io/exclude-from-external-load-balancers"
_BEAT_SECONDS = 0.5
_ASK_SECONDS = 2.0
_MISSES = 2
_FIRST_GROUP = 1000  # ids of next hops below are nodes

_log = logging.getLogger(__name__)


class Balancer:
    """Asks the nodes, and keeps the routes of the balancer's namespace at what they answer."""

    def __init__(self, state: LabState, store: Store) -> None:
        self._state = state
        self._store = store
        self._netns = state.netns("balancer")
        opener = SocketOpener()
        self._probers = {node.name: Prober(opener, self._netns, node.addresses[0], (), {}) for node in state.nodes}
        self._misses: dict[tuple[str, Check], int] = {}
        self._routed: dict[str, tuple[int, ...]] | None = None
        self._ids: dict[str, int] = {}

    async def run(self) -> None:
        """Goes on for ever."""
        while True:
            services = [one for one in self._store.list(SERVICES) if is_balanced(one) and ingress_of(one)]
            healthy = await self._ask({check_of(service) for service in services})
            await self._route(plan_groups(services, self._state.nodes, healthy))
            await asyncio.sleep(_BEAT_SECONDS)

    async def _ask(self, checks: set[Check]) -> dict[Check, frozenset[str]]:
        nodes = [node["metadata"] for node in self._store.list(NODES)]
        there = {node["name"] for node in nodes if EXCLUDED_LABEL not in (node.get("labels") or {})}
        asked = [(name, check) for check in checks for name in self._probers if name in there]
        answers = await asyncio.gather(*(self._why_not(name, check) for name, check in asked))
        misses = {
            key: self._misses.get(key, _MISSES - 1) + 1 if why else 0 for key, why in zip(asked, answers, strict=True)
        }  # one that was never asked is out until it gives a good answer
        for key, why in zip(asked, answers, strict=True):
            was, is_out = self._misses.get(key, _MISSES) >= _MISSES, misses[key] >= _MISSES
            if was != is_out:
                _log.info("%s, asked at port %d: %s", key[0], key[1].port, f"leaves, {why}" if is_out else "is healthy")
        self._misses = misses
        return {check: frozenset(n for n, c in asked if c == check and misses[n, c] < _MISSES) for check in checks}

    async def _why_not(self, node: str, check: Check) -> str:
        probe = Probe(action=HttpGet(path=check.path, port=check.port), timeout=_ASK_SECONDS)
        return await self._probers[node].why_not(probe, {})

    async def _route(self, wanted: dict[str, tuple[int, ...]]) -> None:
        for address in wanted:
            self._ids.setdefault(address, _FIRST_GROUP + len(self._ids))
        fresh = self._routed is None
        commands = plan_hops(self._state.nodes) if fresh else []
        commands += plan_commands(self._routed or {}, wanted, self._ids)
        if not commands:
            return
        self._routed = None  # until it is known to be done
        child = await asyncio.create_subprocess_exec(
            "nsenter", f"--net={self._netns}", "ip", "-batch", "-",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await child.communicate("\n".join(commands).encode() + b"\n")
        if child.returncode:
            _log.warning("the balancer's routes: %s", said.decode(errors="replace").strip())
            return
        self._routed = wanted
