"""Two nodes with the pods of tests/policy_cases.py, as namespaces: bridges, a wire between the nodes, plain routes.

    pods of x and z ── br0 ── node1 ═══ node2 ── br0 ── pods of y

x/a and x/b share a bridge and a subnet, x/a and z/a a node, x/a and y/a nothing. The bridges hand their packets to the
firewall, as Podwire's does. Nothing of the daemon is here: what enforces policies is all that is under test.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from kube_proxy_lite.apply.policy_iptables import PolicyIptablesApplier
from kube_proxy_lite.apply.policy_nftables import PolicyApplier
from kube_proxy_lite.model import Network
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.render.policy_iptables import PolicyIptablesRenderer
from kube_proxy_lite.render.policy_nftables import PolicyRenderer
from tests.netns.probes import Prober
from tests.policy_cases import BASE, NAMESPACES, PODS, PORTS, Step, address
from tests.policy_oracle import World
from tests.unit.test_policy_evaluator import put, remove

T = TypeVar("T")
NODES = ("node1", "node2")
_SUBNETS = {4: "10.244.{}.{}/24", 6: "fd00:10:244::{:x}{:02x}/120"}


def node_of(home: str) -> str:
    """The node that the pods of a namespace are on."""
    return NODES[NAMESPACES.index(home) % 2]


class PolicyStage:
    """The namespaces, named with `prefix`. Use as a context manager."""

    def __init__(self, mode: str = "nft", prefix: str = "pwpol") -> None:
        """`mode` is what enforces: nft, or iptables-nft or iptables-legacy."""
        self.mode = mode
        self.prefix = prefix
        self.prober = Prober()
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> PolicyStage:
        self._names = [self.name(each) for each in NODES]
        self._names += [self.name(f"{home}.{pod}") for home in NAMESPACES for pod in PODS]
        for each in self._names:
            _run("ip", "netns", "add", each)
        self._plumb()
        for home in NAMESPACES:
            for pod in PODS:
                self.prober.serve(self.name(f"{home}.{pod}"), PORTS)
        return self

    def __exit__(self, *_: object) -> None:
        self.prober.__exit__()
        self._loop.close()
        for each in self._names:
            _run("ip", "netns", "del", each)

    def name(self, role: str) -> str:
        """The name of a namespace: of "node1", or of "x.a"."""
        return f"{self.prefix}.{role}"

    def enforcer(self, node: str) -> tuple[Any, Any]:
        """A renderer, and an applier for a node."""
        there = ("nsenter", f"--net=/run/netns/{self.name(node)}", "--")
        if self.mode == "nft":
            return PolicyRenderer(), PolicyApplier((*there, "nft"))
        return PolicyIptablesRenderer(), PolicyIptablesApplier(there, backend=self.mode.removeprefix("iptables-"))

    def forget_connections(self) -> None:
        """Empties conntrack on both nodes: a probe whose source port was used before would be taken for an old flow."""
        for node in NODES:
            self._in(node, "conntrack", "-F")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end."""
        return self._loop.run_until_complete(work)

    def _plumb(self) -> None:
        for node in NODES:
            for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
                self._in(node, "sysctl", "-qw", f"{key}=1")
            self._in(node, "sh", "-c", "echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables || true")
            self._in(node, "sh", "-c", "echo 0 > /proc/sys/net/bridge/bridge-nf-call-ip6tables || true")
            self._ip(node, "link add br0 type bridge nf_call_iptables 1 nf_call_ip6tables 1", "link set br0 up")
        self._ip("node1", f"link add up0 type veth peer name up0 netns {self.name('node2')}")
        for node, other, own in (("node1", "node2", 1), ("node2", "node1", 2)):
            theirs = 3 - own
            self._ip(node, f"addr add 192.0.2.{own}/24 dev up0", f"addr add fd00::{own}/64 dev up0 nodad")
            self._ip(node, "link set up0 up", "link set lo up")
            for index, home in enumerate(NAMESPACES):
                if node_of(home) == other:
                    self._ip(node, f"route add 10.244.{index}.0/24 via 192.0.2.{theirs}")
                    self._ip(node, f"-6 route add fd00:10:244::{index:x}00/120 via fd00::{theirs}")
                else:
                    for shape in _SUBNETS.values():
                        self._ip(node, f"addr add {shape.format(index, 1)} dev br0{' nodad' if ':' in shape else ''}")
        for home in NAMESPACES:
            for pod in PODS:
                self._plumb_pod(home, pod)
        self._settle()

    def _plumb_pod(self, home: str, pod: str) -> None:
        name, node, index = f"{home}.{pod}", node_of(home), NAMESPACES.index(home)
        own, peer = (
            ["ip", "-n", self.name(node), "link", "add", name],
            ["peer", "name", "eth0", "netns", self.name(name)],
        )
        _run(*own, "type", "veth", *peer)
        self._ip(node, f"link set {name} master br0 up", f"link set {name} type bridge_slave hairpin on")
        self._ip(
            name,
            f"addr add {address(home, pod)}/24 dev eth0",
            f"addr add {address(home, pod, 6)}/120 dev eth0 nodad",
            "link set eth0 up",
            "link set lo up",
            f"route add default via 10.244.{index}.1",
            f"-6 route add default via fd00:10:244::{index:x}01",
        )

    def _settle(self) -> None:
        """Waits until every pod reaches its gateway, in both families: links and neighbours need a moment."""
        deadline = time.monotonic() + 90
        for index, home in enumerate(NAMESPACES):
            for pod in PODS:
                for gateway in (f"10.244.{index}.1", f"fd00:10:244::{index:x}01"):
                    command = ["ip", "netns", "exec", self.name(f"{home}.{pod}"), "ping", "-qc1", "-W1", gateway]
                    while subprocess.run(command, capture_output=True, check=False).returncode:
                        assert time.monotonic() < deadline, f"{home}/{pod} does not reach {gateway}"

    def _ip(self, role: str, *commands: str) -> None:
        for command in commands:
            _run("ip", "-n", self.name(role), *command.split())

    def _in(self, role: str, *command: str) -> None:
        _run("ip", "netns", "exec", self.name(role), *command)


