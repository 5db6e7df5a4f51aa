"""A node with clients and backends, all namespaces, for the packets of Services; the addresses are service_cases.py's.

    client 10.244.1.9 ─┐                            ┌─ b 10.0.0.2: pods 10.244.2.3, 10.244.3.3
    pods   10.244.1.3 ─┼─ node a 10.0.0.1, 10.0.1.1 ┤
           10.244.1.4 ─┘                            └─ outside 192.0.2.7

Everything has its twin in IPv6. Backends answer on port 8080 with their address and the one that they see.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from kube_proxy_lite.model import (
    Frontend,
    PortPlan,
    Protocol,
    Settings,
    Source,
    Verdict,
    decide,
)
from tests.netns.node_fixtures import Netns
from tests.unit.service_cases import BACKENDS, CLIENTS, LOCAL, LOCAL_2, NODE, REMOTE, REMOTE_2, address, plan

TRAFFIC = Path(__file__).with_name("service_traffic.py")
PORT = 8080
SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.icmp_ratelimit=0",  # or the second refusal of a datagram within a second is not told
    "net.ipv6.icmp.ratelimit=0",
)
TIMES = 60
"""Connections in which all of two or three backends are seen, but once in 10^10 times."""


class Stage:
    """The namespaces, and how to make connections between them. As a context manager, for one test or a module."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._askers: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Stage:
        with self._stack:
            self._build()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def nft(self) -> tuple[str, ...]:
        """nft on the node."""
        return ("ip", "netns", "exec", self.node.name, "nft")

    def start(self, place: Netns, *arguments: str) -> subprocess.Popen[str]:
        """service_traffic.py in a namespace; ended with the stage at the latest."""
        command = ["ip", "netns", "exec", place.name, sys.executable, "-S", str(TRAFFIC), *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._stack.callback(_end, process)
        return process

    def ask(self, place: Netns, protocol: str, to: str, port: int, expected: set[str]) -> set[str]:
        """What connections from a namespace meet: `<server> <client>`, `refuse` or `drop`."""
        asker = self._askers.get(place.name)
        if asker is None:
            asker = self._askers[place.name] = self.start(place, "ask")
        request = {
            "protocol": protocol,
            "address": to,
            "port": port,
            "expected": sorted(expected),
            "times": TIMES,
        }
        assert asker.stdin is not None
        assert asker.stdout is not None
        asker.stdin.write(json.dumps(request) + "\n")
        asker.stdin.flush()
        return set(json.loads(asker.stdout.readline()))

    @contextmanager
    def load(self, place: Netns, to: str, port: int) -> Iterator[dict[str, int]]:
        """Connections, one after the other, while the block runs; afterwards, who answered how often."""
        process = self.start(place, "load", to, str(port))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        counts: dict[str, int] = {}
        yield counts
        process.send_signal(signal.SIGINT)
        counts.update(json.loads(process.stdout.readline()))

    def check(self, made: PortPlan, frontend: Frontend, source: Source, settings: Settings) -> str:
        """Empty when packets fare as the model says, else what was seen and what should have been."""
        version = made.key.version
        decision = decide(made, frontend, source, settings)
        to = str(frontend.address or address("10.0.1.1", version))
        wanted = {str(each.address) for each in decision.backends}
        if decision.verdict is not Verdict.FORWARD:
            wanted = {decision.verdict.value}
        seen = self.ask(self.place_of(source), made.key.protocol, to, frontend.port, wanted)
        if {each.partition(" ")[0] for each in seen} != wanted:
            return f"saw {sorted(seen)}, expected {sorted(wanted)}"
        clients = {each.partition(" ")[2] for each in seen} - {""}
        # who backends see; the node has an address in every direction
        node = {str(each) for each in NODE[version]} | {str(address(each, version)) for each in self.gateways}
        if source is Source.NODE or (decision.masquerade and clients):
            allowed = node
        else:
            allowed = {str(address(CLIENTS[source], version))}
        return "" if clients <= allowed else f"came from {sorted(clients)}, expected {sorted(allowed)}"

    def place_of(self, source: Source) -> Netns:
        return {Source.POD: self.client, Source.NODE: self.node, Source.EXTERNAL: self.outside}[source]

    # --- Building -----------------------------------------------------------------------------------------------

    gateways = ("10.244.1.1", "192.0.2.1", "10.0.0.1")

    def _build(self) -> None:
        names = ("node", "client", "local", "local2", "b", "outside")
        spaces = {name: self._stack.enter_context(Netns(name)) for name in names}
        self.node, self.client, self.outside = spaces["node"], spaces["client"], spaces["outside"]
        self.local, self.local2, self.b = spaces["local"], spaces["local2"], spaces["b"]
        for space in spaces.values():
            space.ip("link", "set", "lo", "up")
            space.run("sysctl", "-qw", *SYSCTLS)
        for name, host in (("client", "10.244.1.9"), ("local", LOCAL), ("local2", LOCAL_2)):
            self._wire(spaces[name], f"cali-{name}", "10.244.1.1", host)
        self._wire(self.outside, "eth1", "192.0.2.1", CLIENTS[Source.EXTERNAL])
        self._wire(self.b, "eth0", "10.0.0.1", "10.0.0.2")
        for remote in (REMOTE, REMOTE_2):
            for version in (4, 6):
                self._address(self.b, str(address(remote, version)), "lo", version)
                via = str(address("10.0.0.2", version))
                self.node.ip("route", "add", str(address(remote, version)), "via", via, "dev", "eth0")
        for version in (4, 6):
            self._address(self.node, str(address("10.0.1.1", version)), "lo", version)
            via = str(address("192.0.2.7", version))  # what the node knows no other way to, it sends outside
            self.node.ip(f"-{version}", "route", "add", "default", "via", via, "dev", "eth1")
        for space, hosts in ((self.local, (LOCAL,)), (self.local2, (LOCAL_2,)), (self.b, (REMOTE, REMOTE_2))):
            both = [str(address(host, version)) for host in hosts for version in (4, 6)]
            server = self.start(space, "serve", *both, str(PORT))
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"

    def _wire(self, space: Netns, name: str, gateway: str, host: str) -> None:
        """A veth to the node with one address at each end, and the node as the way to everywhere."""
        self.node.ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space.name)
        self.node.ip("link", "set", name, "up")
        space.ip("link", "set", "eth0", "up")
        for version in (4, 6):
            near, far = str(address(gateway, version)), str(address(host, version))
            self._address(self.node, near, name, version)
            self._address(space, far, "eth0", version)
            self.node.ip(f"-{version}", "route", "add", far, "dev", name, "src", near)
            space.ip(f"-{version}", "route", "add", near, "dev", "eth0")
            space.ip(f"-{version}", "route", "add", "default", "via", near, "dev", "eth0")

    def _address(self, space: Netns, text: str, device: str, version: int) -> None:
        words = ("nodad",) if version == 6 else ()
        space.ip("addr", "add", f"{text}/{32 if version == 4 else 128}", "dev", device, *words)


def matrix(turn: tuple[str, ...] = ("TCP", "UDP")) -> list[tuple[str, PortPlan]]:
    """The plans of service_cases.flows, each with places of its own, so that one kernel holds them all."""
    made: list[tuple[str, PortPlan]] = []
    policies = (("Cluster", False, False), ("eTP Local", False, True), ("iTP Local", True, False))
    for version in (4, 6):
        for backends, (cluster, local) in BACKENDS.items():
            for policy, internal, external in policies:
                number = len(made) + 1
                each = plan(
                    f"s{number}",
                    cluster,
                    local,
                    version=version,
                    protocol=Protocol(turn[number % len(turn)]),
                    number=number,
                    internal_local=internal,
                    external_local=external,
                )
                made.append((f"v{version} {backends}, {policy} {each.key.protocol}", each))
    return made


def replace_backends(made: PortPlan, cluster: tuple[str, ...]) -> PortPlan:
    """The plan with other backends."""
    version = made.key.version
    other = plan(cluster=cluster, version=version)
    return msgspec.structs.replace(made, cluster=other.cluster)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
