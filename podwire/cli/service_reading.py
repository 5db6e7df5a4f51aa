"""Reads what `podwire service` looks at: everything that there is, once, from the API as the proxy reaches it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from kube_proxy_lite.model import Settings
from podwire.cli.service_view import Cluster, Key
from podwire.errors import TryAgain
from podwire.kube import options
from podwire.kube.api import ApiSource
from podwire.kube.client import Client
from podwire.kube.kinds import ENDPOINT_SLICES, NODES, PODS, SERVICE_CIDRS, SERVICES, Wanted
from podwire.kube.options import KubeOptions
from podwire.kube.source import Silent, Source

_SECONDS = 15.0


class _LastProblem(Silent):
    """Keeps what hindered the reading, for the error message."""

    def __init__(self) -> None:
        self.words = "no answer"

    def problem(self, kind: str, reason: str) -> None:
        """See source.Observer."""
        if reason:
            self.words = f"{kind}: {reason}"


def read(kubernetes: KubeOptions, settings: Settings, mode: str) -> Cluster:
    """Lists what there is. Raises TryAgain with what hindered it, ConfigError."""
    problem = _LastProblem()

    async def everything() -> Cluster:
        async with asyncio.timeout(_SECONDS), Client(options.access(kubernetes), observer=problem) as client:
            return await read_from(ApiSource(client), settings, mode)

    try:
        return asyncio.run(everything())
    except TimeoutError:
        raise TryAgain(f"the Kubernetes API did not say in {_SECONDS:.0f} s what there is: {problem.words}") from None


async def read_from(source: Source, settings: Settings, mode: str = "nftables") -> Cluster:
    """Everything that a source has."""
    kinds = (SERVICES, ENDPOINT_SLICES, NODES, PODS)
    wanted: list[Wanted[Any]] = [*(Wanted(kind=kind) for kind in kinds), Wanted(kind=SERVICE_CIDRS, optional=True)]
    services, slices, nodes, pods, cidrs = await asyncio.gather(*(_all(source, each) for each in wanted))
    return Cluster(
        services=services, slices=slices, nodes=nodes, pods=pods, service_cidrs=cidrs, settings=settings, mode=mode
    )  # fmt: skip


async def _all(source: Source, wanted: Wanted[Any]) -> tuple[Any, ...]:
    found: dict[Key, Any] = {}
    async with contextlib.aclosing(source.follow(wanted)) as batches:
        async for batch in batches:
            found |= {obj.key: obj for obj in batch.upserts}
            for key in batch.deletes:
                found.pop(key, None)
            if batch.synced:
                break
    return tuple(found[key] for key in sorted(found))
