"""What runs through a fault: a ping at 100 a second, and a TCP stream that is echoed.

A ping counts packets. A stream shows what a ping does not: that connection tracking and the path in both directions
stayed as they were, since a connection whose peer is forgotten for a moment is reset or stalls. It sends numbered lines
and reads them back, in order and complete.

Run as a program, this file is the stream's ends, for a namespace that a test enters with nsenter.
"""

from __future__ import annotations

import contextlib
import json
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
_TCP_INFO_TOTAL_RETRANS = 100  # the offset of tcpi_total_retrans in struct tcp_info, linux/tcp.h


class Place(Protocol):
    """Where a command can be started: a container."""

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Starts a command there, with its output in a pipe."""


class _Ended:
    """A process that is killed with its block, unless it was asked for its result before."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __enter__(self) -> _Ended:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def summary(self) -> str:
        """What it prints on SIGINT."""
        self._process.send_signal(signal.SIGINT)
        out, _ = self._process.communicate(timeout=20)
        return out


class Pings(_Ended):
    """A ping at 100 a second that runs until it is asked how many were lost."""

    def __init__(self, source: Place, address: str) -> None:
        super().__init__(source.start("ping", "-q", "-i", "0.01", "-W", "1", address))

    def __enter__(self) -> Pings:
        return self

    def lost(self) -> int:
        """Ends it. How many were not answered."""
        out = self.summary()
        words = next(line for line in out.splitlines() if "packets transmitted" in line).split()
        sent, received = int(words[0]), int(words[3])
        assert sent > 5, out
        return sent - received


class Stream(_Ended):
    """A TCP connection on which numbered lines are sent and echoed until it is asked what became of it."""

    def __init__(self, source: Place, address: str) -> None:
        super().__init__(source.start(sys.executable, "-IS", __file__, "send", address))

    def __enter__(self) -> Stream:
        return self

    def broken(self) -> str:
        """Ends it. Why the stream is not as it should be; empty when all that was sent came back."""
        out = self.summary()
        said: dict[str, Any] = json.loads(out.splitlines()[-1]) if out.strip() else {"error": "it died"}
        if said["error"] or said["sent"] != said["echoed"] or said["sent"] < 5:
            return f"{said}"
        return ""


class Echo(_Ended):
    """The stream's other end, listening when it is made."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.start(sys.executable, "-IS", __file__, "echo"))
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

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


def _echo() -> None:
    with socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        print("listening", flush=True)
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(65536):
                connection.sendall(data)


def _send(address: str) -> None:
    stopping = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopping.set())
    said: dict[str, Any] = {"sent": 0, "echoed": 0, "retransmitted": 0, "error": ""}
    try:
        with socket.create_connection((address, PORT), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lines = connection.makefile("rb")
            while not stopping.is_set():
                line = b"%d\n" % said["sent"]
                connection.sendall(line)
                said["sent"] += 1
                if lines.readline() != line:
                    raise OSError(f"line {said['sent']} was not echoed")
                said["echoed"] += 1
                time.sleep(_PAUSE)
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            (said["retransmitted"],) = struct.unpack_from("I", info, _TCP_INFO_TOTAL_RETRANS)
    except OSError as error:
        said["error"] = str(error) or type(error).__name__
    stopping.wait()
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    ends: dict[str, Callable[..., None]] = {"echo": _echo, "send": _send}
    ends[sys.argv[1]](*sys.argv[2:])
