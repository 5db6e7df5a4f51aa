"""`podwire explain` names what is wrong: every fault made on purpose, on a lab of two nodes whose packets agree.

Faults in the kernel are made with the daemon and the proxy of that node away: both would put them right. Each is made,
named, mended, and gone.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from podwire.cli import main as command
from podwire.explain.hops import State
from podwire.lab import cluster, demo, demo_policy, node, process, proxy, state
from podwire.lab.state import LabState
from tests.netns.explain_stage import (
    ECHO,
    PATIENCE,
    Object,
    address_of,
    fetched_ip,
    labelled,
    look,
    on,
    passes,
    policy,
    reaches,
    service,
    wait_served,
)
from tests.netns.lab_fixtures import Pods, fresh_name, pod

UNREADY = {"readinessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1}}
LOCAL = {"name": "web", "command": [sys.executable, "-m", "http.server", "-b", "127.0.0.1", "8000"]}


OBJECTS = [
    labelled(pod("a", ECHO, nodeName="node1")),
    labelled(pod("b", ECHO, nodeName="node2")),
    labelled(pod("near", ECHO, nodeName="node1")),
    labelled(pod("host", {**ECHO, "ports": [{"containerPort": 8080}]}, nodeName="node2", hostNetwork=True)),
    labelled(pod("caged", ECHO, nodeName="node1")),
    labelled(pod("closed", ECHO, nodeName="node2")),
    labelled(pod("loopback", LOCAL, nodeName="node2")),
    service("svc", "b"),
    service("self", "a"),
    service("ported", "b", type="NodePort", ports=[{"port": 80, "nodePort": 30080}]),
    service("bare", "b", clusterIP="None"),
    service("wrong", "b", 81),
    service("nobody", "ghost"),
    service("late", "late"),
    policy("cage", "caged", policyTypes=["Egress"], egress=[{"to": [{"podSelector": {"matchLabels": {"app": "a"}}}]}]),
    policy("shut", "closed", ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "near"}}}]}]),
]
LATE = labelled(pod("late", {**ECHO, **UNREADY}, nodeName="node2"))


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    made = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(2), proxy="nftables"))
    try:
        cluster.wait_ready(made, cluster.apply(made, OBJECTS))
        cluster.apply(made, [LATE])
        demo.start_outside(made)

        wait_served(made, {"svc", "self", "wrong", "late"})
        process.wait_for(lambda: passes(made, "near", "svc", "80"), PATIENCE, "the proxies to have the Services")
        process.wait_for(lambda: passes(made, "near", "closed", "80"), PATIENCE, "the proxies to have the policies")
        process.wait_for(lambda: passes(made, "host", "self", "80"), PATIENCE, "the other proxy to have them, too")
        yield made
    finally:
        cluster.down(made.name)


# --- what needs no fault in a kernel ------------------------------------------------------------------------------

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


# --- faults in the kernel -----------------------------------------------------------------------------------------


@pytest.fixture(scope="class")
def untended(lab: LabState) -> Iterator[LabState]:
    """Nobody puts anything right on node1."""
    node.stop_daemon(lab, "node1")
    proxy.end(lab, "node1")
    try:
        yield lab
    finally:
        node.start_daemon(lab, "node1")
        proxy.start(lab, "node1")
        node.wait_daemon(lab, "node1")
        proxy.wait_healthy(lab, lab.node("node1"))


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """`make` returns what mends it: commands on node1, or in a pod where they begin with `pod/…`.

    `lost`: a packet to the target gets no answer, too.
    """

    make: Callable[[LabState], list[list[str]]]
    title: str
    words: str
    source: str = "a"
    target: str = "b"
    port: str = "80"
    lost: bool = True


def did(lab: LabState, *commands: list[str]) -> None:
    for words in commands:
        on(lab, *(words if words[0].startswith("pod/") else ["node1", *words]))


def block_of_node2(lab: LabState) -> tuple[str, str]:
    """(block, VTEP) of node2, as node1 has them in its routes."""
    (found,) = re.findall(r"^(\S+) via (\S+) dev pw-vxlan", on(lab, "node1", "ip", "route"), re.MULTILINE)
    return str(found[0]), str(found[1])


def mac_of_node2(lab: LabState) -> str:
    said = on(lab, "node1", "ip", "neigh", "show", "to", block_of_node2(lab)[1], "dev", "pw-vxlan")
    return said.split("lladdr ")[1].split()[0]


def delete_route(lab: LabState) -> list[list[str]]:
    block, vtep = block_of_node2(lab)
    did(lab, ["ip", "route", "del", block])
    return [["ip", "route", "add", block, "via", vtep, "dev", "pw-vxlan", "onlink", "proto", "80"]]


def wrong_fdb(lab: LabState) -> list[list[str]]:
    entry = ["bridge", "fdb", "replace", mac_of_node2(lab), "dev", "pw-vxlan", "self", "permanent", "dst"]
    did(lab, [*entry, "172.31.0.99"])
    return [[*entry, "172.31.0.12"]]


def no_fdb(lab: LabState) -> list[list[str]]:
    mac = mac_of_node2(lab)
    did(lab, ["bridge", "fdb", "del", mac, "dev", "pw-vxlan", "dst", "172.31.0.12", "self"])
    return [["bridge", "fdb", "add", mac, "dev", "pw-vxlan", "dst", "172.31.0.12", "self", "permanent"]]


def no_neighbour(lab: LabState) -> list[list[str]]:
    vtep, mac = block_of_node2(lab)[1], mac_of_node2(lab)
    did(lab, ["ip", "neigh", "del", vtep, "dev", "pw-vxlan"])
    return [["ip", "neigh", "replace", vtep, "lladdr", mac, "dev", "pw-vxlan", "nud", "permanent"]]


def wrong_neighbour(lab: LabState) -> list[list[str]]:
    vtep, mac = block_of_node2(lab)[1], mac_of_node2(lab)
    entry = ["ip", "neigh", "replace", vtep, "dev", "pw-vxlan", "nud", "permanent", "lladdr"]
    did(lab, [*entry, "02:00:00:00:00:99"])
    return [[*entry, mac]]


def wire_of(lab: LabState, name: str) -> str:
    """The node's end of a pod's wire."""
    (peer,) = re.findall(r"eth0@if(\d+)", on(lab, f"pod/{name}", "ip", "-o", "link", "show", "eth0"))
    links = json.loads(on(lab, "node1", "ip", "-j", "link"))
    return str(next(each["ifname"] for each in links if each["ifindex"] == int(peer)))


def large_mtu(lab: LabState) -> list[list[str]]:
    sizes = {("node1", "pw0"): 1450, ("node1", wire_of(lab, "a")): 1450, ("pod/a", "eth0"): 1450}
    for where, device in sizes:
        on(lab, where, "ip", "link", "set", device, "mtu", "1500")
    return [
        [*([where] if where != "node1" else []), "ip", "link", "set", device, "mtu", str(mtu)]
        for (where, device), mtu in reversed(sizes.items())
    ]


def no_forwarding(lab: LabState) -> list[list[str]]:
    did(lab, ["sysctl", "-qw", "net.ipv4.ip_forward=0"])
    return [["sysctl", "-qw", "net.ipv4.ip_forward=1"]]


def no_masquerade_rule(lab: LabState) -> list[list[str]]:
    chain = on(lab, "node1", "nft", "-s", "list", "chain", "inet", "podwire", "postrouting")
    did(lab, ["nft", "flush", "chain", "inet", "podwire", "postrouting"])
    return [["nft", chain]]


def element(table: str, name: str, key: str) -> Callable[[LabState], list[list[str]]]:
    """Takes an element out; `{a}` is the address of pod a, `{wire}` its wire, `{block}` its block."""

    def make(lab: LabState) -> list[list[str]]:
        own, block = address_of(lab, "a"), on(lab, "node1", "ip", "-o", "-4", "addr", "show", "pw0").split()[3]
        mac = "0a:58:" + ":".join(f"{int(part):02x}" for part in own.split("."))
        found = key.format(
            a=own, wire=wire_of(lab, "a"), mac=mac, block=block.rpartition(".")[0] + ".0/24", svc=fetched_ip(lab, "svc")
        )
        listed = on(lab, "node1", "nft", "get", "element", *table.split(), name, f"{{ {found} }}")
        whole = listed.partition("elements = {")[2].partition("}")[0].strip()
        did(lab, ["nft", "delete", "element", *table.split(), name, f"{{ {found} }}"])
        return [["nft", "add", "element", *table.split(), name, f"{{ {whole} }}"]]

    return make


def no_default_route(lab: LabState) -> list[list[str]]:
    (gateway,) = re.findall(r"default via (\S+)", on(lab, "pod/a", "ip", "route"))
    on(lab, "pod/a", "ip", "route", "del", "default")
    return [["pod/a", "ip", "route", "add", "default", "via", str(gateway), "dev", "eth0"]]


def out_of_the_bridge(lab: LabState) -> list[list[str]]:
    wire = wire_of(lab, "a")
    did(lab, ["ip", "link", "set", wire, "nomaster"])
    return [
        ["ip", "link", "set", wire, "master", "pw0"],
        ["ip", "link", "set", wire, "type", "bridge_slave", "hairpin", "on"],
    ]


FAULTS: dict[str, Fault] = {
    "route deleted": Fault(make=delete_route, title="out: forwarding and route", words="node1 has no route to 10.244."),
    "FDB entry wrong": Fault(make=wrong_fdb, title="tunnel to node2", words="leads to 172.31.0.99, and node2 is"),
    "FDB entry missing": Fault(make=no_fdb, title="tunnel to node2", words="has no FDB entry"),
    "neighbour missing": Fault(make=no_neighbour, title="tunnel to node2", words="has no neighbour entry"),
    "neighbour wrong": Fault(
        make=wrong_neighbour, title="tunnel to node2", words="is 02:00:00:00:00:99, and the tunnel"
    ),
    "MTU too large": Fault(
        make=large_mtu, title="underlay to node2", words="with VXLAN 1550, and eth0 takes 1500", lost=False
    ),
    "forwarding off": Fault(make=no_forwarding, title="out: forwarding and route", words="net.ipv4.ip_forward is 0"),
    "masquerade rule missing": Fault(
        make=no_masquerade_rule,
        title="masquerade",
        words="the rule that masquerades is missing",
        target="198.51.100.1",
    ),
    "masquerade's block missing": Fault(
        make=element("inet podwire", "local_blocks4", "{block}"),
        title="masquerade",
        words="is in no block that is masqueraded",
        target="198.51.100.1",
    ),
    "hairpin masquerade missing": Fault(
        make=element("ip podwire_proxy", "hairpin", "{a} . {a}"),
        title="Service default/self",
        words="is not masqueraded",
        target="self",
    ),
    "Service missing in the kernel": Fault(
        make=element("ip podwire_proxy", "services", "{svc} . 6 . 80"),
        title="Service default/svc",
        words="the kernel of node1 does not know",
        target="svc",
    ),
    "pod unknown to the proxy": Fault(
        make=element("inet podwire_policy", "known4", "{a}"),
        title="egress policy",
        words="is closed: the proxy of node1",
    ),
    "not bound by the spoof guard": Fault(
        make=element("bridge podwire", "bound4", '"{wire}" . {mac} . {a}'),
        title="wire, bridge and spoof guard",
        words="the spoof guard drops what comes from",
    ),
    "wire out of the bridge": Fault(
        make=out_of_the_bridge, title="wire, bridge and spoof guard", words="no port of pw0 is the other end of eth0"
    ),
    "no default route": Fault(make=no_default_route, title="source pod", words="the pod has no route to"),
    "answer's neighbour missing": Fault(
        make=no_neighbour, title="back: tunnel to node2", words="has no neighbour entry", source="b", target="a"
    ),
}


@contextmanager
def made(lab: LabState, fault: Fault) -> Iterator[None]:
    mend = fault.make(lab)
    try:
        yield
    finally:
        did(lab, *mend)


def place(lab: LabState, words: str) -> str:
    """The address that a packet to a target of the table goes to."""
    if words[0].isdigit():
        return words
    return fetched_ip(lab, words) if words in ("svc", "self") else address_of(lab, words)


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
    def test_a_fault_is_named_with_its_hop_and_its_fix(self, untended: LabState, fault: Fault) -> None:
        lab = untended
        target = place(lab, fault.target)
        assert reaches(lab, fault.source, target, int(fault.port), PATIENCE)
        with made(lab, fault):
            first = look(lab, fault.source, fault.target, fault.port).first(State.FAILS)
            assert first is not None
            _, hop, finding = first
            assert (hop.title, bool(finding.fix), bool(finding.command)) == (fault.title, True, True), finding
            assert fault.words in finding.text
            if fault.lost:
                assert not reaches(lab, fault.source, target, int(fault.port))
        process.wait_for(
            lambda: look(lab, fault.source, fault.target, fault.port).first(State.FAILS) is None,
            PATIENCE,
            "the way to be found mended",
        )
        assert reaches(lab, fault.source, target, int(fault.port), PATIENCE)

    def test_another_node_that_sees_the_pods_own_address_may_answer(self, untended: LabState) -> None:
        mend = no_masquerade_rule(untended)
        try:
            path = look(untended, "a", "host", "8080")
            assert path.first(State.FAILS) is None
            assert [hop.title for hop in path.hops if hop.state is State.WARNING] == ["the ends", "masquerade"]
            assert reaches(untended, "a", address_of(untended, "host"), 8080, PATIENCE)
        finally:
            did(untended, *mend)


def test_policies_that_are_not_in_effect_are_a_warning(lab: LabState) -> None:
    """Nobody has read the policies into the kernel: nothing is denied, which is not what the API says."""
    proxy.end(lab, "node2")
    listed = on(lab, "node2", "nft", "list", "table", "inet", "podwire_policy")
    on(lab, "node2", "nft", "delete", "table", "inet", "podwire_policy")
    try:
        warned = look(lab, "near", "closed").first(State.WARNING)
        assert warned is not None
        assert (warned[1].title, "policies are not in effect on node2" in warned[2].text) == ("ingress policy", True)
    finally:
        on(lab, "node2", "nft", listed)
        proxy.start(lab, "node2")
        proxy.wait_healthy(lab, lab.node("node2"))


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
