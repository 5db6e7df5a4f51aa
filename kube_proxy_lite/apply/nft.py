"""nft as a process: scripts by `nft -f -`, listings by `nft -p list table`.

Text is nft's one documented interface, and legible. A call costs 3 ms, mostly nft's start; one that deletes something
takes 10–20 ms, in which the kernel waits for readers to be done (RCU) and nobody computes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from kube_proxy_lite.render.interface import ApplyFailed

_SECONDS = 30.0
_REMEMBERED = 256
_WORDS = 2000


class Nft:
    """Runs `command`, which is nft with what goes before it to run it in another namespace."""

    def __init__(self, command: Sequence[str] = ("nft",)) -> None:
        self._command = tuple(command)
        self._started: deque[int] = deque(maxlen=_REMEMBERED)

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here, of the last 256."""
        return pid in self._started

    async def script(self, text: str) -> None:
        """Carries `text` out as one transaction. Raises ApplyFailed with nft's words."""
        await self.run("-f", "-", stdin=text)

    async def table(self, table: str) -> str | None:
        """The listing of `table` ("inet name"), None when there is none. Raises ApplyFailed."""
        try:
            return await self.run("-p", "list", "table", *table.split())
        except ApplyFailed as error:
            if "No such file" in str(error):
                return None
            raise

    async def remove(self, *tables: str) -> None:
        """Deletes tables; those that are not there are fine."""
        # to add what is there is no error, to delete what is not would be
        await self.script("".join(f"add table {each}\ndelete table {each}\n" for each in tables))

    async def run(self, *arguments: str, stdin: str = "") -> str:
        """What nft printed. Raises ApplyFailed."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, *arguments, stdin=pipe, stdout=pipe, stderr=pipe
            )
        except OSError as error:
            raise ApplyFailed(f"{self._command[0]} cannot be run: {error.strerror}") from error
        self._started.append(process.pid)
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin.encode()), _SECONDS)
        except TimeoutError as error:
            raise ApplyFailed(f"nft gave no answer within {_SECONDS:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            words = " ".join(err.decode(errors="replace").split())[:_WORDS]
            raise ApplyFailed(f"nft {' '.join(arguments)}: {words}")
        return out.decode()
