"""ADD of the CNI specification as a table: every version × every behaviour, against the real executable and kernel.

Rows run against the reference plugins as well, wherever they do the same thing (tests/netns/contenders.py). Which
demand of the specification is shown by which row is in docs/conformance.md.
"""

from __future__ import annotations

import ipaddress
from functools import partial

import pytest

from tests.netns.conformance_fixtures import OLD, box, boxes, container_end, default_gateways, eth0, it, lab
from tests.netns.containers import Container, at_once
from tests.netns.contenders import Config, Contender, rows, settle

__all__ = ["box", "boxes", "it", "lab"]


# --- ADD: the result ----------------------------------------------------------------------------------------------


@rows()
def test_a_result_has_the_shape_of_its_version(it: Contender, box: Container) -> None:
    result = it.add(box)
    assert result["cniVersion"] == it.version
    (ip,) = result["ips"]
    assert ip.get("version") == ("4" if it.version in OLD else None)
    assert result["interfaces"][ip["interface"]] == container_end(result)
    assert ipaddress.ip_address(ip["gateway"]) in ipaddress.ip_interface(ip["address"]).network
    assert "/" in ip["address"]
    assert {"dst": "0.0.0.0/0", "gw": ip["gateway"]} in result["routes"]
    it.delete(box)


@rows()
def test_a_result_names_the_sandbox_as_the_runtime_did(it: Contender, box: Container) -> None:
    roundabout = box.netns.replace("/run/netns/", "/run/../run/./netns/")
    result = it.add(box, CNI_NETNS=roundabout)
    assert container_end(result)["sandbox"] == roundabout
    assert all(not each.get("sandbox") for each in result["interfaces"] if each["name"] != "eth0")
    it.delete(box)


@rows(not_by_reference="does not say the MTU; its library came with 1.1.0")
def test_the_mtu_is_told_from_1_1_0_on(it: Contender, box: Container) -> None:
    result = it.add(box)
    expected = eth0(box)["mtu"] if it.version == "1.1.0" else None
    assert [each.get("mtu") for each in result["interfaces"]] == [expected, expected]
    it.delete(box)


@rows()
def test_the_dns_of_the_configuration_is_handed_back(it: Contender, box: Container) -> None:
    dns = {"nameservers": ["10.96.0.10"], "domain": "cluster.local", "search": ["svc"], "options": ["ndots:5"]}
    assert it.add(box, it.config(dns=dns))["dns"] == dns
    it.delete(box)


@rows(not_by_reference="prints an empty `dns`, since Go does not omit an empty struct")
def test_an_empty_dns_is_left_out(it: Contender, box: Container) -> None:
    assert "dns" not in it.add(box, it.config(dns={}))
    it.delete(box)


# --- ADD: what is there -------------------------------------------------------------------------------------------


@rows()
def test_the_container_has_what_the_result_says(it: Contender, box: Container) -> None:
    result = it.add(box)
    link, (ip,) = eth0(box), result["ips"]
    assert link["operstate"] == "UP"
    assert link["address"] == container_end(result)["mac"]
    assert [f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"] if each["family"] == "inet"] == [
        ip["address"]
    ]
    assert default_gateways(box) == [ip["gateway"]]
    assert box.links() == {"lo", "eth0"}
    assert box.run("ping", "-n", "-c1", "-W2", ip["gateway"]).returncode == 0
    it.delete(box)


@rows()
def test_the_node_has_what_the_result_says(it: Contender, box: Container) -> None:
    said = it.host_end(it.add(box))
    link = it.link(said["name"])
    assert (link["master"], link["operstate"]) == (it.bridge, "UP")
    assert link["linkinfo"]["info_slave_data"]["hairpin"] is True
    assert link["address"] == said["mac"]
    it.delete(box)


@rows()
def test_containers_of_a_node_reach_each_other(it: Contender, boxes: list[Container]) -> None:
    added = at_once([partial(it.call, "ADD", each) for each in boxes])
    assert len({said.address for said in added}) == 3
    assert boxes[0].run("ping", "-n", "-c1", "-W2", added[1].address).returncode == 0
    assert {said.exit_code for said in at_once([partial(it.call, "DEL", each) for each in boxes])} == {0}


