"""`podwire explain` on a lab of two nodes whose packets agree: what is right, what objects have wrong, how it is said.

No kernel is tampered with here (test_explain_faults.py does that): ways that pass are read hop by hop and nothing is
found wrong, what objects, servers and an absent daemon have wrong is named, and on a node half of the way is seen.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from podwire.cli import main as command
from podwire.explain.hops import State
from podwire.lab import cluster, demo_policy, node
from podwire.lab.state import LabState
from tests.netns.explain_fixtures import lab
from tests.netns.explain_stage import PATIENCE, Object, address_of, look, on, reaches
from tests.netns.lab_fixtures import Pods, pod

__all__ = ["lab"]

# --- ways that pass, and what objects and servers have wrong --------------------------------------------------------

CLEAN: dict[str, tuple[str, str, str]] = {
    "across nodes": ("a", "b", "80"),
    "on one node": ("a", "near", "80"),
    "by a port's name": ("a", "b", "http"),
    "by UDP": ("a", "b", "dns"),
    "to a Service": ("a", "svc", "80"),
    "to a port of its own node": ("a", "172.31.0.11", "30080"),
    "to a port of another node": ("a", "172.31.0.12", "30080"),
    "to a headless Service": ("a", "bare", "80"),
    "to a Service that is the client itself": ("a", "self", "80"),
    "to another node": ("a", "172.31.0.12", "8080"),
    "to a pod on another node's network": ("a", "host", "8080"),
    "out of the cluster": ("a", "198.51.100.1", "80"),
    "from a pod on its node's network": ("host", "a", "80"),
    "from such a pod to a Service": ("host", "self", "80"),
    "where a policy allows it": ("near", "closed", "80"),
    "where a policy lets it out": ("caged", "a", "80"),
}


@pytest.mark.parametrize(("source", "target", "port"), CLEAN.values(), ids=CLEAN.keys())
def test_nothing_fails_and_every_hop_was_read(lab: LabState, source: str, target: str, port: str) -> None:
    path = look(lab, source, target, port)
    wrong = [(hop.title, each.text) for hop in path.hops for each in hop.findings if each.state is not State.OK]
    assert wrong == []


def test_a_path_across_nodes_has_the_hops_of_a_textbook(lab: LabState) -> None:
    path = look(lab, "a", "svc")
    assert [hop.title for hop in path.hops] == [
        "the ends",
        "source pod",
        "wire, bridge and spoof guard",
        "Service default/svc",
        "egress policy",
        "out: forwarding and route",
        "tunnel to node2",
        "underlay to node2",
        "the other node",
        "ingress policy",
        "destination pod",
        "wire, bridge and spoof guard",
        "the listener",
        "back: forwarding and route",
        "back: tunnel to node1",
        "back: underlay to node1",
    ]


def test_every_command_that_is_shown_says_it_again(lab: LabState) -> None:
    path = look(lab, "a", "svc")
    shown = [each.command for hop in path.hops for each in hop.findings if each.command]
    assert len(shown) > 20
    of_each_sort = {shlex.split(each)[shlex.split(each).index("--") + 1]: each for each in shown}
    assert of_each_sort.keys() == {"ip", "nft", "bridge", "ss", "sysctl"}
    for each in of_each_sort.values():
        words = [sys.executable, "-m", "podwire.cli.main", *shlex.split(each)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
        # what is not in a set is an answer, too
        assert done.returncode == 0 or "Could not process rule: No such file" in done.stderr, done.stderr


STATED: dict[str, tuple[str, str, str, str, str]] = {
    "a policy denies egress": ("caged", "b", "80", "egress policy", "isolated for egress by default/cage"),
    "a policy denies ingress": ("a", "closed", "80", "ingress policy", "isolated for ingress by default/shut"),
    "no endpoints": ("a", "nobody", "80", "Service default/nobody", "it selects app=ghost, and no such pod"),
    "the endpoint is not ready": ("a", "svc/default/late", "80", "Service default/late", "is not ready"),
    "a wrong target port": ("a", "wrong", "80", "the listener", "nothing listens on TCP 81 in default/b"),
    "a server on its loopback alone": ("a", "loopback", "8000", "the listener", "listened on at 127.0.0.1 alone"),
}


@pytest.mark.parametrize(("source", "target", "port", "title", "words"), STATED.values(), ids=STATED.keys())
def test_what_objects_and_servers_have_wrong(
    lab: LabState, source: str, target: str, port: str, title: str, words: str
) -> None:
    first = look(lab, source, target, port).first(State.FAILS)
    assert first is not None
    _, hop, finding = first
    assert (hop.title, bool(finding.fix)) == (title, True)
    assert words in finding.text


def test_a_pod_that_has_no_address_because_its_nodes_daemon_is_down(lab: LabState) -> None:
    node.kill_daemon(lab, "node2")
    try:
        with Pods(lab, [pod("early", nodeName="node2")], wait=False):
            first = look(lab, "a", "early").first(State.FAILS)
            assert first is not None
            assert "the daemon of node2, which would give it one, does not answer" in first[2].text
            path = look(lab, "a", "b")
            assert path.first(State.FAILS) is None  # what is in the kernel stays
            warned = path.first(State.WARNING)
            assert warned is not None
            assert (warned[1].title, "the daemon of node2 does not answer" in warned[2].text) == (
                "the other node",
                True,
            )
            assert reaches(lab, "a", address_of(lab, "b"), seconds=PATIENCE)
            node.start_daemon(lab, "node2")
            node.wait_daemon(lab, "node2")
    finally:
        node.kill_daemon(lab, "node2")
        node.start_daemon(lab, "node2")
        node.wait_daemon(lab, "node2")


# --- on a node ----------------------------------------------------------------------------------------------------


def on_node(lab: LabState, *words: str) -> tuple[int, Object]:
    """The command on node1 as an operator there would run it, without the lab."""
    flags = ["--kubeconfig", str(lab.files.node_kubeconfig), "--socket", str(lab.files.ipamd_socket("node1"))]
    asked = ["explain", *words, *flags, "-o", "json"]
    line = [*node.enter_command(lab, "node1"), sys.executable, "-m", "podwire.cli.main", *asked]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_on_a_node_the_local_half_is_read_and_the_remote_half_marked(lab: LabState) -> None:
    code, shown = on_node(lab, "a", "svc", "80")
    states = {hop["title"]: hop["state"] for hop in shown["hops"]}
    assert (code, shown["passes"], shown["end"].split()[0]) == (0, True, "default/b")
    for title in ("source pod", "Service default/svc", "egress policy", "out: forwarding and route", "tunnel to node2"):
        assert states[title] == "ok", title
    for title in ("destination pod", "the listener", "the other node"):
        assert states[title] == "unseen", title
    assert "not read back" in shown["conclusion"][0]


def test_on_a_node_whose_daemon_is_down_what_needs_no_daemon_is_read(lab: LabState) -> None:
    node.stop_daemon(lab, "node1")
    try:
        code, shown = on_node(lab, "a", "svc", "80", "--node", "node1")
    finally:
        node.start_daemon(lab, "node1")
        node.wait_daemon(lab, "node1")
    states = {hop["title"]: hop["state"] for hop in shown["hops"]}
    assert (code, states["the ends"], states["source pod"]) == (0, "warning", "unseen")
    assert (states["Service default/svc"], states["egress policy"]) == ("ok", "ok")
    assert "the daemon of node1 does not answer" in shown["conclusion"][0]


def test_on_a_node_a_policy_of_the_other_node_is_named_all_the_same(lab: LabState) -> None:
    code, shown = on_node(lab, "a", "closed", "80")
    assert (code, shown["first"]["title"]) == (1, "ingress policy")


def test_a_path_begins_at_a_pod(lab: LabState, capsys: pytest.CaptureFixture[str]) -> None:
    for place, said in (
        (["svc", "b", "80"], "no such pod"),
        (["198.51.100.1", "b", "80"], "is no pod"),
        (["a", "mars/rover", "80"], "no such pod or Service"),
        (["a", "b", "https"], "no port named https"),
    ):
        assert command.main(["explain", "--name", lab.name, *place]) == 2
        assert said in capsys.readouterr().err


def test_the_text_ends_with_what_it_comes_to(lab: LabState, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["explain", "--name", lab.name, "a", "svc", "80"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "nothing fails on the whole way"
    assert "default/a" in said[0]
    assert command.main(["explain", "--name", lab.name, "a", "wrong", "80", "-q"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-3].startswith("fails at hop 13, the listener (pod default/b): nothing listens on TCP 81")
    assert said[-2].startswith("fix: ")
    assert said[-1].startswith("see: podwire lab exec")


# --- what else is asked of a cluster that runs --------------------------------------------------------------------


def test_policies_of_a_cluster_that_runs(lab: LabState, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--name", lab.name]
    for source, to, code in (("near", "closed", 0), ("a", "closed", 1), ("a", "svc/default/svc", 0), ("caged", "b", 1)):
        assert command.main(["policy", "test", *flags, "--from", source, "--to", to, "--port", "80"]) == code
    capsys.readouterr()
    assert command.main(["policy", "matrix", *flags, "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    place = {name: number for number, group in enumerate(shown["groups"]) for name in group["pods"]}
    near, own, closed = (place[f"default/{name}"] for name in ("near", "a", "closed"))
    assert (shown["cells"][near][closed]["state"], shown["cells"][own][closed]["state"]) == ("all", "none")
    kubeconfig = ["--kubeconfig", str(lab.files.kubeconfig)]
    assert command.main(["policy", "test", *kubeconfig, "--from", "a", "--to", "closed", "--port", "80"]) == 1


def test_the_status_of_a_node_says_which_policies_are_in_effect(lab: LabState) -> None:
    line = [sys.executable, "-m", "podwire.cli.main", "status", "--socket", str(lab.files.ipamd_socket("node1"))]
    assert re.search(r"proxy nftables: up to date; policy generation \d+ is in effect", on(lab, "node1", *line))
    shown = json.loads(on(lab, "node1", *line, "-o", "json"))["proxy"]
    assert (shown["answers"], shown["healthy"], shown["generation"] > 0) == (True, True, True)


class Said:
    """A stage of the demonstration that keeps what it is told."""

    def __init__(self, lab: LabState) -> None:
        self.lab = lab
        self.lines: list[str] = []
        self.failures: list[str] = []

    def title(self, text: str) -> None:
        self.lines.append(text)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def wrong(self, what: str) -> None:
        self.failures.append(what)


def test_the_demonstrations_stanza(lab: LabState) -> None:
    stage = Said(lab)
    try:
        demo_policy.show_policy(stage)
        assert stage.failures == []
        assert any("fails at hop" in line and "shop/db-from-web" in line for line in stage.lines)
    finally:
        cluster.wait_deleted(lab, cluster.delete(lab, [*demo_policy.objects(), demo_policy.policy()]))
