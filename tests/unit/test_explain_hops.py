"""The plans of `podwire explain`, fed with what commands say: what a lab does not happen to say among it."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import msgspec
import pytest
from rich.console import Console

from podwire.explain import ends, translation, way
from podwire.explain.cluster import Cluster, NoSuchPlace, PortWish
from podwire.explain.hops import Ask, Finding, Hop, NodeFacts, Reading, State, Where, fails, ok, unseen, warns
from podwire.explain.manifests import read_objects
from podwire.explain.path import Path, walk
from podwire.explain.reading import node_facts, run
from podwire.explain.report import conclusion, plain, show
from podwire.v1 import agent_pb2
from tests.unit.test_policy_cli import SHOP, bare_pod

Object = dict[str, Any]
A, B = ipaddress.ip_address("10.244.1.3"), ipaddress.ip_address("10.244.2.3")
NODE2 = NodeFacts(
    name="node2",
    addresses=(ipaddress.ip_address("172.31.0.12"),),
    blocks=("10.244.2.0/24",),
    vteps=(ipaddress.ip_address("10.244.2.2"),),
    macs=("0a:58:0a:f4:02:02",),
)


class Canned:
    """Says what a test wrote, by the words that a command begins with; all else cannot be seen."""

    def __init__(self, said: dict[str, Any]) -> None:
        self._said = said

    def read(self, ask: Ask) -> Reading:
        command = " ".join(ask.words)
        for words, text in self._said.items():
            if command.startswith(words):
                if isinstance(text, Reading):
                    return text
                return Reading(text=text if isinstance(text, str) else json.dumps(text), command=command)
        return Reading(seen=False, text="it is on another node", command=command)

    def nodes(self) -> dict[str, NodeFacts]:
        return {}


NO = Reading(code=1, text="Error: Could not process rule: No such file or directory")

LISTENING: dict[str, tuple[str, str, State, str]] = {
    "on every address of both families": ("LISTEN 0 5 *:80 *:*", "10.244.2.3", State.OK, ""),
    "on every address of IPv4": ("LISTEN 0 5 0.0.0.0:80 0.0.0.0:*", "10.244.2.3", State.OK, ""),
    "on every address of IPv6": ("LISTEN 0 5 [::]:80 [::]:*", "fd00::3", State.OK, ""),
    "on the address itself": ("LISTEN 0 5 10.244.2.3%eth0:80 0.0.0.0:*", "10.244.2.3", State.OK, ""),
    "on the address, seen as IPv6": ("LISTEN 0 5 [::ffff:10.244.2.3]:80 *:*", "10.244.2.3", State.OK, ""),
    "on its loopback alone": ("LISTEN 0 5 127.0.0.1:80 *:*", "10.244.2.3", State.FAILS, "127.0.0.1 alone"),
    "on IPv4 alone": ("LISTEN 0 5 0.0.0.0:80 0.0.0.0:*", "fd00::3", State.FAILS, "0.0.0.0 alone"),
    "on another port": ("LISTEN 0 5 *:8080 *:*\nLISTEN 0 5 *:800 *:*", "10.244.2.3", State.FAILS, "on 800, 8080"),
    "nobody": ("", "10.244.2.3", State.FAILS, "it listens on nothing"),
    "words that are none": ("what\n\nLISTEN", "10.244.2.3", State.FAILS, "it listens on nothing"),
}


@pytest.mark.parametrize(("text", "address", "state", "words"), LISTENING.values(), ids=LISTENING.keys())
def test_who_listens(text: str, address: str, state: State, words: str) -> None:
    where = Where("node2", ("default", "b"))
    hop = run(ends.listener(where, ipaddress.ip_address(address), "TCP", 80, "default/b"), Canned({"ss": text}))
    assert (hop.state, words in hop.findings[0].text) == (state, True)


def test_sctp_listeners_are_not_looked_for() -> None:
    hop = run(ends.listener(Where("node2"), B, "SCTP", 80, "b"), Canned({}))
    assert hop.state is State.UNSEEN


ROUTES: dict[str, tuple[Any, Any, State, str]] = {
    "by the tunnel": ("1", [{"gateway": "10.244.2.2", "dev": "pw-vxlan"}], State.OK, "to node2"),
    "directly": ("1", [{"gateway": "172.31.0.12", "dev": "eth0"}], State.OK, "to node2"),
    "by the default route": ("1", [{"gateway": "172.31.0.1", "dev": "eth0"}], State.FAILS, "no route to 10.244.2.0/24"),
    "by the tunnel of another": ("1", [{"gateway": "10.244.9.2", "dev": "pw-vxlan"}], State.FAILS, "no route to"),
    "nowhere": ("1", Reading(code=2, text="RTNETLINK answers: Network is unreachable"), State.FAILS, "is unreachable"),
    "not forwarded": ("0", Reading(code=2, text="RTNETLINK answers: No route to host"), State.FAILS, "ip_forward is 0"),
    "what ip says is none": ("1", "[[]]", State.FAILS, "has no route"),
}


@pytest.mark.parametrize(("forwards", "route", "state", "words"), ROUTES.values(), ids=ROUTES.keys())
def test_the_way_to_another_node(forwards: str, route: Any, state: State, words: str) -> None:
    said = Canned({"sysctl": forwards, "ip -j route get": route})
    hop, _ = run(way.leave("node1", A, B, NODE2, own=False, way="out"), said)
    assert hop.state is state
    assert any(words in each.text for each in hop.findings)
    assert sum(each.state is State.FAILS for each in hop.findings) == (state is State.FAILS)  # one reason, not two


TUNNELS: dict[str, tuple[Any, Any, Any, State, str]] = {
    "in order": ("0a:58:0a:f4:02:02", "172.31.0.12", None, State.OK, "is at 172.31.0.12"),
    "in order, as far as is known": ("0a:58:0a:f4:02:02", "172.31.0.12", Reading(seen=False), State.OK, "node2"),
    "another MAC than is computed": ("02:00:00:00:00:01", "172.31.0.12", Reading(seen=False), State.FAILS, "02:00"),
    "another MAC than the tunnel has": ("0a:58:0a:f4:02:02", "172.31.0.12", "0a:58:0a:f4:09:02", State.FAILS, "09:02"),
    "no neighbour": ("", "172.31.0.12", None, State.FAILS, "no neighbour entry"),
    "no FDB entry": ("0a:58:0a:f4:02:02", "", None, State.FAILS, "no FDB entry"),
    "another node": ("0a:58:0a:f4:02:02", "172.31.0.13", None, State.FAILS, "leads to 172.31.0.13"),
    "the other's tunnel is down": ("0a:58:0a:f4:02:02", "172.31.0.12", "down", State.FAILS, "is not up"),
}


@pytest.mark.parametrize(("mac", "end", "truth", "state", "words"), TUNNELS.values(), ids=TUNNELS.keys())
def test_the_tunnel(mac: str, end: str, truth: Any, state: State, words: str) -> None:
    other = truth
    if not isinstance(truth, Reading):
        own = NODE2.macs[0] if truth in (None, "down") else truth
        other = [{"ifname": "pw-vxlan", "address": own, "flags": [] if truth == "down" else ["UP"]}]
    said = {
        "ip -j neigh": [{"dst": "10.244.2.2", "lladdr": mac}] if mac else [],
        "bridge -j fdb": [{"mac": "0a:58:0a:f4:02:02", "dst": end}] if end else [],
        "ip -j -d addr": other,
    }
    if mac.startswith("02:"):
        said["bridge -j fdb"] = [{"mac": mac, "dst": end}]
    hop = run(way.tunnel("node1", ipaddress.ip_address("10.244.2.2"), NODE2), Canned(said))
    assert hop.state is state
    assert any(words in each.text for each in hop.findings)


ROOM: dict[str, tuple[int, bool, int, State]] = {
    "VXLAN fits": (1450, True, 1500, State.OK),
    "VXLAN is one too large": (1451, True, 1500, State.FAILS),
    "plain fits": (1500, False, 1500, State.OK),
    "plain is one too large": (1501, False, 1500, State.FAILS),
    "the pod's is not known": (0, True, 1500, State.OK),
}


@pytest.mark.parametrize(("mtu", "tunnelled", "room", "state"), ROOM.values(), ids=ROOM.keys())
def test_room_on_the_underlay(mtu: int, tunnelled: bool, room: int, state: State) -> None:
    node1 = NodeFacts(name="node1", addresses=(ipaddress.ip_address("172.31.0.11"),))
    said = {
        "ip -j route": [{"dev": "eth0"}],
        "ip -j link": [{"flags": ["UP"], "mtu": room}],
        "nft get element inet podwire vteps4": "",
    }
    hop = run(way.underlay(node1, NODE2, mtu, tunnelled=tunnelled), Canned(said))
    assert hop.state is state


def test_a_node_that_does_not_know_the_other_drops_its_vxlan() -> None:
    node1 = NodeFacts(name="node1", addresses=(ipaddress.ip_address("172.31.0.11"),))
    link = [{"flags": ["UP"], "mtu": 1500}]
    said = {"ip -j route": [{"dev": "eth0"}], "ip -j link": link, "nft get": NO}
    hop = run(way.underlay(node1, NODE2, 1450, tunnelled=True), Canned(said))
    assert [each.text for each in hop.findings if each.state is State.FAILS] == [
        "node2 does not know 172.31.0.11, and drops its VXLAN"
    ]


# --- Services ---------------------------------------------------------------------------------------------------


SERVICES: dict[str, tuple[dict[str, Any], State, str]] = {
    "in order": (
        {"services": ": goto lb_tcp_1 }", "eps_tcp": ". 80 . 0 : 10.244.0.12 . 5432 }"},
        State.OK,
        "its endpoints there are 10.244.0.12:5432",
    ),
    "another number of endpoints": ({"services": ": goto lb_tcp_2 }"}, State.FAILS, "sends it to lb_tcp_2"),
    "refused by the kernel alone": ({"services": ": goto refuse }"}, State.FAILS, "sends it to refuse"),
    "an endpoint of long ago": (
        {"services": ": goto lb_tcp_1 }", "eps_tcp": ". 80 . 0 : 10.244.9.9 . 5432 }"},
        State.FAILS,
        "has 10.244.9.9 . 5432 among the endpoints",
    ),
    "a slot without an endpoint": ({"services": ": goto lb_tcp_1 }", "eps_tcp": NO}, State.FAILS, "has nobody among"),
    "not there": ({"services": NO}, State.FAILS, "does not know 10.96.0.10 port 5432"),
}


@pytest.mark.parametrize(("kernel", "state", "words"), SERVICES.values(), ids=SERVICES.keys())
def test_a_service_in_nftables(kernel: dict[str, Any], state: State, words: str) -> None:
    cluster = Cluster(read_objects(SHOP))
    client = cluster.place("shop/web-1")
    (made,) = cluster.translate_service(cluster.place("svc/shop/db"), PortWish(number=5432), client, _pod())
    said = {f"nft get element ip podwire_proxy {name} ": text for name, text in kernel.items()}
    said["nft list tables ip"] = "table ip podwire_proxy"
    own = client.of(4)
    assert own is not None
    hop = run(translation.service(cluster, "node1", made, own), Canned(said))
    assert hop.state is state
    assert any(words in each.text for each in hop.findings), hop.findings


def test_a_node_without_rules_for_services() -> None:
    cluster = Cluster(read_objects(SHOP))
    client = cluster.place("shop/web-1")
    (made,) = cluster.translate_service(cluster.place("svc/shop/db"), PortWish(number=5432), client, _pod())
    own = client.of(4)
    assert own is not None
    hop = run(translation.service(cluster, "node1", made, own), Canned({"nft get": NO, "nft list": "", "iptables": ""}))
    assert hop.findings[-1].text == "the kernel of node1 has no rules for Services"


BALANCED: Object = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "front", "namespace": "shop"},
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.77",
        "clusterIPs": ["10.96.0.77"],
        "loadBalancerSourceRanges": ["192.0.2.0/24"],
        "selector": {"app": "db"},
        "ports": [{"port": 80, "targetPort": 5432, "nodePort": 30080}],
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}},
}
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node2"},
    "status": {"addresses": [{"type": "InternalIP", "address": "172.31.0.12"}]},
}


def test_the_name_of_a_service_is_its_cluster_ip() -> None:
    """What a balancer's address would do is another question, and is asked by that address."""
    cluster = Cluster(read_objects([*SHOP, BALANCED]))
    client = cluster.place("shop/web-1")

    def asked(words: str) -> list[tuple[str, str]]:
        found = cluster.translate_service(cluster.place(words), PortWish(number=80), client, _pod())
        return [(str(each.address), each.decision.verdict.value) for each in found]

    assert asked("svc/shop/front") == [("10.96.0.77", "forward")]
    assert asked("198.51.100.7") == [("198.51.100.7", "drop")]


