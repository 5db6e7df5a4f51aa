"""Numbered datagrams at a steady rate, each echoed; how many were lost, on their way there and back, phase by phase.

steady_udp.py RATE SOCKET SOCKET …   descriptors of a client, connected, and its server, for each flow; RATE a second of
                                     each. A line of standard input begins a phase of that name; at its end one line of
                                     JSON: by phase, how many were sent, and how many were lost there, and back

A process of its own, since a thread of pytest's would stand still while that works. A datagram that cannot be sent is
lost. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence

_NUMBER = struct.Struct("!I")
_BURST = 16
_PATIENCE = 10.0  # seconds in which the last ones may arrive
_RCVBUFFORCE, _ROOM = 33, 1 << 24  # for seconds in which the process does not get to run


class Flow:
    """One client and its server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.sent = 0
        self.asked, self.answered = set[int](), set[int]()
        for each in (client, server):
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _ROOM)

    def send(self) -> None:
        """The next one."""
        with contextlib.suppress(OSError):
            self.client.send(_NUMBER.pack(self.sent))
        self.sent += 1

    def serve(self) -> None:
        """Echoes what has come."""
        with contextlib.suppress(OSError):
            while True:
                data, source = self.server.recvfrom(64)
                self.asked.add(*_NUMBER.unpack(data))
                self.server.sendto(data, source)

    def hear(self) -> None:
        """Takes what has come back."""
        with contextlib.suppress(OSError):
            while True:
                self.answered.add(*_NUMBER.unpack(self.client.recv(64)))


def _run(flows: Sequence[Flow], rate: float) -> list[tuple[str, list[int]]]:
    """Until standard input ends. The phases, with the number of the first datagram of each flow."""
    poll = select.poll()
    work = {sys.stdin.fileno(): lambda: None}
    for flow in flows:
        work |= {flow.client.fileno(): flow.hear, flow.server.fileno(): flow.serve}
    for descriptor in work:
        poll.register(descriptor, select.POLLIN)
    phases, due, lines = [("the beginning", [0] * len(flows))], time.monotonic(), b""
    until = 0.0
    while not until or (time.monotonic() < until and any(len(each.answered) < each.sent for each in flows)):
        for _ in range(0 if until else _BURST):
            if time.monotonic() >= due:
                due += 1 / rate
                for flow in flows:
                    flow.send()
        for descriptor, _ in poll.poll(1):
            work[descriptor]()
            if descriptor != sys.stdin.fileno():
                continue
            said = os.read(descriptor, 4096)
            if not said:
                poll.unregister(descriptor)
                until = time.monotonic() + _PATIENCE
            *whole, lines = (lines + said).split(b"\n")
            phases += [(each.decode(), [flow.sent for flow in flows]) for each in whole]
        due = max(due, time.monotonic() - 0.1)
    return phases


def _main(rate: float, descriptors: Sequence[int]) -> None:
    ends = [socket.socket(fileno=each) for each in descriptors]
    flows = [Flow(one, other) for one, other in zip(ends[::2], ends[1::2], strict=True)]
    phases = _run(flows, rate)
    found = {name: {"sent": 0, "there": 0, "back": 0} for name, _ in phases}
    for number, flow in enumerate(flows):
        firsts = [at[number] for _, at in phases]
        for each in range(flow.sent):
            about = found[phases[bisect_right(firsts, each) - 1][0]]
            about["sent"] += 1
            about["there"] += each not in flow.asked
            about["back"] += each in flow.asked and each not in flow.answered
    print(json.dumps(found), flush=True)


class Steady:
    """The same from a test."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def phase(self, name: str) -> None:
        """What is sent from now on is sent in this phase."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{name}\n")
        self._child.stdin.flush()

    def lost(self) -> dict[str, dict[str, int]]:
        """The phases in which something was lost; sends no more. Raises AssertionError when too little was sent."""
        out, _ = self._child.communicate(timeout=60)
        found: dict[str, dict[str, int]] = json.loads(out)
        assert sum(each["sent"] for each in found.values()) > 1000, found
        return {name: each for name, each in found.items() if each["there"] or each["back"]}


@contextlib.contextmanager
def steady(pairs: Sequence[tuple[socket.socket, socket.socket]], rate: float = 1000) -> Iterator[Steady]:
    """Datagrams from each first socket, which is connected, to the second."""
    descriptors = [each.fileno() for pair in pairs for each in pair]
    child = subprocess.Popen(
        [sys.executable, __file__, str(rate), *map(str, descriptors)],
        pass_fds=descriptors,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield Steady(child)
        finally:
            child.kill()


if __name__ == "__main__":
    _main(float(sys.argv[1]), [int(each) for each in sys.argv[2:]])
