"""Manifests: what is read from files, folders and standard input, in which order, and how each mistake is told."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from podwire import manifests
from podwire.manifests import ManifestError

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\n"

READ: dict[str, tuple[str, list[str]]] = {
    "one document": (POD % "a", ["a"]),
    "several documents, empty ones and comments between": (
        "---\n" + POD % "a" + "---\n---\n# no\n---\n" + POD % "b",
        ["a", "b"],
    ),
    "nothing at all": ("", []),
    "JSON": ('{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}', ["a"]),
    "a List, and one inside another": (
        "apiVersion: v1\nkind: List\nitems:\n"
        "- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n"
        "- {apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod, metadata: {name: b}}]}\n",
        ["a", "b"],
    ),
    "a PodList, whose items need not say what they are": (
        "apiVersion: v1\nkind: PodList\nitems:\n- {metadata: {name: a}}\n",
        ["a"],
    ),
    "anchors and merged keys, one of them given again": (
        "apiVersion: v1\nkind: Pod\nx: &base {name: a, labels: {l: m}}\nmetadata: {<<: *base, name: b}\n",
        ["b"],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_objects_come_in_the_order_they_stand(case: str) -> None:
    text, names = READ[case]
    assert [obj["metadata"]["name"] for obj in manifests.parse(text, "pods.yaml")] == names


def test_an_item_of_a_typed_list_gets_its_kind() -> None:
    (obj,) = manifests.parse(READ["a PodList, whose items need not say what they are"][0], "x")
    assert (obj["apiVersion"], obj["kind"]) == ("v1", "Pod")


def test_values_are_those_of_json() -> None:
    text = POD % "a" + "spec: {at: 2024-01-02, when: 2024-01-02T03:04:05Z, 80: http, mode: 0644, on: yes}\n"
    (obj,) = manifests.parse(text, "x")
    assert obj["spec"] == {
        "at": "2024-01-02", "when": "2024-01-02T03:04:05Z", "80": "http", "mode": 0o644, "on": True
    }  # fmt: skip


WRONG: dict[str, tuple[str, str]] = {
    "not YAML": (POD % "a" + "---\na: [1,\n", "pods.yaml: document 2, line"),
    "a key given twice": (POD % "a" + "kind: Service\n", "document 1, line 4: not YAML: key 'kind' is given twice"),
    "no kind": (POD % "a" + "---\napiVersion: v1\nmetadata: {name: b}\n", "document 2: kind is missing"),
    "no apiVersion": ("kind: Pod\nmetadata: {name: b}\n", "document 1: apiVersion is missing"),
    "an apiVersion that is a number": ("apiVersion: 1\nkind: Pod\n", "document 1: apiVersion is 1; it should be text"),
    "no metadata": ("apiVersion: v1\nkind: Pod\n", "document 1: Pod: metadata is missing"),
    "no name": ("apiVersion: v1\nkind: Pod\nmetadata: {labels: {}}\n", "document 1: Pod: metadata.name is missing"),
    "a name that is a number": ("apiVersion: v1\nkind: Pod\nmetadata: {name: 12}\n", "metadata.name is 12; quote it"),
    "a list": ("- a\n", "document 1: this is a list"),
    "mere text": ("hello\n", "document 1: this is the value 'hello'"),
    "a bad item of a List": (
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n- {kind: Pod}\n",
        "document 1: items[1]: apiVersion is missing",
    ),
    "an object of Python's": ("!!python/object/apply:os.getcwd []\n", "document 1, line 1: not YAML"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told_with_file_document_and_field(case: str) -> None:
    text, said = WRONG[case]
    with pytest.raises(ManifestError) as caught:
        manifests.parse(text, "pods.yaml")
    assert str(caught.value).startswith("pods.yaml: ")
    assert said in str(caught.value)


def test_files_folders_and_standard_input_are_read_in_the_order_given(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    for name, pod in (("2.yml", "second"), ("1.yaml", "first"), ("3.json", "third"), ("README.md", "none")):
        (folder / name).write_text(POD % pod)
    single = tmp_path / "single.txt"
    single.write_text(POD % "single")
    objects = manifests.load([single, "-", str(folder)], io.StringIO(POD % "stdin"))
    assert [obj["metadata"]["name"] for obj in objects] == ["single", "stdin", "first", "second", "third"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.yaml", None, "missing.yaml: cannot be read: No such file"),
        ("binary.yaml", b"\xff\xfe\x00", "binary.yaml: not UTF-8 text"),
        ("empty/", None, "empty: no manifest in this folder"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        manifests.load([path])
    assert said in str(caught.value)


def test_namespaces_and_definitions_are_applied_first() -> None:
    kinds = ["Pod", "CustomResourceDefinition", "Service", "Namespace", "Deployment", "Namespace"]
    objects = [{"kind": kind, "metadata": {"name": str(number)}} for number, kind in enumerate(kinds)]
    assert [obj["metadata"]["name"] for obj in manifests.apply_order(objects)] == ["3", "5", "1", "0", "2", "4"]
