"""Deployments in a lab: pods that come, go, are replaced and rolled over, on real wires."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from podwire.errors import PodwireError
from podwire.lab import cluster, process, topology
from podwire.lab.api.client import path
from podwire.lab.api.kinds import DEPLOYMENTS, PODS, REPLICA_SETS
from podwire.lab.state import LabState
from podwire.lab.talk import ask
from tests.netns.lab_fixtures import PATIENCE, Pods, pod

Object = dict[str, Any]


def deployment(name: str, replicas: int, image: str = "web:1", **spec: Any) -> Object:
    probe = {"httpGet": {"port": 80}, "periodSeconds": 1, "timeoutSeconds": 30}  # a slow answer is one
    container = {"name": "web", "image": image, "ports": [{"containerPort": 80}], "readinessProbe": probe}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}},
            **spec,
        },
    }


class Rolled(Pods):
    """Deployments of one test: all their pods ready on entry, gone on exit."""

    def __enter__(self) -> Rolled:
        super().__enter__()
        try:
            self.apply(*self._objects)
        except BaseException:
            self.__exit__()
            raise
        return self

    def apply(self, *objects: Object) -> None:
        """Applies and waits until it is rolled out."""
        cluster.apply(self.lab, objects)
        cluster.wait_rolled_out(self.lab, objects)

    def of(self, app: str) -> dict[str, Object]:
        """The pods of a Deployment that are not on their way out, by name."""
        found = cluster.client(self.lab).list(PODS, "default", labels=f"app={app}")
        return {one["metadata"]["name"]: one for one in found if "deletionTimestamp" not in one["metadata"]}

    def addresses(self, app: str) -> dict[str, str]:
        """Their addresses, by name."""
        return {name: one["status"]["podIP"] for name, one in self.of(app).items()}


def links_of_pods(lab: LabState) -> int:
    shown = [topology.run(["ip", "-n", f"pw.{lab.name}.{node.name}", "-o", "link"]) for node in lab.nodes]
    return sum(line.count("@if") for text in shown for line in text.splitlines() if "master pw0" in line)


def test_thirty_pods_come_spread_answer_and_go(lab: LabState) -> None:
    before = topology.namespaces(lab.name)
    with Rolled(lab, [deployment("web", 30), pod("client", nodeName="node1")]) as pods:
        nodes = [one["spec"]["nodeName"] for one in pods.of("web").values()]
        assert min(nodes.count(node.name) for node in lab.nodes) >= 9
        addresses = pods.addresses("web")
        assert len(set(addresses.values())) == 30
        for name, address in addresses.items():
            answer = pods.ask("client", address)
            assert (answer.pod, answer.client, answer.untranslated) == (name, pods.address("client"), True)
        survivors = deployment("web", 2)
        pods.apply(survivors)
        assert pods.addresses("web").items() <= addresses.items(), "those that stay keep their addresses"
        process.wait_for(lambda: len(topology.namespaces(lab.name)) == len(before) + 3, PATIENCE, "the others to go")
    assert topology.namespaces(lab.name) == before
    process.wait_for(lambda: links_of_pods(lab) == 0, PATIENCE, "the last link to go")
    assert cluster.client(lab).list(REPLICA_SETS) == []


def test_a_deleted_pod_is_replaced_under_another_name_and_address(lab: LabState) -> None:
    with Rolled(lab, [deployment("web", 3)]) as pods:
        first = pods.addresses("web")
        gone = sorted(first)[0]
        cluster.client(lab).request("DELETE", path(PODS, "default", gone))

        def replaced() -> bool:
            found = pods.of("web")
            return len(found) == 3 and gone not in found and not any(map(cluster.what_lacks, found.values()))

        pods.until("a replacement", replaced)
        now = pods.addresses("web")
        (new,) = now.keys() - first.keys()
        assert now[new] not in first.values(), "an address that has just been given up cools down first"
        assert {name: now[name] for name in first if name != gone}.items() <= first.items()


def test_a_rollout_leaves_no_moment_without_a_pod_that_answers(lab: LabState) -> None:
    """What a Service will do, done by hand: at any time, ask one of the pods that are ready."""
    with Rolled(lab, [deployment("web", 2), pod("client", nodeName="node1")]) as pods:
        client, failures, answers = Path(pods.shown("client")["netns"]), [], []
        stop = threading.Event()

        def ask_on_and_on() -> None:
            while not stop.is_set():
                # A pod may go between the look and the question; with two looks at nobody, nobody was there.
                for tries_left in (2, 1, 0):
                    ready = [one for one in pods.of("web").values() if cluster.what_lacks(one) == ""]
                    try:
                        answers.append(ask(client, ready[0]["status"]["podIP"], 80).pod)
                        break
                    except (PodwireError, LookupError) as error:
                        if not tries_left:
                            failures.append(str(error))

        asking = threading.Thread(target=ask_on_and_on)
        asking.start()
        try:
            before = set(pods.of("web"))
            pods.until("an answer", lambda: bool(answers))
            pods.apply(deployment("web", 2, "web:2"))
            after = set(pods.of("web"))
            pods.until("an answer of the new ones", lambda: bool(set(answers) & after))
        finally:
            stop.set()
            asking.join()
        assert failures == []
        assert not before & after
        assert {pod.rpartition("-")[0] for pod in after} != {pod.rpartition("-")[0] for pod in before}
        assert set(answers) & before


def test_pods_that_do_not_get_ready_stop_a_rollout(lab: LabState) -> None:
    with Rolled(lab, [deployment("web", 2)]) as pods:
        before = set(pods.of("web"))
        broken = deployment("web", 2, "web:2")
        broken["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"] = 81
        cluster.apply(lab, [broken])
        pods.until("a pod of the new template", lambda: len(pods.of("web")) == 3)
        with pytest.raises(PodwireError, match=r"deployment default/web: has 2 of 2 pods available; .*is progressing"):
            cluster.wait_rolled_out(lab, [broken], seconds=1.5)
        assert before < set(pods.of("web"))
        pods.apply(deployment("web", 2))
        assert set(pods.of("web")) == before, "the old ones were never touched"


def test_the_command_waits_for_deployments_shows_their_logs_and_deletes_them(lab: LabState, tmp_path: Path) -> None:
    def cli(verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "podwire.cli.main", "lab", verb, "--name", lab.name, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    spoken = deployment("talk", 1)
    init = {"name": "first", "command": ["echo", "from $(HOSTNAME)"]}
    spoken["spec"]["template"]["spec"]["initContainers"] = [init]
    manifest = tmp_path / "web.yaml"
    manifest.write_text(yaml.safe_dump(spoken))
    applied = cli("apply", "-f", str(manifest))
    try:
        assert (applied.returncode, applied.stdout) == (0, "deployment.apps/talk created\n"), applied.stderr
        cluster.wait_rolled_out(lab, [spoken])
        (name,) = [one["metadata"]["name"] for one in cluster.pods(lab)]
        for words, code, said in (
            ([name, "-c", "first"], 0, f"from {name}\n"),
            ([name], 0, ""),
            ([name, "-p"], 1, f"pod default/{name}: container web has not been restarted"),
            ([name, "-c", "db"], 1, "has no container 'db'; it has web, first"),
            (["nobody"], 1, 'pods "nobody" not found'),
        ):
            done = cli("logs", *words)
            assert (done.returncode, said in (done.stderr if code else done.stdout)) == (code, True), done
    finally:
        deleted = cli("delete", "-f", str(manifest))
    assert (deleted.returncode, deleted.stdout) == (0, "deployment/talk deleted\n"), deleted.stderr
    assert cluster.pods(lab) == [], "the command waits for what goes with it"
    assert cluster.client(lab).list(DEPLOYMENTS) == []