def test_whom_a_service_masquerades_another_node_does_not_know() -> None:
    """The policy of shop/db allows shop/web: by the ClusterIP; by an external address it sees a node."""
    front = BALANCED | {"spec": BALANCED["spec"] | {"externalIPs": ["192.0.2.9"]}}
    near = bare_pod("near", "shop", nodeName="node1")
    near["metadata"]["labels"] = {"app": "web"}
    cluster = Cluster(read_objects([*SHOP, front, near]))
    source = cluster.place("shop/near")
    nodes = {"node1": NodeFacts(name="node1", vteps=(ipaddress.ip_address("10.244.1.2"),))}

    def failing(words: str) -> list[str]:
        path = run(walk(cluster, nodes, source, cluster.place(words), PortWish(number=80)), Canned({}))
        return [hop.title for hop in path.hops if hop.state is State.FAILS]

    assert failing("svc/shop/front") == []
    assert failing("192.0.2.9") == ["ingress policy"]


TO_DB = "-A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination 10.244.0.12:5432"
PORTS = """:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PORT-A - [0:0]
:KUBE-EXT-1 - [0:0]
:KUBE-SEP-1 - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A KUBE-SERVICES ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
"""
BY_IPTABLES: dict[str, tuple[str, State, str]] = {
    "in a chain of a range of ports": (
        "-A KUBE-NODEPORTS -p tcp -m tcp --dport 28672:32767 -g KUBE-PORT-A\n"
        f"-A KUBE-PORT-A -p tcp -m tcp --dport 30080 -j KUBE-EXT-1\n-A KUBE-EXT-1 -j KUBE-SEP-1\n{TO_DB}\n",
        State.OK,
        "iptables: chain KUBE-EXT-1",
    ),
    "in the chain of all ports": (
        f"-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-1\n-A KUBE-EXT-1 -j KUBE-SEP-1\n{TO_DB}\n",
        State.OK,
        "iptables: chain KUBE-EXT-1",
    ),
    "a port that only begins alike": (
        f"-A KUBE-NODEPORTS -p tcp -m tcp --dport 300800 -j KUBE-EXT-1\n-A KUBE-EXT-1 -j KUBE-SEP-1\n{TO_DB}\n",
        State.FAILS,
        "no rule of node2 that packets of pods meet names 172.31.0.12 TCP 30080",
    ),
    "of another protocol": (
        f"-A KUBE-NODEPORTS -p udp -m udp --dport 30080 -j KUBE-EXT-1\n-A KUBE-EXT-1 -j KUBE-SEP-1\n{TO_DB}\n",
        State.FAILS,
        "no rule of node2 that packets of pods meet names 172.31.0.12 TCP 30080",
    ),
    "without the endpoint": (
        "-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-1\n",
        State.FAILS,
        "the rules of node2 for it do not lead to 10.244.0.12:5432",
    ),
}


