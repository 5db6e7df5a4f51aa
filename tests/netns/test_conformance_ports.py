"""Ports of the node and limits, three ways: Podwire alone, the reference's chain, and Podwire with the reference after
it, which then are both asked to do the same.

    podwire      podwire                                   does both itself
    reference    bridge (host-local) · portmap · bandwidth
    both         podwire · portmap · bandwidth             all three are told of ports and limits

A row that all three pass says what a runtime may expect; where they differ, the test says what.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from podwire.lab import node, process
from podwire.lab.cni import Attachment, CniError, Runtime, load_network
from podwire.lab.state import MARK, LabState
from tests.netns.conformance_fixtures import lab
from tests.netns.containers import Container, containers
from tests.netns.contenders import DEBIAN, KINDS, PATIENCE, Config, Contender
from tests.netns.hostport_fixtures import REFUSED, ask, running, serving
from tests.netns.node_fixtures import Netns
from tests.netns.test_bandwidth import STREAM

__all__ = ["lab"]

pytestmark = pytest.mark.skipif(not (DEBIAN / "portmap").exists(), reason="needs Debian's containernetworking-plugins")

PORTS, LIMITS = {"portMappings": True}, {"bandwidth": True}
REFERENCE: list[Config] = [{"type": "portmap", "capabilities": PORTS}, {"type": "bandwidth", "capabilities": LIMITS}]
OURS: Config = {"type": "podwire", "capabilities": PORTS | LIMITS}
MBIT = 1_000_000
TCP = {"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}
UDP = TCP | {"protocol": "udp"}


class Place(Netns):
    """A namespace of the lab."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.name = str(path), Path(path).name


@dataclass
class Way:
    """One of the three, on a node of the lab."""

    kind: str
    it: Contender
    runtime: Runtime
    folder: Path
    results: dict[str, dict[str, Any]]

    @property
    def node(self) -> Place:
        return Place(self.it.lab.netns(self.it.node))

    @property
    def address(self) -> str:
        return self.it.lab.node(self.it.node).addresses[0]

    def add(self, box: Container, ports: list[Config] | None = None, limits: Config | None = None) -> str:
        """Attaches the container and returns its address."""
        self.results[box.name] = asyncio.run(self.runtime.add(about(box, ports, limits)))
        return str(self.results[box.name]["ips"][0]["address"].split("/")[0])

    def delete(self, box: Container, ports: list[Config] | None = None, limits: Config | None = None) -> None:
        asyncio.run(self.runtime.delete(about(box, ports, limits), self.results.get(box.name)))

    async def check(self, box: Container, limits: Config | None = None) -> None:
        """Every plugin in order but portmap: that of Debian 12 looks for IPv6 rules of a pod without IPv6."""
        network = load_network(self.folder)
        for plugin in network.plugins:
            if plugin["type"] != "portmap":
                await self.runtime._execute("CHECK", network, plugin, about(box, None, limits), self.results[box.name])

    def left(self) -> set[str]:
        """What is on the node: ifb devices, queues, elements, rules that name a pod."""
        links = {line.split()[0] for line in self.it.on_node("ip", "-br", "link").splitlines()}
        nft = self.it.on_node("nft", "list", "ruleset")
        rules = re.findall(r".*(?:18080|dport 1808\d).*", nft + self.it.on_node("iptables-save"))
        return {each for each in links if each.startswith(("pwi", "pwe", "bwp", "ifb"))} | set(rules)


def about(box: Container, ports: list[Config] | None, limits: Config | None) -> Attachment:
    capabilities: list[tuple[str, Any]] = []
    if ports is not None:
        capabilities.append(("portMappings", ports))
    if limits is not None:
        capabilities.append(("bandwidth", limits))
    return Attachment(container_id=box.name, netns=box.netns, capabilities=tuple(capabilities))


@pytest.fixture(scope="module")
def bin_dirs(lab: LabState) -> dict[str, Path]:
    """Each node's plugin folder, with Debian's beside ours."""
    folders = {name: lab.files.node_path(name, "/opt/cni/bin") for name in ("node1", "node2")}
    for folder in folders.values():
        for plugin in ("portmap", "bandwidth", "bridge", "host-local"):
            (folder / plugin).symlink_to(DEBIAN / plugin)
    return folders


THE_REFERENCE = pytest.param("reference", marks=pytest.mark.slow)
alone = pytest.mark.parametrize("way", ["podwire", THE_REFERENCE], indirect=True)
"""For what the first plugin refuses, so that those after it are not asked."""


