"""The modes of the proxy: which renderer and which applier, and which nft tables are theirs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kube_proxy_lite.apply.nftables import NftablesApplier
from kube_proxy_lite.errors import ModeUnavailable
from kube_proxy_lite.model import Settings
from kube_proxy_lite.render.interface import Applier, Changes, ClusterIPs, Renderer
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_layout import WORDS
from kube_proxy_lite.settings import Mode

MODES = (Mode.NFTABLES, Mode.IPTABLES)


class MadeMode(msgspec.Struct, frozen=True, kw_only=True):
    """A renderer and its applier. `tables` are names of nft tables whose changes by others count as drift; `is_own`
    says whether a process is one that the applier has started."""

    renderer: Renderer[Any, Any]
    applier: Applier[Any, Any]
    tables: frozenset[str] = frozenset()
    is_own: Callable[[int], bool] = lambda _pid: False


def make_mode(mode: Mode, settings: Settings) -> MadeMode:
    """The parts of `mode`. Raises ModeUnavailable when what it needs is not there."""
    if mode is Mode.NFTABLES:
        return _nftables(settings)
    if mode is Mode.IPTABLES:
        return _iptables(settings)
    return MadeMode(renderer=Nothing(), applier=Nothing())


def _nftables(settings: Settings) -> MadeMode:
    need("nft", "nftables")
    applier = NftablesApplier()
    tables = frozenset(words.table.split()[1] for words in WORDS.values())
    return MadeMode(renderer=NftablesRenderer(settings), applier=applier, tables=tables, is_own=applier.is_own)


def _iptables(settings: Settings) -> MadeMode:
    raise ModeUnavailable(f"mode is iptables on {settings.node}, which is not there yet; expected nftables or none")


def need(program: str, package: str) -> None:
    """Raises ModeUnavailable when a program is not there."""
    if shutil.which(program) is None:
        raise ModeUnavailable(f"the program {program} is not there, expected it in PATH; it comes with {package}")


class Nothing:
    """The mode `none`: no rule of ours is wanted, and none is touched."""

    def update(self, changes: Changes, cluster_ips: ClusterIPs) -> tuple[()]:  # noqa: ARG002
        """Nothing to do."""
        return ()

    def configure(self, settings: Settings) -> tuple[()]:  # noqa: ARG002
        """Nothing to do."""
        return ()

    def resync(self, listing: None) -> tuple[()]:  # noqa: ARG002
        """Nothing to do."""
        return ()

    async def apply(self, transactions: Sequence[object]) -> None:
        """Nothing to do."""

    async def read(self) -> None:
        """Nothing to see."""

    async def remove(self) -> None:
        """Nothing to remove."""
