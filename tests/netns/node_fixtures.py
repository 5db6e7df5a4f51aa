"""A node for tests: a network namespace of its own, in which the daemon's netlink thread lives.

The daemon's netlink sockets, interface lookups and sysctls all belong to one thread (ipam_daemon/netlink.py), so a test
makes that thread enter a namespace before anything else runs on it, and the whole daemon works there, inside the test's
own process. `nft` is run through `ip netns exec`.

A new namespace starts with the global bridge-nf-call sysctls at 1, which would hide a bridge that does not ask for the
firewall itself: here they are 0.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from ipam_daemon.allocator import Layout
from ipam_daemon.attachments import Attachments
from ipam_daemon.cni import Call, NetworkConfig
from ipam_daemon.devices import Devices
from ipam_daemon.guard import SpoofGuard
from ipam_daemon.identity import boottime_ns
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import AttachmentKey, Block, Network, PodRef
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.plan import BRIDGE, BridgePlan, mac_of
from ipam_daemon.podwatch import PodWatch
from ipam_daemon.reconcile import Reconciler
from ipam_daemon.wires import Wires
from podwire import netns

COOLDOWN = 30.0
PATIENCE = 120.0  # seconds that one command may take, or whoever waits for one
IDLE_28 = {"used": 0, "releasing": 0, "cooling": 0, "reserved": 4, "free": 12}
"""How the addresses of an unused /28 are counted."""
_numbers = itertools.count(1)
BRIDGE_NF_CALL = "/proc/sys/net/bridge/bridge-nf-call-{}"


def command(*words: str, check: bool = True, stdin: str | None = None) -> str:
    """Runs a program and returns what it printed."""
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False, timeout=PATIENCE)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)}: {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


class Netns:
    """A named network namespace that is gone at the end of the block."""

    def __init__(self, what: str) -> None:
        self.name = f"pwtest-{os.getpid()}-{next(_numbers)}-{what}"
        self.path = f"/run/netns/{self.name}"

    def __enter__(self) -> Netns:
        command("ip", "netns", "add", self.name)
        return self

    def __exit__(self, *_: object) -> None:
        self.delete()

    def delete(self) -> None:
        """Deletes the namespace; fine when it is gone."""
        if os.path.exists(self.path):
            command("ip", "netns", "del", self.name)

    def ip(self, *words: str) -> str:
        """`ip …` inside."""
        return command("ip", "-n", self.name, *words)

    def json(self, *words: str) -> list[dict[str, Any]]:
        """`ip -d -j …` inside, decoded; without the empty objects that iproute2 prints for what was filtered."""
        text = command("ip", "-n", self.name, "-d", "-j", *words)
        return [each for each in json.loads(text or "[]") if each]

    def run(self, *words: str, check: bool = True, stdin: str | None = None) -> str:
        """Any program inside."""
        return command("ip", "netns", "exec", self.name, *words, check=check, stdin=stdin)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts any program inside."""
        return subprocess.Popen(("ip", "netns", "exec", self.name, *words), stdout=subprocess.PIPE, text=True)

    def links(self) -> set[str]:
        """The names of the links, `lo` not counted."""
        return {each["ifname"] for each in self.json("link", "show")} - {"lo"}

    def pings(self, address: str, seconds: float = 10) -> bool:
        """Whether one echo request is answered; after `seconds` it is not."""
        return "1 received" in self.run("ping", "-n", "-c", "1", "-W", str(seconds), address, check=False)


class Node(Netns):
    """A node's namespace, and the netlink thread that has entered it. `async with`."""

    def __init__(self, what: str = "node") -> None:
        super().__init__(what)
        self.thread = NetlinkThread()

    async def __aenter__(self) -> Node:
        self.__enter__()
        try:
            await enter(self.thread, self.path)
            for family in ("iptables", "ip6tables"):
                await self.thread.run(switch_off, Path(BRIDGE_NF_CALL.format(family)))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.thread.close()
        self.delete()


def switch_off(sysctl: Path) -> None:
    """Writes 0; fine when this kernel has no such sysctl (br_netfilter is not loaded)."""
    with suppress(FileNotFoundError):
        sysctl.write_text("0")


async def enter(thread: NetlinkThread, path: str) -> None:
    """Makes the thread live in the namespace at `path` from now on; before its first netlink request."""
    fd = netns.open_netns(path)
    try:
        await thread.run(netns._setns, fd)
    finally:
        os.close(fd)
    there = await thread.run(os.stat, "/proc/thread-self/ns/net")
    assert there.st_ino == os.stat(path).st_ino, "the thread must not touch the machine's own namespace"


def block(cidr: Network) -> Block:
    """A block of this node."""
    return Block(cidr=cidr, pool="default", node="node-1", node_id="id-1", generation=1)


def bridge_plan(cidr: Network, mtu: int = 1450) -> BridgePlan:
    """The bridge of a node with this one block."""
    gateway = Layout.of(cidr).gateway
    address = ipaddress.ip_interface(f"{gateway}/{cidr.prefixlen}")
    return BridgePlan(name=BRIDGE, mac=mac_of(gateway), mtu=mtu, addresses=(address,))


