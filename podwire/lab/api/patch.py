"""The four ways to change an object in part, as pure functions of it and the patch.

| content type                           | function          | source                                           |
| -------------------------------------- | ----------------- | ------------------------------------------------ |
| application/merge-patch+json           | `merge_patch`     | RFC 7386                                         |
| application/json-patch+json            | `json_patch`      | RFC 6902                                         |
| application/strategic-merge-patch+json | `strategic_patch` | Kubernetes' strategic-merge-patch.md             |
| application/apply-patch+yaml           | `apply_patch`     | an approximation of server-side apply, see there |

Nothing given is changed in place; what is returned may share parts with what was given. Costs one walk over the patch
and, for lists with a merge key, the product of the two lists' lengths (they are containers and ports: a handful).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from podwire.lab.api.errors import BadRequest, Invalid

Path = tuple[str, ...]
MergeKeys = Mapping[Path, str]  # field path without indices → the key of its elements; "" for a set of plain values

_CONTAINER_LISTS = {
    (): "name",
    ("ports",): "containerPort",
    ("env",): "name",
    ("volumeMounts",): "mountPath",
    ("volumeDevices",): "devicePath",
}
_POD_SPEC: dict[Path, str] = {
    ("volumes",): "name",
    ("imagePullSecrets",): "name",
    ("hostAliases",): "ip",
    ("topologySpreadConstraints",): "topologyKey",
    **{
        (containers, *path): key
        for containers in ("containers", "initContainers", "ephemeralContainers")
        for path, key in _CONTAINER_LISTS.items()
    },
}
_COMMON: dict[Path, str] = {
    ("metadata", "ownerReferences"): "uid",
    ("metadata", "finalizers"): "",
    ("status", "conditions"): "type",
}
_TEMPLATE: dict[Path, str] = {("spec", "template", "spec", *path): key for path, key in _POD_SPEC.items()}
_BY_KIND: dict[str, dict[Path, str]] = {
    "Pod": {
        **{("spec", *path): key for path, key in _POD_SPEC.items()},
        ("status", "podIPs"): "ip",
        ("status", "hostIPs"): "ip",
    },
    **dict.fromkeys(("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job"), _TEMPLATE),
    "Service": {("spec", "ports"): "port"},
    "Node": {("status", "addresses"): "type", ("spec", "podCIDRs"): ""},
    "ServiceAccount": {("secrets",): "name", ("imagePullSecrets",): "name"},
}


def merge_keys(kind: str) -> MergeKeys:
    """The lists of a built-in kind that are merged element by element; every other list is replaced whole."""
    return {**_COMMON, **_BY_KIND.get(kind, {})}


def merge_patch(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386): null removes, objects merge, everything else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


# --- strategic merge --------------------------------------------------------------------------------------------

_ORDER, _DELETE_VALUES = "$setElementOrder/", "$deleteFromPrimitiveList/"


def strategic_patch(target: Any, patch: Any, keys: MergeKeys, path: Path = ()) -> Any:
    """Strategic merge patch with the directives $patch, $retainKeys, $setElementOrder, $deleteFromPrimitiveList.

    Raises BadRequest for a directive that does not exist and for a list element without its merge key.
    """
    if isinstance(patch, list):
        return _merge_list(target if isinstance(target, list) else [], patch, keys, path)
    if not isinstance(patch, Mapping):
        return patch
    directive = patch.get("$patch", "merge")
    if directive not in ("merge", "replace", "delete"):
        raise BadRequest(f"{_dotted(path)}: $patch is {directive!r}; it is one of merge, replace, delete")
    fields = {key: value for key, value in patch.items() if not key.startswith("$")}
    if directive == "replace":
        return fields
    if directive == "delete":
        return {}
    merged = dict(target) if isinstance(target, Mapping) else {}
    if "$retainKeys" in patch:
        merged = {key: value for key, value in merged.items() if key in patch["$retainKeys"]}
    for key, value in patch.items():
        if key.startswith(_DELETE_VALUES):
            field = key.removeprefix(_DELETE_VALUES)
            merged[field] = [one for one in merged.get(field) or [] if one not in value]
    for key, value in fields.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = strategic_patch(merged.get(key), value, keys, (*path, key))
    for key, value in patch.items():
        if key.startswith(_ORDER):
            field = key.removeprefix(_ORDER)
            if field in merged:
                merged[field] = _ordered(merged[field], value, keys.get((*path, field)))
    return merged


def _merge_list(target: list[Any], patch: list[Any], keys: MergeKeys, path: Path) -> list[Any]:
    key = keys.get(path)
    if any(isinstance(one, Mapping) and one.get("$patch") == "replace" and len(one) == 1 for one in patch):
        return [one for one in patch if not (isinstance(one, Mapping) and "$patch" in one)]
    if key is None:
        return patch
    if key == "":
        return [*target, *(one for one in patch if one not in target)]
    merged = list(target)
    for element in patch:
        if not isinstance(element, Mapping) or key not in element:
            raise BadRequest(f"{_dotted(path)}: an element has no {key!r}, by which elements are told apart")
        at = _index(merged, element, key)
        if element.get("$patch") == "delete":
            if at is not None:
                del merged[at]
        elif at is None:
            merged.append(strategic_patch(None, element, keys, path))
        else:
            merged[at] = strategic_patch(merged[at], element, keys, path)
    return merged


def _index(elements: Sequence[Any], wanted: Mapping[str, Any], key: str) -> int | None:
    """Where the element of the same key stands. A port that says its protocol means that one: 53/UDP is not 53/TCP."""
    protocol = wanted.get("protocol") if key in ("containerPort", "port") else None
    for at, element in enumerate(elements):
        if isinstance(element, Mapping) and element.get(key) == wanted[key]:  # noqa: SIM102
            if protocol is None or element.get("protocol", "TCP") == protocol:
                return at
    return None


def _ordered(elements: list[Any], order: list[Any], key: str | None) -> list[Any]:
    """`elements` in the given order; those that it does not name follow as they stood."""

    def place(element: Any) -> int:
        for at, wanted in enumerate(order):
            same = element == wanted if not key else _index([element], wanted, key) is not None
            if same:
                return at
        return len(order)

    return sorted(elements, key=place)


def _dotted(path: Path) -> str:
    return ".".join(path) or "patch"


# --- apply ------------------------------------------------------------------------------------------------------


def apply_patch(current: Any, config: Any, last: Any, keys: MergeKeys) -> Any:
    """Server-side apply, approximated: `config` is merged in, and what `last` had and `config` has not is removed.

    `last` is what the same field manager applied before (None at first). Real server-side apply also tracks which
    other managers own a field and answers 409 when two disagree; here the last one wins, as with `--force-conflicts`.
    """
    if last is not None:
        current = strategic_patch(current, _removals(last, config, keys, ()), keys)
    return strategic_patch(current, config, keys)


def _removals(last: Mapping[str, Any], now: Mapping[str, Any], keys: MergeKeys, path: Path) -> dict[str, Any]:
    """The strategic patch that takes away what `last` had and `now` has not."""
    patch: dict[str, Any] = {}
    for field, before in last.items():
        where = (*path, field)
        after = now.get(field)
        if after is None:
            patch[field] = None
        elif isinstance(before, Mapping) and isinstance(after, Mapping):
            patch[field] = _removals(before, after, keys, where)
        elif isinstance(before, list) and isinstance(after, list) and where in keys:
            key = keys[where]
            if key == "":
                patch[_DELETE_VALUES + field] = [one for one in before if one not in after]
            else:
                patch[field] = _element_removals(before, after, keys, where)
    return patch


def _element_removals(before: list[Any], after: list[Any], keys: MergeKeys, path: Path) -> list[Any]:
    key, patch = keys[path], []
    for element in before:
        identity = {name: element[name] for name in (key, "protocol") if name in element}
        at = _index(after, element, key)
        if at is None:
            patch.append({**identity, "$patch": "delete"})
        else:
            patch.append({**_removals(element, after[at], keys, path), **identity})
    return patch


# --- JSON patch -------------------------------------------------------------------------------------------------


def json_patch(target: Any, operations: Any) -> Any:
    """JSON patch (RFC 6902): add, remove, replace, move, copy, test, in order, all or nothing.

    Raises BadRequest for what is not a patch, Invalid for an operation that does not fit the object.
    """
    if not isinstance(operations, list):
        raise BadRequest("a JSON patch is a list of operations")
    document = copy.deepcopy(target)
    for number, operation in enumerate(operations):
        if not isinstance(operation, Mapping) or not isinstance(operation.get("path"), str):
            raise BadRequest(f"operation {number}: it needs an op and a path")
        try:
            document = _operate(document, operation)
        except (LookupError, TypeError, ValueError) as error:
            raise Invalid(
                f"operation {number}: {operation.get('op')} {operation['path']!r} does not fit the object: {error}"
            ) from error
    return document


def _operate(document: Any, operation: Mapping[str, Any]) -> Any:
    path = _pointer(operation["path"])
    match operation.get("op"):
        case "add":
            return _add(document, path, copy.deepcopy(operation["value"]))
        case "remove":
            return _remove(document, path)
        case "replace":
            _look(document, path)
            return (
                _add(_remove(document, path), path, copy.deepcopy(operation["value"])) if path else operation["value"]
            )
        case "move":
            source = _pointer(operation["from"])
            if path[: len(source)] == source and path != source:
                raise ValueError(f"{operation['from']!r} cannot move into itself")
            value = _look(document, source)
            return _add(_remove(document, source), path, value)
        case "copy":
            return _add(document, path, copy.deepcopy(_look(document, _pointer(operation["from"]))))
        case "test":
            found = _look(document, path)
            if found != operation["value"]:
                raise ValueError(f"the value is {found!r}, not {operation['value']!r}")
            return document
        case other:
            raise BadRequest(f"op is {other!r}; it is one of add, remove, replace, move, copy, test")


def _pointer(text: str) -> list[str]:
    """The steps of a JSON pointer (RFC 6901)."""
    if text and not text.startswith("/"):
        raise ValueError(f"{text!r} does not start with /")
    return [step.replace("~1", "/").replace("~0", "~") for step in text.split("/")[1:]]


def _step(container: Any, step: str) -> Any:
    """The key (for an object) or index (for a list) that a step means."""
    if isinstance(container, list):
        if not step.isascii() or not step.isdigit() or (step != "0" and step.startswith("0")):
            raise ValueError(f"{step!r} is not an index")
        return int(step)
    if not isinstance(container, dict):
        raise TypeError(f"nothing is below {step!r}")
    return step


def _look(document: Any, path: list[str]) -> Any:
    for step in path:
        document = document[_step(document, step)]
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent = _look(document, path[:-1])
    if isinstance(parent, list):
        at = len(parent) if path[-1] == "-" else _step(parent, path[-1])
        if at > len(parent):
            raise IndexError(f"the list has {len(parent)} elements")
        parent.insert(at, value)
    else:
        parent[_step(parent, path[-1])] = value
    return document


def _remove(document: Any, path: list[str]) -> Any:
    if not path:
        return None
    parent = _look(document, path[:-1])
    del parent[_step(parent, path[-1])]
    return document
