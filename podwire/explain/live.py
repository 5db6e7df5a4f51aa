"""The objects of a cluster that runs, read from its API once: a list of each kind, and no watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from podwire.errors import TryAgain
from podwire.explain.objects import Objects
from podwire.kube.access import Access
from podwire.kube.api import ApiSource
from podwire.kube.client import Client
from podwire.kube.kinds import ENDPOINT_SLICES, NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICES, Kind, Wanted
from podwire.kube.source import Source

_KINDS: tuple[Kind[Any], ...] = (NAMESPACES, PODS, NETWORK_POLICIES, SERVICES, ENDPOINT_SLICES, NODES)
_SECONDS = 20.0


def fetch(access: Access, seconds: float = _SECONDS) -> Objects:
    """What the API says now. Raises TryAgain when it does not say all of it within `seconds`, with what hinders."""
    return asyncio.run(_fetch(access, seconds))


async def _fetch(access: Access, seconds: float) -> Objects:
    async with _source(access) as source:
        try:
            async with asyncio.timeout(seconds):
                found = await asyncio.gather(*(_list(source, kind) for kind in _KINDS))
        except TimeoutError:
            hindrance = "; ".join(dict.fromkeys(source.problems.values())) or "no answer"
            raise TryAgain(f"the API at {', '.join(access.servers)}: {hindrance}") from None
        problems = [
            f"{kind} {'/'.join(filter(None, key))} is left out: {why}"
            for kind, skipped in source.skipped.items()
            for key, why in skipped.items()
        ]
    namespaces, pods, policies, services, slices, nodes = found
    return Objects(
        namespaces=namespaces,
        pods=pods,
        policies=policies,
        services=services,
        slices=slices,
        nodes=nodes,
        problems=tuple(problems),
    )


@asynccontextmanager
async def _source(access: Access) -> AsyncIterator[ApiSource]:
    async with Client(access) as client:
        yield ApiSource(client)


async def _list(source: Source, kind: Kind[Any]) -> tuple[Any, ...]:
    """Everything of one kind, up to the moment at which the source has said what there is."""
    found: dict[tuple[str, str], Any] = {}
    async with aclosing(source.follow(Wanted(kind=kind, optional=True))) as batches:
        async for batch in batches:
            for key in batch.deletes:
                found.pop(key, None)
            found.update({each.key: each for each in batch.upserts})
            if batch.synced:
                break
    return tuple(found.values())
