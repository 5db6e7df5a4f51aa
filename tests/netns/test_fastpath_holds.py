"""What the fast path does not change: a pod that is gone hears nothing, nobody speaks as another, no daemon is needed.

Every story is of connections that are fast and busy, between pods of one node and to the other one. What was sent after
a promise began to hold is told by its number (busy_flows.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import yaml

from ipam_daemon.plan import mac_of
from podwire.lab import cluster, node
from podwire.lab.agent import daemon_status
from podwire.lab.state import LabState
from tests.netns.busy_flows import (
    BARELY,
    PORT,
    TCP,
    UDP,
    Busy,
    Ear,
    Echo,
    Pod,
    dying,
    message,
    metric,
    moments,
    nothing_since,
    quick_lab,
    share,
    taken,
    undisturbed,
    until_fast,
)
from tests.netns.containers import at_once, containers, on_node, status, wait
from tests.netns.fast_kernel import Maps, programs
from tests.netns.frames import IPV4, IPV6, ethernet, ip, raw, udp
from tests.netns.test_ipam_check import etcd, podwire_node

HOST_PORT = {"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": PORT, "protocol": "udp"}]}}


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    with quick_lab() as made:
        yield made


class Trio:
    """Two pods of node1 and one of node2 that stay, with an echo each in the last two."""

    def __init__(self, lab: LabState, pods: Sequence[Pod], stack: contextlib.ExitStack) -> None:
        self.lab, (self.client, self.near, self.far) = lab, pods
        for pod in pods[1:]:
            stack.enter_context(Echo(pod.netns))

    def flows(self, stack: contextlib.ExitStack) -> tuple[Busy, ...]:
        """One of each protocol, family and way, fast at both ends."""
        near, far, begin = self.near, self.far, self.client.netns
        made = tuple(
            stack.enter_context(Busy(begin, to, kind))
            for to, kind in ((near.at[4], UDP), (near.at[6], TCP), (far.at[6], UDP), (far.at[4], TCP))
        )
        until_fast(self.lab, *made)
        until_fast(self.lab, *made[2:], at=["node2"])
        return made


@pytest.fixture(scope="module")
def trio(lab: LabState) -> Iterator[Trio]:
    with (
        containers(lab, "node1", "stays", 2) as (one, other),
        containers(lab, "node2", "stays-far", 1) as (away,),
        contextlib.ExitStack() as stack,
    ):
        made = [Pod(each) for each in (one, other, away)]
        yield Trio(lab, made, stack)
        for each in made:
            each.delete()


@contextlib.contextmanager
def one_more(lab: LabState, name: str, on: str = "node1", config: dict[str, Any] | None = None) -> Iterator[Pod]:
    """A pod that may be deleted within the block."""
    with containers(lab, on, name, 1) as (box,):
        made = Pod(box, config)
        try:
            yield made
        finally:
            made.delete()


def counted(lab: LabState, name: str, reason: str) -> int:
    """What the guard of a node has dropped."""
    return metric(lab, name, node.METRICS_PORT, "podwire_spoofed_packets_total", f'reason="{reason}"')


def known(lab: LabState, name: str, link: str) -> set[str]:
    """The addresses that the programs of a node know."""
    with Maps(lab, name, link) as maps:
        return maps.pods()


# --- pods that are gone -------------------------------------------------------------------------------------------


def to_all(trio: Trio, to: Pod) -> list[tuple[str, str, int]]:
    """Connections to one pod, from its node and from another."""
    client, far = trio.client.netns, trio.far.netns
    return [
        (client, to.at[4], UDP),
        (client, to.at[6], UDP),
        (client, to.at[4], TCP),
        (far, to.at[4], UDP),
        (far, to.at[6], TCP),
    ]


def test_nothing_reaches_a_pod_whose_del_was_answered(lab: LabState, trio: Trio) -> None:
    """Its namespace is still there, with its interface up for a moment, and who talked to it goes on talking."""
    with contextlib.ExitStack() as stack:
        steady = trio.flows(stack)
        pod = stack.enter_context(one_more(lab, "dies"))
        ear = stack.enter_context(Ear(pod.netns))
        stack.enter_context(Echo(pod.netns))
        flows = [stack.enter_context(Busy(*each)) for each in to_all(trio, pod)]
        until_fast(lab, *flows)
        assert [each.lost() for each in flows] == [[]] * len(flows), "nor is anything lost when it becomes fast"
        with undisturbed(*steady):
            with dying(pod):
                since = moments(*flows)
                assert not set(pod.at.values()) & known(lab, "node1", trio.client.port)
                assert nothing_since(ear, since) == {}
            assert nothing_since(ear, since) == {}
        assert ear.latest, "it heard what came before"
        first = pod.at
        pod.add()
        assert pod.at != first
        until_fast(lab, stack.enter_context(Busy(trio.client.netns, pod.at[4], TCP)))
        assert nothing_since(ear, since) == {}, "what is sent to the address before is not for it"


def test_an_address_that_another_pod_has_now_leads_to_that_pod(lab: LabState, trio: Trio) -> None:
    """A client that goes on sending to the address, from the same port, reaches whoever has it, and nobody else."""
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(one_more(lab, "before"))
        ear = stack.enter_context(Ear(old.netns))
        stack.enter_context(Echo(old.netns))
        flow = stack.enter_context(Busy(trio.client.netns, old.at[4]))
        until_fast(lab, flow)
        old.delete()
        since = moments(flow)
        asking = {"runtimeConfig": {"ips": [f"{old.at[4]}"]}}
        new = stack.enter_context(one_more(lab, "after", config=asking))
        assert new.at[4] == old.at[4]
        heir = stack.enter_context(Echo(new.netns))
        wait(lambda: heir.latest.get(flow.number, 0) > 0, "the new pod to hear it")
        until_fast(lab, flow)
        assert nothing_since(ear, since) == {}


def test_a_pod_whose_namespace_went_without_a_del_is_forgotten(lab: LabState, trio: Trio) -> None:
    with contextlib.ExitStack() as stack:
        steady = trio.flows(stack)
        with containers(lab, "node1", "vanishes", 1) as (box,):
            pod = Pod(box)
            with Echo(pod.netns), Busy(trio.client.netns, pod.at[4]) as flow:
                until_fast(lab, flow)
            with undisturbed(*steady):
                on_node(lab, "node1", "ip", "link", "del", pod.port)
                gone = set(pod.at.values())
                wait(lambda: not gone & known(lab, "node1", trio.client.port), "it to be forgotten")
            pod.delete()


def test_pods_come_and_go_beside_connections_that_are_fast(lab: LabState, trio: Trio) -> None:
    """Whoever is there is known, and nobody else: a DEL that is answered has taken its pod out."""
    staying = {*trio.client.at.values(), *trio.near.at.values()}
    with contextlib.ExitStack() as stack:
        steady = trio.flows(stack)
        boxes = stack.enter_context(containers(lab, "node1", "storm", 12))
        with undisturbed(*steady):
            for seen in (False, True, False):
                made = at_once([partial(Pod, box) for box in boxes], 6)
                live = staying.union(*(pod.at.values() for pod in made))
                if seen:
                    wait(lambda live=live: known(lab, "node1", trio.client.port) == live, "all to be known")  # type: ignore[misc]
                at_once([pod.delete for pod in made], 6)
                assert known(lab, "node1", trio.client.port) == staying
            pod = Pod(boxes[0])
            wait(lambda: known(lab, "node1", trio.client.port) == {*staying, *pod.at.values()}, "it to be known")
            pod.delete()


# --- spoofs -------------------------------------------------------------------------------------------------------


def tcp(source: str, target: str, ports: tuple[int, int], data: bytes) -> bytes:
    """A segment in the middle of a connection, in its packet. Its checksum is left out: who hears it looks before."""
    return ip(source, target, 6, struct.pack("!HHIIBBHHH", *ports, 1, 1, 5 << 4, 0x18, 1024, 0, 0) + data)


def spoofs(liar: Pod, victim: Pod, target: Pod, mac: str, flows: Sequence[Busy]) -> list[bytes]:
    """Frames with the victim's address, its MAC, and both, on every connection that it has; numbers far ahead."""
    made = []
    for address, source in ((victim.at, liar.mac), (liar.at, victim.mac), (victim.at, victim.mac)):
        far_ahead = [message(each.number, 1 << 40) for each in flows]
        udp4, udp6, stream = far_ahead
        made += [
            ethernet(source, mac, IPV4, udp(address[4], target.at[4], udp4, PORT)),
            ethernet(source, mac, IPV6, udp(address[6], target.at[6], udp6, PORT)),
            ethernet(source, mac, IPV4, tcp(address[4], target.at[4], (flows[2].own_port, PORT), stream)),
        ]
    return made


