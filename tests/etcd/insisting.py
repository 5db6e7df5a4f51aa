"""What a daemon does with an etcd that is away: it asks again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from podwire.etcd import EtcdUnavailable


async def insist(call: Callable[[], Awaitable[Any]]) -> Any:
    """Tries again while etcd is away, or has no time; the story's own limit ends it."""
    while True:
        try:
            return await call()
        except EtcdUnavailable:
            await asyncio.sleep(0.02)
