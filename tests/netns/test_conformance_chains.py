"""Podwire in a list with Debian's plugins after it, as runtimes run them: results handed on, effects there, all undone.

The chain is the one that distributions write: portmap, bandwidth, firewall, tuning. What each makes of Podwire's result
is looked at where it takes effect: a port of the node that answers, a queue on the wire, a rule, a setting in the
container.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from podwire.lab import node, process, topology
from podwire.lab.cni import Attachment, CniError, Runtime, load_network
from podwire.lab.state import MARK, LabState
from tests.netns.conformance_fixtures import box, it, lab
from tests.netns.containers import Container
from tests.netns.contenders import DEBIAN, DEBIAN_VERSIONS, PATIENCE, Config, Contender

__all__ = ["box", "it", "lab"]

pytestmark = pytest.mark.skipif(not (DEBIAN / "portmap").exists(), reason="needs Debian's containernetworking-plugins")

MAC = "02:00:00:00:00:42"
HOST_PORT = 18080
SERVE = "import socket; s=socket.create_server(('', 80)); print(flush=True)\nwhile True: s.accept()[0].sendall(b'pod')"
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 60).recv(9).decode())"


@pytest.fixture(scope="module")
def bin_dir(lab: LabState) -> Path:
    """The node's plugin folder, with Debian's beside ours."""
    folder = lab.files.node_path("node1", "/opt/cni/bin")
    for name in ("portmap", "bandwidth", "firewall", "tuning", "ptp", "host-local"):
        (folder / name).symlink_to(DEBIAN / name)
    return folder


versions = pytest.mark.parametrize(
    "it", [pytest.param(("podwire", version), id=version) for version in DEBIAN_VERSIONS], indirect=True
)


def plugins(lab: LabState) -> dict[str, Config]:
    """The entries of a list, by name."""
    data = lab.files.node_path("node1", "/var/lib/cni") / "tuning"
    return {
        "podwire": {"type": "podwire", "capabilities": {"ips": True, "mac": True}},
        "portmap": {"type": "portmap", "capabilities": {"portMappings": True}},
        "bandwidth": {
            "type": "bandwidth",
            "ingressRate": 800_000_000,
            "ingressBurst": 80_000_000,
            "egressRate": 800_000_000,
            "egressBurst": 80_000_000,
        },
        "firewall": {"type": "firewall", "backend": "iptables"},
        "tuning": {"type": "tuning", "mac": MAC, "sysctl": {"net.core.somaxconn": "500"}, "dataDir": str(data)},
    }


def runtime(it: Contender, folder: Path, bin_dir: Path, *names: str) -> Runtime:
    """A runtime on the node whose list has these plugins."""
    entries = plugins(it.lab)
    listed = {"cniVersion": it.version, "name": "chained", "plugins": [entries.get(n, {"type": n}) for n in names]}
    folder.joinpath("10-chained.conflist").write_text(json.dumps(listed))
    return Runtime(node.enter_command(it.lab, it.node), bin_dir, folder, {MARK: it.lab.name})


def attachment(box: Container) -> Attachment:
    mapping = [{"hostPort": HOST_PORT, "containerPort": 80, "protocol": "tcp"}]
    return Attachment(container_id=box.name, netns=box.netns, capabilities=(("portMappings", mapping), ("mac", MAC)))


async def check(runtime: Runtime, folder: Path, about: Attachment, result: Mapping[str, Any]) -> None:
    """What a runtime does for CHECK: every plugin in order gets the result of the whole list.

    Without portmap: that of Debian 12 looks for IPv6 rules of a container that has no IPv6, whoever comes before it.
    """
    network = load_network(folder)
    for plugin in network.plugins:
        if plugin["type"] != "portmap":
            await runtime._execute("CHECK", network, plugin, about, result)


def answers(lab: LabState, box: Container) -> bool:
    """Whether a server in the container is reached from outside at the node's port."""
    server = box.start("python3", "-IS", "-c", SERVE)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        ask = ["python3", "-IS", "-c", ASK, lab.node("node1").addresses[0], str(HOST_PORT)]
        return topology.run(["nsenter", f"--net={lab.netns('outside')}", "--", *ask]).strip() == "pod"
    finally:
        server.kill()
        server.communicate()


def rules(it: Contender) -> set[str]:
    """The iptables rules of the node, that of chains and plugins' own scaffolding left out."""
    saved = it.on_node("iptables-save").splitlines()
    return {line for line in saved if line.startswith("-A") and ("10.244." in line or "chained" in line)}


