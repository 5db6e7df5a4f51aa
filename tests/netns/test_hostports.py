"""Ports of the node that lead to pods: real packets, from everywhere that a client may be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ipam_daemon.errors import PortTaken, UnsupportedField
from ipam_daemon.model import Bandwidth
from ipam_daemon.server import AgentService
from podwire.cli.status import _port
from podwire.v1 import agent_pb2
from tests.netns.hostport_fixtures import (
    GATEWAY,
    NODE,
    OUTSIDE,
    REFUSED,
    add_call,
    ask,
    both_families,
    dual_stack,
    elements,
    mapping,
    running,
    serving,
)
from tests.netns.node_fixtures import Netns, eventually, key, play, pods

BOTH = [mapping(8080), mapping(8080, protocol="udp")]


def test_a_port_of_the_node_leads_to_the_pod_from_everywhere(tmp_path: Path) -> None:
    """And the pod sees who it is, unless an answer to that would not come back this way."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (web, other), serving(web, "web", 80):
                await it.attachments.add(add_call("web", web, *BOTH))
                await it.attachments.add(add_call("other", other))
                row = it.journal.get(key("other"))
                assert row is not None
                mine: dict[int, str] = {each.version: str(each.ip) for each in row.addresses}
                seen = {}
                for version, local in ((4, "127.0.0.1"), (6, "")):
                    for protocol in ("tcp", "udp"):
                        for name, where, address, expected in (
                            ("outside", outside, NODE[version], OUTSIDE[version]),
                            ("the node, at its address", it.node, NODE[version], NODE[version]),
                            ("the node, at localhost", it.node, local, GATEWAY[version]),
                            ("a pod, at the node's address", other, NODE[version], mine[version]),
                            ("a pod, at its gateway", other, GATEWAY[version], mine[version]),
                            ("the pod itself", web, NODE[version], GATEWAY[version]),
                        ):
                            if address:
                                got = ask(where, address, 8080, protocol)
                                if got != f"web {expected}":
                                    seen[f"{name}, IPv{version}, {protocol}"] = got
                assert seen == {}
                assert ask(outside, NODE[4], 8081) == REFUSED, "a port that nobody asked for"
                assert ask(it.node, "::1", 8080) == REFUSED, "the kernel routes no ::1, so it is not mapped"
                assert ask(it.node, "127.0.0.53", 8080) == REFUSED, "where the node's resolver may be"

    play(story)


def table(node: Netns) -> str:
    """What nft lists of our table, without what counts packets."""
    return node.run("nft", "-s", "list", "table", "inet", "podwire_hostports")


def test_a_mapping_of_one_address_is_of_no_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            it.node.ip("addr", "add", "192.0.2.9/24", "dev", "under0")
            with pods(2) as (web, local), serving(web, "web", 80), serving(local, "local", 80):
                mine = [
                    mapping(8080, host_ip="192.0.2.9"),
                    mapping(8081, host_ip="0.0.0.0"),
                    mapping(8082, host_ip="::"),
                ]
                await it.attachments.add(add_call("web", web, *mine))
                await it.attachments.add(add_call("local", local, mapping(8080, host_ip="127.0.0.1")))
                asked = {
                    ("outside", "192.0.2.9", 8080): f"web {OUTSIDE[4]}",
                    ("outside", NODE[4], 8080): REFUSED,
                    ("outside", NODE[6], 8080): REFUSED,
                    ("node", "127.0.0.1", 8080): f"local {GATEWAY[4]}",
                    ("outside", NODE[4], 8081): f"web {OUTSIDE[4]}",
                    ("outside", NODE[6], 8081): REFUSED,
                    ("outside", NODE[4], 8082): REFUSED,
                    ("outside", NODE[6], 8082): f"web {OUTSIDE[6]}",
                }
                where = {"outside": outside, "node": it.node}
                assert {each: ask(where[each[0]], *each[1:]) for each in asked} == asked

    play(story)


