"""The stanza of the demonstration about NetworkPolicy: a policy denies, the matrix shows it, `explain` says which.

guest ──▶ db   answered         policy db-from-web         guest ──▶ db   nothing
web ────▶ db   answered         ───────────────▶           web ────▶ db   answered
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from podwire.errors import PodwireError
from podwire.explain.cluster import Cluster
from podwire.explain.hops import State
from podwire.explain.live import fetch
from podwire.explain.matrix import make_matrix
from podwire.explain.matrix_text import render_text
from podwire.explain.reading import LabReader, explain
from podwire.explain.report import conclusion
from podwire.kube import options
from podwire.kube.options import KubeOptions
from podwire.lab import cluster, process
from podwire.lab.state import LabState
from podwire.lab.talk import ask

NAMESPACE = "shop"
POLICY = "db-from-web"
_PORT = 80
_SILENT_SECONDS = 2.0  # whoever is let in answers long before
_SECONDS = 90.0

Object = dict[str, Any]


class Stage(Protocol):
    """What the stanza needs of podwire.lab.demo's."""

    lab: LabState

    def title(self, text: str) -> None:
        """Begins a part."""

    def say(self, text: str) -> None:
        """A line."""

    def wrong(self, what: str) -> None:
        """Something is not as it should be."""


def objects() -> list[Object]:
    """A namespace with a web server and a guest on the first node, and a database on the second."""
    ports = [{"name": "http", "containerPort": _PORT}]
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "echo", "ports": ports}]},
        }
        for name, node in (("web", "node1"), ("guest", "node1"), ("db", "node2"))
    ]
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}, *pods]


def policy() -> Object:
    """The database lets the web server in, and nobody else."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": POLICY, "namespace": NAMESPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": "db"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}],
        },
    }


def show_policy(stage: Stage) -> None:
    """A policy comes; who reaches whom from then on, and why not."""
    lab = stage.lab
    stage.title(f"NetworkPolicy: {NAMESPACE}/{POLICY} lets web into db, and nobody else")
    cluster.wait_ready(lab, cluster.apply(lab, objects()))
    before = {name: _reaches(lab, name, _SECONDS) for name in ("web", "guest")}
    cluster.apply(lab, [policy()])
    try:
        process.wait_for(
            lambda: not _reaches(lab, "guest", _SILENT_SECONDS), _SECONDS, "the policy to be in the kernel"
        )
    except PodwireError as error:
        stage.wrong(f"guest still reaches db: {error}")
    after = {"web": _reaches(lab, "web", _SECONDS), "guest": _reaches(lab, "guest", _SILENT_SECONDS)}
    for name in before:
        words = [("answered" if each else "nothing comes back") for each in (before[name], after[name])]
        stage.say(f"  {name:<5} asks db: {words[0]}; with the policy: {words[1]}")
    if before != {"web": True, "guest": True} or after != {"web": True, "guest": False}:
        stage.wrong(f"who reaches db is {before} without the policy and {after} with it")
    _show_matrix(stage)
    _show_path(stage)


def _show_matrix(stage: Stage) -> None:
    stage.say(f"  podwire policy matrix --name {stage.lab.name} -n {NAMESPACE}")
    matrix = make_matrix(Cluster(fetch(_access(stage.lab))), namespaces=[NAMESPACE])
    for line in filter(None, render_text(matrix, 110)):
        stage.say(f"    {line}")
    place = {pod.partition("/")[2]: number for number, group in enumerate(matrix.groups) for pod in group.pods}
    states = {name: matrix.cells[place[name]][place["db"]].state for name in ("web", "guest")}
    if states != {"web": "all", "guest": "none"}:
        stage.wrong(f"the matrix says {states} of who reaches db")


def _show_path(stage: Stage) -> None:
    stage.say(f"  podwire explain --name {stage.lab.name} -n {NAMESPACE} guest db {_PORT}")
    path = explain(fetch(_access(stage.lab)), LabReader(stage.lab.name), "guest", "db", str(_PORT), NAMESPACE)
    first = path.first(State.FAILS)
    passed = path.hops[: first[0] - 1] if first else path.hops
    stage.say(f"    in order: {', '.join(hop.title for hop in passed)}")
    for line in conclusion(path):
        stage.say(f"    {line}")
    if first is None or first[1].title != "ingress policy" or f"{NAMESPACE}/{POLICY}" not in first[2].text:
        stage.wrong(f"explain does not name the policy: {conclusion(path)[0]}")


def _access(lab: LabState) -> Any:
    return options.access(KubeOptions(kubeconfig=str(lab.files.kubeconfig)))


def _reaches(lab: LabState, name: str, seconds: float) -> bool:
    found = {
        each["metadata"]["name"]: each["status"]["podIP"]
        for each in cluster.pods(lab)
        if each["metadata"].get("namespace") == NAMESPACE
    }
    netns: Path = lab.pod_netns(NAMESPACE, name)
    try:
        ask(netns, found["db"], _PORT, seconds=seconds)
    except PodwireError:
        return False
    return True