@versions
def test_everything_that_is_chained_takes_effect_and_goes(
    it: Contender, bin_dir: Path, box: Container, tmp_path: Path
) -> None:
    names = ["podwire", "portmap", "bandwidth", "tuning"]
    if it.version != "0.3.1":
        names.insert(3, "firewall")  # which does not speak 0.3.1
    listed, about = runtime(it, tmp_path, bin_dir, *names), attachment(box)
    before = (it.held(), it.on_node("ip", "-br", "link", "show", "type", "ifb"), rules(it))
    result = asyncio.run(listed.add(about))
    host, container = result["interfaces"][:2]
    assert (container["name"], container["sandbox"], container["mac"]) == ("eth0", box.netns, MAC)
    assert (result["ips"][0]["interface"], result["routes"][0]["dst"]) == (1, "0.0.0.0/0")
    address = result["ips"][0]["address"].split("/")[0]
    assert answers(it.lab, box), "portmap"
    assert "tbf" in it.on_node("tc", "qdisc", "show", "dev", host["name"]), "bandwidth, towards the container"
    assert "ingress" in it.on_node("tc", "qdisc", "show", "dev", host["name"]), "bandwidth, from it"
    accepted = any(f"-d {address}/32" in rule and "-j ACCEPT" in rule for rule in rules(it))
    assert accepted == ("firewall" in names)
    assert box.run("cat", "/proc/sys/net/core/somaxconn").stdout.strip() == "500", "tuning"
    assert MAC in box.run("ip", "link", "show", "dev", "eth0").stdout, "tuning"
    if it.version != "0.3.1":
        asyncio.run(check(listed, tmp_path, about, result))
    asyncio.run(listed.delete(about, result))
    it.wait_held(before[0])
    assert (it.held(), it.on_node("ip", "-br", "link", "show", "type", "ifb"), rules(it)) == before
    asyncio.run(listed.delete(about, result))


@pytest.mark.parametrize("it", [("podwire", "1.0.0")], indirect=True)
def test_a_mac_that_tuning_changes_cuts_the_pod_off_and_check_says_so(
    it: Contender, bin_dir: Path, box: Container, tmp_path: Path
) -> None:
    """Podwire has answered when tuning sets it. Asked for by the capability, as above, it is Podwire's own, too."""
    before, about = it.held(), Attachment(container_id=box.name, netns=box.netns)
    listed = runtime(it, tmp_path, bin_dir, "podwire", "tuning")
    result = asyncio.run(listed.add(about))
    assert result["interfaces"][1]["mac"] == MAC
    gateway = result["ips"][0]["gateway"]
    assert box.run("ping", "-n", "-c", "1", "-W", "1", gateway).returncode != 0
    assert "counter packets 0" not in it.on_node("nft", "list", "counter", "bridge", "podwire", "dropped_mac")
    with pytest.raises(CniError, match="bound to the MAC of its ADD") as caught:
        asyncio.run(check(listed, tmp_path, about, result))
    assert caught.value.code == 103
    asyncio.run(listed.delete(about, result))
    it.wait_held(before)


@pytest.mark.parametrize("plugin", ["portmap", "bandwidth"])
@versions
def test_a_plugin_that_only_looks_hands_the_result_on_as_it_is(
    it: Contender, bin_dir: Path, box: Container, tmp_path: Path, plugin: str
) -> None:
    before, about = it.held(), attachment(box)
    ours = it.add(box, it.config(name="chained", dns={"nameservers": ["10.96.0.10"]}))
    it.delete(box, it.config(name="chained"))
    listed = runtime(it, tmp_path, bin_dir, "podwire", plugin)
    result = asyncio.run(listed.add(about))
    shape = {"cniVersion", "interfaces", "ips", "routes"}
    assert shape <= result.keys() <= shape | {"dns"}
    assert [each["name"] for each in result["interfaces"]][1:2] == ["eth0"]
    assert result["interfaces"][1].keys() == ours["interfaces"][1].keys()
    assert result["ips"][0].keys() == ours["ips"][0].keys()
    assert result["routes"] == ours["routes"]
    asyncio.run(listed.delete(about, result))
    it.wait_held(before)


@pytest.mark.parametrize("it", [("podwire", "1.0.0")], indirect=True)
def test_a_chain_that_fails_after_us_is_undone_by_its_del(
    it: Contender, bin_dir: Path, box: Container, tmp_path: Path
) -> None:
    """A runtime calls DEL of every plugin, without a result, once one of them has failed."""
    before, about = it.held(), attachment(box)
    broken = runtime(it, tmp_path, bin_dir, "podwire", "tuning")
    listed = json.loads((tmp_path / "10-chained.conflist").read_text())
    listed["plugins"][1]["sysctl"] = {"net.no.such": "1"}
    (tmp_path / "10-chained.conflist").write_text(json.dumps(listed))
    with pytest.raises(CniError, match="tuning"):
        asyncio.run(broken.add(about))
    assert it.held() != before
    asyncio.run(runtime(it, tmp_path, bin_dir, "podwire", "portmap").delete(about, None))
    it.wait_held(before)
    assert box.links() == {"lo"}


@versions
def test_podwire_after_another_plugin_is_refused(it: Contender, bin_dir: Path, box: Container, tmp_path: Path) -> None:
    """In so many words, and without touching what the first one made."""
    before, about = it.held(), attachment(box)
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.98.0.0/24"}]], "dataDir": str(tmp_path / "ptp")}
    listed = runtime(it, tmp_path, bin_dir, "ptp", "podwire")
    conflist = json.loads((tmp_path / "10-chained.conflist").read_text())
    conflist["plugins"][0]["ipam"] = ipam
    (tmp_path / "10-chained.conflist").write_text(json.dumps(conflist))
    with pytest.raises(CniError, match=r"podwire: prevResult is given.*it comes first") as caught:
        asyncio.run(listed.add(about))
    assert caught.value.code == 2
    assert it.held() == before
    assert "10.98.0." in box.run("ip", "-br", "-4", "address", "show", "dev", "eth0").stdout
    asyncio.run(listed.delete(about, None))
    process.wait_for(lambda: box.links() == {"lo"}, PATIENCE, "what the first plugin made to go")
