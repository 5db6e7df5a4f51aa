"""What the daemon tells an operator of the cluster, in sentences: nothing of it keeps a pod from being added. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

from ipam_daemon.model import Backend, BackendType, Network, NodeRecord
from ipam_daemon.plan import is_complete

_LISTED = 5


def on_backends(ours: Backend, clusters: Backend) -> Iterator[str]:
    """A backend in this node's configuration that is not the cluster's."""
    if ours != clusters:
        yield (
            f"backend is {describe(ours)} in this node's configuration; "
            f"the cluster's holds, which is {describe(clusters)}"
        )


def on_doubles(own: NodeRecord, peers: Iterable[NodeRecord]) -> Iterator[str]:
    """Nodes that are recorded with what is this node's: most likely names that it had before."""
    doubles = _doubles(own, peers)
    if doubles:
        yield (
            f"what is recorded of {_listed(doubles)} is this node's own address or block, and is passed over: "
            "`podwire node forget` a name that nobody has any more"
        )


def on_unreached(
    own: NodeRecord, peers: Sequence[NodeRecord], routes: Container[Network], backend: BackendType
) -> Iterator[str]:
    """Nodes with blocks that no route leads to, but for those of `on_doubles`."""
    doubles = _doubles(own, peers)
    lost = [
        each.name
        for each in peers
        if is_complete(each) and any(cidr not in routes for cidr in each.blocks) and each.name not in doubles
    ]
    if lost:
        yield f"backend {backend} does not reach all pods of {_listed(lost)}: not on a network of this node's"


def describe(backend: Backend) -> str:
    """A backend in words."""
    return f"{backend.type} (VNI {backend.vni}, UDP port {backend.port})"


def _doubles(own: NodeRecord, peers: Iterable[NodeRecord]) -> list[str]:
    said = {*own.addresses, *own.blocks}
    return [each.name for each in peers if not said.isdisjoint((*each.addresses, *each.blocks))]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
