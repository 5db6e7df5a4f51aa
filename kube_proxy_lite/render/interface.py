"""What a mode of the proxy consists of: a renderer, which is pure, and an applier, which speaks to the kernel.

    services.changed() ──▶ Renderer.update ──▶ transactions ──▶ Applier.apply ──▶ kernel
                           Renderer.resync ◀──── listing ◀───── Applier.read ◀───────┘

A renderer keeps what should be (plans, settings) and what it believes the kernel to hold. `update` and `configure` take
a change in and return what brings the kernel from the one to the other, at the cost of the change. Before the first
`resync` nothing is believed and nothing returned, so a start, a restart and a repair are one path:

    renderer.update(services.changed(), services.changed_cluster_ips())
    await applier.apply(renderer.resync(await applier.read()))

An empty kernel gets all of it, in bounded pieces; one that has everything, by an earlier process, gets nothing; one
that somebody has meddled with gets what is missing. What a listing shows of an earlier process's free choices (which
endpoint sits in which slot) is kept.

**Transactions** are applied in order, each one whole or not at all, and each leaves the kernel in a state that sends
nobody to nowhere: what is referred to comes first, removals come last and in transactions of their own, because one
packet's look-ups may straddle a commit. When one fails, those after it are not applied, and the renderer's belief is
wrong: the caller reads and resyncs (and tries again later when that fails, too).

    try:
        await applier.apply(transactions)
    except ApplyFailed:
        await applier.apply(renderer.resync(await applier.read()))

Each mode has types of its own for transactions and listings; nobody but its own renderer and applier looks into them.
Neither is for use by several tasks at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeVar

from kube_proxy_lite.model import Address, Network, PortKey, PortPlan, Settings
from kube_proxy_lite.policy.membership import Fact, Value
from podwire.errors import TryAgain

T_co = TypeVar("T_co", covariant=True)  # transactions made, and taken
T_contra = TypeVar("T_contra", contravariant=True)
L_co = TypeVar("L_co", covariant=True)  # listings made, and taken
L_contra = TypeVar("L_contra", contravariant=True)

Changes = Mapping[PortKey, PortPlan | None]
"""Plans that are new or others than before; None for those that are no more (services.Services.changed)."""
ClusterIPs = Mapping[Address, bool]
"""ClusterIPs that have come (True) and gone (False) (services.Services.changed_cluster_ips)."""


class ApplyFailed(TryAgain):
    """The kernel, or the tool that speaks to it, refused a transaction; the message has its words."""


class Renderer(Protocol[T_co, L_contra]):
    """Desired state in, transactions out. No two plans that it holds have a frontend in common (claims.py)."""

    def update(self, changes: Changes, cluster_ips: ClusterIPs) -> tuple[T_co, ...]:
        """Take changes in. What it costs, and sends, grows with the change, not with what there is."""
        ...

    def configure(self, settings: Settings) -> tuple[T_co, ...]:
        """Take other settings: an address of the node that has gone, a ServiceCIDR that has come."""
        ...

    def accept_health_checks(self, ports: Collection[int]) -> tuple[T_co, ...]:
        """Let clients in to these ports of the node, all on which the Services' health is asked for, where rules of
        this mode are what lets clients in."""
        ...

    def resync(self, listing: L_contra) -> tuple[T_co, ...]:
        """Take `listing` for what the kernel holds; nothing is returned when that is what should be."""
        ...


class Applier(Protocol[T_contra, L_co]):
    """The kernel's side. Nothing that is not the mode's own is read or touched."""

    async def apply(self, transactions: Sequence[T_contra]) -> None:
        """Carry `transactions` out, in order. Raises ApplyFailed; those before the one that failed are done."""
        ...

    async def read(self) -> L_co:
        """What the kernel holds of this mode. Raises ApplyFailed."""
        ...

    async def remove(self) -> None:
        """Take everything of this mode out of the kernel; nothing when there is nothing."""
        ...


class PolicyRenderer(Protocol[T_co, L_contra]):
    """As Renderer, for the facts of policies (policy.policies)."""

    def update(self, facts: Mapping[Fact, Value], local_blocks: frozenset[Network]) -> tuple[T_co, ...]:
        """Take facts in, and the networks in which an address that nobody knows is closed."""
        ...

    def resync(self, listing: L_contra) -> tuple[T_co, ...]:
        """Take `listing` for what the kernel holds; nothing is returned when that is what should be."""
        ...


class PolicyApplier(Applier[T_contra, L_co], Protocol[T_contra, L_co]):
    """An Applier that knows its own processes, so that what they change is no drift."""

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here."""
        ...
