"""Plugins that are asked the same questions: Podwire, and Debian's reference `bridge` with `host-local`.

A test that both pass says what the specification says; one that only ours passes may say what we happen to do. So a row
of the conformance table runs against the reference, too, wherever that does the same thing, each on a node of one lab,
exec'd there as a runtime does, with what differs between the two in one place:

                  Podwire                                          the reference
    reserved      attachments in the daemon's journal              files of host-local
    links         ports named pw…                                  veths on the node
    bridge        pw0                                              ref0

What a plugin holds goes some time after its answer (a veth is deleted in the background): tests wait for it to be gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from podwire.lab import node, process, topology
from podwire.lab.state import LabState
from podwire.v1 import agent_pb2, agent_pb2_grpc
from tests.netns.containers import Container, pod_links, status

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
DEBIAN = Path("/usr/lib/cni")
DEBIAN_VERSIONS = ("0.3.1", "0.4.0", "1.0.0")
"""What Debian 12's plugins (1.1.1) speak."""
PATIENCE = 90.0
RELEASING = agent_pb2.Attachment.STATE_RELEASING
Config = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """All that a plugin said: its exit code and both of its streams."""

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def body(self) -> Config:
        """Standard output, decoded; empty when there was none."""
        return dict(json.loads(self.stdout)) if self.stdout else {}

    @property
    def error(self) -> int:
        """The CNI error code, 0 for success."""
        return int(self.body["code"]) if self.exit_code else 0

    @property
    def address(self) -> str:
        """The first address of a result, bare."""
        return str(self.body["ips"][0]["address"]).split("/")[0]


