"""`podwire explain` names what is wrong in a kernel: every fault made on purpose, on a lab whose packets agree.

Faults are made with the daemon and the proxy of that node away: both would put them right. Each is made, named, mended,
and gone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from podwire.explain.hops import State
from podwire.lab import node, process, proxy
from podwire.lab.state import LabState
from tests.netns.explain_fixtures import lab
from tests.netns.explain_stage import PATIENCE, address_of, fetched_ip, look, on, reaches

__all__ = ["lab"]


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
