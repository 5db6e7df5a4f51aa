"""Network namespaces: checked before they are entered, and entered in one audited place.

A namespace is entered by one thread that does nothing else, for as long as it takes to open a socket (about 0.1 ms),
and left again before anything else runs on it. A netlink socket belongs for life to the namespace that it was opened
in, so everything else can be done from outside. Never by fork (gRPC's threads do not survive one), and never by a
library's own namespace process, which costs 8 ms and forks.

A socket left open pins its namespace: whoever opens one closes it before it answers.

Source: setns(2), namespaces(7), ioctl_ns(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from podwire.errors import PodwireError

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
_OWN = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


class NetnsError(PodwireError):
    """A path that does not lead to a network namespace other than our own."""


class NetnsGone(NetnsError):
    """There is nothing at the path: the namespace was deleted, or never made."""


def open_netns(path: str) -> int:
    """A file descriptor of the network namespace at `path`; the caller closes it.

    Raises NetnsGone when nothing is there, NetnsError when it is something else, or the caller's own namespace.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO or a device is not even opened
            raise NetnsError(f"{path!r} is not a network namespace but another kind of file")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NetnsGone(f"no network namespace at {path!r}") from error
    except (OSError, ValueError) as error:
        raise NetnsError(f"{path!r} cannot be opened as a network namespace: {error}") from error
    try:
        _check(fd, path)
    except NetnsError:
        os.close(fd)
        raise
    return fd


def _check(fd: int, path: str) -> None:
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = None
    if kind != _CLONE_NEWNET:
        raise NetnsError(f"{path!r} is not a network namespace (an empty mount point is what a deleted one leaves)")
    ours, theirs = os.stat(_OWN), os.fstat(fd)
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        raise NetnsError(f"{path!r} is the node's own network namespace, expected a container's")


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """Runs the block with this thread in the network namespace `fd`.

    Only for a thread that nothing else runs on meanwhile. A thread that cannot return would go on to plumb the node
    from inside a pod: the process ends instead (its journal tells the next one what was under way).
    """
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(fd)
        try:
            yield
        finally:
            try:
                _setns(own)
            except OSError:
                os.write(2, b"cannot return from a network namespace; ending\n")
                os._exit(70)
    finally:
        os.close(own)


def netlink_socket() -> socket.socket:
    """A NETLINK_ROUTE socket in the namespace of this thread. A datagram one, since asyncio adopts no raw sockets."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
