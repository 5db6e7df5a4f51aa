"""The lab's runtime against plugins that are not ours: Debian's, chained, with previous results and capabilities."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from podwire.errors import PodwireError
from podwire.lab import names, node, process, topology
from podwire.lab.cni import Attachment, CniError, Runtime, result_addresses
from podwire.lab.sandbox import Sandbox
from podwire.lab.state import MARK, LabState
from tests.netns.lab_fixtures import pod

DEBIAN = Path("/usr/lib/cni")
CHAIN = {
    "cniVersion": "1.0.0",
    "name": "reference",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "ref0",
            "isGateway": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]]},
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}

pytestmark = pytest.mark.skipif(not (DEBIAN / "portmap").exists(), reason="needs Debian's containernetworking-plugins")


@pytest.fixture
def container(lab: LabState) -> Iterator[Attachment]:
    """A container in a namespace of its own, which asks for a host port."""
    name = names.namespace(lab.name, "pod.test.reference")
    topology.run(["ip", "netns", "add", name])
    mapping = [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]
    yield Attachment(
        container_id=secrets.token_hex(32),
        netns=str(names.netns_path(name)),
        args=(("IgnoreUnknown", "1"), ("K8S_POD_NAME", "reference")),
        capabilities=(("portMappings", mapping), ("bandwidth", {"ingressRate": 1})),
    )
    topology.delete_namespaces([name])


def runtime(lab: LabState, conf_dir: Path, chain: Mapping[str, object]) -> Runtime:
    """Node 3 with Debian's plugins; `conf_dir` is the machine's, which the node sees."""
    conf_dir.joinpath("10-reference.conflist").write_text(json.dumps(chain))
    conf_dir.joinpath("20-later.conflist").write_text("never read")
    return Runtime(node.enter_command(lab, "node3"), DEBIAN, conf_dir, {MARK: lab.name})


@pytest.mark.skipif(shutil.which("iptables") is None, reason="needs iptables, which portmap runs")
def test_a_chain_hands_results_on_and_is_undone_in_reverse(
    lab: LabState, container: Attachment, tmp_path: Path
) -> None:
    reference = runtime(lab, tmp_path, CHAIN)
    inside = Path(container.netns).name
    result = asyncio.run(reference.add(container))
    assert [name.rsplit(".", 1)[0] for name in result_addresses(result)] == ["10.99.0"]
    shown = json.loads(topology.run(["ip", "-n", inside, "-j", "-4", "address", "show", "eth0"]))
    assert shown[0]["addr_info"][0]["local"] == result_addresses(result)[0]
    # portmap knows the address by the result of the plugin before it, and the port by the capability.
    rules = [*node.enter_command(lab, "node3"), "iptables-save", "-t", "nat"]
    assert f"--to-destination {result_addresses(result)[0]}:80" in topology.run(rules)
    asyncio.run(reference.delete(container, result))
    assert "18080" not in topology.run(rules)
    assert [link["ifname"] for link in json.loads(topology.run(["ip", "-n", inside, "-j", "link"]))] == ["lo"]


def test_a_pods_network_goes_though_its_processes_outlive_the_first_attempt(
    lab: LabState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stalls may take longer to end them than is waited for: the pod must not stay for good."""
    torn = pod("torn", nodeName="node1")
    torn["metadata"]["uid"] = "torn"
    said: list[tuple[str, str]] = []
    kill_all, tried = process.kill_all, []

    def too_slow_once(*arguments: Any) -> None:
        tried.append(arguments)
        if len(tried) == 1:
            raise PodwireError("waited 5 s for the lab's processes to end")
        kill_all(*arguments)

    async def story() -> None:
        sandbox = Sandbox(lab, torn, lambda reason, message: said.append((reason, message)))
        try:
            assert await sandbox.attach(asyncio.Event())
            assert lab.pod_netns("default", "torn").exists()
            monkeypatch.setattr(process, "kill_all", too_slow_once)
            await sandbox.detach()
        finally:
            monkeypatch.undo()
            await sandbox.detach()

    asyncio.run(story())
    assert [reason for reason, _ in said] == ["FailedKillPod"], said
    assert len(tried) == 2
    assert not lab.pod_netns("default", "torn").exists()


@pytest.mark.parametrize(
    ("plugin", "complaint"),
    [
        ({"type": "host-local", "ipam": {"type": "host-local"}}, "no IP ranges specified"),
        ({"type": "nothing-like-it"}, "No such file"),
        ({"type": "portmap"}, "must be called as chained plugin"),
    ],
)
def test_a_plugins_error_is_told_in_its_words(
    lab: LabState, container: Attachment, tmp_path: Path, plugin: dict[str, object], complaint: str
) -> None:
    reference = runtime(lab, tmp_path, {**CHAIN, "plugins": [plugin]})
    with pytest.raises(CniError, match=complaint):
        asyncio.run(reference.add(container))