def send(liar: Pod, frames: Sequence[bytes]) -> None:
    async def story() -> None:
        mouth = await raw(liar.netns)
        mouth.send(*frames)
        mouth.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("on", "to"),
    [("node1", "near"), ("node1", "far"), ("node2", "near")],
    ids=["within a node", "to another node", "from another node"],
)
def test_nobody_speaks_on_a_connection_of_another(lab: LabState, trio: Trio, on: str, to: str) -> None:
    """With the right ports of connections that are fast, also of the liar's own with another's MAC."""
    client, target = trio.client, trio.near if to == "near" else trio.far
    with contextlib.ExitStack() as stack:
        liar = stack.enter_context(one_more(lab, "liar", on))
        ear = stack.enter_context(Ear(target.netns))
        begin = [(client, 4, UDP), (client, 6, UDP), (client, 4, TCP), (liar, 4, UDP), (liar, 6, UDP)]
        flows = [
            stack.enter_context(Busy(pod.netns, target.at[family], kind, own_port=7001 if kind == UDP else 0))
            for pod, family, kind in begin
        ]
        until_fast(lab, *flows[:3])
        until_fast(lab, *flows[3:], at=[on])
        before = {reason: counted(lab, on, reason) for reason in ("address", "mac")}
        mac = target.mac if on == target.node else mac_of(ipaddress.ip_address(liar.gateway[4]))
        frames = spoofs(liar, client, target, mac, flows[:3])
        with undisturbed(*flows):
            send(liar, frames)
            send(liar, [ethernet(liar.mac, mac, IPV4, udp(liar.at[4], target.at[4], message(0, 1 << 40), PORT))])
            wait(lambda: 0 in ear.latest, "what it says as itself to arrive")
        assert nothing_since(ear, dict.fromkeys(flows, 1 << 39)) == {}
        now = {reason: counted(lab, on, reason) - before[reason] for reason in ("address", "mac")}
        assert (sum(now.values()), all(now.values())) == (len(frames), True), now


