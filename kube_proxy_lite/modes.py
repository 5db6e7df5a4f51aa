"""The modes of the proxy: which renderer and which applier, what of the kernel is theirs, and how one follows another.

A node that was in another mode has that one's rules. They stay until this mode's are there, so that no Service is away
in between (of two chains that would translate a connection the first one does, whichever that is), and then they go:
rules that nobody keeps send connections to pods of long ago. The same holds for NetworkPolicy, which is in nftables
but in the mode iptables, and nowhere where policies are not enforced any more. What other programs have made stays,
another proxy's rules among it.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kube_proxy_lite.apply.iptables import IptablesApplier
from kube_proxy_lite.apply.nftables import NftablesApplier
from kube_proxy_lite.apply.nftevents import Touches, in_iptables, in_tables
from kube_proxy_lite.apply.policy_iptables import PolicyIptablesApplier
from kube_proxy_lite.apply.policy_nftables import PolicyApplier
from kube_proxy_lite.errors import ModeUnavailable
from kube_proxy_lite.model import Settings
from kube_proxy_lite.render import interface
from kube_proxy_lite.render.interface import Applier, Changes, ClusterIPs, Renderer
from kube_proxy_lite.render.iptables import IptablesRenderer
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_layout import WORDS
from kube_proxy_lite.render.policy_iptables import PolicyIptablesRenderer
from kube_proxy_lite.render.policy_iptables_rules import TABLE as POLICY_CHAINS
from kube_proxy_lite.render.policy_nftables import TABLE as POLICY_TABLE
from kube_proxy_lite.render.policy_nftables import PolicyRenderer
from kube_proxy_lite.settings import Mode

_IPV6 = Path("/proc/net/if_inet6")
_JUMPS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_TABLES = ("nat", "filter")


class MadeMode(msgspec.Struct, frozen=True, kw_only=True):
    """A renderer and its applier. `touches` says which changes of nftables by others are drift, None that none is seen;
    `is_own` whether a process is one that the applier has started."""

    renderer: Renderer[Any, Any]
    applier: Applier[Any, Any]
    touches: Touches | None = None
    is_own: Callable[[int], bool] = lambda _pid: False


def _versions() -> tuple[int, ...]:
    """The families that the node has."""
    return (4, 6) if _IPV6.exists() else (4,)


class MadePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """NetworkPolicy's renderer and applier. `touches` says which changes of nftables by others are drift."""

    renderer: interface.PolicyRenderer[Any, Any]
    applier: interface.PolicyApplier[Any, Any]
    touches: Touches


def make_mode(mode: Mode, settings: Settings) -> MadeMode:
    """The parts of `mode`. Raises ModeUnavailable when what it needs is not there."""
    versions = _versions()
    if mode is Mode.NFTABLES:
        need("nft", "nftables")
        nftables = NftablesApplier(versions=versions)
        touches = in_tables({words.table.split()[1] for words in WORDS.values()})
        renderer = NftablesRenderer(settings, versions)
        return MadeMode(renderer=renderer, applier=nftables, touches=touches, is_own=nftables.is_own)
    if mode is Mode.IPTABLES:
        need("iptables-restore", "iptables")
        iptables = IptablesApplier(versions=versions)
        touches = in_iptables("KUBE-", _JUMPS, _TABLES)
        return MadeMode(
            renderer=IptablesRenderer(settings, versions), applier=iptables, touches=touches, is_own=iptables.is_own
        )
    return MadeMode(renderer=Nothing(), applier=Nothing())


def make_policy(mode: Mode) -> MadePolicy:
    """NetworkPolicy's parts beside Services of `mode`. Raises ModeUnavailable when what they need is not there."""
    if mode is Mode.IPTABLES:
        need("iptables-restore", "iptables")
        need("ipset", "ipset")
        versions = _versions()
        return MadePolicy(
            renderer=PolicyIptablesRenderer(versions),
            applier=PolicyIptablesApplier(versions=versions),
            touches=in_iptables("PODWIRE-", ("FORWARD",), (POLICY_CHAINS,)),
        )
    need("nft", "nftables")
    return MadePolicy(renderer=PolicyRenderer(), applier=PolicyApplier(), touches=in_tables((POLICY_TABLE.split()[1],)))


def need(program: str, package: str) -> None:
    """Raises ModeUnavailable when a program is not there."""
    if shutil.which(program) is None:
        raise ModeUnavailable(f"the program {program} is not there, expected it in PATH; it comes with {package}")


async def remove_all_but(mode: Mode | None, policy: bool) -> None:
    """Takes the rules of all other modes than `mode` out of the kernel, and with `policy` False those of NetworkPolicy.

    What was not there is fine. Raises the first failure when all has been tried.
    """
    failures: list[Exception] = []
    for remove in _removals(mode, policy):
        try:
            await remove()
        except Exception as error:  # noqa: BLE001 - the others are to go, too; raised below
            failures.append(error)
    if failures:
        raise failures[0]


def _removals(mode: Mode | None, policy: bool) -> list[Callable[[], Awaitable[None]]]:
    """A mode whose program is not there has no rules."""
    found: list[Callable[[], Awaitable[None]]] = []
    if shutil.which("nft"):
        found += [NftablesApplier().remove] if mode is not Mode.NFTABLES else []
        found += [PolicyApplier().remove] if not policy or mode is Mode.IPTABLES else []
    if shutil.which("iptables-restore"):  # policies first: Services tell the backend
        if shutil.which("ipset") and (not policy or mode is not Mode.IPTABLES):
            found.append(PolicyIptablesApplier().remove)
        found += [IptablesApplier().remove] if mode is not Mode.IPTABLES else []
    return found


class Nothing:
    """The mode `none`: Services are left to somebody else."""

    def update(self, changes: Changes, cluster_ips: ClusterIPs) -> tuple[()]:  # noqa: ARG002
        """Nothing to do."""
        return ()

    def configure(self, settings: Settings) -> tuple[()]:  # noqa: ARG002
        """Nothing to do."""
        return ()

    def accept_health_checks(self, ports: Collection[int]) -> tuple[()]:  # noqa: ARG002
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
