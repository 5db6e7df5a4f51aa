"""A cluster changes its backend, and its underlay its MTU, while pods talk; and nothing of anybody else's is touched.

One dual-stack lab of three nodes on one segment serves all stories; each begins and ends with VXLAN.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
import yaml

from podwire.errors import PodwireError
from podwire.lab import cluster, demo, demo_traffic, names, node, topology
from podwire.lab.state import LabState, plan_nodes
from podwire.lab.talk import ask
from tests.netns.containers import (
    Container,
    containers,
    know_each_other,
    nothing_is_held,
    on_node,
    pod_links,
    status,
    wait,
)
from tests.netns.traffic import Pings, traffic

POD_CIDR = "10.244.0.0/16,fd00:10:244::/56"
PATIENCE = 90.0


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    state = LabState(name=f"back-{uuid4().hex[:6]}", nodes=plan_nodes(3, POD_CIDR), pod_cidr=POD_CIDR)
    try:
        yield know_each_other(cluster.up(state))
    finally:
        cluster.down(state.name)


class Pair:
    """A pod on node1, one on node2, and the addresses of the second by family."""

    def __init__(self, here: Container, there: Container) -> None:
        self.here, self.there = here, there
        self.result = here.call("ADD").body
        self.addresses = addresses_of(there.call("ADD").body)


def addresses_of(result: dict[str, Any]) -> dict[int, str]:
    found = [each["address"].split("/")[0] for each in result["ips"]]
    return {6 if ":" in each else 4: each for each in found}


@contextlib.contextmanager
def pair(lab: LabState) -> Iterator[Pair]:
    with containers(lab, "node1", "here", 1) as (here,), containers(lab, "node2", "there", 1) as (there,):
        try:
            yield Pair(here, there)
        finally:
            deleted = [box.call("DEL").code for box in (here, there)]
        assert deleted == [0, 0]
    for name in ("node1", "node2"):
        wait(partial(nothing_is_held, lab, name), f"{name} to be empty")


@contextlib.contextmanager
def backend(lab: LabState, chosen: str) -> Iterator[None]:
    """This backend, and VXLAN again afterwards."""
    demo.set_backend(lab, chosen)
    try:
        yield
    finally:
        demo.set_backend(lab, "vxlan")


def podwire(lab: LabState, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    config = lab.files.node_path(name, "/etc/podwire") / "ipamd.yaml"
    command = [*node.PYTHON, "-m", "podwire.cli.main", *words, "--config", str(config)]
    return on_node(lab, name, *command)


def routes(lab: LabState, name: str, *more: str) -> list[dict[str, Any]]:
    """All routes of a node, by both families."""
    texts = (on_node(lab, name, "ip", "-j", family, "route", "show", *more).stdout for family in ("-4", "-6"))
    return [route for text in texts for route in json.loads(text or "[]")]


def have_vni(lab: LabState, vni: int) -> bool:
    with contextlib.suppress(ValueError):  # the device is being made anew
        return all(link(lab, each.name, "pw-vxlan")["linkinfo"]["info_data"]["id"] == vni for each in lab.nodes)
    return False


def answers(box: Container, address: str) -> bool:
    return box.run("ping", "-n", "-c", "1", "-W", "1", address).returncode == 0


def link(lab: LabState, name: str, device: str) -> dict[str, Any]:
    (found,) = json.loads(on_node(lab, name, "ip", "-j", "-d", "link", "show", device).stdout)
    assert isinstance(found, dict)
    return found


# --- another backend ------------------------------------------------------------------------------------------------


def test_the_backend_changes_and_pods_lose_nothing(lab: LabState) -> None:
    with pair(lab) as pods, Pings(pods.here, pods.addresses[6]) as pings:
        with traffic(pods.here, pods.there, pods.addresses[4]) as talk:
            for chosen in ("direct", "auto", "vxlan", "direct", "vxlan"):
                demo.set_backend(lab, chosen)
            assert talk.harm() == []
        assert pings.lost() == 0


def test_a_direct_packet_is_no_vxlan_packet(lab: LabState) -> None:
    with pair(lab) as pods, backend(lab, "direct"):
        for address in pods.addresses.values():
            with demo_traffic.capture(lab, "node1", f"dst host {address}") as lines:
                assert pods.here.run("ping", "-n", "-c", "1", "-W", "10", address).returncode == 0
                assert any(f"> {address}" in line and "VXLAN" not in line for line in lines())


def test_strict_reverse_path_filters_break_nothing(lab: LabState) -> None:
    """Before a change they are strict, and a packet that comes by another way than its answer goes is dropped."""
    strict = "for each in all eth0 pw0 pw-vxlan; do echo 1 >/proc/sys/net/ipv4/conf/$each/rp_filter; done"
    loose = strict.replace("echo 1", "echo 0")
    with pair(lab) as pods:
        try:
            for each in lab.nodes:
                on_node(lab, each.name, "sh", "-c", strict)
            for chosen in ("direct", "auto", "vxlan"):
                demo.set_backend(lab, chosen)
                assert pods.here.run("ping", "-n", "-c", "2", "-W", "10", pods.addresses[4]).returncode == 0, chosen
            # node1 has heard of it, node2 has not: each sends by its own way
            node.stop_daemon(lab, "node2")
            podwire(lab, "node1", "cluster", "set", "--backend", "direct")
            wait(lambda: status(lab, "node1").backend == "direct", "node1 to be direct")
            assert pods.here.run("ping", "-n", "-c", "2", "-W", "10", pods.addresses[4]).returncode == 0
        finally:
            for each in lab.nodes:
                on_node(lab, each.name, "sh", "-c", loose)
            node.start_daemon(lab, "node2")
            node.wait_daemon(lab, "node2")
            demo.set_backend(lab, "vxlan")


def test_another_vni_and_port_are_followed_and_pods_live(lab: LabState) -> None:
    with pair(lab) as pods:
        try:
            done = podwire(lab, "node1", "cluster", "set", "--vni", "7", "--port", "8472")
            assert done.stdout.startswith("backend vxlan (VNI 7, UDP port 8472), was vxlan (VNI 1, UDP port 4789)")
            wait(partial(have_vni, lab, 7), "VNI 7")
            for address in pods.addresses.values():
                wait(partial(answers, pods.here, address), "a pod's answer")
        finally:
            podwire(lab, "node1", "cluster", "set", "--vni", "1", "--port", "4789")
            wait(partial(have_vni, lab, 1), "VNI 1")


def test_a_daemon_whose_file_says_otherwise_follows_and_says_so(lab: LabState) -> None:
    with pair(lab) as pods, backend(lab, "direct"):
        assert [note for note in status(lab, "node1").notes if "the cluster's holds" in note] == [
            "backend is vxlan (VNI 1, UDP port 4789) in this node's configuration; "
            "the cluster's holds, which is direct (VNI 1, UDP port 4789)"
        ]
        with Pings(pods.here, pods.addresses[4]) as pings:
            cluster.kill_etcd(lab, "etcd1")
            try:
                node.stop_daemon(lab, "node1")
                node.start_daemon(lab, "node1")
                node.wait_daemon(lab, "node1")
                assert status(lab, "node1").backend == "direct", "it remembers without etcd"
                assert link(lab, "node1", "pw0")["mtu"] == 1500
            finally:
                cluster.start_etcd(lab)
            wait(lambda: status(lab, "node1").peers == 2, "node1 to know its peers again")
            assert pings.lost() == 0


WRONG = {
    "nothing": ([], "set what? --backend, --vni or --port"),
    "an id of 25 bits": (["--vni", "16777216"], "backend.vni is 16777216, expected 1 to 16777215"),
    "another kind": (["--backend", "geneve"], "invalid choice: 'geneve'"),
}


@pytest.mark.parametrize(("words", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_set_is_refused(lab: LabState, words: list[str], says: str) -> None:
    refused = podwire(lab, "node1", "cluster", "set", *words)
    assert refused.returncode != 0
    assert says in refused.stderr


def test_what_holds_is_shown(lab: LabState) -> None:
    plain = json.loads(podwire(lab, "node1", "cluster", "show", "-o", "json").stdout)
    assert plain["backend"] == {"type": "vxlan", "vni": 1, "port": 4789}
    assert [pool["blockSize"] for pool in plain["pools"]] == [24, 64]


# --- another MTU ----------------------------------------------------------------------------------------------------


def mtus(lab: LabState, box: Container) -> dict[str, int]:
    """Of everything between a pod and the underlay."""
    inside = json.loads(box.run("ip", "-j", "link", "show", "eth0").stdout)[0]["mtu"]
    (port,) = pod_links(lab, box.node)
    found = {name: int(link(lab, box.node, name)["mtu"]) for name in ("pw0", "pw-vxlan")}
    return {"pod": inside, "port": int(link(lab, box.node, port)["mtu"]), **found}


def have_mtus(lab: LabState, box: Container, wanted: dict[str, int]) -> bool:
    return mtus(lab, box) == wanted


def underlay_mtu(lab: LabState, mtu: int) -> None:
    for each in lab.nodes:
        on_node(lab, each.name, "ip", "link", "set", "eth0", "mtu", str(mtu))


@pytest.mark.parametrize(("chosen", "overhead"), [("vxlan", 50), ("direct", 0)])
def test_the_mtu_of_running_pods_follows_the_underlays(lab: LabState, chosen: str, overhead: int) -> None:
    with backend(lab, chosen), pair(lab) as pods, traffic(pods.here, pods.there, pods.addresses[6]) as talk:
        check = {"cniVersion": "1.1.0", "name": "podwire", "type": "podwire", "prevResult": pods.result}
        try:
            for mtu in (1400, 1500, 1380, 1500):
                underlay_mtu(lab, mtu)
                wanted = dict.fromkeys(("pod", "port", "pw0"), mtu - overhead) | {"pw-vxlan": mtu - 50}
                for box in (pods.here, pods.there):
                    wait(partial(have_mtus, lab, box, wanted), f"MTU {mtu} to be followed")
                wait(lambda: status(lab, "node1").mtu == wanted["pod"], "node1 to say so")  # noqa: B023  it is waited for here
                assert pods.here.call("CHECK", check).error == 0
                for address, headers in ((pods.addresses[4], 28), (pods.addresses[6], 48)):
                    largest = ["ping", "-n", "-c", "1", "-W", "10", "-M", "do", "-s", str(mtu - overhead - headers)]
                    assert "1 received" in pods.here.run(*largest, address).stdout
            assert talk.harm() == []
        finally:
            underlay_mtu(lab, 1500)
            wait(lambda: status(lab, "node1").mtu == 1500 - overhead, "the usual MTU")


def test_an_underlay_too_small_for_ipv6_is_not_followed(lab: LabState) -> None:
    """A link of less than 1280 bytes has no IPv6, and addresses that are taken away do not come back by themselves."""
    with pair(lab) as pods:
        try:
            on_node(lab, "node1", "ip", "link", "set", "eth0", "mtu", "1300")
            log = lab.files.log(node.daemon_role("node1"))
            wait(lambda: "leaves 1250 for pods, which need 1280" in log.read_text(), "the daemon to say so")
            assert mtus(lab, pods.here)["pod"] == 1450
        finally:
            on_node(lab, "node1", "ip", "link", "set", "eth0", "mtu", "1500")
        wait(lambda: answers(pods.here, pods.addresses[6]), "the way back")


def test_an_interface_that_was_down_has_its_routes_again(lab: LabState) -> None:
    """The kernel drops the routes over an interface that goes down, and its IPv6 addresses."""
    back = [
        "ip link set eth0 up",
        "ip -6 addr add fd00:172:31::b/64 dev eth0 nodad",
        "ip -6 addr add fe80::b/64 dev eth0 nodad",
        "ip route add default via 172.31.0.250",
        "ip -6 route add default via fd00:172:31::fa",
    ]
    with pair(lab) as pods, backend(lab, "direct"), never_looks(lab, "node1"):
        for address in pods.addresses.values():
            wait(partial(answers, pods.here, address), "the way there")
        on_node(lab, "node1", "ip", "link", "set", "eth0", "down")
        for line in back:
            assert on_node(lab, "node1", *line.split()).returncode == 0, line
        for address in pods.addresses.values():
            wait(partial(answers, pods.here, address), "the way back, without the periodic resync")


@contextlib.contextmanager
def never_looks(lab: LabState, name: str) -> Iterator[None]:
    """A node whose daemon reads back nothing by itself, but when it starts."""
    path = lab.files.node_path(name, "/etc/podwire") / "ipamd.yaml"
    usual = path.read_text()
    try:
        configure(lab, name, yaml.safe_dump(yaml.safe_load(usual) | {"reconcileInterval": 3600}))
        yield
    finally:
        configure(lab, name, usual)


def configure(lab: LabState, name: str, text: str) -> None:
    """Restarts a node's daemon with this configuration."""
    (lab.files.node_path(name, "/etc/podwire") / "ipamd.yaml").write_text(text)
    node.stop_daemon(lab, name)
    node.start_daemon(lab, name)
    node.wait_daemon(lab, name)
    know_each_other(lab)


