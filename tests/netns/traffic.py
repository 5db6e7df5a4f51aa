"""What runs through a fault: a ping at 100 a second, and a TCP stream that is echoed.

A ping counts packets. A stream shows what a ping does not: that connection tracking and the path in both directions
stayed as they were, since a connection whose peer is forgotten for a moment is reset or stalls. It sends numbered lines
and reads them back, in order and complete.

Both run when they are made: something was answered already. Both end when they are asked: from then on nothing new is
sent, and what is on its way may arrive. That is why the pings are not `ping`'s, which ends with the signal: an answer
that is behind by a millisecond on a busy machine would be called lost.

Run as a program, this file is the ends of both, for a namespace that a test enters with nsenter.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

PORT = 7007
_PAUSE = 0.005  # seconds between two lines
_INTERVAL = 0.01  # seconds between two pings
_LEAST = 10  # lines or pings, however soon the end comes
_PATIENCE = 60.0  # seconds in which an answer may come
_TCP_INFO_TOTAL_RETRANS = 100  # the offset of tcpi_total_retrans in struct tcp_info, linux/tcp.h
_ECHO = {4: (socket.AF_INET, socket.IPPROTO_ICMP, 8, 0), 6: (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128, 129)}
_LISTENING, _RUNNING = "listening", "running"


class Place(Protocol):
    """Where a command can be started: a container."""

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Starts a command there, with its output in a pipe."""


class _End:
    """One end in its place, which is killed with its block unless it was asked for its result before."""

    def __init__(self, place: Place, says: str, *arguments: str) -> None:
        self._process = place.start(sys.executable, "-IS", __file__, *arguments)
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != says:
            self.__exit__()
            raise AssertionError(f"{' '.join(arguments)}: {said or 'it died'}")

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def summary(self) -> dict[str, Any]:
        """Ends it. What it says of itself."""
        self._process.send_signal(signal.SIGINT)
        out, _ = self._process.communicate(timeout=2 * _PATIENCE)
        said = json.loads(out.splitlines()[-1]) if out.strip() else {"error": "it died"}
        assert isinstance(said, dict)
        return said


class Pings(_End):
    """Pings at 100 a second until it is asked how many were lost."""

    def __init__(self, source: Place, address: str) -> None:
        super().__init__(source, _RUNNING, "ping", address)

    def __enter__(self) -> Pings:
        return self

    def lost(self) -> int:
        """Ends it. How many were not answered."""
        said = self.summary()
        assert not said["error"], said
        return int(said["sent"]) - int(said["answered"])


class Stream(_End):
    """A TCP connection on which numbered lines are sent and echoed until it is asked what became of it."""

    def __init__(self, source: Place, address: str) -> None:
        super().__init__(source, _RUNNING, "send", address)

    def __enter__(self) -> Stream:
        return self

    def broken(self) -> str:
        """Ends it. Why the stream is not as it should be; empty when all that was sent came back."""
        said = self.summary()
        return f"{said}" if said["error"] or said["sent"] != said["echoed"] else ""


class Echo(_End):
    """The stream's other end, listening when it is made."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, _LISTENING, "echo")

    def __enter__(self) -> Echo:
        return self


class Traffic:
    """A ping and a stream from one container to another's address."""

    def __init__(self, pings: Pings, stream: Stream) -> None:
        self._pings = pings
        self._stream = stream

    def harm(self) -> list[str]:
        """Ends both. What was lost, in words; empty when nothing was."""
        lost, broken = self._pings.lost(), self._stream.broken()
        return ([f"{lost} packets lost"] if lost else []) + ([f"stream: {broken}"] if broken else [])


@contextlib.contextmanager
def traffic(source: Place, target: Place, address: str) -> Iterator[Traffic]:
    """Traffic from `source` to `target`, which has `address`."""
    with Echo(target), Pings(source, address) as pings, Stream(source, address) as stream:
        yield Traffic(pings, stream)


