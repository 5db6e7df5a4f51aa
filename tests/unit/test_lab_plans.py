"""What the lab decides before it does anything: names, programs, nodes, links, a plugin's configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest

from podwire.errors import PodwireError
from podwire.lab import names
from podwire.lab.cni import Attachment, NetworkList, plugin_config, plugin_environment
from podwire.lab.node import block_size
from podwire.lab.program import expand, plan_program
from podwire.lab.scheduler import choose_node
from podwire.lab.state import LabState, plan_nodes
from podwire.lab.topology import plan_hosts, plan_underlay

POD = {
    "metadata": {"name": "web-1", "namespace": "shop", "uid": "u1"},
    "spec": {"nodeName": "node2"},
    "status": {"hostIP": "172.31.0.12"},
}
ECHO = {"pod": "web-1", "namespace": "shop", "node": "node2", "container": "c"}


@pytest.mark.parametrize("name", ["a", "lab", "0-x", "x" * 20])
def test_names_that_a_lab_can_have(name: str) -> None:
    assert names.check_lab_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "A", "a.b", "a/b", "..", "x" * 21, "a\n"])
def test_names_that_a_lab_cannot_have(name: str) -> None:
    with pytest.raises(PodwireError, match="lab name"):
        names.check_lab_name(name)


def test_no_labs_namespaces_are_taken_for_anothers() -> None:
    assert not names.namespace("lab-2", "node1").startswith(names.namespace_prefix("lab"))


def test_the_namespace_of_a_pod_fits_into_a_file_name_and_is_its_own() -> None:
    assert names.pod_namespace("lab", "shop", "web-1") == "pw.lab.pod.shop.web-1"
    longest = [names.pod_namespace("lab", "n" * 63, "p" * 252 + end) for end in "ab"]
    assert len(set(longest)) == 2
    assert all(len(name) == 255 and name.startswith("pw.lab.pod.") for name in longest)


@pytest.mark.parametrize(
    ("story", "container", "words", "warned"),
    [
        ("a command of this machine", {"command": ["sh", "-c"], "args": ["x"]}, ("/bin/sh", "-c", "x"), ""),
        ("an argument with a variable", {"command": ["sh"], "args": ["$(HOSTNAME)"]}, ("/bin/sh", "web-1"), ""),
        ("no ports", {}, ("/bin/sleep", "infinity"), ""),
        ("arguments for an image alone", {"args": ["serve"]}, ("/bin/sleep", "infinity"), ""),
        ("a command that is not here", {"command": ["/srv/app"]}, ("/bin/sleep", "infinity"), "/srv/app"),
        ("SCTP alone", {"ports": [{"containerPort": 9, "protocol": "SCTP"}]}, ("/bin/sleep", "infinity"), "SCTP"),
    ],
)
def test_what_a_container_runs(story: str, container: dict[str, Any], words: tuple[str, ...], warned: str) -> None:
    known = {"sh": "/bin/sh"}
    program = plan_program(POD, {"name": "c", **container}, ("10.244.1.7",), known.get)
    assert program.words == words, story
    assert not program.echo
    assert warned in " ".join(program.warnings)
    assert bool(warned) == bool(program.warnings)


@pytest.mark.parametrize(
    ("container", "ports"),
    [
        ({"ports": [{"containerPort": 80}]}, [["TCP", 80]]),
        ({"ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}]}, [["UDP", 53], ["TCP", 53]]),
        ({"command": ["/srv/app"], "ports": [{"containerPort": 80}]}, [["TCP", 80]]),
    ],
)
def test_what_becomes_an_echo_server(container: dict[str, Any], ports: list[list[object]]) -> None:
    program = plan_program(POD, {"name": "c", **container}, (), lambda _: None)
    assert program.echo
    assert json.loads(program.words[-1]) == {**ECHO, "ports": ports}


def test_the_environment_says_who_and_where_the_pod_is() -> None:
    def field(name: str, path: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    fields = [field("IP", "status.podIP"), field("IPS", "status.podIPs"), field("HOST", "status.hostIP")]
    variables = [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)$(A)"}, *fields]
    environment = plan_program(POD, {"name": "c", "env": variables}, ("10.244.1.7", "fd00::7")).environment
    wanted = {"A": "1", "B": "11", "IP": "10.244.1.7", "IPS": "10.244.1.7,fd00::7", "HOST": "172.31.0.12"}
    assert wanted.items() <= environment.items()
    assert environment["HOSTNAME"] == "web-1"


@pytest.mark.parametrize(
    ("word", "wanted"), [("$(A)", "1"), ("$$(A)", "$(A)"), ("$(NO)", "$(NO)"), ("$A", "$A"), ("a$(A)b", "a1b")]
)
def test_variables_are_expanded_as_kubelet_does(word: str, wanted: str) -> None:
    assert expand(word, {"A": "1"}) == wanted


def _node(name: str, unschedulable: bool = False, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "spec": {"unschedulable": unschedulable}}


def _on(node: str, phase: str = "Running") -> dict[str, Any]:
    return {"spec": {"nodeName": node}, "status": {"phase": phase}}


@pytest.mark.parametrize(
    ("story", "selector", "pods", "wanted"),
    [
        ("the first of equals", {}, [], "n1"),
        ("the emptiest", {}, [_on("n1"), _on("n2"), _on("n2")], "n3"),
        ("ended pods do not count", {}, [_on("n1", "Succeeded"), _on("n2"), _on("n3")], "n1"),
        ("labels are asked for", {"disk": "ssd"}, [_on("n2"), _on("n2")], "n2"),
        ("nothing has the labels", {"disk": "tape"}, [], None),
        ("a cordoned node takes nothing", {"zone": "b"}, [], None),
    ],
)
def test_where_a_pod_goes(story: str, selector: dict[str, str], pods: list[Any], wanted: str | None) -> None:
    nodes = [_node("n1"), _node("n2", disk="ssd"), _node("n3"), _node("n4", unschedulable=True, zone="b")]
    assert choose_node({"spec": {"nodeSelector": selector}}, nodes, pods) == wanted, story


def test_the_plan_gives_every_host_an_address_of_its_own_and_a_port_of_the_switch() -> None:
    state = LabState(name="lab", nodes=plan_nodes(99))
    hosts = plan_hosts(state)
    addresses = [line.split()[2] for host in hosts for line in host.commands if line.endswith("dev eth0")]
    assert len(set(addresses)) == len(hosts) == 102
    ports = [line for line in plan_underlay("lab", hosts) if "type veth" in line]
    assert len(ports) == 102
    assert all(f"netns pw.lab.{host.part}" in port for host, port in zip(hosts, ports, strict=True))


@pytest.mark.parametrize(
    ("cidr", "wanted"), [("10.244.0.0/16", 24), ("10.0.0.0/8", 24), ("10.1.2.0/24", 28), ("10.1.2.0/27", 29)]
)
def test_blocks_are_small_enough_for_several_nodes(cidr: str, wanted: int) -> None:
    assert block_size(cidr) == wanted


def test_a_plugin_gets_what_the_specification_says() -> None:
    mapping = [{"hostPort": 80, "containerPort": 8080}]
    attachment = Attachment(
        container_id="c1",
        netns="/run/netns/x",
        args=(("IgnoreUnknown", "1"), ("K8S_POD_NAME", "web-1")),
        capabilities=(("portMappings", mapping), ("bandwidth", {"ingressRate": 1})),
    )
    network = NetworkList("net", "1.0.0", ())
    entry = {"type": "podwire", "mtu": 1400, "capabilities": {"portMappings": True, "bandwidth": False}}
    own = {"type": "podwire", "mtu": 1400, "name": "net", "cniVersion": "1.0.0"}
    runtime = {"runtimeConfig": {"portMappings": mapping}}
    assert plugin_config(network, entry, attachment, None) == own | runtime
    assert plugin_config(network, {"type": "t"}, attachment, {"ips": []})["prevResult"] == {"ips": []}
    environment = plugin_environment("ADD", attachment, names.ROOT)
    assert environment["CNI_ARGS"] == "IgnoreUnknown=1;K8S_POD_NAME=web-1"
    assert (environment["CNI_COMMAND"], environment["CNI_IFNAME"]) == ("ADD", "eth0")