@rows()
def test_what_a_plugin_does_not_know_it_passes_over(it: Contender, box: Container) -> None:
    unknown = {"colour": "blue", "args": {"cni": {"labels": [{"key": "a", "value": "b"}], "size": 1}, "other": []}}
    runtime = {"portMappings": [{"hostPort": 1, "containerPort": 1}], "io.kubernetes.cri.pod-annotations": {"a": "b"}}
    config = it.config(runtimeConfig=runtime, capabilities={"ips": True}, **unknown)
    result = it.add(box, config)
    if it.version != "0.3.1":
        previous = {**result, "colour": "blue", "interfaces": [{**i, "colour": 1} for i in result["interfaces"]]}
        assert it.check(box, previous, runtimeConfig=runtime, **unknown).exit_code == 0
    it.delete(box, config)


@rows()
def test_null_is_as_absent(it: Contender, box: Container) -> None:
    nothing = dict.fromkeys(("dns", "runtimeConfig", "args", "prevResult", "capabilities"))
    it.add(box, it.config(**nothing))
    it.delete(box, it.config(**nothing))


@rows()
def test_a_stray_argument_is_refused_unless_it_is_to_be_ignored(it: Contender, box: Container) -> None:
    assert it.call("ADD", box, environment={"CNI_ARGS": "COLOUR=blue"}).error != 0
    it.add(box, CNI_ARGS="IgnoreUnknown=1;COLOUR=blue;K8S_POD_NAME=web;K8S_POD_NAMESPACE=default")
    it.delete(box, CNI_ARGS="IgnoreUnknown=1;COLOUR=blue;K8S_POD_NAME=web;K8S_POD_NAMESPACE=default")


@rows()
def test_a_container_can_be_added_again_at_once(it: Contender, box: Container) -> None:
    """The wire of the DEL may still be on its way out."""
    for _ in range(3):
        result = it.add(box)
        it.delete(box, it.config(prevResult=result))
    again = it.add(box)
    assert box.run("ping", "-n", "-c1", "-W2", again["ips"][0]["gateway"]).returncode == 0
    it.delete(box)


# --- ADD: what is asked for by name -------------------------------------------------------------------------------

FIFTH = -3
"""Where a block's address is that nobody was given by turn."""


def wish(it: Contender, box: Container, offset: int = FIFTH) -> str:
    """An address of the node that is free: of the block that the next address comes from."""
    network = ipaddress.ip_interface(it.add(box)["ips"][0]["address"]).network
    it.delete(box)
    it.wait_held(set())
    return str(network[offset])


@rows(ends_first=True)
def test_an_address_is_asked_for_in_three_ways(it: Contender, box: Container) -> None:
    """runtimeConfig goes before args.cni, and that before CNI_ARGS."""
    first, second, third = (wish(it, box, offset) for offset in (-3, -4, -5))
    by_name = {"CNI_ARGS": f"IgnoreUnknown=1;IP={third}"}
    args = {"cni": {"ips": [second]}}
    for config, environment, expected in (
        (it.config(runtimeConfig={"ips": [first]}), {}, first),
        (it.config(args=args), {}, second),
        (it.config(), by_name, third),
    ):
        assert it.add(box, config, **environment)["ips"][0]["address"].split("/")[0] == expected
        it.delete(box, config, **environment)
        it.wait_held(set())


@rows(
    not_by_reference="host-local takes all of them for one request, and refuses two addresses of one range",
    ends_first=True,
)
def test_the_runtimes_wish_goes_first(it: Contender, box: Container) -> None:
    first, second, third = (wish(it, box, offset) for offset in (-3, -4, -5))
    args = {"cni": {"ips": [second], "mac": "02:00:00:00:00:02"}}
    by_name = "IgnoreUnknown=1;IP=" + third + ";MAC=02:00:00:00:00:03"
    for config, address, mac in (
        (it.config(args=args, runtimeConfig={"ips": [first], "mac": "02:00:00:00:00:01"}), first, "02:00:00:00:00:01"),
        (it.config(args=args), second, "02:00:00:00:00:02"),
        (it.config(args=args, runtimeConfig={"mac": "02:00:00:00:00:01"}), second, "02:00:00:00:00:01"),
        (it.config(), third, "02:00:00:00:00:03"),
    ):
        result = it.add(box, config, CNI_ARGS=by_name)
        assert (result["ips"][0]["address"].split("/")[0], eth0(box)["address"]) == (address, mac)
        it.delete(box, config, CNI_ARGS=by_name)
        it.wait_held(set())