# --- who else decides ---------------------------------------------------------------------------------------------


def test_a_connection_that_an_operator_deletes_is_judged_again(lab: LabState, trio: Trio) -> None:
    """`conntrack -D`: the next packet goes the long way, past a rule that the operator has made, or through."""
    with Busy(trio.client.netns, trio.near.at[4]) as flow, Busy(trio.client.netns, trio.near.at[6], TCP) as other:
        until_fast(lab, flow, other)
        forget = ("conntrack", "-D", "-p", "udp", "--orig-port-src", str(flow.own_port))
        with undisturbed(flow, other):
            assert on_node(lab, "node1", *forget).returncode == 0
            until_fast(lab, flow)
        rule = f"udp sport {flow.own_port} drop"
        table = f"table inet operators {{ chain in {{ type filter hook forward priority -5; {rule}; }}; }}"
        with (
            Echo(trio.near.netns, PORT + 1) as echo,
            Busy(trio.client.netns, trio.near.at[4], own_port=7005, port=PORT + 1) as cut,
        ):
            until_fast(lab, cut)
            assert on_node(lab, "node1", "nft", table.replace(str(flow.own_port), "7005")).returncode == 0
            try:
                assert on_node(lab, "node1", *forget[:-1], "7005").returncode == 0
                since = moments(cut)
                assert nothing_since(echo, since) == {}
            finally:
                assert on_node(lab, "node1", "nft", "delete table inet operators").returncode == 0
            until_fast(lab, cut)


def test_a_port_of_the_node_leads_to_a_pod_and_back(lab: LabState, trio: Trio) -> None:
    """Its answers come from where they were asked, though both ends are pods that the fast path knows; who asks the
    pod itself, from the same port, is answered by the pod."""
    host = lab.node("node1").addresses[0]
    with one_more(lab, "served", config=HOST_PORT) as pod, Echo(pod.netns):
        for client, at in ((trio.client, "node1"), (trio.far, "node2")):
            with Busy(client.netns, pod.at[4], own_port=7010) as direct:
                until_fast(lab, direct, at=["node1", at])
                with Busy(client.netns, host, port=8080, own_port=7010) as by_port:
                    by_port.is_answered()
                    assert share(by_port, lambda: taken(lab, "node1")) < BARELY
                    with undisturbed(direct, by_port):
                        until_fast(lab, direct)
            with Busy(client.netns, host, port=8080, own_port=7011) as by_port:
                by_port.is_answered()
                with Busy(client.netns, pod.at[4], own_port=7011) as direct, undisturbed(by_port):
                    direct.is_answered()
                    assert share(by_port, lambda: taken(lab, "node1")) < BARELY
                    assert direct.lost(2) == []


# --- the daemon ---------------------------------------------------------------------------------------------------