@pytest.fixture(params=["podwire", "both", THE_REFERENCE])
def way(request: pytest.FixtureRequest, lab: LabState, bin_dirs: dict[str, Path], tmp_path: Path) -> Iterator[Way]:
    made, name = KINDS["reference" if request.param == "reference" else "podwire"]
    it = made(lab, name, "1.0.0")
    first = it.plain() if request.param == "reference" else OURS
    listed = {"cniVersion": "1.0.0", "name": "ports", "plugins": [first, *REFERENCE]}
    if request.param == "podwire":
        listed["plugins"] = [OURS]
    (tmp_path / "10-ports.conflist").write_text(json.dumps(listed))
    runtime = Runtime(node.enter_command(lab, name), bin_dirs[name], tmp_path, {MARK: lab.name})
    chosen = Way(request.param, it, runtime, tmp_path, {})
    before = it.held(), chosen.left()
    yield chosen
    it.wait_held(before[0])
    assert chosen.left() == before[1]


@pytest.fixture
def boxes(way: Way) -> Iterator[list[Container]]:
    with containers(way.it.lab, way.it.node, "box", 3) as made:
        yield made
        for box in made:  # what a failed test has left would fail the others
            way.delete(box, [TCP, UDP], SIDES["both"])


def test_a_port_of_the_node_leads_to_the_container(way: Way, boxes: list[Container], lab: LabState) -> None:
    web, other = boxes[:2]
    mine, theirs = way.add(web, [TCP, UDP]), way.add(other)
    gateway = way.results[web.name]["ips"][0]["gateway"]
    outside = Place(lab.netns("outside"))
    source = outside.json("route", "get", way.address)[0]["prefsrc"]
    with serving(Place(web.netns), "web", 80):
        seen = {
            "outside": ask(outside, way.address, 18080),
            "outside, by UDP": ask(outside, way.address, 18080, "udp"),
            "the node": ask(way.node, way.address, 18080),
            "the node, at localhost": ask(way.node, "127.0.0.1", 18080),
            "another container": ask(Place(other.netns), way.address, 18080),
            "the container itself": ask(Place(web.netns), way.address, 18080),
        }
    own = {"outside": source, "outside, by UDP": source}
    own["another container"] = theirs if way.kind == "podwire" else gateway  # portmap masquerades its whole network
    assert {name: said.split()[0] for name, said in seen.items()} == dict.fromkeys(seen, "web")
    assert {name: seen[name].split()[1] for name in own} == own, "the source is what it was"
    assert seen["the node, at localhost"].split()[1] == gateway
    assert mine not in seen["the container itself"], "its answer has to come by the node"
    for box in (web, other):
        way.delete(box, [TCP, UDP])


def test_a_mapping_of_one_address_is_of_that_address(way: Way, boxes: list[Container], lab: LabState) -> None:
    ports = [TCP | {"hostIP": "127.0.0.1"}]
    way.add(boxes[0], ports)
    with serving(Place(boxes[0].netns), "web", 80):
        assert ask(way.node, "127.0.0.1", 18080).startswith("web ")
        assert ask(Place(lab.netns("outside")), way.address, 18080) == REFUSED
    way.delete(boxes[0], ports)


def test_the_next_container_has_the_port_at_once(way: Way, boxes: list[Container], lab: LabState) -> None:
    """By UDP from one and the same port, too, which conntrack would keep with the container that is gone. The reference
    forgets that only for the next one."""
    outside, ports = Place(lab.netns("outside")), [TCP, UDP]
    for box in boxes[:2]:
        way.add(box, ports)
        with serving(Place(box.netns), box.name, 80):
            assert ask(outside, way.address, 18080).split()[0] == box.name
            assert ask(outside, way.address, 18080, "udp", source=5555).split()[0] == box.name
        way.delete(box, ports)
        assert ask(outside, way.address, 18080) == REFUSED
        if way.kind != "reference":
            assert ask(outside, way.address, 18080, "udp", source=5555) == REFUSED


def test_del_may_come_again_and_at_once(way: Way, boxes: list[Container]) -> None:
    """At once Debian's portmap fails: it makes a chain in order to delete it."""
    way.add(boxes[0], [TCP], {"ingressRate": 8 * MBIT, "ingressBurst": MBIT})
    with ThreadPoolExecutor(4 if way.kind == "podwire" else 1) as threads:
        for done in [threads.submit(way.delete, boxes[0], [TCP]) for _ in range(4)]:
            done.result()
    way.delete(boxes[0], [TCP])


WRONG_PORTS: dict[str, list[Config]] = {
    "no container port": [{"hostPort": 18080, "protocol": "tcp"}],
    "no host port": [{"containerPort": 80, "protocol": "tcp"}],
    "a negative port": [TCP | {"hostPort": -1}],
    "no list": [{"hostPort": "18080"}],
}


@alone
@pytest.mark.parametrize("ports", WRONG_PORTS.values(), ids=WRONG_PORTS.keys())
def test_an_ill_formed_mapping_is_an_error(way: Way, boxes: list[Container], ports: list[Config]) -> None:
    with pytest.raises(CniError) as caught:
        way.add(boxes[0], ports)
    assert way.kind == "reference" or caught.value.code == 7
    way.delete(boxes[0])