@pytest.mark.parametrize(("rules", "state", "words"), BY_IPTABLES.values(), ids=BY_IPTABLES.keys())
def test_a_node_port_in_iptables(rules: str, state: State, words: str) -> None:
    cluster = Cluster(read_objects([*SHOP, BALANCED, NODE]))
    client = cluster.place("shop/web-1").of(4)
    assert client is not None
    made = cluster.translate(ipaddress.ip_address("172.31.0.12"), "TCP", 30080, client, _pod())
    assert made is not None
    said = {"nft": NO, "iptables-save": PORTS + rules}
    hop = run(translation.service(cluster, "node2", made, client), Canned(said))
    assert (hop.state, hop.findings[-1].text.partition(", and there")[0]) == (state, words)


def _pod() -> Any:
    from kube_proxy_lite.model import Source

    return Source.POD


# --- the whole --------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_read_the_api_alone_speaks() -> None:
    pods = [dict(each) for each in SHOP]
    cluster = Cluster(read_objects(pods))
    source, target = cluster.place("default/curl"), cluster.place("shop/db-0")
    path = run(walk(cluster, {}, source, target, PortWish(number=5432)), Canned({}))
    first = path.first(State.FAILS)
    assert first is not None
    assert (first[1].title, first[2].state) == ("ingress policy", State.FAILS)
    assert {hop.state for hop in path.hops} <= {State.OK, State.UNSEEN, State.FAILS}


