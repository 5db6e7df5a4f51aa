"""The iptables mode's applier: iptables-restore and iptables-save of the backend that the node uses, for each family.

A node has two sets of iptables rules, those of nf_tables and the legacy ones, and packets pass both. Rules belong where
the node's others are, or they are invisible to whoever looks and judged in an order that nobody means. `find_backend`
looks, as the wrappers of Kubernetes' own images do, for the chains by which the kubelet tells its choice, then for
rules of Services, then for where there are more rules; on an empty node it is the one that `iptables` is.

A change is one process for each family. With nf_tables it takes 15 ms among 500 Services and 35–65 ms among 5,000, most
of it the kernel's, which looks through all chains for loops whenever a rule with a jump is added; the legacy backend
exchanges the whole table, 250 ms of CPU at 5,000. The families go side by side, since neither refers to the other. The
legacy backend has a lock: another's is waited for, `LOCK_SECONDS` at most, and tried again later.

Source: iptables-restore(8), xtables-nft(8); kubernetes-sigs/iptables-wrappers describes the order of the search.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar, cast

from kube_proxy_lite.apply.processes import Processes
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.iptables import removal
from kube_proxy_lite.render.iptables_listing import Listing, parse
from kube_proxy_lite.render.iptables_transactions import TABLES, Transaction, joined

LOCK_SECONDS = 5
_SECONDS = 120.0
_PROGRAMS = {4: "iptables", 6: "ip6tables"}
_HINTS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
BACKENDS = ("nft", "legacy")
T = TypeVar("T")


class IptablesApplier:
    """interface.Applier for iptables. `prefix` is what goes before each command, to run it in another namespace."""

    def __init__(self, prefix: Sequence[str] = (), versions: Sequence[int] = (4, 6), backend: str = "") -> None:
        """`backend` is "nft" or "legacy"; without one it is found when it is first needed."""
        self._prefix = tuple(prefix)
        self._versions = tuple(versions)
        self._backend = backend
        self._processes = Processes()

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here."""
        return self._processes.is_own(pid)

    async def backend(self) -> str:
        """The backend that is used. Raises ApplyFailed when there is no iptables."""
        if not self._backend:
            self._backend = await self._find_backend()
        return self._backend

    async def apply(self, transactions: Sequence[Transaction]) -> None:
        """See interface.Applier. Each family's are carried out in order, the families side by side."""
        by_version = {version: [each for each in transactions if each.version == version] for version in self._versions}
        legacy = await self.backend() == "legacy"
        await _all(self._apply(version, mine, legacy) for version, mine in by_version.items() if mine)

    async def read(self) -> dict[int, Listing]:
        """See interface.Applier."""
        found = await _all(self._read(version) for version in self._versions)
        return dict(zip(self._versions, found, strict=True))

    async def remove(self) -> None:
        """See interface.Applier. Rules that another proxy has made stay, whatever they are called."""
        for version, listing in (await self.read()).items():
            await self.apply(removal(version, listing))

    async def _apply(self, version: int, transactions: Sequence[Transaction], legacy: bool) -> None:
        whole = joined(transactions) if legacy else None
        for each in (whole,) if whole else transactions:
            await self._run(version, "restore", "-w", str(LOCK_SECONDS), "--noflush", stdin=each.text)

    async def save(self, version: int, *tables: str) -> str:
        """What iptables-save prints of `tables`. Raises ApplyFailed."""
        return "\n".join([await self._run(version, "save", "-t", table) for table in tables])

    async def _read(self, version: int) -> Listing:
        return await asyncio.to_thread(parse, await self.save(version, *TABLES))

    # --- Which iptables -----------------------------------------------------------------------------------------

    async def _find_backend(self) -> str:
        said = dict(zip(BACKENDS, await asyncio.gather(*map(self._rules_of, BACKENDS)), strict=True))
        for marks in (_HINTS, ("KUBE-SERVICES",)):
            for backend, text in said.items():
                if any(f":{mark} " in text for mark in marks):
                    return backend
        counts = {backend: text.count("\n-A ") for backend, text in said.items()}
        if counts["nft"] != counts["legacy"]:
            return max(counts, key=lambda backend: counts[backend])
        version = await self.program(f"{_PROGRAMS[4]}", "--version")
        return "nft" if "nf_tables" in version else "legacy"

    async def _rules_of(self, backend: str) -> str:
        """Everything that a backend has; nothing when the node does not have the backend."""
        texts = []
        for version in self._versions:
            try:
                texts.append(await self.program(f"{_PROGRAMS[version]}-{backend}-save"))
            except ApplyFailed:
                continue
        return "\n".join(texts)

    # --- Processes ----------------------------------------------------------------------------------------------

    async def _run(self, version: int, verb: str, *arguments: str, stdin: str = "") -> str:
        return await self.program(f"{_PROGRAMS[version]}-{await self.backend()}-{verb}", *arguments, stdin=stdin)

    async def program(self, program: str, *arguments: str, stdin: str = "") -> str:
        """What it printed. Raises ApplyFailed."""
        return await self._processes.run(*self._prefix, program, *arguments, stdin=stdin, seconds=_SECONDS)


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return; when one fails, the others are done before that is raised."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return cast(list[T], found)
