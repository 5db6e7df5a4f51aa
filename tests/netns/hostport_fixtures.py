"""A node of both families with pods that serve, and a machine outside: where ports of the node are tried out.

    outside 192.0.2.2, 2001:db8::2 ──under0── node 192.0.2.1, 2001:db8::1 ──pw0── pods 10.244.1.x, fd00:1::x

What a pod serves tells who asked: `<pod> <address of the client>`, by TCP and UDP. Nothing outside knows the way to a
pod's address but by the node.
"""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from ipam_daemon.cni import Call, NetworkConfig, RuntimeConfig, Wanted
from ipam_daemon.hostports import Entry, parse
from ipam_daemon.model import Bandwidth
from tests.netns.node_fixtures import Engine, Netns, block, call, engine

SIX = ipaddress.ip_network("fd00:1::/120")
NODE: dict[int, str] = {4: "192.0.2.1", 6: "2001:db8::1"}
OUTSIDE: dict[int, str] = {4: "192.0.2.2", 6: "2001:db8::2"}
GATEWAY: dict[int, str] = {4: "10.244.1.1", 6: "fd00:1::1"}
SERVE = """
import selectors, socket, sys
name, ready = sys.argv[1], selectors.DefaultSelector()
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    server = socket.socket(socket.AF_INET6, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("::", int(sys.argv[2])))
    if kind == socket.SOCK_STREAM:
        server.listen()
    ready.register(server, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in ready.select():
        if key.fileobj.type == socket.SOCK_STREAM:
            client, peer = key.fileobj.accept()
            client.sendall(f"{name} {peer[0].removeprefix('::ffff:')}".encode())
            client.close()
        else:
            _, peer = key.fileobj.recvfrom(99)
            key.fileobj.sendto(f"{name} {peer[0].removeprefix('::ffff:')}".encode(), peer)
"""
ASK = """
import socket, sys
kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[sys.argv[1]]
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
with socket.socket(family, kind) as client:
    client.settimeout(float(sys.argv[4]))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if len(sys.argv) > 5:
        client.bind(("", int(sys.argv[5])))
    try:
        client.connect((sys.argv[2], int(sys.argv[3])))
        client.send(b"who?")
        print(client.recv(99).decode())
    except OSError as error:
        print(type(error).__name__)
"""
REFUSED, SILENCE = "ConnectionRefusedError", "TimeoutError"


def ask(where: Netns, address: str, port: int, protocol: str = "tcp", patience: float = 60, source: int = 0) -> str:
    """What is answered, or the name of the error. `source` is the client's own port."""
    more = [str(source)] if source else []
    return where.run("python3", "-IS", "-c", ASK, protocol, address, str(port), str(patience), *more).strip()


class Program:
    """A Python program that runs in a namespace, and is spoken to by lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def say(self, line: str = "") -> None:
        """Gives it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        """Waits for a line of it."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def running(where: Netns, source: str, *arguments: str) -> Iterator[Program]:
    """A program that has said that it is ready; it is killed at the end."""
    command = ["ip", "netns", "exec", where.name, "python3", "-IS", "-u", "-c", source, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        program = Program(process)
        try:
            assert program.hear() == "ready"
            yield program
        finally:
            process.kill()


@contextmanager
def serving(where: Netns, name: str, port: int) -> Iterator[None]:
    """A server of TCP and UDP."""
    with running(where, SERVE, name, str(port)):
        yield


def mapping(host: int, container: int = 80, protocol: str = "tcp", host_ip: str = "") -> Entry:
    """One of `runtimeConfig.portMappings`."""
    return Entry(host_port=host, container_port=container, protocol=protocol, host_ip=host_ip)


def add_call(name: str, pod: Netns | None, *mappings: Entry, bandwidth: Bandwidth | None = None, **more: Any) -> Call:
    """An ADD that asks for ports of the node, or for limits."""
    config = NetworkConfig(name="podnet", cni_version="1.1.0", runtime=RuntimeConfig(port_mappings=mappings))
    made = call("ADD", name, pod.path if pod else "", config=config)
    wanted = Wanted(port_mappings=parse(mappings), bandwidth=bandwidth or Bandwidth())
    return Call(
        **{name: getattr(made, name) for name in ("command", "config", "container_id", "ifname", "netns", "pod")},
        issued_ns=made.issued_ns,
        wanted=wanted,
        **more,
    )


@asynccontextmanager
async def dual_stack(folder: Path) -> AsyncIterator[tuple[Engine, Netns]]:
    """The node's engine and the machine outside."""
    async with engine(folder) as it:
        with Netns("outside") as outside:
            it.node.ip("link", "add", "under0", "type", "veth", "peer", "name", "under0", "netns", outside.name)
            for machine, addresses in ((it.node, NODE), (outside, OUTSIDE)):
                machine.ip("addr", "add", f"{addresses[4]}/24", "dev", "under0")
                machine.ip("addr", "add", f"{addresses[6]}/64", "dev", "under0", "nodad")
                machine.ip("link", "set", "under0", "up")
                machine.ip("link", "set", "lo", "up")
            await both_families(it)
            yield it, outside


async def both_families(it: Engine) -> None:
    """Gives the node a block of IPv6, too."""
    it.node.ip("addr", "replace", f"{GATEWAY[6]}/120", "dev", "pw0", "nodad")
    it.node.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
    it.attachments.addresses.use_blocks([block(it.cidr), block(SIX)])


def elements(it: Engine) -> int:
    """How many elements the table has."""
    listing = it.node.run("nft", "list", "ruleset")
    return sum(line.count(",") + 1 for line in listing.split("elements = {")[1:] for line in [line.split("}")[0]])
