"""What people do with a lab that is up: pods, and what they reach, from one lab of three nodes."""

from __future__ import annotations

import ipaddress
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from podwire.lab import cluster, names, node, process, topology
from podwire.lab.api.client import path
from podwire.lab.api.kinds import PODS
from podwire.lab.state import LabState
from podwire.lab.status import node_status
from podwire.lab.talk import ask
from tests.netns.lab_fixtures import PATIENCE, Pods, pod

ECHO = {"name": "web", "image": "echo", "ports": [{"containerPort": 80}]}
WEB_ON_HOST = {"name": "web", "image": "echo", "ports": [{"containerPort": 8080}]}


def cli(lab: LabState, verb: str, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podwire.cli.main", "lab", verb, "--name", lab.name, *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="class")
def pods(lab: LabState) -> Iterator[Pods]:
    on_nodes = [pod("a", nodeName="node1"), pod("b", nodeName="node1"), pod("c", nodeName="node2")]
    on_hosts = [pod(f"h{i}", WEB_ON_HOST, nodeName=f"node{i}", hostNetwork=True) for i in (1, 2)]
    with Pods(lab, [*on_nodes, pod("d", nodeName="node3"), *on_hosts]) as made:
        yield made


class TestReachability:
    @pytest.mark.parametrize(
        ("source", "target", "port", "protocol"),
        [
            pytest.param("a", "b", 80, "TCP", id="same node"),
            pytest.param("a", "c", 80, "TCP", id="across nodes"),
            pytest.param("c", "d", 80, "TCP", id="across two other nodes"),
            pytest.param("d", "a", 80, "UDP", id="across nodes, a datagram"),
            pytest.param("a", "h1", 8080, "TCP", id="to its own node"),
            pytest.param("h1", "a", 80, "TCP", id="from its own node"),
            pytest.param("h1", "c", 80, "TCP", id="from another node"),
            pytest.param("h1", "h2", 8080, "TCP", id="node to node"),
        ],
    )
    def test_the_server_sees_the_clients_own_address(
        self, pods: Pods, source: str, target: str, port: int, protocol: str
    ) -> None:
        answer = pods.ask(source, target, port, protocol)
        assert (answer.pod, answer.port, answer.protocol) == (target, port, protocol)
        assert answer.untranslated, answer
        if not source.startswith("h"):
            assert answer.client == pods.address(source)

    def test_a_pod_reaches_another_nodes_own_address_as_its_node(self, pods: Pods, lab: LabState) -> None:
        answer = pods.ask("a", "h2", 8080)
        assert (answer.pod, answer.client) == ("h2", lab.node("node1").addresses[0])

    def test_a_host_network_pod_has_its_nodes_address_and_namespace(self, pods: Pods, lab: LabState) -> None:
        shown = pods.shown("h2")
        assert shown["addresses"] == list(lab.node("node2").addresses)
        assert shown["netns"] == str(lab.netns("node2"))

    def test_what_is_on_no_node_is_reached_by_no_pod_address(self, pods: Pods, lab: LabState) -> None:
        with pytest.raises(Exception, match=r"unreachable|timed out"):
            ask(lab.netns("outside"), pods.address("a"), 80, seconds=0.3)


def test_containers_of_a_pod_share_localhost_and_nothing_else_does(lab: LabState) -> None:
    side = {"name": "side", "image": "echo", "ports": [{"containerPort": 81}]}
    with Pods(lab, [pod("two", ECHO, side, nodeName="node1"), pod("one", nodeName="node1")]) as pods:
        answer = pods.ask("two", "127.0.0.1", 81)
        assert (answer.container, answer.client) == ("side", "127.0.0.1")
        assert pods.ask("two", "127.0.0.1", 80).container == "web"
        with pytest.raises(Exception, match="refused"):
            pods.ask("one", "127.0.0.1", 81)
        statuses = pods.object("two")["status"]["containerStatuses"]
        assert [(one["name"], one["ready"]) for one in statuses] == [("web", True), ("side", True)]


KEEP_ALIVE = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1])
ports = set()
for body in (b"", b"x" * 100_000, b"y"):
    connection.request("POST", "/any/path?q=1", body)
    ports.add(json.loads(connection.getresponse().read())["client_port"])