@dataclass(frozen=True)
class Contender:
    """A plugin on a node, which is spoken to in one version of the specification."""

    lab: LabState
    node: str
    version: str
    kind = ""
    bridge = ""

    def plain(self) -> Config:
        """The plugin's entry in a list."""
        raise NotImplementedError

    def executable(self) -> Path:
        """Where the node has it."""
        raise NotImplementedError

    def reserved(self) -> set[str]:
        """Who holds addresses, one line each."""
        raise NotImplementedError

    def links(self) -> set[str]:
        """The host's ends of its wires."""
        raise NotImplementedError

    def clear(self) -> None:
        """Takes away what a failed test left, so that the next one begins as the first."""
        raise NotImplementedError

    def held(self) -> set[str]:
        """All that it holds on the node."""
        return self.reserved() | {f"link {name}" for name in self.links()}

    def config(self, **more: Any) -> Config:
        """A whole network configuration; keys with '/' and '-' are given as `**{...}`."""
        return {"cniVersion": self.version, "name": "conformance", **self.plain(), **more}

    def call(
        self,
        command: str,
        box: Container | None = None,
        config: Config | bytes | None = None,
        environment: Mapping[str, str | bytes | None] | None = None,
        ifname: str = "eth0",
    ) -> Said:
        """Execs the plugin on the node. `environment` changes variables; None takes one out."""
        variables: dict[str, str | bytes | None] = {
            "PATH": os.environ.get("PATH", os.defpath),
            "CNI_COMMAND": command,
            "CNI_PATH": str(self.executable().parent),
        }
        if box is not None:
            variables |= {"CNI_CONTAINERID": box.name, "CNI_NETNS": box.netns, "CNI_IFNAME": ifname}
        variables |= environment or {}
        plain = config if config is not None else self.config()
        done = subprocess.run(
            [*node.enter_command(self.lab, self.node), str(self.executable())],
            input=plain if isinstance(plain, bytes) else json.dumps(plain).encode(),
            env={name: value for name, value in variables.items() if value is not None},
            capture_output=True,
            check=False,
            timeout=120,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def add(self, box: Container, config: Config | None = None, /, **environment: str) -> Config:
        """An ADD that has to succeed, and its result."""
        said = self.call("ADD", box, config, environment)
        assert said.exit_code == 0, said
        return said.body

    def delete(self, box: Container, config: Config | None = None, /, ifname: str = "eth0", **environment: str) -> None:
        """A DEL that has to succeed, and says nothing."""
        said = self.call("DEL", box, config, environment, ifname)
        assert (said.exit_code, said.stdout) == (0, b""), said

    def check(self, box: Container, previous: Config, **more: Any) -> Said:
        """A CHECK with the result of the ADD."""
        return self.call("CHECK", box, self.config(prevResult=previous, **more))

    def wait_held(self, expected: set[str]) -> None:
        """Waits until the node holds this and no more."""
        with contextlib.suppress(Exception):
            process.wait_for(lambda: self.held() == expected, PATIENCE, "the node to hold what it should")
        assert self.held() == expected

    def on_node(self, *command: str) -> str:
        """Runs a command on the node and returns what it prints."""
        return topology.run([*node.enter_command(self.lab, self.node), *command])

    def host_end(self, result: Config) -> Config:
        """The host's end of the wire in a result."""
        (found,) = (each for each in result["interfaces"] if not each.get("sandbox") and each["name"] != self.bridge)
        return dict(found)

    def link(self, name: str) -> Config:
        """A link of the node, as `ip -d -j link` shows it."""
        return dict(json.loads(self.on_node("ip", "-d", "-j", "link", "show", "dev", name))[0])


class Podwire(Contender):
    """Our own plugin and its daemon."""

    kind = "podwire"
    bridge = "pw0"

    def plain(self) -> Config:
        return {"type": "podwire"}

    def executable(self) -> Path:
        return self.lab.files.node_path(self.node, "/opt/cni/bin") / "podwire"

    def reserved(self) -> set[str]:
        return {
            f"{each.network}/{each.container_id}/{each.ifname} {','.join(each.addresses)}"
            for each in attachments(self.lab, self.node)
            if each.state != RELEASING
        }

    def links(self) -> set[str]:
        releasing = {each.host_ifname for each in attachments(self.lab, self.node) if each.state == RELEASING}
        return pod_links(self.lab, self.node) | releasing

    def clear(self) -> None:
        networks = {each.network for each in attachments(self.lab, self.node)}
        for name in networks - {""}:
            nothing: Config = {"cniVersion": "1.1.0", "name": name, "cni.dev/valid-attachments": []}
            self.call("GC", config=nothing)


class Reference(Contender):
    """Debian's `bridge`, which execs `host-local`."""

    kind = "reference"
    bridge = "ref0"

    def plain(self) -> Config:
        ranges = [[{"subnet": {4: "10.99.0.0/24", 6: "fd00:99::/64"}[family]}] for family in self.lab.families]
        ipam = {"type": "host-local", "ranges": ranges, "dataDir": str(self._data())}
        return {"type": "bridge", "bridge": self.bridge, "isDefaultGateway": True, "hairpinMode": True, "ipam": ipam}

    def executable(self) -> Path:
        return DEBIAN / "bridge"

    def reserved(self) -> set[str]:
        files = [*self._data().glob("*/[0-9]*.*"), *self._data().glob("*/*:*")]
        return {f"{each.parent.name}/{'/'.join(each.read_text().split())} {each.name}" for each in files}

    def links(self) -> set[str]:
        shown = json.loads(self.on_node("ip", "-j", "link", "show", "type", "veth") or "[]")
        return {each["ifname"] for each in shown if each and each["ifname"].startswith("veth")}

    def clear(self) -> None:
        shutil.rmtree(self._data(), ignore_errors=True)
        for name in self.links():
            self.on_node("ip", "link", "delete", name)

    def _data(self) -> Path:
        return self.lab.files.node_path(self.node, "/var/lib/cni") / "reference"


KINDS: dict[str, tuple[type[Contender], str]] = {"podwire": (Podwire, "node1"), "reference": (Reference, "node2")}


def rows(
    versions: Sequence[str] = VERSIONS, not_by_reference: str = "", ends_first: bool = False
) -> pytest.MarkDecorator:
    """Runs a test, with `it` as its contender, in every one of `versions`: against Podwire, and against the reference
    in those that it speaks, unless a reason is given why it does something else. With `ends_first` the versions between
    a contender's oldest and newest are slow tests: for tests that are tables themselves."""
    lacking = pytest.mark.skipif(not (DEBIAN / "bridge").exists(), reason="needs Debian's containernetworking-plugins")
    spoken = {"podwire": list(versions), "reference": [each for each in versions if each in DEBIAN_VERSIONS]}
    if not_by_reference:
        del spoken["reference"]
    params = []
    for kind, all_of_them in spoken.items():
        for version in all_of_them:
            marks = [lacking] if kind == "reference" else []
            if ends_first and version not in (all_of_them[0], all_of_them[-1]):
                marks.append(pytest.mark.slow)
            params.append(pytest.param((kind, version), id=f"{version}-{kind}", marks=marks))
    return pytest.mark.parametrize("it", params, indirect=True)


def attachments(lab: LabState, node_name: str) -> Sequence[agent_pb2.Attachment]:
    """Everything in the journal of the node's daemon."""
    with grpc.insecure_channel(f"unix:{lab.files.ipamd_socket(node_name)}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        answer: agent_pb2.ListAttachmentsResponse = stub.ListAttachments(
            agent_pb2.ListAttachmentsRequest(), timeout=PATIENCE
        )
    return list(answer.attachments)


def everything(it: Contender) -> dict[str, object]:
    """All that a call could change on the node: what is held, how addresses are counted, the DEL queue, every link,
    address and route, the firewall, and the namespaces there are."""
    lab, name = it.lab, it.node
    queue = lab.files.node_path(name, "/var/lib/podwire") / "del-queue"
    return {
        "held": it.held(),
        "addresses": [(b.cidr, b.used, b.releasing, b.cooling + b.free) for b in status(lab, name).blocks],
        "queue": sorted(os.listdir(queue)),
        "run": sorted(os.listdir(lab.files.node_path(name, "/run/podwire"))),
        "namespaces": topology.namespaces(lab.name),
        "kernel": it.on_node(
            "sh", "-c", "ip -br link; ip -br addr; ip route; ip -6 route; nft -s list ruleset"
        ).splitlines(),
    }


def settle(box: Container) -> None:
    """Waits until the kernel has done with a container's new interface what it does by itself: up, with a link-local
    address that it has checked."""

    def is_settled() -> bool:
        (link,) = json.loads(box.run("ip", "-j", "address", "show", "dev", "eth0").stdout)
        local = [each for each in link["addr_info"] if each["scope"] == "link"]
        return (
            link["operstate"] == "UP" and bool(local) and not any(each.get("tentative") for each in link["addr_info"])
        )

    process.wait_for(is_settled, PATIENCE, "the kernel to be done with eth0")


def inside(box: Container) -> list[str]:
    """Links, addresses and routes of a container's namespace."""
    return box.run("sh", "-c", "ip -br link; ip -br addr; ip route; ip -6 route").stdout.splitlines()
