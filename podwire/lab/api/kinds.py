"""The kinds that are served: one row each, and a registry that learns the ones that it is shown.

A kind that the table does not have is stored and listed all the same when somebody sends one (its group, version and
plural stand in the path, its name in the body). `stored_only` marks kinds on which nothing in the lab acts yet: the
server says so once, so that nobody waits for a StatefulSet to make pods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One resource. `plural` is its name in paths. `group` is empty for core kinds.

    `status`, `scale`: has the subresource. `stored_only`: nothing acts on it. `builtin`: strategic merge patch applies.
    `fields`: field selectors besides metadata.name and metadata.namespace. `name_rule`: see `admission.NAME_RULES`.
    """

    group: str = ""
    version: str = "v1"
    kind: str
    plural: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    status: bool = False
    scale: bool = False
    stored_only: bool = False
    builtin: bool = True
    fields: tuple[str, ...] = ()
    name_rule: str = "subdomain"

    @property
    def api_version(self) -> str:
        """`v1`, or `apps/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies it in paths: group, version, plural."""
        return (self.group, self.version, self.plural)

    @property
    def resource(self) -> str:
        """What error messages call it: `pods`, `deployments.apps`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


NAMESPACES = Kind(
    kind="Namespace", plural="namespaces", namespaced=False, short=("ns",), status=True, fields=("status.phase",),
    name_rule="label",
)  # fmt: skip
NODES = Kind(
    kind="Node", plural="nodes", namespaced=False, short=("no",), status=True, fields=("spec.unschedulable",)
)  # fmt: skip
PODS = Kind(
    kind="Pod", plural="pods", short=("po",), status=True,
    fields=("spec.nodeName", "spec.hostNetwork", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName",
            "status.phase", "status.podIP"),
)  # fmt: skip
SERVICES = Kind(
    kind="Service", plural="services", short=("svc",), status=True, name_rule="service",
    fields=("spec.clusterIP", "spec.type"),
)  # fmt: skip
ENDPOINT_SLICES = Kind(group="discovery.k8s.io", kind="EndpointSlice", plural="endpointslices")
NETWORK_POLICIES = Kind(group="networking.k8s.io", kind="NetworkPolicy", plural="networkpolicies", short=("netpol",))
SERVICE_CIDRS = Kind(
    group="networking.k8s.io", kind="ServiceCIDR", plural="servicecidrs", namespaced=False, status=True
)  # fmt: skip
CRDS = Kind(
    group="apiextensions.k8s.io", kind="CustomResourceDefinition", plural="customresourcedefinitions",
    namespaced=False, short=("crd",), status=True,
)  # fmt: skip
DEPLOYMENTS = Kind(
    group="apps", kind="Deployment", plural="deployments", short=("deploy",), status=True, scale=True
)  # fmt: skip
REPLICA_SETS = Kind(
    group="apps", kind="ReplicaSet", plural="replicasets", short=("rs",), status=True, scale=True,
    fields=("status.replicas",),
)  # fmt: skip
CONFIG_MAPS = Kind(kind="ConfigMap", plural="configmaps", short=("cm",))
SECRETS = Kind(kind="Secret", plural="secrets", fields=("type",))
_EVENT_FIELDS = (
    "involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid", "reason", "type",
)  # fmt: skip


def _workload(kind: str, *short: str) -> Kind:
    return Kind(group="apps", kind=kind, plural=f"{kind.lower()}s", short=short, status=True, stored_only=True)


def _rbac(kind: str, *, namespaced: bool) -> Kind:
    return Kind(
        group="rbac.authorization.k8s.io", kind=kind, plural=f"{kind.lower()}s", namespaced=namespaced,
        stored_only=True, name_rule="segment",
    )  # fmt: skip


BUILTIN: tuple[Kind, ...] = (
    NAMESPACES,
    NODES,
    PODS,
    SERVICES,
    Kind(kind="Endpoints", plural="endpoints", short=("ep",), stored_only=True),
    CONFIG_MAPS,
    SECRETS,
    Kind(kind="ServiceAccount", plural="serviceaccounts", short=("sa",)),
    Kind(kind="Event", plural="events", short=("ev",), fields=_EVENT_FIELDS),
    DEPLOYMENTS,
    REPLICA_SETS,
    _workload("StatefulSet", "sts"),
    _workload("DaemonSet", "ds"),
    Kind(group="batch", kind="Job", plural="jobs", status=True, stored_only=True),
    Kind(group="batch", kind="CronJob", plural="cronjobs", short=("cj",), status=True, stored_only=True),
    ENDPOINT_SLICES,
    NETWORK_POLICIES,
    Kind(
        group="networking.k8s.io", kind="Ingress", plural="ingresses", short=("ing",), status=True, stored_only=True
    ),
    Kind(
        group="networking.k8s.io", kind="IngressClass", plural="ingressclasses", namespaced=False, stored_only=True
    ),
    SERVICE_CIDRS,
    Kind(
        group="policy", kind="PodDisruptionBudget", plural="poddisruptionbudgets", short=("pdb",), status=True,
        stored_only=True,
    ),
    Kind(group="coordination.k8s.io", kind="Lease", plural="leases"),
    _rbac("Role", namespaced=True),
    _rbac("RoleBinding", namespaced=True),
    _rbac("ClusterRole", namespaced=False),
    _rbac("ClusterRoleBinding", namespaced=False),
    CRDS,
)  # fmt: skip


class Registry:
    """The kinds of one server: the table above, and what it was shown since."""

    def __init__(self, kinds: Iterable[Kind] = BUILTIN) -> None:
        self._by_key: dict[tuple[str, str, str], Kind] = {}
        for kind in kinds:
            self.add(kind)

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._by_key.values())

    def add(self, kind: Kind) -> Kind:
        """Serves `kind` from now on. One that is known already stays as it is, and is returned."""
        return self._by_key.setdefault(kind.key, kind)

    def find(self, group: str, version: str, plural: str) -> Kind | None:
        """The kind at a path, or None."""
        return self._by_key.get((group, version, plural))

    def named(self, api_version: str, kind: str) -> Kind | None:
        """The kind that a manifest's `apiVersion` and `kind` mean, or None."""
        return next((k for k in self if k.api_version == api_version and k.kind == kind), None)

    def groups(self) -> dict[str, list[str]]:
        """Versions by group, in the order of the table; the core group is empty text."""
        found: dict[str, list[str]] = {}
        for kind in self:
            versions = found.setdefault(kind.group, [])
            if kind.version not in versions:
                versions.append(kind.version)
        return found


