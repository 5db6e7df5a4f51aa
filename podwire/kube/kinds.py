"""Which kinds are followed, where they are in the API, and which of their objects are wanted.

A selection is data and not the text of a query, because it is applied twice: by the server, as `labelSelector` and
`fieldSelector`, and by a folder of manifests, which has no server (`selects`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

from podwire.kube.objects import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    Object,
    Pod,
    Service,
    ServiceCIDR,
)

T = TypeVar("T", bound=Object)
Key: TypeAlias = tuple[str, str]
"""(namespace, name); the namespace of a cluster-wide object is empty."""


class Kind(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One resource: `name` as manifests spell it, `plural` as paths do, `model` the struct it is decoded into."""

    name: str
    plural: str
    model: type[T]
    group: str = ""
    version: str = "v1"
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """`v1`, or `discovery.k8s.io/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def path(self) -> str:
        """Of the collection, in all namespaces."""
        return (
            f"/apis/{self.group}/{self.version}/{self.plural}" if self.group else f"/api/{self.version}/{self.plural}"
        )

    @property
    def resource(self) -> str:
        """As RBAC and error messages write it: `services`, `endpointslices.discovery.k8s.io`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def called(self, key: Key) -> str:
        """An object in words: `Service shop/web`."""
        return f"{self.name} {'/'.join(part for part in key if part)}"


SERVICES = Kind(name="Service", plural="services", model=Service)
ENDPOINT_SLICES = Kind(
    name="EndpointSlice", plural="endpointslices", group="discovery.k8s.io", model=EndpointSlice
)  # fmt: skip
NODES = Kind(name="Node", plural="nodes", namespaced=False, model=Node)
PODS = Kind(name="Pod", plural="pods", model=Pod)
NAMESPACES = Kind(name="Namespace", plural="namespaces", namespaced=False, model=Namespace)
NETWORK_POLICIES = Kind(
    name="NetworkPolicy", plural="networkpolicies", group="networking.k8s.io", model=NetworkPolicy
)  # fmt: skip
SERVICE_CIDRS = Kind(
    name="ServiceCIDR", plural="servicecidrs", group="networking.k8s.io", namespaced=False, model=ServiceCIDR
)  # fmt: skip
KINDS: tuple[Kind[Any], ...] = (
    SERVICES, ENDPOINT_SLICES, NODES, PODS, NAMESPACES, NETWORK_POLICIES, SERVICE_CIDRS
)  # fmt: skip

_FIELDS: Mapping[str, Callable[[Any], str]] = {
    "metadata.name": lambda obj: obj.metadata.name,
    "metadata.namespace": lambda obj: obj.metadata.namespace,
    "spec.nodeName": lambda obj: obj.spec.node_name,
}


class Wanted(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """The objects of a kind that carry none of `without_labels` and whose `fields` are as given, all of them.

    `optional`: a server that does not have the kind at all (404) has none of its objects, and that is no failure.
    """

    kind: Kind[T]
    without_labels: tuple[str, ...] = ()
    fields: tuple[tuple[str, str], ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        for field, _ in self.fields:
            if field not in _FIELDS:
                raise ValueError(f"fields: {field!r} cannot be selected by; there are {', '.join(_FIELDS)}")

    def query(self) -> dict[str, str]:
        """The parameters that make a server send only these."""
        query = {}
        if self.without_labels:
            query["labelSelector"] = ",".join(f"!{label}" for label in self.without_labels)
        if self.fields:
            query["fieldSelector"] = ",".join(f"{field}={value}" for field, value in self.fields)
        return query

    def selects(self, obj: T) -> bool:
        """Whether the object is one of them."""
        labels = obj.metadata.labels or {}
        if any(label in labels for label in self.without_labels):
            return False
        return all(_FIELDS[field](obj) == value for field, value in self.fields)


def proxied_services() -> Wanted[Service]:
    """The Services of the node's default proxy: those that name no other one. Headless ones among them."""
    return Wanted(kind=SERVICES, without_labels=(PROXY_NAME_LABEL,))


def proxied_endpoint_slices() -> Wanted[EndpointSlice]:
    """The slices that may belong to such a Service and have a virtual address in front of them."""
    return Wanted(kind=ENDPOINT_SLICES, without_labels=(PROXY_NAME_LABEL, HEADLESS_LABEL))


def one_node(name: str) -> Wanted[Node]:
    """The node of this name."""
    return Wanted(kind=NODES, fields=(("metadata.name", name),))


def pods_of_node(name: str) -> Wanted[Pod]:
    """The pods that are scheduled to the node of this name."""
    return Wanted(kind=PODS, fields=(("spec.nodeName", name),))
