"""`podwire policy`: manifests as users write them, questions as users ask them, and what the command answers."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from podwire.cli import main as command
from podwire.explain import verdict
from podwire.explain.cluster import Cluster, PortWish
from podwire.explain.manifests import read_objects
from podwire.explain.matrix import make_matrix
from podwire.explain.matrix_picture import render_html, render_svg
from podwire.explain.matrix_text import render_text
from tests.policy_cases import BASE, CASES, NAMESPACES, PODS, Manifest, Step, at, policy
from tests.policy_oracle import World


def workload(kind: str, name: str, app: str, ports: list[Manifest], **spec: Any) -> Manifest:
    """A Deployment or the like in namespace `shop`."""
    template = {"metadata": {"labels": {"app": app}}, "spec": {"containers": [{"name": "c", "ports": ports}]}}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"template": template, **spec},
    }


def service(name: str, selector: dict[str, str], **spec: Any) -> Manifest:
    """A Service in namespace `shop`."""
    spec.setdefault("ports", [{"port": 5432, "targetPort": "pg"}])
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": selector, **spec}}


def bare_pod(name: str, namespace: str = "default", **spec: Any) -> Manifest:
    """A Pod without a status."""
    about = {"name": name, "namespace": namespace, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": {"containers": [{"name": "c"}], **spec}}


WEB = workload("Deployment", "web", "web", [{"name": "http", "containerPort": 8080}], replicas=3)
DB = workload("StatefulSet", "db", "db", [{"name": "pg", "containerPort": 5432}, {"containerPort": 9187}])
DB_FROM_WEB = policy(
    "shop/db",
    select={"app": "db"},
    ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "pg"}]}],
)
BROKEN = policy("shop/broken", select={"app": "web"}, ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}]}])
SHOP = (
    WEB,
    DB,
    service("db", {"app": "db"}),
    service("nobody", {"app": "ghost"}),
    service("headless", {"app": "db"}, clusterIP="None"),
    service("web", {"app": "web"}, ports=[{"name": "http", "port": 80, "targetPort": "http"}]),
    bare_pod("curl"),
    bare_pod("host", hostNetwork=True, nodeName="node1"),
    bare_pod("both", "shop"),
    service("both", {"app": "both"}),
    DB_FROM_WEB,
    BROKEN,
)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    for number, manifest in enumerate(SHOP):
        (folder / f"{number:02}.yaml").write_text(yaml.safe_dump(manifest))
    return folder


ASKED: dict[str, tuple[str, str, str, int, tuple[str, ...]]] = {
    "a rule opens it": ("shop/web", "shop/db-0", "5432", 0, ("allowed", "rule 1 of shop/db allows it")),
    "a port by its name": ("shop/web", "shop/db-0", "pg", 0, ("allowed",)),
    "another port": ("shop/web", "shop/db-0", "9187", 1, ("denied", "isolated for ingress by shop/db")),
    "another protocol": ("shop/web", "shop/db-0", "5432/UDP", 1, ("denied",)),
    "from another namespace": ("curl", "shop/db-0", "5432", 1, ("denied", "no policy isolates default/curl")),
    "a Service goes to its pods' ports": ("shop/web", "svc/shop/db", "5432", 0, ("shop/db-0", "port 5432")),
    "a Service whose pods are closed": ("curl", "svc/shop/db", "5432", 1, ("shop/db-0", "denied")),
    "a Service by a port's name": ("shop/db-0", "svc/shop/web", "http", 1, ("shop/web-1", "port 8080")),
    "a Service without endpoints": ("curl", "shop/nobody", "5432", 1, ("no endpoint: none is selected",)),
    "a headless Service": ("shop/web", "shop/headless", "5432", 0, ("headless", "shop/db-0")),
    "from outside": (
        "192.0.2.7",
        "shop/web",
        "http",
        1,
        ("192.0.2.7 is no pod", "isolated for ingress by shop/broken"),
    ),
    "to outside": ("shop/web", "192.0.2.7", "443", 0, ("allowed",)),
    "from a pod on its node's network": ("host", "shop/db-0", "5432", 1, ("is node node1",)),
    "a pod and a Service of one name": ("curl", "svc/shop/both", "5432", 1, ("no endpoint",)),
}


@pytest.mark.parametrize(("source", "to", "port", "code", "words"), ASKED.values(), ids=ASKED.keys())
def test_a_question_is_answered(
    shop: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    to: str,
    port: str,
    code: int,
    words: tuple[str, ...],
) -> None:
    asked = ["policy", "test", "-f", str(shop), "--from", source, "--to", to, "--port", port]
    assert command.main(asked) == code
    said = capsys.readouterr().out
    assert said.startswith("allowed" if code == 0 else "denied")
    for each in words:
        assert each in said
    assert command.main([*asked, "-o", "json"]) == code
    shown = json.loads(capsys.readouterr().out)
    assert shown["allowed"] is (code == 0)
    assert any("shop/broken: spec.ingress[0]" in each for each in shown["problems"])


REFUSED: dict[str, tuple[list[str], str]] = {
    "no such pod": (["--from", "nobody", "--to", "curl", "--port", "80"], "pods of default: curl, host"),
    "no such namespace": (["--from", "curl", "--to", "mars/rover", "--port", "80"], "there are pods in default, shop"),
    "a Service does not ask": (["--from", "svc/shop/db", "--to", "curl", "--port", "80"], "no such pod"),
    "a name that is both": (
        ["--from", "curl", "--to", "shop/both", "--port", "80"],
        "say pod/shop/both or svc/shop/both",
    ),
    "no such port": (["--from", "curl", "--to", "shop/web-1", "--port", "https"], "its named ports: http/TCP"),
    "no such port of a Service": (["--from", "curl", "--to", "svc/shop/db", "--port", "1"], "its ports: 5432/TCP"),
    "no such protocol": (["--from", "curl", "--to", "shop/db-0", "--port", "80/ICMP"], "TCP, UDP or SCTP"),
    "no port that there can be": (["--from", "curl", "--to", "shop/db-0", "--port", "70000"], "from 1 to 65535"),
    "families that do not meet": (
        ["--from", "192.0.2.1", "--to", "2001:db8::1", "--port", "80"],
        "no family in common",
    ),
    "two sources of objects": (["--name", "x", "--from", "a", "--to", "b", "--port", "1"], "give one of them"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_answered_is_2_and_says_why(
    shop: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert command.main(["policy", "test", "-f", str(shop), *words]) == 2
    assert said in capsys.readouterr().err


def test_wrong_usage_is_2(shop: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "podwire.cli.main", "policy", "test", "-f", str(shop), "--from", "curl"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


# --- the matrix -------------------------------------------------------------------------------------------------


def after(steps: tuple[Step, ...]) -> tuple[World, list[Manifest]]:
    """The world at the end of a story, and its manifests."""
    world = World(BASE)
    for step in steps:
        for kind, namespace, name in step.remove:
            world.remove(kind, namespace, name)
        for manifest in step.put:
            world.put(manifest)
    return world, list(world.objects.values())


def is_whole(steps: tuple[Step, ...]) -> bool:
    """Whether every namespace that is named in the end is there: one that manifests name always is."""
    manifests = after(steps)[1]
    there = {one["metadata"]["name"] for one in manifests if one["kind"] == "Namespace"}
    return {one["metadata"].get("namespace", "") for one in manifests} - {""} <= there


WHOLE = {name: steps for name, steps in CASES.items() if is_whole(steps)}


@pytest.mark.parametrize("steps", WHOLE.values(), ids=WHOLE.keys())
def test_the_matrix_says_what_the_oracle_says(steps: tuple[Step, ...]) -> None:
    world, manifests = after(steps)
    matrix = make_matrix(Cluster(read_objects(manifests)), [PortWish(number=80), PortWish(number=81, protocol="UDP")])
    group_of = {pod: number for number, group in enumerate(matrix.groups) for pod in group.pods}
    places = [f"{home}/{name}" for home in NAMESPACES for name in PODS if f"{home}/{name}" in group_of]
    for source, target in itertools.permutations(places, 2):
        cell = matrix.cells[group_of[source]][group_of[target]]
        wanted = {
            f"{port}/{protocol}": all(
                world.allows(at(source, version), at(target, version), protocol, port) for version in (4, 6)
            )
            for port, protocol in ((80, "TCP"), (81, "UDP"))
        }
        assert {one.port: one.allowed for one in cell.sides} == wanted, (source, target)


def test_one_question_says_what_the_matrix_says() -> None:
    cluster = Cluster(read_objects(SHOP))
    matrix = make_matrix(cluster, [PortWish(number=5432)])
    for row, group in enumerate(matrix.groups):
        for column, other in enumerate(matrix.groups):
            if row == column:
                continue
            ends = cluster.place(f"pod/{group.pods[0]}"), cluster.place(f"pod/{other.pods[0]}")
            answer = verdict.ask(cluster, *ends, PortWish(number=5432))
            assert answer.allowed is (matrix.cells[row][column].state == "all"), (group, other)


def many(count: int, apps: int) -> list[Manifest]:
    """`count` pods of `apps` kinds, of which each lets in the one before it."""
    pods = [
        bare_pod(f"p{number}", "shop")
        | {"metadata": {"name": f"p{number}", "namespace": "shop", "labels": {"app": f"a{number % apps}"}}}
        for number in range(count)
    ]
    policies = [
        policy(
            f"shop/p{app}",
            select={"app": f"a{app}"},
            ingress=[{"from": [{"podSelector": {"matchLabels": {"app": f"a{app - 1}"}}}]}],
        )
        for app in range(apps)
    ]
    return [*pods, *policies]


def test_fifty_pods_that_differ_in_ten_ways_are_ten_rows_no_wider_than_a_terminal() -> None:
    matrix = make_matrix(Cluster(read_objects(many(50, 10))))
    assert sorted(len(group.pods) for group in matrix.groups) == [5] * 10
    lines = render_text(matrix, 100)
    assert max(map(len, lines)) <= 100
    assert sum(line.split(" ")[0].isdigit() for line in lines) == 10


def test_pods_that_nobody_isolates_are_one_row_whatever_their_labels() -> None:
    matrix = make_matrix(Cluster(read_objects([bare_pod(f"p{number}") for number in range(50)])))
    assert [len(group.pods) for group in matrix.groups] == [50]
    assert matrix.cells[0][0].state == "all"


def test_a_wide_matrix_is_broken_by_columns() -> None:
    manifests = many(50, 50)
    matrix = make_matrix(Cluster(read_objects(manifests)))
    assert len(matrix.groups) == 50
    lines = render_text(matrix, 80)
    assert max(len(line) for line in lines) <= 80
    assert sum(line.strip().startswith("1 ") and "shop/" not in line for line in lines) == 1  # one header begins with 1
    assert sum(line.startswith("1 shop/") for line in lines) >= 2


def test_pods_of_one_template_that_a_block_tells_apart_are_two_rows() -> None:
    near, far = (
        bare_pod(f"p{number}", "shop") | {"status": {"phase": "Running", "podIPs": [{"ip": f"10.0.{number}.1"}]}}
        for number in (1, 2)
    )
    far["metadata"]["labels"] = near["metadata"]["labels"]
    only_near = policy(
        "shop/block", select={"app": "server"}, ingress=[{"from": [{"ipBlock": {"cidr": "10.0.1.0/24"}}]}]
    )
    matrix = make_matrix(Cluster(read_objects([near, far, bare_pod("server", "shop"), only_near])))
    place = {pod: number for number, group in enumerate(matrix.groups) for pod in group.pods}
    states = [matrix.cells[place[f"shop/p{number}"]][place["shop/server"]].state for number in (1, 2)]
    assert states == ["all", "none"]


def test_a_service_with_one_endpoint_that_is_closed_is_denied() -> None:
    pods = [bare_pod(name, "shop") for name in ("open", "shut")]
    for each in pods:
        each["metadata"]["labels"]["tier"] = "back"
    shut = policy("shop/shut", select={"app": "shut"})
    both = service("back", {"tier": "back"}, ports=[{"port": 80}])
    cluster = Cluster(read_objects([*pods, both, shut, bare_pod("client")]))
    answer = verdict.ask(cluster, cluster.place("client"), cluster.place("shop/back"), PortWish(number=80))
    assert ([leg.judgement.allowed for leg in answer.legs], answer.allowed) == ([True, False], False)
    said = "\n".join(verdict.describe(cluster, answer))
    assert said.index("to shop/open") < said.index("to shop/shut") < said.index("isolated for ingress by shop/shut")


HOSTILE = '<script>alert("&")</script>'


def test_pictures_are_whole_and_need_nothing_else() -> None:
    hostile = policy("shop/db2", select={"app": "db"}, ingress=[{"from": [{"ipBlock": {"cidr": HOSTILE}}]}])
    pod = bare_pod("x", "shop")
    pod["metadata"]["name"] = f"x{HOSTILE}"
    matrix = make_matrix(Cluster(read_objects([*SHOP, hostile, pod])))
    svg, page = render_svg(matrix), render_html(matrix)
    squares = [
        one for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect") if one.get("width") == "22"
    ]
    assert len(squares) == len(matrix.groups) ** 2
    for text in (svg, page):
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        addresses = text.replace("http://www.w3.org/2000/svg", "")
        assert not any(word in addresses for word in ("http:", "https:", "src=", "url(", "href"))
    alone = make_matrix(Cluster(read_objects([pod])))  # its name is a row's and a column's
    for text in (render_svg(alone), render_html(alone)):
        assert "<script" not in text
        assert text.count("&lt;script&gt;") >= 4
        ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert "shop/broken: spec.ingress[0]" in page


def test_the_matrix_goes_to_a_file_and_names_broken_policies(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["policy", "matrix", "-f", str(shop)]) == 0
    said = capsys.readouterr().out
    assert "5432/TCP only" in said
    assert "problem: NetworkPolicy shop/broken: spec.ingress[0].from[0].ipBlock.cidr" in said
    for kind in ("svg", "html", "json"):
        file = tmp_path / f"matrix.{kind}"
        assert command.main(["policy", "matrix", "-f", str(shop), "-o", kind, "--output", str(file)]) == 0
        assert file.stat().st_size > 500
    shown = json.loads((tmp_path / "matrix.json").read_text())
    assert {pod for group in shown["groups"] for pod in group["pods"]} >= {"shop/web-1", "shop/web-2", "default/curl"}
    assert command.main(["policy", "matrix", "-f", str(shop), "--output", str(tmp_path)]) == 2


def test_a_manifest_that_cannot_be_read_is_named_and_the_others_count() -> None:
    bad = bare_pod("bad")
    bad["metadata"]["labels"] = {"version": 1}
    cluster = Cluster(read_objects([bare_pod("good"), bad]))
    assert [pod.name for pod in cluster.pods()] == ["good"]
    (problem,) = cluster.problems()
    assert problem.startswith("Pod default/bad is left out")


def test_what_manifests_say_of_addresses_is_kept() -> None:
    given = bare_pod("given") | {"status": {"phase": "Running", "podIPs": [{"ip": "10.244.0.10"}]}}
    cluster = Cluster(read_objects([bare_pod("first"), given, bare_pod("second")]))
    addresses = {pod.name: str(pod.addresses[0]) for pod in cluster.pods()}
    assert addresses == {"first": "10.244.0.11", "given": "10.244.0.10", "second": "10.244.0.12"}


JUNK: tuple[Any, ...] = (None, [], {}, [None], -1, "x" * 300, "10.0.0.1", "None")


def places_in(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every field of a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*way, key)
        yield from places_in(each, (*way, key))


@pytest.mark.parametrize("number", range(len(SHOP)), ids=[f"{one['kind']} {one['metadata']['name']}" for one in SHOP])
def test_whatever_stands_in_a_field_the_rest_is_answered(number: int) -> None:
    """What reads manifests (podwire.manifests) has seen to it that kind, metadata and names are what they should be."""
    kept = {("kind",), ("apiVersion",), ("metadata",), ("metadata", "name"), ("metadata", "namespace")}
    for way, junk in itertools.product(set(places_in(SHOP[number])) - kept, JUNK):
        manifests = copy.deepcopy(list(SHOP))
        field: Any = manifests[number]
        for key in way[:-1]:
            field = field[key]
        field[way[-1]] = junk
        cluster = Cluster(read_objects(manifests))
        matrix = make_matrix(cluster)
        assert any("curl" in pod for group in matrix.groups for pod in group.pods) or SHOP[number]["kind"] == "Pod"
        ElementTree.fromstring(render_svg(matrix))