RAW_SCTP = """
import socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_RAW, 132) as raw:
    raw.settimeout(60)
    if sys.argv[1] == "send":
        chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 7, 65535, 1, 1, 9)  # INIT
        packet = struct.pack("!HHII", 40000, int(sys.argv[3]), 0, 0) + chunk
        crc = 0xFFFFFFFF
        for byte in packet:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        raw.sendto(packet[:8] + struct.pack("<I", crc ^ 0xFFFFFFFF) + packet[12:], (sys.argv[2], 0))
    else:
        print("ready", flush=True)
        packet, (source, _) = raw.recvfrom(999)
        print(source, struct.unpack_from("!H", packet, 22)[0])
"""


def test_sctp_is_mapped_as_well(tmp_path: Path) -> None:
    """By hand: a kernel without sockets of SCTP forwards it all the same."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(1) as (pod,):
                await it.attachments.add(add_call("gw", pod, mapping(2905, 2906, "sctp")))
                with running(pod, RAW_SCTP, "receive") as receiver:
                    outside.run("python3", "-IS", "-c", RAW_SCTP, "send", NODE[4], "2905")
                    assert receiver.hear() == f"{OUTSIDE[4]} 2906"

    play(story)


def test_a_port_is_one_pods_until_its_del(tmp_path: Path) -> None:
    """Also across a restart, and no longer: the next pod has it while the address of the first still cools."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (first, second), serving(second, "second", 80):
                await it.attachments.add(add_call("first", first, mapping(8080)))
                before = elements(it)
                for wanted, said in (
                    (mapping(8080), r"port 8080/tcp of this node is taken by pod default/first \(container first\)"),
                    (mapping(8080, host_ip="192.0.2.1"), r"192\.0\.2\.1:8080/tcp of this node is taken by pod"),
                ):
                    with pytest.raises(PortTaken, match=said):
                        await it.attachments.add(add_call("second", second, wanted))
                it = await it.restarted().start()
                await both_families(it)
                with pytest.raises(PortTaken):
                    await it.attachments.add(add_call("second", second, mapping(8080)))
                assert (elements(it), second.links()) == (before, set())
                await it.attachments.add(add_call("second", second, mapping(8080, protocol="udp")))
                await it.delete("second")
                await it.delete("first")
                await it.attachments.add(add_call("second", second, mapping(8080)))
                assert ask(outside, NODE[4], 8080) == f"second {OUTSIDE[4]}"
                it.journal.close()

    play(story)


def test_of_two_that_ask_at_once_one_has_the_port(tmp_path: Path) -> None:
    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (a, b), serving(a, "a", 80), serving(b, "b", 80):
                calls = [it.attachments.add(add_call(name, pod, *BOTH)) for name, pod in (("a", a), ("b", b))]
                done = await asyncio.gather(*calls, return_exceptions=True)
                (won,) = [name for name, each in zip("ab", done, strict=True) if isinstance(each, bytes)]
                assert sum(isinstance(each, PortTaken) for each in done) == 1
                assert ask(outside, NODE[4], 8080) == f"{won} {OUTSIDE[4]}"
                assert len(it.journal.attachments()) == 1
                assert it.attachments.addresses.allocator.use(it.now)[0].used == 1, "the loser's address is free"

    play(story)


