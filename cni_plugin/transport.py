"""A unary call over the daemon's unix socket, with one deadline for all of it.

`_socket` and `select` are compiled into the interpreter; `socket` adds 5 ms of `enum` and `selectors`. Reading and
writing go on together: a daemon that stops reading because we do not read would otherwise wait for us for ever.
"""

import errno
from _socket import AF_UNIX, SO_SNDTIMEO, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from select import POLLIN, POLLOUT, poll
from sys import byteorder
from time import monotonic

from cni_plugin.errors import ConnectionLost, DeadlineExceeded, Unreachable
from cni_plugin.h2 import UnaryCall

CONNECT_TIMEOUT = 5.0
_READ_SIZE = 1 << 18


def call(path: str, method: bytes, request: bytes, deadline: float) -> bytes:
    """Sends `request` to the server at the unix socket `path`, returns its answer, both as encoded messages.

    `deadline` is of `time.monotonic()`, in seconds. Raises a TransportError; after Unreachable nothing was sent.
    """
    connection = _connect(path, min(CONNECT_TIMEOUT, deadline - monotonic()))
    try:
        milliseconds = min(max(1, int((deadline - monotonic()) * 1000)), 99_999_999)
        return _exchange(connection, UnaryCall(method, request, milliseconds), deadline)
    finally:
        connection.close()


def _connect(path: str, timeout: float) -> socket:
    if timeout <= 0:
        raise Unreachable("no time is left to connect to the daemon")
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)
    # A connect to a unix socket waits only while the listener's backlog is full, and then as long as SO_SNDTIMEO, a
    # struct timeval (64-bit), says. A non-blocking one would be told EAGAIN with nothing to poll for.
    seconds, microseconds = divmod(int(timeout * 1_000_000) or 1, 1_000_000)
    connection.setsockopt(SOL_SOCKET, SO_SNDTIMEO, _long(seconds) + _long(microseconds))
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        reason = f"not within {timeout:.0f} seconds" if error.errno == errno.EAGAIN else error.strerror or str(error)
        raise Unreachable(f"cannot connect to the daemon at {path}: {reason}") from error
    connection.setblocking(False)
    return connection


def _exchange(connection: socket, unary: UnaryCall, deadline: float) -> bytes:
    poller = poll()
    poller.register(connection, POLLIN)
    waiting_to_write = False
    unsent = unary.outgoing()
    while True:
        if unsent:
            unsent = unsent[_write(connection, unsent) :]
        if waiting_to_write != bool(unsent):
            waiting_to_write = bool(unsent)
            poller.modify(connection, POLLIN | POLLOUT if unsent else POLLIN)
        remaining = deadline - monotonic()
        if remaining <= 0 or not poller.poll(remaining * 1000):
            raise DeadlineExceeded("the daemon did not answer in time")
        try:
            data = connection.recv(_READ_SIZE)
        except BlockingIOError:
            continue
        except OSError as error:
            raise ConnectionLost(f"the connection to the daemon broke: {error.strerror}") from error
        if not data:
            unary.receive_end()
        unary.receive(data)
        if unary.answer is not None:
            return unary.answer
        unsent += unary.outgoing()


def _write(connection: socket, data: bytes) -> int:
    """How much of `data` is done with: all of it when the peer has closed, which may have answered first."""
    try:
        return connection.send(data)
    except BlockingIOError:
        return 0
    except OSError:
        return len(data)


def _long(value: int) -> bytes:
    return value.to_bytes(8, byteorder)