# --- what is others' --------------------------------------------------------------------------------------------

FOREIGN = """\
ip route add 192.0.2.0/25 via 172.31.0.12 dev eth0
ip route add 192.0.2.128/25 dev pw-vxlan
ip route add 203.0.113.0/24 via 172.31.0.13 proto 99
ip -6 route add 2001:db8:9::/64 via fd00:172:31::c dev eth0
ip -6 route add 2001:db8:a::/64 dev pw-vxlan
ip rule add from 192.0.2.0/24 lookup 77
ip link add foreign0 type bridge
ip addr add 192.0.2.1/32 dev pw0
ip -6 addr add 2001:db8:b::1/64 dev pw0 nodad
nft add table inet foreign
nft add chain inet foreign post '{ type nat hook postrouting priority 200; }'
nft add rule inet foreign post ip saddr 192.0.2.0/24 counter masquerade
"""
LOOKS = (
    "ip rule",
    "ip -6 rule",
    "ip link show foreign0",
    "nft list table inet foreign",
    "ip -o addr show dev pw0 scope global",
)


def everything_foreign(lab: LabState) -> list[str]:
    own = [route for route in routes(lab, "node1") if route.get("protocol") != "80"]
    kept = [
        f"{route['dst']} {route.get('gateway')} {route['dev']}" for route in own if route["dst"][:2] in ("19", "20")
    ]
    looks = [on_node(lab, "node1", "sh", "-c", each).stdout for each in LOOKS]
    return [*sorted(kept), *looks]