def test_a_port_that_the_node_listens_on_is_refused(tmp_path: Path) -> None:
    """Otherwise a pod could take the node's own SSH away."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(1) as (web,), serving(it.node, "node", 2222):
                for wanted in (mapping(2222), mapping(2222, protocol="udp"), mapping(2222, host_ip=NODE[4])):
                    with pytest.raises(PortTaken, match=r"2222/(tcp|udp) is the node's own: .* on 0\.0\.0\.0, ::"):
                        await it.attachments.add(add_call("web", web, wanted))
                assert ask(outside, NODE[4], 2222) == f"node {OUTSIDE[4]}"
                await it.attachments.add(add_call("web", web, mapping(2222, protocol="sctp"), mapping(2223)))

    play(story)


def test_a_family_that_the_pod_has_not_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with dual_stack(tmp_path) as (it, _):
            addresses = it.attachments.addresses
            addresses.use_blocks([each for each in addresses.allocator.blocks if each.cidr.version == 4])
            with pods(1) as (web,):
                with pytest.raises(UnsupportedField, match="hostIP '2001:db8::1', and the pod gets no IPv6 address"):
                    await it.attachments.add(add_call("web", web, mapping(8080, host_ip=NODE[6])))
                assert (it.journal.attachments(), web.links()) == ((), set())
                assert it.counts()["used"] == 0

    play(story)


UDP_CLIENT = """
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.bind(("", 5555))
client.settimeout(60)
client.connect((sys.argv[1], 8080))
print("ready")
for line in sys.stdin:
    try:
        client.send(b"who?")
        print(client.recv(99).decode())
    except OSError as error:
        print(type(error).__name__)
"""


def test_a_udp_client_that_never_stops_meets_the_next_pod(tmp_path: Path) -> None:
    """Its port stays the same, and so conntrack would keep it with the pod that is gone, or with nobody."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with (
                pods(2) as (a, b),
                serving(a, "a", 80),
                serving(b, "b", 80),
                running(outside, UDP_CLIENT, NODE[4]) as client,
            ):

                def again() -> str:
                    client.say()
                    return client.hear()

                assert again() == REFUSED
                await it.attachments.add(add_call("a", a, mapping(8080, protocol="udp")))
                assert again() == f"a {OUTSIDE[4]}"
                await it.delete("a")
                await it.attachments.add(add_call("b", b, mapping(8080, protocol="udp")))
                assert again() == f"b {OUTSIDE[4]}"
                await it.delete("b")
                assert again() == REFUSED

    play(story)


def ids(listing: str) -> list[str]:
    return [word for word in listing.split() if word.startswith("id=")]