print(len(ports))
"""


def test_the_echo_server_takes_any_request_and_keeps_the_connection(lab: LabState) -> None:
    with Pods(lab, [pod("server", nodeName="node1"), pod("client", nodeName="node2")]) as pods:
        enter, _ = cluster.exec_command(lab, "default", "client")
        assert topology.run([*enter, sys.executable, "-IS", "-c", KEEP_ALIVE, pods.address("server")]) == "1\n"
        # A node has several addresses: a datagram is answered from the one that it was sent to.
        with Pods(lab, [pod("on-host", nodeName="node1", hostNetwork=True)]):
            block = next(iter(node_status(lab, lab.node("node1"))["blocks"]))
            gateway = str(ipaddress.ip_network(block)[1])
            assert pods.ask("server", gateway, 80, "UDP").pod == "on-host"
            assert pods.ask("client", gateway, 80, "UDP").pod == "on-host"


def test_pods_that_name_no_node_are_spread(lab: LabState) -> None:
    with Pods(lab, [pod(f"s{i}") for i in range(6)]) as pods:
        placed = sorted(pods.shown(f"s{i}")["node"] for i in range(6))
        assert placed == ["node1", "node1", "node2", "node2", "node3", "node3"]
        addresses = {pods.address(f"s{i}") for i in range(6)}
        assert len(addresses) == 6


def test_a_node_selector_is_obeyed(lab: LabState) -> None:
    with Pods(lab, [pod("picky", nodeSelector={"kubernetes.io/hostname": "node2"})]) as pods:
        assert pods.shown("picky")["node"] == "node2"


def test_deletion_leaves_no_namespace_link_or_process(lab: LabState) -> None:
    def links() -> set[str]:
        shown = topology.run(["ip", "-n", names.namespace(lab.name, "node1"), "-j", "link"])
        return {link["ifname"] for link in json.loads(shown) if link.get("link_index")}

    def nothing_but_its_own() -> bool:
        return links() == {"eth0"}

    process.wait_for(nothing_but_its_own, PATIENCE, "the links of the tests before to go")
    # A daemon of its own session, without the lab's mark: it must not keep the namespace alive.
    stray = {"name": "stray", "command": ["sh", "-c", "env -i setsid sleep 1000 & exec sleep 1000"]}
    with Pods(lab, [pod("gone", ECHO, stray, nodeName="node1")]) as pods:
        netns = Path(pods.shown("gone")["netns"])
        inode = frozenset({netns.stat().st_ino})
        # What a command starts is there some time after it: the container runs from its first process on.
        pods.until("all processes of the pod", lambda: len(process.in_namespaces(inode)) == 3)
        assert len(links()) == 2
    assert not netns.exists()
    assert process.in_namespaces(inode) == []
    process.wait_for(nothing_but_its_own, PATIENCE, "the link to go")


@pytest.mark.parametrize(
    ("policy", "code", "phase", "restarted"),
    [
        pytest.param("Never", 0, "Succeeded", False, id="ends well and stays ended"),
        pytest.param("Never", 3, "Failed", False, id="fails and stays failed"),
        pytest.param("OnFailure", 0, "Succeeded", False, id="on failure: ends well and stays ended"),
        pytest.param("OnFailure", 3, "Running", True, id="on failure: fails and is started again"),
        pytest.param("Always", 0, "Running", True, id="always: is started again"),
    ],
)
def test_a_command_runs_and_ends_as_its_restart_policy_says(
    lab: LabState, policy: str, code: int, phase: str, restarted: bool
) -> None:
    job = {"name": "job", "command": ["sh", "-c", f"exit {code}"]}
    with Pods(lab, [pod("job", job, restartPolicy=policy)], wait=False) as pods:

        def settled() -> bool:
            said = pods.object("job").get("status", {})
            counts = [one["restartCount"] for one in said.get("containerStatuses", [])]
            return said.get("phase") == phase and (not restarted or counts[0] > 0)

        pods.until(f"phase {phase}", settled)


def test_a_command_gets_its_arguments_environment_and_addresses(lab: LabState) -> None:
    own_address = {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    variables = [{"name": "WHO", "value": "world"}, own_address]
    speaker = {"name": "say", "command": ["echo"], "args": ["hello $(WHO) at $(ADDRESS)"], "env": variables}
    with Pods(lab, [pod("speaker", speaker, restartPolicy="Never")], wait=False) as pods:
        pods.until("it to end", lambda: pods.object("speaker").get("status", {}).get("phase") == "Succeeded")
        log = lab.files.pod_folder("default", "speaker") / "say.log"
        assert log.read_text() == f"hello world at {pods.address('speaker')}\n"


def test_a_pod_waits_for_its_nodes_daemon_and_says_so(lab: LabState) -> None:
    node.kill_daemon(lab, "node2")
    try:
        with Pods(lab, [pod("early", nodeName="node2")], wait=False) as pods:
            pods.until("a message", lambda: "code 11" in pods.object("early").get("status", {}).get("message", ""))
            assert pods.object("early")["status"]["phase"] == "Pending"
            node.start_daemon(lab, "node2")
            cluster.wait_ready(lab, [("default", "early")])
            assert "message" not in pods.object("early")["status"]
    finally:
        node.stop_daemon(lab, "node2")
        node.start_daemon(lab, "node2")
        node.wait_daemon(lab, "node2")


def test_a_pod_of_the_same_name_comes_after_the_one_before(lab: LabState) -> None:
    daemon = process.recorded(lab.files, node.daemon_role("node1"))
    assert daemon is not None
    with Pods(lab, [pod("again", nodeName="node1")]) as pods:
        first = pods.address("again")
        daemon.kill(signal.SIGSTOP)  # the first one's end takes a while
        try:
            # Deleted by force, a pod is gone from the API at once and from its node later.
            where = path(PODS, "default", "again")
            cluster.client(lab).request("DELETE", where, query={"gracePeriodSeconds": "0"})
            cluster.apply(lab, [pod("again", nodeName="node1")])
            # A pod that is made after it, and needs no daemon, shows that its successor was looked at.
            on_host = pod("later", WEB_ON_HOST, nodeName="node1", hostNetwork=True)
            with Pods(lab, [on_host]):
                assert pods.object("again")["status"]["phase"] == "Pending"
        finally:
            daemon.kill(signal.SIGCONT)
        cluster.wait_ready(lab, [("default", "again")])
        assert pods.address("again") != first
        assert pods.ask("again", pods.address("again")).pod == "again"


# --- the command ------------------------------------------------------------------------------------------------


def test_apply_exec_delete_by_command(lab: LabState, tmp_path: Path) -> None:
    manifest = tmp_path / "pods.json"
    host_pod = pod("cmd-host", WEB_ON_HOST, nodeName="node3", hostNetwork=True)
    manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [pod("cmd"), host_pod]}))
    applied = cli(lab, "apply", "-f", str(manifest))
    try:
        assert (applied.returncode, applied.stdout) == (0, "pod/cmd created\npod/cmd-host created\n"), applied.stderr
        cluster.wait_ready(lab, [("default", "cmd"), ("default", "cmd-host")])
        cases: list[tuple[str, list[str], str, int, str]] = [
            ("exit code", ["exec", "cmd", "--", "sh", "-c", "exit 7"], "", 7, ""),
            ("stdin and stdout", ["exec", "cmd", "-n", "default", "--", "cat"], "through", 0, "through"),
            ("container", ["exec", "cmd", "-c", "web", "--", "sh", "-c", "echo $HOSTNAME"], "", 0, "cmd\n"),
            ("no such container", ["exec", "cmd", "-c", "db", "--", "true"], "", 1, ""),
            ("no such pod", ["exec", "nobody", "--", "true"], "", 1, ""),
            ("node's files", ["node", "node3", "--", "ls", "/etc/cni/net.d"], "", 0, "10-podwire.conflist\n"),
            ("node's network", ["exec", "cmd-host", "--", "cat", "/sys/class/net/pw0/type"], "", 0, "1\n"),
            ("no such node", ["node", "node9", "--", "true"], "", 1, ""),
        ]  # fmt: skip
        for name, words, stdin, code, stdout in cases:
            done = cli(lab, words[0], *words[1:], stdin=stdin)
            assert (done.returncode, done.stdout) == (code, stdout), f"{name}: {done.stderr}"
            assert "Traceback" not in done.stderr, name
    finally:
        deleted = cli(lab, "delete", "-f", str(manifest))
    assert (deleted.returncode, deleted.stdout) == (0, "pod/cmd-host deleted\npod/cmd deleted\n"), deleted.stderr
    assert cluster.pods(lab) == []


IS_TEXT: Callable[[Any], bool] = lambda value: isinstance(value, str) and bool(value)  # noqa: E731
IS_TEXTS: Callable[[Any], bool] = lambda value: isinstance(value, list) and all(map(IS_TEXT, value))  # noqa: E731


def test_status_is_the_documented_interface(lab: LabState) -> None:
    with Pods(lab, [pod("shown", nodeName="node1")]):
        done = cli(lab, "status", "-o", "json")
        shown = json.loads(done.stdout)
        assert cli(lab, "status").returncode == 0
    assert shown["name"] == lab.name
    assert shown["api"]["url"].startswith("http://127.0.0.1:")
    assert Path(shown["api"]["kubeconfig"]).is_file()
    assert shown["etcd"] == ["http://172.31.0.2:2379"]
    assert shown["services"] == []
    assert [each["name"] for each in shown["nodes"]] == ["node1", "node2", "node3"]
    for each in shown["nodes"]:
        for field in ("name", "netns", "cni_bin_dir", "cni_conf_dir", "ipamd_socket", "metrics"):
            assert IS_TEXT(each[field]), field
        assert IS_TEXTS(each["addresses"])
        assert IS_TEXTS(each["blocks"])
        assert len(each["blocks"]) == 1
        assert Path(each["netns"]).parent == Path("/run/netns")
        assert (Path(each["cni_bin_dir"]) / "podwire").is_file()
        assert Path(each["ipamd_socket"]).is_socket()
    (only,) = shown["pods"]
    assert only.keys() == {"namespace", "name", "node", "netns", "addresses", "phase"}
    assert (only["namespace"], only["name"], only["node"], only["phase"]) == ("default", "shown", "node1", "Running")
    assert only["addresses"][0].startswith(shown["nodes"][0]["blocks"][0].rsplit(".", 1)[0])
    assert Path(only["netns"]).parent == Path("/run/netns")


def test_the_api_answers_on_the_labs_own_network(lab: LabState) -> None:
    words = [*node.enter_command(lab, "node1"), sys.executable, "-IS", "-c"]
    fetch = "import urllib.request as r; print(r.urlopen('http://172.31.0.2:6443/readyz').read().decode())"
    assert topology.run([*words, fetch]) == "ok\n"


def test_metrics_are_served_on_the_node(lab: LabState) -> None:
    fetch = "import urllib.request as r; print(r.urlopen('http://172.31.0.12:9817/readyz').status)"
    assert topology.run([*node.enter_command(lab, "node1"), sys.executable, "-IS", "-c", fetch]) == "200\n"
