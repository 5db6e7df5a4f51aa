"""What a client asks before it asks for anything: groups, resources, and an OpenAPI document that forbids nothing.

kubectl maps `po` to `pods` by the resource lists, and decides by `/openapi/v3` whether the server validates fields: it
looks for a PATCH with a `fieldValidation` parameter for the kind (kubectl ≥ 1.27), and sends the object unchecked if it
finds one. Pure; built anew on every request, since kinds may have been learnt in between.
"""

from __future__ import annotations

from typing import Any

from podwire.lab.api.kinds import PODS, Kind, Registry

_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_SUBRESOURCES = {  # of pods: what is sent or read there, and how
    "binding": ("Binding", ["create"]), "eviction": ("Eviction", ["create"]), "log": ("Pod", ["get"]),
}  # fmt: skip


# kubectl 1.27 and 1.28 fetch version 2 before they apply anything, as protobuf, and use it only for kinds that it
# describes: this one has a version and nothing else (gnostic's openapiv2.Document, field 1).
OPENAPI_V2 = b"\x0a\x032.0"
OPENAPI_V2_TYPE = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"


def api_versions() -> dict[str, Any]:
    """`/api`"""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def group_list(registry: Registry) -> dict[str, Any]:
    """`/apis`"""
    groups = [_group(name, versions) for name, versions in registry.groups().items() if name]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def group(registry: Registry, name: str) -> dict[str, Any] | None:
    """`/apis/GROUP`; None if there is no such group."""
    versions = registry.groups().get(name) if name else None
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)} if versions else None


def _group(name: str, versions: list[str]) -> dict[str, Any]:
    entries = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": entries, "preferredVersion": entries[0]}


def resource_list(registry: Registry, api_version: str) -> dict[str, Any] | None:
    """`/api/v1`, `/apis/GROUP/VERSION`; None if nothing is served there."""
    kinds = [kind for kind in registry if kind.api_version == api_version]
    if not kinds:
        return None
    resources = [entry for kind in kinds for entry in _resources(kind)]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources}


def _resources(kind: Kind) -> list[dict[str, Any]]:
    base = {"namespaced": kind.namespaced, "kind": kind.kind}
    entries = [
        {
            **base,
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "verbs": _VERBS,
            **({"shortNames": list(kind.short)} if kind.short else {}),
            **({"categories": ["all"]} if kind.plural in ("pods", "services") or kind.group == "apps" else {}),
        }
    ]
    if kind.status:
        status = {**base, "name": f"{kind.plural}/status", "singularName": "", "verbs": ["get", "patch", "update"]}
        entries.append(status)
    if kind.scale:
        scale = {**base, "group": "autoscaling", "version": "v1", "kind": "Scale"}
        verbs = ["get", "patch", "update"]
        entries.append({**scale, "name": f"{kind.plural}/scale", "singularName": "", "verbs": verbs})
    if kind is PODS:
        for name, (what, verbs) in _SUBRESOURCES.items():
            entries.append({**base, "kind": what, "name": f"pods/{name}", "singularName": "", "verbs": verbs})
    return entries


def openapi_index(registry: Registry) -> dict[str, Any]:
    """`/openapi/v3`: one document per group and version. The hash lets kubectl keep one until its kinds change."""
    paths = {}
    for name, versions in registry.groups().items():
        for version in versions:
            where = f"apis/{name}/{version}" if name else f"api/{version}"
            count = sum(kind.group == name and kind.version == version for kind in registry)
            paths[where] = {"serverRelativeURL": f"/openapi/v3/{where}?hash={count}"}
    return {"paths": paths}


def openapi_document(registry: Registry, api_version: str) -> dict[str, Any] | None:
    """`/openapi/v3/api/v1`, `/openapi/v3/apis/GROUP/VERSION`; None if nothing is served there."""
    kinds = [kind for kind in registry if kind.api_version == api_version]
    if not kinds:
        return None
    return {
        "openapi": "3.0.0",
        "info": {"title": "Podwire lab", "version": "v1"},
        "paths": {_path(kind): {"patch": _patch_operation(kind)} for kind in kinds},
        "components": {"schemas": {f"{kind.version}.{kind.kind}": _schema(kind) for kind in kinds}},
    }


def _path(kind: Kind) -> str:
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    scope = "/namespaces/{namespace}" if kind.namespaced else ""
    return f"{root}{scope}/{kind.plural}/{{name}}"


def _gvk(kind: Kind) -> dict[str, str]:
    return {"group": kind.group, "version": kind.version, "kind": kind.kind}


def _patch_operation(kind: Kind) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
        for name in ("dryRun", "fieldManager", "fieldValidation", "force")
    ]
    return {
        "parameters": parameters,
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind": _gvk(kind),
    }


def _schema(kind: Kind) -> dict[str, Any]:
    return {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
        "x-kubernetes-group-version-kind": [_gvk(kind)],
    }
