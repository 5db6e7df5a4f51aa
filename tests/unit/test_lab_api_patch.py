"""The lab's API: every kind of patch, as tables of before, patch and after; and the laws that merge patches obey."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.lab.api import patch
from podwire.lab.api.errors import BadRequest, Invalid

POD = patch.merge_keys("Pod")


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "web"}, "spec": spec}


RFC_7386 = [  # the examples of RFC 7386, appendix A
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "change", "result"), RFC_7386)
def test_merge_patch_does_as_the_rfc_shows(target: Any, change: Any, result: Any) -> None:
    assert patch.merge_patch(target, change) == result


A, B = {"name": "a", "image": "1"}, {"name": "b", "image": "1"}
STRATEGIC: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a container is changed by name and the others stay": (
        pod(containers=[A, B]),
        {"spec": {"containers": [{"name": "b", "image": "2"}]}},
        pod(containers=[A, {"name": "b", "image": "2"}]),
    ),
    "a new container is appended": (
        pod(containers=[A]),
        {"spec": {"containers": [B]}},
        pod(containers=[A, B]),
    ),
    "a container is deleted by directive": (
        pod(containers=[A, B]),
        {"spec": {"containers": [{"name": "a", "$patch": "delete"}]}},
        pod(containers=[B]),
    ),
    "deleting what is not there changes nothing": (
        pod(containers=[A]),
        {"spec": {"containers": [{"name": "z", "$patch": "delete"}]}},
        pod(containers=[A]),
    ),
    "a list is replaced whole by directive": (
        pod(containers=[A, B]),
        {"spec": {"containers": [{"name": "c"}, {"$patch": "replace"}]}},
        pod(containers=[{"name": "c"}]),
    ),
    "an object is replaced whole by directive": (
        pod(containers=[A], securityContext={"runAsUser": 1, "fsGroup": 2}),
        {"spec": {"securityContext": {"$patch": "replace", "runAsUser": 3}}},
        pod(containers=[A], securityContext={"runAsUser": 3}),
    ),
    "an object is emptied by directive": (
        pod(nodeSelector={"disk": "ssd"}),
        {"spec": {"nodeSelector": {"$patch": "delete"}}},
        pod(nodeSelector={}),
    ),
    "null removes a field": (
        pod(nodeName="node1", hostNetwork=True),
        {"spec": {"hostNetwork": None}},
        pod(nodeName="node1"),
    ),
    "only the retained keys of a volume stay": (
        pod(volumes=[{"name": "v", "emptyDir": {}}]),
        {"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]}},
        pod(volumes=[{"name": "v", "hostPath": {"path": "/x"}}]),
    ),
    "a given order is taken up": (
        pod(containers=[A, B]),
        {"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}], "containers": [{"name": "c"}]}},
        pod(containers=[{"name": "c"}, B, A]),
    ),
    "environment goes by name, mounts by path": (
        pod(containers=[{"name": "a", "env": [{"name": "X", "value": "1"}], "volumeMounts": [{"mountPath": "/a"}]}]),
        {
            "spec": {
                "containers": [
                    {
                        "name": "a",
                        "env": [{"name": "X", "value": "2"}, {"name": "Y", "value": "3"}],
                        "volumeMounts": [{"mountPath": "/a", "readOnly": True}],
                    }
                ]
            }
        },
        pod(
            containers=[
                {
                    "name": "a",
                    "env": [{"name": "X", "value": "2"}, {"name": "Y", "value": "3"}],
                    "volumeMounts": [{"mountPath": "/a", "readOnly": True}],
                }
            ]
        ),
    ),
    "53/UDP is not 53/TCP when the patch says the protocol": (
        pod(containers=[{"name": "a", "ports": [{"containerPort": 53, "protocol": "UDP"}]}]),
        {"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 53, "protocol": "TCP"}]}]}},
        pod(
            containers=[
                {
                    "name": "a",
                    "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}],
                }
            ]
        ),
    ),
    "a list without merge key is replaced": (
        pod(tolerations=[{"key": "a"}]),
        {"spec": {"tolerations": [{"key": "b"}]}},
        pod(tolerations=[{"key": "b"}]),
    ),
    "finalizers are a set": (
        {"metadata": {"finalizers": ["a", "b"]}},
        {"metadata": {"finalizers": ["b", "c"]}},
        {"metadata": {"finalizers": ["a", "b", "c"]}},
    ),
    "plain values are taken out of a set": (
        {"metadata": {"finalizers": ["a", "b"]}},
        {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]}},
        {"metadata": {"finalizers": ["b"]}},
    ),
    "conditions go by type": (
        {"status": {"conditions": [{"type": "Ready", "status": "False"}, {"type": "PodScheduled", "status": "True"}]}},
        {"status": {"conditions": [{"type": "Ready", "status": "True"}]}},
        {"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}]}},
    ),
    "directives inside something new leave no trace": (
        pod(),
        {"spec": {"containers": [{"name": "a", "$setElementOrder/env": [], "env": [{"name": "X"}], "tty": None}]}},
        pod(containers=[{"name": "a", "env": [{"name": "X"}]}]),
    ),
}


@pytest.mark.parametrize("case", STRATEGIC)
def test_strategic_merge_patch(case: str) -> None:
    before, change, after = STRATEGIC[case]
    assert patch.strategic_patch(before, change, POD) == after


def test_the_lists_of_a_template_merge_like_those_of_a_pod() -> None:
    before = {"spec": {"template": {"spec": {"containers": [A, B]}}}}
    change = {"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "2"}]}}}}
    after = patch.strategic_patch(before, change, patch.merge_keys("Deployment"))
    assert [one["image"] for one in after["spec"]["template"]["spec"]["containers"]] == ["2", "1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spec": {"containers": [{"image": "x"}]}}, "spec.containers: an element has no 'name'"),
        ({"spec": {"$patch": "explode"}}, "spec: $patch is 'explode'"),
    ],
)
def test_a_strategic_patch_that_makes_no_sense_says_where(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        patch.strategic_patch(pod(containers=[A]), change, POD)
    assert said in str(caught.value)


JSON_PATCH: dict[str, tuple[Any, list[dict[str, Any]], Any]] = {
    "add a field": ({"a": 1}, [{"op": "add", "path": "/b", "value": 2}], {"a": 1, "b": 2}),
    "insert into a list": ({"a": [1, 3]}, [{"op": "add", "path": "/a/1", "value": 2}], {"a": [1, 2, 3]}),
    "append to a list": ({"a": [1]}, [{"op": "add", "path": "/a/-", "value": 2}], {"a": [1, 2]}),
    "remove a field": ({"a": 1, "b": 2}, [{"op": "remove", "path": "/b"}], {"a": 1}),
    "remove an element": ({"a": [1, 2]}, [{"op": "remove", "path": "/a/0"}], {"a": [2]}),
    "replace an element where it stands": (
        {"a": [1, 2]},
        [{"op": "replace", "path": "/a/0", "value": 9}],
        {"a": [9, 2]},
    ),
    "replace everything": ({"a": 1}, [{"op": "replace", "path": "", "value": {"b": 2}}], {"b": 2}),
    "move": ({"a": {"x": 1}, "b": {}}, [{"op": "move", "from": "/a/x", "path": "/b/y"}], {"a": {}, "b": {"y": 1}}),
    "copy": ({"a": [1]}, [{"op": "copy", "from": "/a", "path": "/b"}], {"a": [1], "b": [1]}),
    "test that holds": ({"a": 1}, [{"op": "test", "path": "/a", "value": 1}], {"a": 1}),
    "escaped steps": (
        {"labels": {"a/b": "1", "c~d": "2"}},
        [{"op": "remove", "path": "/labels/a~1b"}, {"op": "replace", "path": "/labels/c~0d", "value": "3"}],
        {"labels": {"c~d": "3"}},
    ),
}


@pytest.mark.parametrize("case", JSON_PATCH)
def test_json_patch(case: str) -> None:
    before, operations, after = JSON_PATCH[case]
    assert patch.json_patch(before, operations) == after


@pytest.mark.parametrize(
    ("operations", "error", "said"),
    [
        ({"op": "add"}, BadRequest, "a JSON patch is a list"),
        ([{"op": "add"}], BadRequest, "operation 0"),
        ([{"op": "merge", "path": "/a"}], BadRequest, "op is 'merge'"),
        ([{"op": "remove", "path": "/nowhere"}], Invalid, "/nowhere"),
        ([{"op": "replace", "path": "/nowhere", "value": 1}], Invalid, "/nowhere"),
        ([{"op": "test", "path": "/a", "value": 2}], Invalid, "the value is 1, not 2"),
        ([{"op": "add", "path": "/list/9", "value": 2}], Invalid, "the list has 2 elements"),
        ([{"op": "remove", "path": "/list/-1"}], Invalid, "'-1' is not an index"),
        ([{"op": "add", "path": "/a/b", "value": 2}], Invalid, "nothing is below"),
        ([{"op": "add", "path": "/b"}], Invalid, "value"),
        ([{"op": "move", "from": "/sub", "path": "/sub/x"}], Invalid, "into itself"),
    ],
)
def test_a_json_patch_that_does_not_fit_changes_nothing(operations: Any, error: type[Exception], said: str) -> None:
    before = {"a": 1, "list": [1, 2], "sub": {}}
    first: list[Any] = [{"op": "add", "path": "/new", "value": 1}]
    whole = [*first, *operations] if isinstance(operations, list) and said != "operation 0" else operations
    with pytest.raises(error) as caught:
        patch.json_patch(before, whole)
    assert said in str(caught.value)
    assert before == {"a": 1, "list": [1, 2], "sub": {}}


def test_what_a_manager_no_longer_applies_is_removed_and_what_others_set_stays() -> None:
    first = pod(containers=[{"name": "a", "image": "1", "env": [{"name": "X"}, {"name": "Y"}]}, B], hostNetwork=True)
    second = pod(containers=[{"name": "a", "image": "2", "env": [{"name": "X"}]}])
    current = patch.apply_patch(first, {"metadata": {"labels": {"by": "another"}}}, None, POD)
    after = patch.apply_patch(current, second, first, POD)
    assert after["spec"] == {"containers": [{"name": "a", "image": "2", "env": [{"name": "X"}]}]}
    assert after["metadata"] == {"name": "web", "labels": {"by": "another"}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


@given(target=JSON, change=JSON)
def test_merging_twice_is_merging_once(target: Any, change: Any) -> None:
    once = patch.merge_patch(target, change)
    assert patch.merge_patch(once, change) == once


@given(target=OBJECTS)
def test_an_empty_merge_patch_changes_nothing(target: Any) -> None:
    assert patch.merge_patch(target, {}) == target


@given(target=OBJECTS, change=OBJECTS)
def test_without_merge_keys_and_directives_a_strategic_patch_is_a_merge_patch(target: Any, change: Any) -> None:
    assert patch.strategic_patch(target, change, {}) == patch.merge_patch(target, change)


NAMED = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("xyz")}, optional={"image": st.sampled_from("12")}),
    max_size=3,
    unique_by=lambda one: one["name"],
)


@given(first=NAMED, second=NAMED)
def test_applying_after_applying_leaves_what_was_applied_last(first: list[Any], second: list[Any]) -> None:
    after = patch.apply_patch(pod(containers=first), pod(containers=second), pod(containers=first), POD)

    def by_name(elements: list[Any]) -> list[Any]:
        return sorted(elements, key=lambda one: str(one["name"]))

    assert by_name(after["spec"]["containers"]) == by_name(second)
