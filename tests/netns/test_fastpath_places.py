"""How the fast path's programs get to ports and go from there: by a filter, or by TCX, and nobody loses a packet by it.

    last      the port of a pod that no plugin follows: its place for filters (clsact) is made with it
    beside    that of any other: its program comes by TCX, one port a round, and no place is ever made

node1 of the lab takes pods as soon as it can, node2 never takes one that another plugin may follow. What one round does
is told in test_fastpath_rounds.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from podwire.bpf import tcx
from podwire.lab import cluster, node
from podwire.lab.cni import Attachment, Runtime, load_network
from podwire.lab.state import MARK, LabState, plan_nodes
from tests.netns.busy_flows import DUAL, Pod, inside, taken
from tests.netns.containers import CONFIG, containers, know_each_other, on_node, status, wait
from tests.netns.contenders import DEBIAN
from tests.netns.fast_kernel import Maps, programs
from tests.netns.lab_fixtures import fresh_name
from tests.netns.steady_udp import steady
from tests.netns.test_fastpath_holds import restart

LAST = {"last": True}
LIMITS = {"bandwidth": dict.fromkeys(("ingressRate", "ingressBurst", "egressRate", "egressBurst"), 80_000_000)}
FROM_POD, ARRIVING = "podwire_pod", "podwire_arrival"
HOUR = 3600.0


# --- daemons ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    state = LabState(name=fresh_name(), nodes=plan_nodes(2, DUAL), pod_cidr=DUAL)
    plain = node.daemon_config
    after = {"node1": 0.0, "node2": HOUR}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            node, "daemon_config", lambda lab, of: plain(lab, of) | {"fastPathAfter": after[of.name], "cooldown": 0.0}
        )
        try:
            made = know_each_other(cluster.up(state))
            wait(lambda: all("pw-vxlan" in programs(made, each) for each in after), "the first rounds")
            yield made
        finally:
            cluster.down(state.name)


@contextlib.contextmanager
def added(lab: LabState, on: str, name: str, *configs: dict[str, Any]) -> Iterator[list[Pod]]:
    """A pod for each of these, deleted at the end."""
    with containers(lab, on, name, len(configs)) as boxes:
        try:
            yield [Pod(box, config) for box, config in zip(boxes, configs, strict=True)]
        finally:
            for box in boxes:
                assert box.call("DEL").code == 0


def queues(lab: LabState, on: str, device: str) -> set[str]:
    """The kinds of an interface's queueing disciplines."""
    done = on_node(lab, on, "tc", "qdisc", "show", "dev", device)
    assert done.returncode == 0, done.stderr
    return {line.split()[1] for line in done.stdout.splitlines()}


def known(lab: LabState, on: str) -> set[str]:
    """The addresses that the programs of a node know."""
    with Maps(lab, on, "pw-vxlan") as maps:
        return maps.pods()


def test_a_pod_that_nothing_follows_need_not_wait(lab: LabState) -> None:
    """Where any other would wait for an hour."""
    limited = LAST | {"runtimeConfig": LIMITS}
    with added(lab, "node2", "last", LAST, {}, limited) as (last, other, slow):
        assert [sorted(queues(lab, "node2", each.port)) for each in (last, other)] == [
            ["clsact", "noqueue"],
            ["noqueue"],
        ]
        assert "clsact" not in queues(lab, "node2", slow.port)
        assert queues(lab, "node2", "pw-vxlan") == {"noqueue", "clsact"}
        wait(lambda: known(lab, "node2") == set(last.at.values()), "it to be known, and it alone")
        assert programs(lab, "node2") == {"pw-vxlan": [ARRIVING], last.port: [FROM_POD]}
        assert status(lab, "node2").fast_path == "on: 1 pods"
        previous = last.box.call("ADD", CONFIG | LAST)
        assert previous.code != 0, "it is there already"
        checked = last.box.call("CHECK", CONFIG | LAST | {"prevResult": result_of(last)})
        assert checked.code == 0, checked.body
        last.delete()
        assert known(lab, "node2") == set()
        last.add(LAST)
        assert "clsact" in queues(lab, "node2", last.port)
        wait(lambda: known(lab, "node2") == set(last.at.values()), "it to be known again")
    assert status(lab, "node2").fast_path.startswith("on: ")


def result_of(pod: Pod) -> dict[str, Any]:
    """What its ADD has returned, as far as CHECK asks."""
    ips = [{"address": each["address"], "gateway": each["gateway"]} for each in pod_addresses(pod)]
    interfaces = [{"name": pod.port}, {"name": "eth0", "mac": pod.mac, "sandbox": pod.netns}]
    return {"cniVersion": "1.1.0", "interfaces": interfaces, "ips": ips}


def pod_addresses(pod: Pod) -> list[dict[str, str]]:
    shown = json.loads(pod.box.run("ip", "-j", "address", "show", "dev", "eth0").stdout)
    lengths = {each["local"]: each["prefixlen"] for each in shown[0]["addr_info"]}
    return [{"address": f"{at}/{lengths[at]}", "gateway": pod.gateway[family]} for family, at in pod.at.items()]