# --- the ends -----------------------------------------------------------------------------------------------------


def _stopping() -> threading.Event:
    """Set by SIGINT."""
    told = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: told.set())
    return told


def _echo() -> None:
    with socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        print(_LISTENING, flush=True)
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(65536):
                connection.sendall(data)


def _send(address: str) -> None:
    stopping = _stopping()
    said: dict[str, Any] = {"sent": 0, "echoed": 0, "retransmitted": 0, "error": ""}
    try:
        with socket.create_connection((address, PORT), timeout=_PATIENCE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lines = connection.makefile("rb")
            while said["sent"] < _LEAST or not stopping.is_set():
                line = b"%d\n" % said["sent"]
                connection.sendall(line)
                said["sent"] += 1
                if lines.readline() != line:
                    raise OSError(f"line {said['sent']} was not echoed")
                said["echoed"] += 1
                if said["echoed"] == 1:
                    print(_RUNNING, flush=True)
                time.sleep(_PAUSE)
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            (said["retransmitted"],) = struct.unpack_from("I", info, _TCP_INFO_TOTAL_RETRANS)
    except OSError as error:
        said["error"] = str(error) or type(error).__name__
    print(json.dumps(said), flush=True)


class _Pinger:
    """Echo requests with a number each, and who was answered. What the kernel refuses to send was sent, and is lost."""

    def __init__(self, address: str) -> None:
        family, protocol, self._request, self._reply = _ECHO[6 if ":" in address else 4]
        self._mark = os.urandom(8)
        self._headers = family == socket.AF_INET  # which come with what is received
        self._socket = socket.socket(family, socket.SOCK_RAW, protocol)
        self._socket.setblocking(False)
        self._socket.connect((address, 0))
        self.sent = 0
        self.answered: set[int] = set()

    def send(self) -> None:
        """Sends the next one."""
        body = struct.pack("!HHHH", 0, 0, os.getpid() & 0xFFFF, self.sent & 0xFFFF) + self._mark
        body += struct.pack("!Q", self.sent)
        body = bytes([self._request, 0]) + struct.pack("!H", _checksum(bytes([self._request, 0]) + body[2:])) + body[4:]
        self.sent += 1
        with contextlib.suppress(OSError):
            self._socket.send(body)

    def hear(self, seconds: float) -> None:
        """Waits so long for an answer, and takes what there is."""
        if not select.select([self._socket], [], [], max(0.0, seconds))[0]:
            return
        with contextlib.suppress(OSError):
            while packet := self._socket.recv(2048):
                message = packet[4 * (packet[0] & 15) :] if self._headers else packet
                if message[:1] == bytes([self._reply]) and message[8:16] == self._mark:
                    self.answered.add(struct.unpack_from("!Q", message, 16)[0])


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes; of ICMPv6 the kernel makes its own."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def _ping(address: str) -> None:
    stopping = _stopping()
    pinger, told = _Pinger(address), False
    began = due = time.monotonic()
    while pinger.sent < _LEAST or not stopping.is_set():
        if (now := time.monotonic()) >= due:
            pinger.send()
            due = now + _INTERVAL
        pinger.hear(due - time.monotonic())
        if pinger.answered and not told:
            print(_RUNNING, flush=True)
            told = True
        if not told and now > began + _PATIENCE:
            break
    last = time.monotonic() + _PATIENCE / 6
    while len(pinger.answered) < pinger.sent and time.monotonic() < last:
        pinger.hear(last - time.monotonic())
    error = "" if pinger.answered else "nothing was answered"
    print(json.dumps({"sent": pinger.sent, "answered": len(pinger.answered), "error": error}), flush=True)


if __name__ == "__main__":
    ends: dict[str, Callable[..., None]] = {"echo": _echo, "send": _send, "ping": _ping}
    ends[sys.argv[1]](*sys.argv[2:])