def test_a_service_without_any_address_is_said_to_be_one() -> None:
    named = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "elsewhere", "namespace": "shop"},
        "spec": {"type": "ExternalName", "externalName": "example.com", "ports": [{"port": 80}]},
    }
    cluster = Cluster(read_objects([*SHOP, named]))
    ends_of_it = cluster.place("default/curl"), cluster.place("svc/shop/elsewhere")
    with pytest.raises(NoSuchPlace, match="ExternalName"):
        run(walk(cluster, {}, *ends_of_it, PortWish(number=80)), Canned({}))


def test_what_nodes_say_of_themselves_goes_before_what_their_peers_say() -> None:
    peer = agent_pb2.Peer(name="node2", addresses=["172.31.0.99"], blocks=["10.244.9.0/24"])
    gone = agent_pb2.Peer(name="node3", addresses=["172.31.0.13"], blocks=["10.244.3.0/24", "fd00:3::/64"])
    first = agent_pb2.GetStatusResponse(node="node1", addresses=["172.31.0.11"], peer_nodes=[peer, gone])
    own = agent_pb2.BlockStatus(cidr="10.244.2.0/24")
    second = agent_pb2.GetStatusResponse(node="node2", addresses=["172.31.0.12"], blocks=[own])
    found = node_facts([first, second, None], {"node3": "nobody answers"})
    assert found["node2"] == msgspec.structs.replace(NODE2)
    assert (found["node3"].trouble, [str(each) for each in found["node3"].vteps]) == (
        "nobody answers",
        ["10.244.3.2", "fd00:3::2"],
    )