def test_a_port_that_is_another_containers_is_refused(way: Way, boxes: list[Container], lab: LabState) -> None:
    """The reference lets the later one have no connections, and says nothing."""
    ports = [TCP]
    way.add(boxes[0], ports)
    if way.kind == "reference":
        way.add(boxes[1], ports)
    else:
        with pytest.raises(
            CniError, match=rf"port 18080/tcp of this node is taken by container {boxes[0].name}"
        ) as caught:
            way.add(boxes[1], ports)
        assert caught.value.code == 105
    way.delete(boxes[1], ports)
    with serving(Place(boxes[0].netns), "first", 80):
        assert ask(Place(lab.netns("outside")), way.address, 18080).startswith("first ")
    way.delete(boxes[0], ports)


# --- limits -------------------------------------------------------------------------------------------------------


SIDES: dict[str, Config] = {
    "both": {"ingressRate": 80 * MBIT, "ingressBurst": 4 * MBIT, "egressRate": 40 * MBIT, "egressBurst": 4 * MBIT},
    "to the container": {"ingressRate": 80 * MBIT, "ingressBurst": 4 * MBIT},
    "from the container": {"egressRate": 40 * MBIT, "egressBurst": 4 * MBIT},
}


@pytest.mark.parametrize("limits", SIDES.values(), ids=SIDES.keys())
def test_a_container_is_as_fast_as_it_may_be(way: Way, boxes: list[Container], limits: Config) -> None:
    limited, other = boxes[:2]
    addresses = {limited: way.add(limited, None, limits), other: way.add(other)}
    size = 2 << 20
    for source, sink, rate in ((other, limited, "ingressRate"), (limited, other, "egressRate")):
        with running(Place(sink.netns), STREAM, "receive"):
            began = time.monotonic()
            Place(source.netns).run("python3", "-IS", "-c", STREAM, addresses[sink], str(size))
            taken = time.monotonic() - began
        if rate in limits:
            assert taken > (8 * size - 4 * MBIT) / limits[rate]
    asyncio.run(way.check(limited, limits))
    way.delete(limited, None, limits)
    way.delete(other)


def test_check_sees_a_limit_that_is_gone(way: Way, boxes: list[Container]) -> None:
    """The reference looks at the queues that there are, and not for those that there should be."""
    way.add(boxes[0], None, SIDES["to the container"])
    asyncio.run(way.check(boxes[0], SIDES["to the container"]))
    host = way.it.host_end(way.results[boxes[0].name])["name"]
    device = host if way.kind == "reference" else f"pwi{host[2:]}"
    way.it.on_node("tc", "qdisc", "del", "dev", device, "root")
    if way.kind != "reference":
        with pytest.raises(
            CniError, match=f"{device}, which limits packets to the pod, is gone or has no token bucket"
        ):
            asyncio.run(way.check(boxes[0], SIDES["to the container"]))
    way.delete(boxes[0], None, SIDES["to the container"])


WRONG_LIMITS: dict[str, Config] = {
    "a rate without a burst": {"ingressRate": MBIT},
    "a burst without a rate": {"egressBurst": MBIT},
    "a burst of 4 GB": {"ingressRate": MBIT, "ingressBurst": 8 * ((1 << 32) - 1)},
}


@alone
@pytest.mark.parametrize("limits", WRONG_LIMITS.values(), ids=WRONG_LIMITS.keys())
def test_an_ill_formed_limit_is_an_error(way: Way, boxes: list[Container], limits: Config) -> None:
    with pytest.raises(CniError) as caught:
        way.add(boxes[0], None, limits)
    assert way.kind == "reference" or caught.value.code == 7
    way.delete(boxes[0])


def test_limits_may_stand_in_the_configuration_itself(way: Way, boxes: list[Container]) -> None:
    """Then the runtime's do not count."""
    conflist = way.folder / "10-ports.conflist"
    listed = json.loads(conflist.read_text())
    listed["plugins"][-1] |= SIDES["to the container"]
    conflist.write_text(json.dumps(listed))
    way.add(boxes[0], None, {"egressRate": 40 * MBIT, "egressBurst": 4 * MBIT})
    shown = way.it.on_node("tc", "qdisc", "show")
    assert "rate 80Mbit" in shown
    assert ("rate 40Mbit" in shown) == (way.kind == "both"), "there Podwire is asked by the runtime alone"
    way.delete(boxes[0], None, {"egressRate": 40 * MBIT, "egressBurst": 4 * MBIT})
    process.wait_for(lambda: "tbf" not in way.it.on_node("tc", "qdisc", "show"), PATIENCE, "the queues to go")