MACS: dict[str, tuple[Config, dict[str, str]]] = {
    "runtimeConfig": ({"runtimeConfig": {"mac": "02:00:00:00:00:09"}}, {}),
    "args.cni": ({"args": {"cni": {"mac": "02:00:00:00:00:09"}}}, {}),
    "CNI_ARGS": ({}, {"CNI_ARGS": "IgnoreUnknown=1;MAC=02:00:00:00:00:09"}),
}


@pytest.mark.parametrize(("config", "environment"), MACS.values(), ids=MACS.keys())
@rows(ends_first=True)
def test_a_mac_is_asked_for(it: Contender, box: Container, config: Config, environment: dict[str, str]) -> None:
    result = it.add(box, it.config(**config), **environment)
    assert container_end(result)["mac"] == eth0(box)["address"] == "02:00:00:00:00:09"
    it.delete(box, it.config(**config), **environment)


# --- ADD that fails -----------------------------------------------------------------------------------------------


@rows()
def test_an_interface_of_that_name_is_left_alone(it: Contender, box: Container) -> None:
    box.run("ip", "link", "add", "eth0", "type", "bridge")
    before = eth0(box)
    assert it.call("ADD", box).error != 0
    assert eth0(box) == before
    box.run("ip", "link", "delete", "eth0")
    it.delete(box)


@rows(not_by_reference="deletes whatever has the name, as its DEL is written")
def test_the_del_after_it_leaves_it_alone_too(it: Contender, box: Container) -> None:
    box.run("ip", "link", "add", "eth0", "type", "bridge")
    before = eth0(box)
    assert it.call("ADD", box).error == 101
    it.delete(box)
    assert eth0(box) == before


@rows()
def test_an_add_that_is_repeated_fails_and_changes_nothing(it: Contender, box: Container) -> None:
    result = it.add(box)
    settle(box)
    before, held = eth0(box), it.held()
    assert it.call("ADD", box).error != 0
    assert (eth0(box), it.held()) == (before, held)
    assert box.run("ping", "-n", "-c1", "-W2", result["ips"][0]["gateway"]).returncode == 0
    it.delete(box)


FAILING: dict[str, tuple[Config, dict[str, str]]] = {
    "no such namespace": ({}, {"CNI_NETNS": "/run/netns/not-there"}),
    "no namespace but a file": ({}, {"CNI_NETNS": "/etc/hostname"}),
    "an address of another range": ({}, {"CNI_ARGS": "IP=192.0.2.1"}),
    "the gateway's address": ({"args": {"cni": {"ips": ["10.99.0.1", "10.244.0.1"]}}}, {}),
    "a name too long": ({}, {"CNI_IFNAME": "sixteen-letters-"}),
    "an unknown version": ({"cniVersion": "7.0.0"}, {}),
    "no name": ({"name": ""}, {}),
}


@pytest.mark.parametrize(("config", "environment"), FAILING.values(), ids=FAILING.keys())
@rows(ends_first=True)
def test_an_add_that_fails_leaves_nothing(
    it: Contender, box: Container, config: Config, environment: dict[str, str]
) -> None:
    if it.kind == "reference" and "args" in config:
        pytest.skip("the reference leaves the interface behind when its IPAM plugin fails, for the DEL to take away")
    before = it.reserved()
    said = it.call("ADD", box, it.config(**config), environment)
    assert said.error != 0
    assert said.stdout.endswith(b"}\n") or it.kind == "reference"
    assert (it.reserved(), box.links()) == (before, {"lo"})
    if it.kind == "podwire":
        assert it.links() == set()


@rows(not_by_reference="leaves an address and a wire behind that only the DEL takes away")
def test_an_add_that_fails_half_way_is_undone(it: Contender, boxes: list[Container]) -> None:
    """A default route that is there already is the last thing that an ADD comes upon."""
    box, other, _ = boxes
    box.run("sh", "-c", "ip link set lo up; ip route add default dev lo")
    assert it.call("ADD", box).error == 101
    assert (it.held(), box.links()) == (set(), {"lo"})
    it.add(other)
    it.delete(other)
    it.delete(box)