def test_foreign_links_routes_rules_and_tables_are_not_touched(lab: LabState) -> None:
    for line in FOREIGN.splitlines():
        done = on_node(lab, "node1", "sh", "-c", line)
        assert done.returncode == 0, (line, done.stderr)
    try:
        before = everything_foreign(lab)
        assert len(before) == 6 + len(LOOKS)
        for chosen in ("direct", "auto", "vxlan"):
            demo.set_backend(lab, chosen)
            assert everything_foreign(lab) == before, chosen
            is_well(lab)
        node.kill_daemon(lab, "node1")
        node.start_daemon(lab, "node1")
        node.wait_daemon(lab, "node1")
        assert everything_foreign(lab) == before, "another daemon"
        is_well(lab)
    finally:
        undo = [line.replace(" add ", " del ") for line in FOREIGN.splitlines()[:9]] + ["nft delete table inet foreign"]
        for line in undo:
            on_node(lab, "node1", "sh", "-c", line.replace(" nodad", ""))


def is_well(lab: LabState) -> None:
    """Waits until nothing differs: a daemon that is ready may still be taking its name again."""
    socket = str(lab.files.ipamd_socket("node1"))
    words = (*node.PYTHON, "-m", "podwire.cli.main", "ipam", "check", "--socket", socket)
    wait(lambda: on_node(lab, "node1", *words).returncode == 0, "node1 to be well")


