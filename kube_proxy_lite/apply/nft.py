"""nft as a process: scripts by `nft -f -`, listings by `nft -p list …`.

Text is nft's one documented interface, and legible. A call costs 3 ms, mostly nft's start; one that deletes something
takes 10–20 ms, in which the kernel waits for readers to be done (RCU) and nobody computes.
"""

from __future__ import annotations

from collections.abc import Sequence

from kube_proxy_lite.apply.processes import Processes, ProgramRefused

_ABSENT = "No such file"


class Nft:
    """Runs `command`, which is nft with what goes before it to run it in another namespace."""

    def __init__(self, command: Sequence[str] = ("nft",)) -> None:
        self.command = tuple(command)
        self.processes = Processes()

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here."""
        return self.processes.is_own(pid)

    async def script(self, text: str) -> None:
        """Carries `text` out as one transaction. Raises ApplyFailed with nft's words."""
        await self._run("-f", "-", stdin=text)

    async def list(self, *what: str) -> str | None:
        """A listing, of `"table", "inet", "name"` say; None when it is not there. Raises ApplyFailed."""
        try:
            return await self._run("-p", "list", *what)
        except ProgramRefused as error:
            if _ABSENT in str(error):
                return None
            raise

    async def table(self, table: str) -> str | None:
        """The listing of `table` ("inet name"), None when there is none. Raises ApplyFailed."""
        return await self.list("table", *table.split())

    async def remove(self, *tables: str) -> None:
        """Deletes tables; those that are not there are fine, and cost no transaction. Raises ApplyFailed."""
        for table in tables:
            try:
                await self._run("delete", "table", *table.split())
            except ProgramRefused as error:
                if _ABSENT not in str(error):
                    raise

    async def _run(self, *arguments: str, stdin: str = "") -> str:
        return await self.processes.run(*self.command, *arguments, stdin=stdin)
