"""The lab's API, its small pure parts: admission, selectors, paths, learnt kinds, ages."""

from __future__ import annotations

from typing import Any

import pytest

from podwire.lab.api import admission, kinds, selectors, table
from podwire.lab.api.errors import BadRequest, Invalid, NotFound
from podwire.lab.api.kinds import NAMESPACES, NODES, PODS, SERVICES, Kind
from podwire.lab.api.paths import Target, parse


def pod(name: str = "web", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"containers": [{"name": "c"}], **spec}}


def ports(**port: Any) -> list[dict[str, Any]]:
    return [{"name": "c", "ports": [port]}]


REFUSED: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "no name": (PODS, {"metadata": {}, "spec": pod()["spec"]}, "metadata.name: Required value"),
    "capitals in a name": (PODS, pod("Web"), 'metadata.name: Invalid value: "Web": must be a lowercase RFC 1123'),
    "an underscore in a name": (PODS, pod("a_b"), 'metadata.name: Invalid value: "a_b"'),
    "a name of 254 letters": (PODS, pod("a" * 254), "at most 253 long"),
    "a name with a line break": (PODS, pod("web\n"), "metadata.name: Invalid value"),
    "a dot in a namespace": (NAMESPACES, {"metadata": {"name": "a.b"}}, 'metadata.name: Invalid value: "a.b"'),
    "a service that starts with a digit": (SERVICES, {"metadata": {"name": "1a"}}, "RFC 1035"),
    "no metadata": (PODS, {"spec": {}}, "metadata: Required value"),
    "no spec": (PODS, {"metadata": {"name": "a"}}, "spec: Required value: a pod needs a spec with containers"),
    "no containers": (PODS, pod(containers=[]), "spec.containers: Required value"),
    "a container without name": (PODS, pod(containers=[{}]), "spec.containers[0].name: Required value"),
    "two containers of one name": (
        PODS, pod(containers=[{"name": "a"}, {"name": "a"}]), 'spec.containers[1].name: Duplicate value: "a"',
    ),
    "an init container and a container of one name": (
        PODS, pod(initContainers=[{"name": "a"}], containers=[{"name": "a"}]), 'containers[0].name: Duplicate value',
    ),
    "port 0": (PODS, pod(containers=ports(containerPort=0)), "ports[0].containerPort: Invalid value: 0: must be"),
    "port 65536": (PODS, pod(containers=ports(containerPort=65536)), "Invalid value: 65536: must be a number"),
    "a port in quotes": (PODS, pod(containers=ports(containerPort="80")), 'containerPort: Invalid value: "80"'),
    "a host port too high": (PODS, pod(containers=ports(containerPort=80, hostPort=70000)), "hostPort: Invalid value"),
    "a port without number": (PODS, pod(containers=ports(name="http")), "ports[0].containerPort: Required value"),
    "a protocol in lower case": (PODS, pod(containers=ports(containerPort=1, protocol="udp")), '"TCP", "UDP"'),
    "a restart policy that is none": (PODS, pod(restartPolicy="Sometimes"), "spec.restartPolicy: Unsupported value"),
    "a label that is a number": (NODES, {"metadata": {"name": "n", "labels": {"a": 1}}}, "a must be text: quote"),
    "a label with a space": (NODES, {"metadata": {"name": "n", "labels": {"a": "b c"}}}, 'Invalid value: "b c"'),
    "a label key with two slashes": (NODES, {"metadata": {"name": "n", "labels": {"a/b/c": "d"}}}, '"a/b/c"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_field_value_and_what_is_right(case: str) -> None:
    kind, obj, said = REFUSED[case]
    with pytest.raises(Invalid) as caught:
        admission.for_create(kind, obj)
    assert said in str(caught.value)
    assert caught.value.details["causes"]


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(Invalid) as caught:
        admission.for_create(PODS, pod("Web", containers=ports(containerPort=0, hostPort=0)))
    assert [cause["field"] for cause in caught.value.details["causes"]] == [
        "metadata.name",
        "spec.containers[0].ports[0].containerPort",
        "spec.containers[0].ports[0].hostPort",
    ]


def test_a_pod_gets_its_defaults_and_its_maker_s_object_is_left_alone() -> None:
    given = pod(containers=ports(containerPort=80))
    made = admission.for_create(PODS, given)
    assert made["spec"]["restartPolicy"] == "Always"
    assert made["spec"]["containers"][0]["ports"] == [{"containerPort": 80, "protocol": "TCP"}]
    assert made["status"] == {"phase": "Pending"}
    assert given == pod(containers=ports(containerPort=80))


def test_a_port_of_a_pod_on_the_host_s_network_is_the_host_s() -> None:
    made = admission.for_create(PODS, pod(hostNetwork=True, containers=ports(containerPort=80)))
    assert made["spec"]["containers"][0]["ports"][0]["hostPort"] == 80


@pytest.mark.parametrize("bad", [None, [], "x", [None], {"containers": "x"}, {"containers": [{"ports": [3]}]}])
def test_a_pod_of_the_wrong_shape_is_refused_and_not_a_crash(bad: Any) -> None:
    with pytest.raises(Invalid):
        admission.for_create(PODS, {"metadata": {"name": "a"}, "spec": bad})


WEB = {
    "metadata": {"name": "web-1", "namespace": "shop", "labels": {"app": "web", "tier": ""}},
    "spec": {"nodeName": "node1"},
    "status": {"phase": "Running"},
}
SELECTED: list[tuple[str, str, bool]] = [
    ("", "", True),
    ("app=web", "", True),
    ("app==web", "", True),
    ("app=db", "", False),
    ("app!=db", "", True),
    ("other!=db", "", True),
    ("app", "", True),
    ("!app", "", False),
    ("other", "", False),
    ("!other", "", True),
    ("tier=", "", True),
    ("app in (web, db)", "", True),
    ("app in (db)", "", False),
    ("app notin (db)", "", True),
    ("other notin (db)", "", True),
    ("app notin (web,db)", "", False),
    ("app=web,tier=,!other,app in (web)", "", True),
    ("app=web,other", "", False),
    ("", "metadata.name=web-1", True),
    ("", "metadata.name!=web-1", False),
    ("", "metadata.namespace=shop,spec.nodeName=node1", True),
    ("", "spec.nodeName=", False),
    ("", "status.phase!=Failed,status.phase!=Succeeded", True),
    ("", "spec.hostNetwork=false", True),
    ("app=web", "status.phase=Pending", False),
]


@pytest.mark.parametrize(("labels", "fields", "matches"), SELECTED)
def test_selectors(labels: str, fields: str, matches: bool) -> None:
    assert selectors.parse(PODS, labels, fields).matches(WEB) is matches


@pytest.mark.parametrize(
    ("labels", "fields", "said"),
    [
        ("app in web", "", "'app in web'"),
        ("app=web,,x", "", "',x'"),
        ("app=(", "", "labelSelector"),
        ("", "spec.nodename=x", "'spec.nodename' is not a field label of pods"),
        ("", "metadata.name", "cannot read 'metadata.name'"),
    ],
)
def test_a_selector_that_cannot_be_read_is_quoted(labels: str, fields: str, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        selectors.parse(PODS, labels, fields)
    assert said in str(caught.value)


PATHS: list[tuple[str, dict[str, str]]] = [
    ("pods", {"plural": "pods"}),
    ("nodes/n1", {"plural": "nodes", "name": "n1"}),
    ("nodes/n1/status", {"plural": "nodes", "name": "n1", "subresource": "status"}),
    ("namespaces", {"plural": "namespaces"}),
    ("namespaces/shop", {"plural": "namespaces", "name": "shop"}),
    ("namespaces/shop/status", {"plural": "namespaces", "name": "shop", "subresource": "status"}),
    ("namespaces/shop/pods", {"plural": "pods", "namespace": "shop"}),
    ("namespaces/shop/pods/a", {"plural": "pods", "namespace": "shop", "name": "a"}),
    ("namespaces/shop/pods/status", {"plural": "pods", "namespace": "shop", "name": "status"}),
    ("namespaces/shop/pods/a/binding", {"plural": "pods", "namespace": "shop", "name": "a", "subresource": "binding"}),
]


@pytest.mark.parametrize(("path", "target"), PATHS)
def test_paths(path: str, target: dict[str, str]) -> None:
    assert parse("", "v1", path.split("/")) == Target(group="", version="v1", **target)


@pytest.mark.parametrize("path", ["", "pods//x", "pods/a/b/c", "namespaces/shop/pods/a/b/c"])
def test_paths_that_lead_nowhere(path: str) -> None:
    with pytest.raises(NotFound):
        parse("", "v1", path.split("/"))


@pytest.mark.parametrize(
    ("kind", "plural", "namespaced"),
    [
        ("Widget", "widgets", True),
        ("NetworkPolicy", "networkpolicies", True),
        ("Gateway", "gateways", True),
        ("Ingress", "ingresses", True),
        ("GatewayClass", "gatewayclasses", False),
        ("ClusterIssuer", "clusterissuers", False),
    ],
)
def test_a_kind_that_nobody_declared_is_guessed(kind: str, plural: str, namespaced: bool) -> None:
    guessed = kinds.guess("example.org/v1", kind)
    assert (guessed.group, guessed.plural, guessed.namespaced) == ("example.org", plural, namespaced)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (150, "2m30s"), (600, "10m"), (10799, "179m"), (10800, "3h"),
        (12000, "3h20m"), (28800, "8h"), (172800, "2d"), (176400, "2d1h"), (691200, "8d"), (63072000, "2y"),
        (63158400, "2y1d"), (252288000, "8y"),
    ],
)  # fmt: skip
def test_ages_are_written_as_kubectl_writes_them(seconds: int, text: str) -> None:
    assert table.age(seconds) == text


POD_WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing yet": ({"status": {"phase": "Pending"}}, "Pending"),
    "a container that waits for a reason": (
        {"status": {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}},
        "CrashLoopBackOff",
    ),
    "all is well": ({"status": {"phase": "Running", "containerStatuses": [{"ready": True}]}}, "Running"),
    "finished": ({"status": {"phase": "Succeeded"}}, "Completed"),
    "evicted": ({"status": {"phase": "Failed", "reason": "Evicted"}}, "Evicted"),
    "on its way out": ({"metadata": {"name": "a", "deletionTimestamp": "x"}}, "Terminating"),
}


@pytest.mark.parametrize("case", POD_WORDS)
def test_the_word_under_status(case: str) -> None:
    parts, word = POD_WORDS[case]
    obj = {"metadata": {"name": "a"}, "spec": {"containers": [{}]}, **parts}
    assert table.table(PODS, [obj], 0.0)["rows"][0]["cells"][2] == word
