"""What tests of `podwire explain` share: objects to walk between, a look at a path, and packets that agree."""

from __future__ import annotations

from typing import Any

from podwire.errors import PodwireError
from podwire.explain.hops import State
from podwire.explain.live import fetch
from podwire.explain.path import Path
from podwire.explain.reading import LabReader, explain
from podwire.kube import options
from podwire.kube.access import Access
from podwire.kube.options import KubeOptions
from podwire.lab import cluster, node, process, topology
from podwire.lab.state import LabState
from podwire.lab.talk import ask

Object = dict[str, Any]
PORTS = [{"name": "http", "containerPort": 80}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}]
PATIENCE = 90.0
ECHO = {"name": "web", "image": "echo", "ports": PORTS}


def labelled(made: Object, **labels: str) -> Object:
    made["metadata"]["labels"] = {"app": made["metadata"]["name"], **labels}
    return made


def service(name: str, app: str, target: int = 80, **more: Any) -> Object:
    spec = {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": target}], **more}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def policy(name: str, app: str, **spec: Any) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": {"app": app}}, **spec},
    }


def access(lab: LabState) -> Access:
    return options.access(KubeOptions(kubeconfig=str(lab.files.kubeconfig)))


def look(lab: LabState, source: str, target: str, port: str = "80") -> Path:
    return explain(fetch(access(lab)), LabReader(lab.name), source, target, port)


def passes(lab: LabState, source: str, target: str, port: str) -> bool:
    path = look(lab, source, target, port)
    return all(hop.state is State.OK for hop in path.hops)


def on(lab: LabState, where: str, *words: str) -> str:
    """Runs a command on a node, or in a pod (`pod/a`)."""
    if where.startswith("pod/"):
        enter, _ = cluster.exec_command(lab, "default", where.removeprefix("pod/"))
        return topology.run([*enter, *words])
    return topology.run([*node.enter_command(lab, where), *words])


def reaches(lab: LabState, source: str, address: str, port: int = 80, seconds: float = 0.5) -> bool:
    """Whether a packet says so, too."""
    try:
        ask(lab.pod_netns("default", source), address, port, seconds=seconds)
    except PodwireError:
        return False
    return True


def address_of(lab: LabState, name: str) -> str:
    found = next(each for each in cluster.pods(lab) if each["metadata"]["name"] == name)
    return str(found["status"]["podIP"])


def wait_served(lab: LabState, names: set[str]) -> None:
    """Waits until these Services have an endpoint, ready or not."""

    def served() -> bool:
        return {each.service[1] for each in fetch(access(lab)).slices if each.endpoints} >= names

    process.wait_for(served, PATIENCE, "the Services' endpoints")


def fetched_ip(lab: LabState, name: str) -> str:
    """The first ClusterIP of a Service."""
    return str(next(each.spec.cluster_ip for each in fetch(access(lab)).services if each.metadata.name == name))
