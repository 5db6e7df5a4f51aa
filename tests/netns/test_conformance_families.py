"""The specification for IPv6 and for both families: what a family changes, by the oldest version and the newest.

The rows for IPv4 are those of tests/netns/test_conformance.py. Here each runs on a lab of IPv6 alone and on one of
both, against Podwire and against the reference plugins.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from functools import partial
from uuid import uuid4

import pytest

from podwire.lab import cluster, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.conformance_fixtures import box, boxes, it
from tests.netns.containers import Container, at_once
from tests.netns.contenders import Config, Contender, rows

__all__ = ["box", "boxes", "it"]

VERSIONS = ("0.3.1", "1.0.0", "1.1.0")
CHECKED = ("0.4.0", "1.0.0", "1.1.0")
NEWEST = ("1.1.0",)
POOLS = {"IPv6": "fd00:10:244::/56", "both": "10.244.0.0/24,fd00:10:244::/56"}
DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}


@pytest.fixture(scope="module", params=list(POOLS.values()), ids=list(POOLS))
def lab(request: pytest.FixtureRequest) -> Iterator[LabState]:
    """Two nodes, as in the other conformance tests, on an underlay of the same families."""
    state = LabState(name=f"conf-{uuid4().hex[:6]}", nodes=plan_nodes(2, request.param), pod_cidr=request.param)
    try:
        yield cluster.up(state)
    finally:
        cluster.down(state.name)


def by_family(result: Config) -> dict[int, Config]:
    """The addresses of a result."""
    return {ipaddress.ip_interface(each["address"]).version: each for each in result["ips"]}


def bare(ip: Config) -> str:
    return str(ip["address"]).split("/")[0]


def addresses(box: Container) -> list[Config]:
    """The container's global addresses, as the kernel has them."""
    shown = json.loads(box.run("ip", "-j", "address", "show", "dev", "eth0", "scope", "global").stdout)
    return [each for link in shown if link for each in link["addr_info"] if each]


def default_gateways(box: Container) -> set[str]:
    texts = (box.run("ip", "-j", family, "route", "show", "default").stdout for family in ("-4", "-6"))
    return {route["gateway"] for text in texts for route in json.loads(text or "[]")}


def reaches(box: Container, address: str) -> bool:
    return box.run("ping", "-n", "-c1", "-W2", address).returncode == 0


@rows(VERSIONS)
def test_a_result_has_one_address_and_one_default_route_of_each_family(it: Contender, box: Container) -> None:
    result = it.add(box)
    ips = by_family(result)
    assert sorted(ips) == sorted(it.lab.families)
    for family, ip in ips.items():
        assert ip.get("version") == (str(family) if it.version == "0.3.1" else None)
        assert result["interfaces"][ip["interface"]]["sandbox"] == box.netns
        assert ipaddress.ip_address(ip["gateway"]) in ipaddress.ip_interface(ip["address"]).network
        assert {"dst": DEFAULT[family], "gw": ip["gateway"]} in result["routes"]
    it.delete(box)


@rows(VERSIONS)
def test_the_container_has_them_and_can_use_them_at_once(it: Contender, box: Container) -> None:
    ips = by_family(it.add(box))
    found = addresses(box)
    assert {f"{each['local']}/{each['prefixlen']}" for each in found} == {ip["address"] for ip in ips.values()}
    assert not any(each.get("tentative") for each in found)
    assert default_gateways(box) == {ip["gateway"] for ip in ips.values()}
    for gateway in sorted(ip["gateway"] for ip in ips.values()):
        if it.kind == "reference":  # its bridge looks for duplicates of its gateway, for some seconds
            process.wait_for(partial(reaches, box, gateway), 90, "the gateway's answer")
        assert reaches(box, gateway)
    it.delete(box)


@rows(VERSIONS)
def test_containers_of_a_node_reach_each_other_by_every_family(it: Contender, boxes: list[Container]) -> None:
    added = at_once([partial(it.call, "ADD", each) for each in boxes])
    given = [{bare(ip) for ip in said.body["ips"]} for said in added]
    assert len(set().union(*given)) == len(boxes) * len(it.lab.families)
    assert [address for address in given[1] if not reaches(boxes[0], address)] == []
    assert {said.exit_code for said in at_once([partial(it.call, "DEL", each) for each in boxes])} == {0}


@rows(VERSIONS)
def test_an_address_of_each_family_is_asked_for(it: Contender, box: Container) -> None:
    networks = [ipaddress.ip_interface(ip["address"]).network for ip in it.add(box)["ips"]]
    it.delete(box)
    it.wait_held(set())
    wanted = {str(network.network_address + 9) for network in networks}
    config = it.config(args={"cni": {"ips": sorted(wanted)}})
    assert {bare(ip) for ip in it.add(box, config)["ips"]} == wanted
    it.delete(box, config)


@rows(VERSIONS)
def test_one_family_that_cannot_be_had_means_none(it: Contender, box: Container) -> None:
    """Not the address of the other family either, and no interface."""
    config = it.config(args={"cni": {"ips": ["2001:db8::1"]}})
    assert it.call("ADD", box, config).error != 0
    assert it.reserved() == set()
    it.delete(box, config)
    assert box.links() == {"lo"}


@rows(VERSIONS)
def test_del_takes_all_families_away(it: Contender, box: Container) -> None:
    result = it.add(box)
    held = "".join(it.reserved())
    assert [bare(ip) for ip in result["ips"] if bare(ip) not in held] == []
    it.delete(box, it.config(prevResult=result))
    assert it.reserved() == set()
    it.wait_held(set())
    it.delete(box)


DAMAGE = {
    "the address of IPv6 is gone": "-6 address flush dev eth0 scope global",
    "the default route of IPv6 is gone": "-6 route delete default",
}


@pytest.mark.parametrize("words", DAMAGE.values(), ids=DAMAGE.keys())
@rows(CHECKED)
def test_check_sees_what_is_missing_of_one_family(it: Contender, box: Container, words: str) -> None:
    result = it.add(box)
    assert it.check(box, result).exit_code == 0
    assert box.run("ip", *words.split()).returncode == 0
    assert it.check(box, result).error != 0
    it.delete(box)


@rows(NEWEST, not_by_reference="no reference plugin of that version knows GC")
def test_gc_frees_all_families(it: Contender, boxes: list[Container]) -> None:
    kept, lost, _ = boxes
    address = bare(it.add(kept)["ips"][-1])
    gateway = by_family(it.add(lost))[6]["gateway"]
    keep = [{"containerID": kept.name, "ifname": "eth0"}]
    assert it.call("GC", config=it.config(**{"cni.dev/valid-attachments": keep})).exit_code == 0
    (left,) = it.reserved()
    assert address in left
    assert reaches(kept, gateway)
    it.delete(lost)
    it.delete(kept)
