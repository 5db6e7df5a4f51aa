"""The objects of a cluster that decide who reaches whom, at one moment: what manifests say, or an API. Pure."""

from __future__ import annotations

import msgspec

from kube_proxy_lite.model import Address
from podwire.kube.objects import EndpointSlice, Namespace, NetworkPolicy, Node, Pod, Service


class Objects(msgspec.Struct, frozen=True, kw_only=True):
    """`invented` are the addresses that were made up for pods that have none; `problems` are what was left out."""

    namespaces: tuple[Namespace, ...] = ()
    pods: tuple[Pod, ...] = ()
    policies: tuple[NetworkPolicy, ...] = ()
    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    nodes: tuple[Node, ...] = ()
    invented: frozenset[Address] = frozenset()
    problems: tuple[str, ...] = ()