CONCLUDED: dict[str, tuple[tuple[Finding, ...], str]] = {
    "nothing fails": ((ok("fine"),), "nothing fails on the whole way"),
    "the first that fails": ((warns("odd", "x"), fails("bad", "mend it"), fails("worse", "y")), "fails at hop 2, h1"),
    "a warning": ((ok("fine"), warns("odd", "look")), "packets pass, but at hop 2, h1"),
    "not all was seen": ((unseen("who", Reading(seen=False, text="far")),), "nothing that can be seen from here fails"),
}


@pytest.mark.parametrize(("findings", "words"), CONCLUDED.values(), ids=CONCLUDED.keys())
def test_what_it_comes_to(findings: tuple[Finding, ...], words: str) -> None:
    cluster = Cluster(read_objects(SHOP))
    hops = tuple(Hop(title=f"h{number}", where="", findings=(each,)) for number, each in enumerate(findings))
    ends_of_it = cluster.place("default/curl"), cluster.place("shop/db-0")
    path = Path(source=ends_of_it[0], target=ends_of_it[1], protocol="TCP", port=80, hops=hops)
    assert conclusion(path)[0].startswith(words)
    console = Console(width=80, record=True, quiet=True)
    show(path, console)
    shown = json.loads(json.dumps(plain(path)))
    assert [hop["state"] for hop in shown["hops"]] == [each.state.value for each in findings]
    assert shown["passes"] is not any(each.state is State.FAILS for each in findings)
