"""Manifests: YAML or JSON files, folders of them, or standard input, read into plain dicts in the order they stand.

YAML is read as Kubernetes reads it: timestamps stay text, and a key given twice is an error. `List` objects are taken
apart. Whatever is wrong is said with the file, the number of the document in it (from 1) and the field.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from podwire.errors import PodwireError

Object = dict[str, Any]
_SUFFIXES = (".yaml", ".yml", ".json")
_FIRST = {"Namespace": 0, "CustomResourceDefinition": 1}  # what others may need; all other kinds keep their order


class ManifestError(PodwireError):
    """A manifest that cannot be used; the message says where and what would be right."""


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is eight times as fast


class _Loader(_SafeLoader):  # type: ignore[misc]  # which of the two it is, is known at run time
    """YAML whose values are all JSON's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        written: set[str] = set()  # before `<<` is resolved, whose keys may be given again
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in written:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            written.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(sources: Sequence[str | Path], stdin: TextIO | None = None) -> list[Object]:
    """The objects of all sources, in order: a file, a folder (its .yaml, .yml and .json files by name), or `-`.

    Raises ManifestError for what cannot be read, is not YAML, or is no Kubernetes object.
    """
    return [obj for source in sources for name, text in _texts(source, stdin) for obj in parse(text, name)]


def parse(text: str, source: str) -> list[Object]:
    """The objects of a YAML stream. `source` is what errors call it."""
    found: list[Object] = []
    for number, document in enumerate(documents(text, source), start=1):
        if document is not None:
            found += objects(document, f"{source}: document {number}")
    return found


def documents(text: str, source: str) -> list[Any]:
    """The plain documents of a YAML (or JSON) stream, empty ones as None. Raises ManifestError with the line."""
    found: list[Any] = []
    try:
        for document in yaml.load_all(text, Loader=_Loader):
            found.append(document)  # noqa: PERF402 (one by one: the number of those before an error is told)
    except (yaml.YAMLError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ManifestError(f"{source}: document {len(found) + 1}{line}: not YAML: {problem}") from error
    return found


def apply_order(objects: Sequence[Object]) -> list[Object]:
    """Namespaces first, then definitions of kinds, then the rest as it stands. Reversed, the order to delete in."""
    return sorted(objects, key=lambda obj: _FIRST.get(obj["kind"], len(_FIRST)))


def _texts(source: str | Path, stdin: TextIO | None) -> Iterator[tuple[str, str]]:
    if str(source) == "-":
        yield "standard input", (stdin or sys.stdin).read()
        return
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ManifestError(f"{path}: no manifest in this folder; their names end in {', '.join(_SUFFIXES)}")
    for file in files:
        try:
            yield str(file), file.read_text(encoding="utf-8")
        except OSError as error:
            raise ManifestError(f"{file}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ManifestError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def objects(document: Any, where: str) -> Iterator[Object]:
    """The objects of one plain document; a list is taken apart. Raises ManifestError, which begins with `where`."""
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: this is {_called(document)}; a manifest is a mapping with apiVersion and kind")
    for field in ("apiVersion", "kind"):
        value = document.get(field)
        if not isinstance(value, str) or not value:
            shown = "is missing" if value is None else f"is {value!r}"
            example = "v1 or apps/v1" if field == "apiVersion" else "Pod"
            raise ManifestError(f"{where}: {field} {shown}; it should be text such as {example}")
    if document["kind"].endswith("List") and isinstance(document.get("items"), list):
        for number, item in enumerate(document["items"]):
            if isinstance(item, dict) and document["kind"] != "List":  # items of a PodList do not say what they are
                item = {"apiVersion": document["apiVersion"], "kind": document["kind"].removesuffix("List"), **item}
            yield from objects(item, f"{where}: items[{number}]")
        return
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        raise ManifestError(f"{where}: {document['kind']}: metadata is missing; it should hold the object's name")
    if not metadata.get("name") and not metadata.get("generateName"):
        raise ManifestError(f"{where}: {document['kind']}: metadata.name is missing")
    for field in ("name", "namespace"):
        if not isinstance(metadata.get(field, ""), str):
            raise ManifestError(f"{where}: {document['kind']}: metadata.{field} is {metadata[field]!r}; quote it")
    yield document


def _called(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the value {value!r}"