class Enforcement:
    """The policies of a cluster on both nodes, kept up as objects change. A new one finds what the last one left."""

    def __init__(self, stage: PolicyStage) -> None:
        self.world = World(BASE)
        self._stage = stage
        self._policies = {node: Policies(node) for node in NODES}
        self._renderers: dict[str, Any] = {}
        self._appliers: dict[str, Any] = {}
        for node in NODES:
            self._renderers[node], self._appliers[node] = stage.enforcer(node)
        for manifest in BASE:
            for policies in self._policies.values():
                put(policies, manifest)
        for node in NODES:
            self._update(node)
            applier = self._appliers[node]
            stage.wait(applier.apply(self._renderers[node].resync(stage.wait(applier.read()))))

    def take(self, step: Step) -> None:
        """Objects change, and the kernels with them."""
        for removed in step.remove:
            self.world.remove(*removed)
        for manifest in step.put:
            self.world.put(manifest)
        for node, policies in self._policies.items():
            for removed in step.remove:
                remove(policies, *removed)
            for manifest in step.put:
                put(policies, manifest)
            self._stage.wait(self._appliers[node].apply(self._update(node)))
        self._stage.forget_connections()

    def drift(self, node: str) -> tuple[Any, ...]:
        """What a look at the kernel finds to be done."""
        found: tuple[Any, ...] = self._renderers[node].resync(self._stage.wait(self._appliers[node].read()))
        return found

    def _update(self, node: str) -> tuple[Any, ...]:
        policies = self._policies[node]
        blocks: frozenset[Network] = frozenset()
        found: tuple[Any, ...] = self._renderers[node].update(policies.drain(), blocks)
        return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