class Engine:
    """The daemon's attachments on a node: journal, allocator and wires, put together as main.py does."""

    def __init__(
        self,
        node: Node,
        folder: Path,
        cidr: Network,
        cooldown: float = COOLDOWN,
        guard: SpoofGuard | None = None,
        podwatch: PodWatch | None = None,
    ) -> None:
        self.node = node
        self.folder = folder
        self.cidr = cidr
        self.journal = Journal(folder / "journal.db", "boot-1")
        self.metrics = Metrics()
        self.wires = Wires(node.thread, guard=guard)
        self.now = time.time()
        self.attachments = Attachments(
            journal=self.journal,
            wires=self.wires,
            thread=node.thread,
            metrics=self.metrics,
            cooldown=cooldown,
            clock=lambda: self.now,
            nft=("ip", "netns", "exec", node.name, "nft"),
            podwatch=podwatch,
        )
        self.reconciler = Reconciler(self.journal, self.attachments, self.metrics)

    def restarted(self) -> Engine:
        """Another daemon on the same node and the same journal, after this one was killed; not started yet."""
        self.journal.close()
        return Engine(self.node, self.folder, self.cidr)

    async def start(self) -> Engine:
        """The bridge is there, the block is known."""
        await self.node.thread.run(Devices(self.node.thread).ensure_bridge, bridge_plan(self.cidr))
        self.attachments.addresses.use_blocks([block(self.cidr)])
        await self.attachments.resume()
        self.attachments.mtu = 1450
        return self

    def counts(self) -> dict[str, int]:
        """How many addresses are in which state."""
        (use,) = self.attachments.addresses.allocator.use(self.now)
        return {name: getattr(use, name) for name in ("used", "releasing", "cooling", "reserved", "free")}

    async def add(self, container_id: str, netns_path: str, ifname: str = "eth0", issued_ns: int = 0) -> dict[str, Any]:
        """An ADD and its result, decoded."""
        got = json.loads(await self.attachments.add(call("ADD", container_id, netns_path, ifname, issued_ns)))
        assert isinstance(got, dict)
        return got

    async def delete(self, container_id: str, ifname: str = "eth0", issued_ns: int = 0) -> None:
        """A DEL."""
        await self.attachments.delete(call("DEL", container_id, "", ifname, issued_ns))

    async def reap(self) -> None:
        """Deletes killed wires until none is left."""
        while await self.attachments.reaper.reap():  # noqa: ASYNC110  the kernel says nothing when a link is gone
            await asyncio.sleep(0.01)


def call(
    command: str,
    container_id: str,
    netns_path: str = "",
    ifname: str = "eth0",
    issued_ns: int = 0,
    config: NetworkConfig | None = None,
) -> Call:
    """A CNI call, issued now unless a moment is given."""
    return Call(
        command=command,
        config=config or NetworkConfig(name="podnet", cni_version="1.1.0"),
        container_id=container_id,
        ifname=ifname,
        netns=netns_path,
        pod=PodRef(namespace="default", name=container_id, uid=f"uid-{container_id}"),
        issued_ns=issued_ns or boottime_ns(),
    )


def key(container_id: str, ifname: str = "eth0") -> AttachmentKey:
    """The attachment of a container in the network that `call` names."""
    return AttachmentKey("podnet", container_id, ifname)


async def hold(node: Node) -> threading.Event:
    """Keeps the netlink thread busy until the event is set, so that what is asked of it meanwhile forms a queue."""
    began, goes_on = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        goes_on.wait(PATIENCE)

    task = asyncio.ensure_future(node.thread.run(wait))
    await asyncio.to_thread(began.wait, PATIENCE)
    assert not task.done()
    return goes_on


async def settle() -> None:
    """Lets every task run until it waits for the netlink thread or a lock."""
    for _ in range(10):
        await asyncio.sleep(0)


async def eventually(holds: Callable[[], bool]) -> None:
    """Waits until it holds."""
    while not holds():  # noqa: ASYNC110  the kernel says nothing when it is done
        await asyncio.sleep(0.01)


@asynccontextmanager
async def engine(folder: Path, cidr: str = "10.244.1.0/28") -> AsyncIterator[Engine]:
    """An engine that is started on a node of its own."""
    async with Node() as node:
        started = await Engine(node, folder, ipaddress.ip_network(cidr)).start()
        try:
            yield started
        finally:
            started.journal.close()


@contextmanager
def pods(number: int) -> Iterator[list[Netns]]:
    """Namespaces for so many pods."""
    with ExitStack() as stack:
        yield [stack.enter_context(Netns(f"pod{each}")) for each in range(number)]


def play(story: Callable[[], Awaitable[None]]) -> None:
    """Runs a story in an event loop of its own, for five minutes at most."""

    async def limited() -> None:
        await asyncio.wait_for(story(), 300)

    asyncio.run(limited())