@pytest.mark.parametrize("chosen", ["vxlan", "direct", "auto"])
def test_what_a_node_has_left_behind_is_gone(lab: LabState, chosen: str) -> None:
    with backend(lab, chosen):
        blocks = [block.cidr for block in status(lab, "node3").blocks]
        ours = partial(routes, lab, "node1", "proto", "80")
        wait(lambda: {route["dst"] for route in ours()} >= set(blocks), "routes to node3")
        node.stop_daemon(lab, "node3")
        try:
            wait(partial(forgets, lab, "node3"), "etcd to forget node3")
            wait(lambda: not {route["dst"] for route in ours()} & set(blocks), "the routes to node3 to go")
            wait(lambda: len(entries(lab)) == (3 if chosen == "vxlan" else 0), "its entries to go, and no others")
            sets = on_node(lab, "node1", "nft", "list", "table", "inet", "podwire").stdout
            assert "172.31.0.13" not in sets
            assert "fd00:172:31::d" not in sets
        finally:
            node.start_daemon(lab, "node3")
            node.wait_daemon(lab, "node3")
        wait(lambda: status(lab, "node1").peers == 2, "node3 to be back")


def forgets(lab: LabState, name: str) -> bool:
    """Refused while its name lives, which outlives a daemon by its lease when etcd did not hear the daemon go."""
    return podwire(lab, "node1", "node", "forget", name, "--yes").returncode == 0


