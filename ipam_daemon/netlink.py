"""The thread that speaks netlink.

Every netlink request of the daemon is made on this one thread: the kernel serialises them behind one lock (RTNL)
anyway, a request is a blocking system call of 0.2 to 30 ms that must not stop the event loop, and entering a namespace
needs a thread that runs nothing else meanwhile (podwire/netns.py). pyroute2's synchronous sockets carry an event loop
of their own each, and belong to the thread that made them.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.peer_messages import BulkChannel
from ipam_daemon.rtnl import Channel
from podwire.netns import inside, netlink_socket
from podwire.nfnetlink import Nftables

_SIOCGIFINDEX, _IFREQ = 0x8933, struct.Struct("=16si20x")  # netdevice(7)
_LONGEST_NAME = 15  # bytes

P = ParamSpec("P")
T = TypeVar("T")


class NetlinkThread:
    """One thread with its netlink sockets in the node's own namespace: pyroute2's, and two for packed messages."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netlink")
        self._host: Any = None
        self._channel: Channel | None = None
        self._bulk: BulkChannel | None = None
        self._nftables: Nftables | None = None

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `function` on the thread. A call that was begun is finished even when the caller is cancelled.

        Raises what the function raises; an error of the kernel that it did not name itself is a PlumbingFailed, too, so
        that whoever tries again after one does so after any.
        """

        def act() -> T:
            with naming(getattr(function, "__name__", "netlink")):
                return function(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._executor, act)

    @property
    def host(self) -> Any:
        """The node's IPRoute. Only for functions that run on the thread."""
        if self._host is None:
            self._host = IPRoute()
        return self._host

    @property
    def channel(self) -> Channel:
        """The node's socket for packed messages. Only for functions that run on the thread."""
        if self._channel is None:
            self._channel = Channel(netlink_socket())
        return self._channel

    @property
    def bulk(self) -> BulkChannel:
        """The node's socket for many messages at a time. Only for functions that run on the thread."""
        if self._bulk is None:
            self._bulk = BulkChannel(netlink_socket())
        return self._bulk

    @property
    def nftables(self) -> Nftables:
        """The node's socket for nft elements. Only for functions that run on the thread."""
        if self._nftables is None:
            self._nftables = Nftables()
        return self._nftables

    async def close(self) -> None:
        """Finishes what is queued and closes the sockets."""
        for each in (self._host, self._channel, self._bulk, self._nftables):
            if each is not None:
                await self.run(each.close)
        self._executor.shutdown(wait=True)


@contextmanager
def container(netns_fd: int, ifname: str) -> Iterator[tuple[Any, int]]:
    """An IPRoute inside the namespace `netns_fd` and the index of its interface `ifname` (0 when there is none).

    Closed at the end of the block: an open socket pins the namespace. Only for functions that run on the thread.
    """
    with inside(netns_fd):
        sock = netlink_socket()
        index = index_of(ifname)
    descriptor = sock.detach()
    try:
        route = IPRoute(fileno=descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        yield route, index
    finally:
        route.close()


@contextmanager
def container_channel(netns_fd: int, ifname: str) -> Iterator[tuple[Channel, int]]:
    """The same with a socket for packed messages, which costs nothing to adopt."""
    with inside(netns_fd):
        channel = Channel(netlink_socket())
        index = index_of(ifname)
    try:
        yield channel, index
    finally:
        channel.close()


def index_of(ifname: str) -> int:
    """The index of an interface in the namespace of this thread, 0 when there is none. 10 µs, where a dump takes ms.

    Raises PlumbingFailed when that cannot be known: `if_nametoindex` says so of an interface that is not there and of a
    process without a file descriptor left in the same words, and the wire of a pod that runs would be taken for gone.
    """
    name = ifname.encode()
    if len(name) > _LONGEST_NAME:
        return 0
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
            answer = fcntl.ioctl(asking, _SIOCGIFINDEX, _IFREQ.pack(name, 0))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return 0
        raise PlumbingFailed(f"whether there is an interface {ifname} cannot be known: {error.strerror}") from error
    _, index = _IFREQ.unpack(answer)
    return int(index)


@contextmanager
def tolerating(*numbers: int) -> Iterator[None]:
    """Passes over netlink errors of these numbers: what was to be done is done already."""
    try:
        yield
    except (NetlinkError, OSError) as error:
        if (error.code if isinstance(error, NetlinkError) else error.errno) not in numbers:
            raise


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns a netlink error into one that says what could not be done."""
    try:
        yield
    except (NetlinkError, OSError) as error:
        number = error.code if isinstance(error, NetlinkError) else error.errno
        raise PlumbingFailed(
            f"{what}: {errno.errorcode.get(number or 0, number)}: {os.strerror(number or 0)}"
        ) from error


def read_sysctl(path: str) -> str:
    """What /proc/sys/<path> says in the namespace of this thread; empty when this kernel has no such thing."""
    try:
        with open(f"/proc/sys/{path}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def write_sysctl(path: str, value: str) -> None:
    """Writes /proc/sys/<path>, unless it says so already (a read-only /proc/sys is fine when nothing has to change).

    Applies to the namespace of this thread. Raises PlumbingFailed.
    """
    file = f"/proc/sys/{path}"
    with naming(f"sysctl {path.replace('/', '.')} = {value}"):
        with open(file, encoding="ascii") as current:
            if current.read().strip() == value:
                return
        with open(file, "w", encoding="ascii") as target:
            target.write(value)
