"""Probes, init containers and environment in a lab: what kubelet does, on real wires."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

import pytest

from podwire.lab import cluster, process
from podwire.lab.api.client import path
from podwire.lab.api.kinds import BUILTIN, PODS
from podwire.lab.state import LabState
from podwire.lab.status import node_status
from tests.netns.lab_fixtures import Pods, pod

Object = dict[str, Any]
EVENTS = next(kind for kind in BUILTIN if kind.kind == "Event")

# Answers with what the file says: a status, or `deaf`: then it closes its port and lives on.
SERVER = """
import http.server, pathlib, sys, time
file = pathlib.Path(sys.argv[1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(file.read_text() or 500))
        self.end_headers()
    def log_message(self, *_):
        print(self.client_address[0], self.path, self.headers['User-Agent'], flush=True)
server = http.server.ThreadingHTTPServer(('', 8080), Handler)
print('serving', flush=True)
while file.read_text() != 'deaf':
    server.timeout = 0.05
    server.handle_request()
server.server_close()
time.sleep(1000)
"""


@pytest.fixture
def says(tmp_path: Path) -> Path:
    """The file that tells the server what to answer."""
    file = tmp_path / "says"
    file.write_text("200")
    return file


def server(says: Path, **probes: Object) -> Object:
    command = ["python3", "-IS", "-c", SERVER, str(says)]
    # A start takes longer than nothing, and an answer may: neither is what the test is about.
    if "livenessProbe" in probes:
        probes = {"startupProbe": {"tcpSocket": {"port": 8080}, "failureThreshold": 300}, **probes}
    quick = {name: {"periodSeconds": 1, "timeoutSeconds": 30, "failureThreshold": 1, **p} for name, p in probes.items()}
    return {"name": "web", "command": command, "ports": [{"containerPort": 8080, "name": "http"}], **quick}


def status(pods: Pods, name: str = "a") -> Object:
    (found,) = pods.object(name)["status"]["containerStatuses"]
    return dict(found)


def is_ready(pods: Pods, name: str = "a") -> bool:
    shown = pods.object(name)["status"]  # one look: the next may show another moment
    ready = [one["status"] for one in shown["conditions"] if one["type"] == "Ready"] == ["True"]
    assert shown["containerStatuses"][0]["ready"] == ready
    return ready


def events(pods: Pods, name: str = "a") -> list[tuple[str, str]]:
    uid = pods.object(name)["metadata"]["uid"]
    found = cluster.client(pods.lab).list(EVENTS, "default", fields=f"involvedObject.uid={uid}")
    return [(one["reason"], one["message"]) for one in found]


def test_readiness_comes_and_goes_without_a_restart(lab: LabState, says: Path) -> None:
    says.write_text("503")
    web = server(says, readinessProbe={"httpGet": {"path": "/ready", "port": "http"}})
    with Pods(lab, [pod("a", web, nodeName="node1")], wait=False) as pods:
        refusal = ("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503")
        pods.until("a failed probe", lambda: refusal in events(pods))
        assert pods.object("a")["status"]["phase"] == "Running"
        assert not is_ready(pods)
        says.write_text("302")
        pods.until("ready", lambda: is_ready(pods))
        says.write_text("404")
        pods.until("unready", lambda: not is_ready(pods))
        assert status(pods)["restartCount"] == 0
        # The probes came from the node, over the wire, to the pod's own address.
        block = ipaddress.ip_network(node_status(lab, lab.node("node1"))["blocks"][0])
        log = cluster.container_log(lab, "default", "a").read_text().splitlines()
        assert f"{block[1]} /ready kube-probe/1.31" in log


@pytest.mark.parametrize(
    ("story", "broken", "probe", "why"),
    [
        ("httpGet", "500", {"httpGet": {"port": 8080}}, "HTTP probe failed with statuscode: 500"),
        ("tcpSocket", "deaf", {"tcpSocket": {"port": "http"}}, "connection refused"),
    ],
)
def test_a_failed_liveness_probe_restarts_the_container_and_keeps_the_address(
    lab: LabState, says: Path, story: str, broken: str, probe: Object, why: str
) -> None:
    with Pods(lab, [pod("a", server(says, livenessProbe=probe), nodeName="node2")]) as pods:
        address, inode = pods.address("a"), Path(pods.shown("a")["netns"]).stat().st_ino
        says.write_text(broken)
        pods.until(f"its end: {story}", lambda: "terminated" in {**status(pods)["lastState"], **status(pods)["state"]})
        says.write_text("200")
        pods.until("another run", lambda: status(pods)["restartCount"] > 0 and is_ready(pods))
        assert pods.address("a") == address
        assert Path(pods.shown("a")["netns"]).stat().st_ino == inode
        assert any(reason == "Unhealthy" and why in message for reason, message in events(pods)), events(pods)
        assert ("Killing", "Container web failed liveness probe, will be restarted") in events(pods)
        assert "serving" in cluster.container_log(lab, "default", "a", previous=True).read_text()
        found = process.in_namespaces(frozenset({inode}))
        assert len(found) == 1, "nothing of the first run is left"


def test_a_liveness_probe_ends_a_pod_that_is_not_to_be_restarted(lab: LabState, says: Path) -> None:
    says.write_text("500")
    web = server(says, livenessProbe={"httpGet": {"port": 8080}})
    with Pods(lab, [pod("a", web, restartPolicy="Never")], wait=False) as pods:
        pods.until("failure", lambda: pods.object("a").get("status", {}).get("phase") == "Failed")
        assert status(pods)["state"]["terminated"]["exitCode"] == 143


def test_a_slow_start_is_given_its_time_by_a_startup_probe(lab: LabState, tmp_path: Path, says: Path) -> None:
    flag = tmp_path / "started"
    startup = {"exec": {"command": ["test", "-e", str(flag)]}, "failureThreshold": 100}
    says.write_text("500")  # liveness would end it at once, if it were asked
    web = server(says, startupProbe=startup, livenessProbe={"httpGet": {"port": 8080}})
    with Pods(lab, [pod("a", web)], wait=False) as pods:
        pods.until("a failed startup probe", lambda: any("Startup" in said for _, said in events(pods)))
        assert (status(pods)["started"], status(pods)["ready"], status(pods)["restartCount"]) == (False, False, 0)
        says.write_text("200")
        pods.until("the server", lambda: "serving" in cluster.container_log(lab, "default", "a").read_text())
        flag.touch()
        pods.until("ready", lambda: is_ready(pods))
        assert status(pods)["started"]
        says.write_text("500")
        pods.until("liveness to end it", lambda: status(pods)["lastState"] != {})


def test_probes_of_a_pod_on_its_nodes_network(lab: LabState, says: Path) -> None:
    web = server(says, readinessProbe={"httpGet": {"port": 8080}}, livenessProbe={"tcpSocket": {"port": 8080}})
    with Pods(lab, [pod("a", web, nodeName="node3", hostNetwork=True)]) as pods:
        assert pods.address("a") == lab.node("node3").addresses[0]
        says.write_text("503")
        pods.until("unready", lambda: not is_ready(pods))


# --- init containers --------------------------------------------------------------------------------------------


def shell(name: str, script: str) -> Object:
    return {"name": name, "command": ["sh", "-c", script]}


def test_init_containers_run_one_after_the_other_before_all_else(lab: LabState, tmp_path: Path) -> None:
    order, gate = tmp_path / "order", tmp_path / "gate"
    init = [
        shell("one", f"echo one >> {order}; while [ ! -e {gate} ]; do sleep 0.05; done; ip -br address show eth0"),
        {"name": "nowhere", "image": "migrate:1"},
        shell("two", f"echo two >> {order}"),
    ]
    main = shell("main", f"echo main >> {order}; exec sleep 1000")
    with Pods(lab, [pod("a", main, initContainers=init)], wait=False) as pods:
        pods.until("the first", order.exists)
        answer = cluster.client(lab).get(PODS, "a", "default")["status"]
        assert answer["phase"] == "Pending"
        assert answer["containerStatuses"][0]["state"] == {"waiting": {"reason": "PodInitializing"}}
        gate.touch()
        cluster.wait_ready(lab, [("default", "a")])
        pods.until("the last", lambda: order.read_text().split() == ["one", "two", "main"])
        assert pods.address("a") in cluster.container_log(lab, "default", "a", "one").read_text(), "it has a network"
        assert "did nothing" in cluster.container_log(lab, "default", "a", "nowhere").read_text()
        ended = pods.object("a")["status"]["initContainerStatuses"]
        assert [one["state"]["terminated"]["exitCode"] for one in ended] == [0, 0, 0]


@pytest.mark.parametrize(("policy", "phase", "runs"), [("Always", "Running", 2), ("Never", "Failed", 1)])
def test_an_init_container_that_fails(lab: LabState, tmp_path: Path, policy: str, phase: str, runs: int) -> None:
    """It fails the first time: where it may, it is started again."""
    seen = tmp_path / "seen"
    init = shell("init", f"echo run >> {seen}; test $(wc -l < {seen}) -gt 1")
    with Pods(lab, [pod("a", shell("main", "exec sleep 1000"), initContainers=[init], restartPolicy=policy)],
              wait=False) as pods:  # fmt: skip
        pods.until(phase, lambda: pods.object("a").get("status", {}).get("phase") == phase)
        assert len(seen.read_text().splitlines()) == runs
        (state,) = pods.object("a")["status"]["initContainerStatuses"]
        assert state["restartCount"] == runs - 1


def test_a_sidecar_runs_beside_the_others_from_before_them(lab: LabState) -> None:
    sidecar = {"name": "side", "image": "echo", "ports": [{"containerPort": 81}], "restartPolicy": "Always"}
    with Pods(lab, [pod("a", shell("main", "exec sleep 1000"), initContainers=[sidecar])]) as pods:
        assert pods.ask("a", "127.0.0.1", 81).container == "side"


def test_a_pod_that_is_deleted_while_it_initializes_goes(lab: LabState) -> None:
    with Pods(lab, [pod("a", initContainers=[shell("stuck", "exec sleep 1000")])], wait=False) as pods:
        pods.until("it to be stuck", lambda: "initContainerStatuses" in pods.object("a").get("status", {}))


# --- environment ------------------------------------------------------------------------------------------------


def test_a_container_waits_for_the_config_map_that_it_names(lab: LabState) -> None:
    source = {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "paint", "key": "color"}}}
    job = {"name": "main", "command": ["echo"], "args": ["$(COLOR) on $(NODE)"], "env": [
        source, {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ]}  # fmt: skip
    paint = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "paint"}, "data": {"color": "red"}}
    with Pods(lab, [pod("a", job, restartPolicy="Never", nodeName="node2")], wait=False) as pods:
        reason = "CreateContainerConfigError"
        pods.until(reason, lambda: reason in json.dumps(pods.object("a").get("status", {})))
        try:
            cluster.apply(lab, [paint])
            pods.until("it to end", lambda: pods.object("a")["status"]["phase"] == "Succeeded")
        finally:
            cluster.delete(lab, [paint])
        assert cluster.container_log(lab, "default", "a").read_text() == "red on node2\n"


def test_logs_over_the_api(lab: LabState) -> None:
    main = shell("main", "seq 5; exec sleep 1000")
    with Pods(lab, [pod("a", main)]) as pods:
        pods.until("its output", lambda: cluster.container_log(lab, "default", "a").read_text().endswith("5\n"))
        api = cluster.client(lab)
        where = path(PODS, "default", "a", "log")
        for query, wanted in (({}, "1\n2\n3\n4\n5\n"), ({"tailLines": "2"}, "4\n5\n"), ({"limitBytes": "3"}, "1\n2")):
            assert api.text(where, query=query) == wanted
        for query, said in (
            ({"container": "db"}, "container db is not valid for pod a"),
            ({"previous": "true"}, "not found"),
            ({"timestamps": "true"}, "does not keep the time"),
        ):
            with pytest.raises(Exception, match=said):
                api.text(where, query=query)