def restart(
    lab: LabState, name: str, end: Callable[[LabState, str], None] = node.kill_daemon, **config: object
) -> None:
    """Ends a node's daemon, and starts it with this in its configuration."""
    end(lab, name)
    file = lab.files.node_path(name, "/etc/podwire") / "ipamd.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | config))
    node.start_daemon(lab, name)
    node.wait_daemon(lab, name)


@contextlib.contextmanager
def without_daemon(lab: LabState, name: str) -> Iterator[None]:
    """It was killed; there is the next one after the block."""
    node.kill_daemon(lab, name)
    try:
        yield
    finally:
        node.start_daemon(lab, name)
        node.wait_daemon(lab, name)


def until_answering(lab: LabState, name: str) -> None:
    """Returns when a node's daemon answers, ready or not."""
    wait(lambda: daemon_status(lab.files.ipamd_socket(name)) is not None, f"the daemon of {name}")


def ours(trio: Trio, name: str) -> dict[str, list[str]]:
    """The programs that a node has while these three pods are all."""
    pods = [each.port for each in (trio.client, trio.near, trio.far) if each.node == name]
    return {"pw-vxlan": ["podwire_arrival"], **{each: ["podwire_pod"] for each in pods}}


def test_connections_need_no_daemon_and_notice_none(lab: LabState, trio: Trio) -> None:
    """Killed, they go on as they were; with its lease run out they go the long way; and back with the next one."""
    with contextlib.ExitStack() as stack:
        flows = trio.flows(stack)
        with undisturbed(*flows):
            with without_daemon(lab, "node1"), Maps(lab, "node1", trio.client.port) as maps:
                for each in flows:
                    assert share(each, maps.taken) > 0.9, "nobody is needed for that"
                maps.expire()
                assert [share(each, maps.taken) for each in flows] == [0.0] * 4
            until_fast(lab, *flows)
            assert programs(lab, "node1") == ours(trio, "node1")
            restart(lab, "node1", node.stop_daemon)
            restart(lab, "node1")
            until_fast(lab, *flows)
            assert programs(lab, "node1") == ours(trio, "node1"), "one a link, whoever was there before"


@pytest.mark.slow
def test_what_a_daemon_has_left_ends_before_the_next_one_answers(lab: LabState, trio: Trio) -> None:
    """Without a fast path of its own it would tell the programs of the one before of no DEL."""
    with contextlib.ExitStack() as stack:
        flows = trio.flows(stack)
        pod = stack.enter_context(one_more(lab, "late"))
        ear = stack.enter_context(Ear(pod.netns))
        stack.enter_context(Echo(pod.netns))
        to_it = [stack.enter_context(Busy(*each)) for each in to_all(trio, pod)]
        until_fast(lab, *to_it)
        with undisturbed(*flows):
            restart(lab, "node1", fastPath=False)
            try:
                with dying(pod):
                    since = moments(*to_it)
                    assert nothing_since(ear, since) == {}
                wait(lambda: programs(lab, "node1") == {}, "nothing of it to be left on any link")
                assert status(lab, "node1").fast_path == "off: fastPath is false"
            finally:
                restart(lab, "node1", fastPath=True)
            until_fast(lab, *flows)


@pytest.mark.slow
def test_a_pod_whose_address_is_another_nodes_is_cut_off() -> None:
    """A node that had no etcd when it came back knows its pods, and that they are its own no more only later."""
    with quick_lab() as lab, contextlib.ExitStack() as stack:
        boxes = stack.enter_context(containers(lab, "node2", "fenced", 2))
        client, pod = (Pod(each) for each in boxes)
        ear, _ = stack.enter_context(Ear(pod.netns)), stack.enter_context(Echo(pod.netns))
        flow = stack.enter_context(Busy(client.netns, pod.at[4]))
        until_fast(lab, flow, at=["node2"])
        (cidr,) = [each.cidr for each in status(lab, "node2").blocks if "." in each.cidr]
        node.stop_daemon(lab, "node2")
        assert podwire_node(lab, "node1", "forget", "node2", "--yes").returncode == 0
        block = f"Block(cidr=ipaddress.ip_network('{cidr}'), pool='default', node='node9', node_id='9', generation=1)"
        etcd(lab, "node1", f"await session.put(root + 'blocks/{cidr}', encode({block}))")
        cluster.kill_etcd(lab, "etcd1")
        node.start_daemon(lab, "node2")
        until_answering(lab, "node2")
        until_fast(lab, flow, at=["node2"])
        cluster.start_etcd(lab)
        wait(lambda: any("are cut off" in each for each in status(lab, "node2").reasons), "node2 to see it")
        assert known(lab, "node2", client.port) == set()
        since = moments(flow)
        assert nothing_since(ear, since) == {}
