"""What the proxy tells a daemon reaches the one that listens, and not the connection with the one before it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.unit.test_podwatch import PATIENCE, Node, Proxy, attachment


def test_what_is_settled_after_the_daemon_came_back_reaches_it(tmp_path: Path) -> None:
    """Many comings and goings: the one who is told must not depend on which of the connections is woken first."""

    async def story() -> None:
        proxy = Proxy(tmp_path / "s")
        try:
            for turn in range(6):
                async with Node(tmp_path, PATIENCE) as node:
                    assert await node.add(attachment(f"a{turn}", "a")) == "answered"
                    assert await node.add(attachment(f"b{turn}", "b")) == "answered"
        finally:
            await proxy.end()

    asyncio.run(story())