def test_connections_to_the_same_port_elsewhere_are_not_forgotten(tmp_path: Path) -> None:
    """A pod that asks a server outside at port 8080 is none of the mapping's business."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            outside.ip("route", "add", "10.244.1.0/28", "via", NODE[4])
            with pods(2) as (client, web), serving(outside, "outside", 8080):
                await it.attachments.add(add_call("client", client))
                await it.attachments.add(add_call("web", web, mapping(8081)))  # so that conntrack is on
                it.node.run("sysctl", "-q", "-w", "net.netfilter.nf_conntrack_udp_timeout=600")
                assert ask(client, OUTSIDE[4], 8080, "udp").startswith("outside")
                listed = ("conntrack", "-L", "-p", "udp", "--orig-port-dst", "8080", "-o", "id,extended")
                before = it.node.run(*listed, check=False)
                assert "8080" in before
                await it.delete("web")
                await it.attachments.add(add_call("web", web, mapping(8080, protocol="udp")))
                after = it.node.run(*listed, check=False)
                assert ids(after) == ids(before) != []

    play(story)


def test_when_del_answers_nothing_leads_to_the_pod(tmp_path: Path) -> None:
    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (web, other), serving(web, "web", 80):
                await it.attachments.add(add_call("other", other, mapping(9090)))
                alone = table(it.node)
                await it.attachments.add(add_call("web", web, *BOTH, mapping(8081, host_ip=NODE[4])))
                assert ask(outside, NODE[4], 8080) == f"web {OUTSIDE[4]}"
                assert elements(it) == 4 + 2 * 2 + 1 + 2, "two families: two a mapping, and two for the pod"
                await it.delete("web")
                assert table(it.node) == alone
                assert ask(outside, NODE[4], 8080) == REFUSED
                await it.delete("other")
                assert elements(it) == 0

    play(story)


DAMAGE = {
    "the table deleted": "delete table inet podwire_hostports",
    "the whole ruleset flushed": "flush ruleset",
    "a chain flushed": "flush chain inet podwire_hostports prerouting",
    "a map flushed": "flush map inet podwire_hostports any4",
    "an element of somebody else": "add element inet podwire_hostports any4 { tcp . 99 : 10.9.9.9 . 99 }",
    "a port that leads elsewhere": (
        "delete element inet podwire_hostports any4 { tcp . 8080 }\n"
        "add element inet podwire_hostports any4 { tcp . 8080 : 10.9.9.9 . 80 }"
    ),
    "a rule of somebody else": "add rule inet podwire_hostports hostports accept",
}


def test_a_restart_changes_nothing_and_a_round_mends_what_somebody_did(tmp_path: Path) -> None:
    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(1) as (web,), serving(web, "web", 80):
                await it.attachments.add(add_call("web", web, *BOTH))
                handles = it.node.run("nft", "-a", "-s", "list", "ruleset")
                it = await it.restarted().start()
                await both_families(it)
                await it.reconciler.round()
                assert it.node.run("nft", "-a", "-s", "list", "ruleset") == handles
                whole = table(it.node)
                for name, script in DAMAGE.items():
                    it.node.run("nft", "-f", "-", stdin=script)
                    await it.reconciler.round()
                    assert table(it.node) == whole, name
                    assert ask(outside, NODE[4], 8080) == f"web {OUTSIDE[4]}", name
                it.node.run("sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/pw0/route_localnet")
                await it.reconciler.round()
                assert ask(it.node, "127.0.0.1", 8080) == f"web {GATEWAY[4]}"
                it.journal.close()

    play(story)


def test_an_add_or_del_that_finds_the_table_damaged_mends_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (a, b), serving(a, "a", 80), serving(b, "b", 80):
                await it.attachments.add(add_call("a", a, mapping(8080)))
                it.node.run("nft", "flush", "ruleset")
                await it.attachments.add(add_call("b", b, mapping(8081)))
                assert [ask(outside, NODE[4], port) for port in (8080, 8081)] == [f"{x} {OUTSIDE[4]}" for x in "ab"]
                it.node.run("nft", "add element inet podwire_hostports any4 { tcp . 8082 : 10.9.9.9 . 80 }")
                await it.delete("b")
                await it.attachments.add(add_call("b", b, mapping(8082)))
                assert ask(outside, NODE[4], 8082) == f"b {OUTSIDE[4]}"
                it.node.run("nft", "flush", "ruleset")
                await it.delete("a")
                await it.delete("b")
                assert elements(it) == 0

    play(story)


def test_a_lost_journal_learns_the_mappings_from_the_kernel(tmp_path: Path) -> None:
    asked = [*BOTH, mapping(8081, host_ip=NODE[4]), mapping(8082, host_ip="::")]

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (web, other), serving(web, "web", 80):
                await it.attachments.add(add_call("web", web, *asked))
                before = it.journal.get(key("web"))
                assert before is not None
                it.journal.forget(before.key)
                for _ in range(2):
                    await it.reconciler.round()
                after = it.journal.get(before.key)
                assert after is not None
                assert set(after.port_mappings) == set(before.port_mappings)
                assert ask(outside, NODE[4], 8080) == f"web {OUTSIDE[4]}"
                with pytest.raises(PortTaken, match="taken by container web"):
                    await it.attachments.add(add_call("other", other, mapping(8081)))

    play(story)


FRAME = """
import socket, struct, sys
mac = lambda text: bytes.fromhex(text.replace(":", ""))
source, destination = (socket.inet_aton(each) for each in sys.argv[3:5])
udp = struct.pack("!HHHH", 5, 7777, 9, 0) + b"x"
head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + source + destination
total = sum(struct.unpack("!10H", head))
total = (total & 0xFFFF) + (total >> 16)
head = head[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + head[12:]
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind(("eth0", 0))
    raw.send(mac(sys.argv[1]) + mac(sys.argv[2]) + struct.pack("!H", 0x0800) + head + udp)
"""
LISTEN = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", 7777))
    print("ready", flush=True)
    while True:
        print(server.recvfrom(9)[1][0], flush=True)
"""


def test_a_pod_reaches_nothing_at_the_nodes_localhost(tmp_path: Path) -> None:
    """`route_localnet` alone would let it (CVE-2020-8558): without our guard both frames arrive."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, _):
            with pods(1) as (pod,), running(it.node, LISTEN) as server:
                await it.attachments.add(add_call("pod", pod, mapping(8080)))
                row = it.journal.get(key("pod"))
                assert row is not None
                (bridge,) = it.node.json("link", "show", "dev", "pw0")
                mine = str(row.addresses[0].ip)

                def send(source: str, destination: str) -> None:
                    pod.run("python3", "-IS", "-c", FRAME, bridge["address"], row.mac, source, destination)

                send(mine, "127.0.0.1")
                send("127.0.0.1", GATEWAY[4])
                guard = ("nft", "list", "chain", "inet", "podwire_hostports", "guard")
                await eventually(lambda: it.node.run(*guard).count("counter packets 1 ") == 2)
                it.node.run("nft", "flush", "chain", "inet", "podwire_hostports", "guard")
                send(mine, "127.0.0.1")
                assert server.hear() == mine, "the first that arrives is the one without a guard"

    play(story)


FOREIGN = """
table ip kube-proxy {
    chain nodeports { type nat hook prerouting priority dstnat; tcp dport 30080 dnat to %(other)s:80; }
    chain services { type nat hook output priority -100; tcp dport 30080 dnat to %(other)s:80; }
}
"""


def test_what_others_translate_goes_first_and_stays(tmp_path: Path) -> None:
    """A NodePort of the same number is kube-proxy's; the iptables of portmap are asked before us as well."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (web, other), serving(web, "web", 80), serving(other, "other", 80):
                await it.attachments.add(add_call("other", other))
                row = it.journal.get(key("other"))
                assert row is not None
                it.node.run("nft", "-f", "-", stdin=FOREIGN % {"other": row.addresses[0].ip})
                nat = ("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "30081", "-j", "DNAT")
                it.node.run(*nat, "--to-destination", f"{row.addresses[0].ip}:80")
                before = it.node.run("nft", "-s", "list", "ruleset")
                await it.attachments.add(add_call("web", web, mapping(30080), mapping(30081), mapping(30082)))
                got = [ask(outside, NODE[4], port) for port in (30080, 30081, 30082)]
                assert got == [f"other {OUTSIDE[4]}", f"other {OUTSIDE[4]}", f"web {OUTSIDE[4]}"]
                await it.delete("web")
                it.node.run("nft", "delete", "table", "inet", "podwire_hostports")
                assert it.node.run("nft", "-s", "list", "ruleset") == before

    play(story)


def test_a_tool_is_told_of_ports_and_limits(tmp_path: Path) -> None:
    """By `podwire status`, of what the journal has."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, _):
            with pods(1) as (web,):
                limits = Bandwidth(egress_rate=8_000_000, egress_burst=800_000)
                asked = [mapping(8080), mapping(8081, 81, "udp", NODE[6])]
                await it.attachments.add(add_call("web", web, *asked, bandwidth=limits))
                listed = await AgentService(agent_pb2.GetStatusResponse, it.journal).ListAttachments(
                    agent_pb2.ListAttachmentsRequest(), None
                )
                (told,) = listed.attachments
                assert list(map(_port, told.port_mappings)) == ["8080→80/tcp", "[2001:db8::1]:8081→81/udp"]
                assert (told.bandwidth.egress_rate, told.bandwidth.ingress_rate) == (8_000_000, 0)

    play(story)