def entries(lab: LabState) -> list[str]:
    """What node1 knows of VXLAN peers."""
    words = "ip neigh show dev pw-vxlan nud permanent; bridge fdb show dev pw-vxlan"
    shown = on_node(lab, "node1", "sh", "-c", words).stdout.splitlines()
    return [line for line in shown if "33:33:" not in line and "01:00:5e" not in line]


# --- masquerade ---------------------------------------------------------------------------------------------------


def test_what_is_exempt_from_masquerade_sees_the_pod(lab: LabState) -> None:
    demo.start_outside(lab)
    path = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
    usual = path.read_text()
    outside = ["ip", "netns", "exec", names.namespace(lab.name, "outside"), "ip"]
    try:
        with pair(lab) as pods:
            wait(lambda: is_asked(lab, pods), "the outside host to serve")
            seen = {family: beyond(lab, pods, family) for family in (4, 6)}
            assert seen == {4: lab.nodes[0].addresses[0], 6: lab.nodes[0].addresses[1]}
            path.write_text(
                yaml.safe_dump(yaml.safe_load(usual) | {"nonMasqueradeCIDRs": ["198.51.100.0/24", "2001:db8:51::/48"]})
            )
            configure(lab, "node1", path.read_text())
            own = addresses_of(pods.result)
            for family, address in own.items():
                topology.run([*outside, "route", "add", address, "via", lab.nodes[0].addresses[family == 6]])
            assert {family: beyond(lab, pods, family) for family in (4, 6)} == own
    finally:
        configure(lab, "node1", usual)


def is_asked(lab: LabState, pods: Pair) -> bool:
    with contextlib.suppress(PodwireError):
        return bool(beyond(lab, pods, 4))
    return False


def beyond(lab: LabState, pods: Pair, family: int) -> str:
    """Whom a host outside the cluster sees when the pod asks it."""
    netns = lab.netns(f"box.{pods.here.name}")
    return ask(netns, str(names.BEYOND_ADDRESSES[family]), 80).client
