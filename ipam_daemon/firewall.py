"""The nft table of this node in the kernel, kept at its plan. What it says is ipam_daemon/ruleset.py's.

nft is fed text, its one documented interface. A call costs 2–8 ms; none is on the ADD path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.plan import FirewallPlan
from ipam_daemon.ruleset import TABLE, FirewallState, parse_listing, render, render_vteps

_NFT_SECONDS = 10.0


class Firewall:
    """The table in the kernel."""

    def __init__(self, nft: Sequence[str] = ("nft",)) -> None:
        """`nft` is the command, with what goes before it to run it in another namespace."""
        self._nft = tuple(nft)

    async def ensure(self, plan: FirewallPlan, known: FirewallPlan | None = None) -> bool:
        """Brings the table to `plan`. True when something had to be done. Raises PlumbingFailed with nft's words.

        `known` is what the table was brought to before: where another node is all that differs, the kernel is not asked
        what it has, which takes the longer the more nodes there are.
        """
        if known is not None and (script := render_vteps(known, plan)):
            with contextlib.suppress(PlumbingFailed):  # somebody has changed the table: the longer way mends it
                await run_nft(*self._nft, "-f", "-", stdin=script)
                return True
        script = render(plan, await self.read())
        if script:
            await run_nft(*self._nft, "-f", "-", stdin=script)
        return bool(script)

    async def read(self) -> FirewallState:
        """What the kernel has now."""
        try:
            listing = json.loads(await run_nft(*self._nft, "-j", "list", "table", *TABLE.split()))
        except PlumbingFailed as error:
            if "No such file" in str(error):
                return FirewallState(chains="", elements={})
            raise
        return parse_listing(listing)


async def run_nft(*command: str, stdin: str = "") -> str:
    """Runs nft, as `command`, and returns what it prints. Raises PlumbingFailed with its words."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        raise PlumbingFailed(f"{command[0]} cannot be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(_NFT_SECONDS):
            out, err = await process.communicate(stdin.encode())
    except TimeoutError as error:
        raise PlumbingFailed(f"nft gave no answer within {_NFT_SECONDS:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise PlumbingFailed(f"{' '.join(command)}: {' '.join(err.decode().split())}")
    return out.decode()