def guess(api_version: str, kind: str) -> Kind:
    """A kind that nobody declared: plural by English rule, and namespaced unless its name says that it is not."""
    group, _, version = api_version.rpartition("/")
    word = kind.lower()
    if word.endswith(("s", "x", "ch", "sh")):
        plural = f"{word}es"
    elif word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        plural = f"{word[:-1]}ies"
    else:
        plural = f"{word}s"
    cluster_wide = kind.startswith("Cluster") or kind.endswith("Class")
    return stored(group, version, kind, plural, namespaced=not cluster_wide)


def stored(group: str, version: str, kind: str, plural: str, *, namespaced: bool) -> Kind:
    """A kind that is kept and listed and on which nothing acts."""
    return Kind(
        group=group, version=version, kind=kind, plural=plural, namespaced=namespaced, stored_only=True,
        builtin=False, name_rule="segment",
    )  # fmt: skip


def declared_by(crd: Mapping[str, Any]) -> list[Kind]:
    """The kinds that a CustomResourceDefinition (apiextensions.k8s.io/v1) declares, one a served version."""
    spec = crd.get("spec") or {}
    names = spec.get("names") or {}
    if not (spec.get("group") and names.get("kind") and names.get("plural")):
        return []
    return [
        Kind(
            group=spec["group"], version=version["name"], kind=names["kind"], plural=names["plural"],
            namespaced=spec.get("scope") != "Cluster", short=tuple(names.get("shortNames") or ()), stored_only=True,
            status="status" in (version.get("subresources") or {}), builtin=False,
        )
        for version in spec.get("versions") or ()
        if version.get("name") and version.get("served", True)
    ]  # fmt: skip