@pytest.mark.skipif(not (DEBIAN / "bandwidth").exists(), reason="needs Debian's containernetworking-plugins")
def test_a_plugin_that_follows_late_has_the_port_to_itself(lab: LabState, tmp_path: Path) -> None:
    """The reference `bandwidth`, which makes an ingress queue where no other may be, comes when the pod is known."""
    bin_dir = lab.files.node_path("node1", "/opt/cni/bin")
    (bin_dir / "bandwidth").symlink_to(DEBIAN / "bandwidth")
    plugins = [{"type": "podwire"}, {"type": "bandwidth", **LIMITS["bandwidth"]}]
    listed = {"cniVersion": "1.0.0", "name": "chained", "plugins": plugins}
    tmp_path.joinpath("10-chained.conflist").write_text(json.dumps(listed))
    runtime = Runtime(node.enter_command(lab, "node1"), bin_dir, tmp_path, {MARK: lab.name})
    network = load_network(tmp_path)
    with containers(lab, "node1", "chained", 1) as (box,):
        about, result = Attachment(container_id=box.name, netns=box.netns), None
        try:
            result = asyncio.run(runtime._execute("ADD", network, network.plugins[0], about, None))
            (port,) = (each["name"] for each in result["interfaces"] if "sandbox" not in each)
            addresses = {each["address"].split("/")[0] for each in result["ips"]}
            wait(lambda: addresses <= known(lab, "node1"), "the pod to be known")
            assert (programs(lab, "node1")[port], queues(lab, "node1", port)) == ([FROM_POD], {"noqueue"})
            result = asyncio.run(runtime._execute("ADD", network, network.plugins[1], about, result))
            assert queues(lab, "node1", port) == {"tbf", "ingress"}
            wait(lambda: not addresses & known(lab, "node1"), "it to be known no more")
            assert f"{port}: it has a queueing discipline of somebody else (" in status(lab, "node1").fast_path
        finally:
            asyncio.run(runtime.delete(about, result))
    assert "ifb" not in on_node(lab, "node1", "ip", "-br", "link", "show", "type", "ifb").stdout


def numbers(lab: LabState, on: str) -> set[int]:
    """The kernel's numbers of the programs that run on a node."""
    found = set[int]()
    for link in programs(lab, on):
        shown = on_node(lab, on, "tc", "-j", "filter", "show", "dev", link, "ingress").stdout
        found |= {int(number) for number in re.findall(r'"prog":\{"id":(\d+)', shown)}
        found |= inside(lab.netns(on), lambda link=link: set(tcx.programs(socket.if_nametoindex(link), tcx.Way.IN)))  # type: ignore[misc]
    return found


def connected(stack: contextlib.ExitStack, here: Pod, there: Pod, family: int) -> tuple[socket.socket, socket.socket]:
    """A client, and the server that it is connected to."""
    kind = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
    server, client = (
        stack.enter_context(inside(each.netns, lambda: socket.socket(kind, socket.SOCK_DGRAM)))
        for each in (there, here)
    )
    server.bind((there.at[family], 0))
    client.connect(server.getsockname()[:2])
    return client, server


@pytest.mark.slow
def test_no_packet_is_lost_whatever_becomes_of_programs(lab: LabState) -> None:
    """Pods of both kinds become known, daemons come and go, the node changes, and nobody wants a fast path any more."""
    stream = "net.netfilter.nf_conntrack_udp_timeout_stream"

    def runs_fast() -> None:
        before = taken(lab, "node1")
        wait(lambda: taken(lab, "node1") > before + 5000, "thousands of packets to be fast")

    with (
        added(lab, "node2", "far", LAST) as (far,),
        added(lab, "node1", "near", LAST, {}, LAST, {}) as pods,
        contextlib.ExitStack() as stack,
    ):
        one, two, three, four = pods
        ways = [(one, two, 4), (four, three, 6), (two, far, 6), (far, one, 4), (three, four, 4)]
        both = {each.port: [FROM_POD] for each in pods} | {"pw-vxlan": [ARRIVING]}
        with steady([connected(stack, *way) for way in ways]) as traffic:
            wait(lambda: programs(lab, "node1") == both, "all to be known")
            runs_fast()
            assert ["clsact" in queues(lab, "node1", each.port) for each in pods] == [True, False, True, False]
            traffic.phase("the daemon ends and another begins")
            restart(lab, "node1", node.stop_daemon)
            runs_fast()
            traffic.phase("it is killed")
            restart(lab, "node1", node.kill_daemon)
            runs_fast()
            traffic.phase("the node changes")
            old = numbers(lab, "node1")
            assert on_node(lab, "node1", "sysctl", "-qw", f"{stream}=77").returncode == 0
            wait(lambda: not old & numbers(lab, "node1"), "other programs to be there")
            runs_fast()
            assert programs(lab, "node1") == both, "one for each"
            traffic.phase("nobody wants it")
            restart(lab, "node1", node.stop_daemon, fastPath=False)
            try:
                wait(lambda: programs(lab, "node1") == {}, "none to be left")
                with added(lab, "node1", "plain", LAST) as (plain,):
                    assert "clsact" not in queues(lab, "node1", plain.port)
                traffic.phase("somebody wants it again")
            finally:
                restart(lab, "node1", node.stop_daemon, fastPath=True)
            wait(lambda: programs(lab, "node1") == both, "all to be known again")
            runs_fast()
            assert traffic.lost() == {}
