"""What the demonstration watches on its way: a ping that goes on, and one packet on the wire."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from podwire.errors import PodwireError
from podwire.lab import process
from podwire.lab.state import LabState

_CAPTURE_SECONDS = 30
_SNAPSHOT = re.compile(r"(\d+)/(\d+) packets")  # answered, sent


@contextlib.contextmanager
def pinging(netns: Path, address: str) -> Iterator[Callable[[], tuple[int, int]]]:
    """A ping that runs, and can be asked how many it has sent, and how many were answered.

    It is asked on the way (SIGQUIT), again and again until nothing is on its way: when it ends, what was just sent
    would count as lost.
    """
    words = ["nsenter", f"--net={netns}", "--", "ping", "-q", "-i", "0.01", address]
    ping = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert ping.stderr is not None
    says = ping.stderr

    def look() -> tuple[int, int]:
        ping.send_signal(signal.SIGQUIT)
        for line in says:
            if found := _SNAPSHOT.search(line):
                return int(found[2]), int(found[1])
        raise PodwireError(f"the ping to {address} has ended")

    def count() -> tuple[int, int]:
        deadline = time.monotonic() + _CAPTURE_SECONDS
        while True:
            sent, answered = look()
            if answered >= sent or time.monotonic() > deadline:
                return sent, answered
            time.sleep(0.05)

    try:
        yield count
    finally:
        ping.kill()
        ping.communicate()


@contextlib.contextmanager
def capture(lab: LabState, port: str, wanted: str) -> Iterator[Callable[[], list[str]]]:
    """Captures one packet on a port of the underlay's switch. It gives a function that waits for tcpdump's lines."""
    tcpdump_words = ["tcpdump", "-l", "-n", "-t", "-c", "1", "-i", port, wanted]
    with tempfile.TemporaryFile() as said:
        tcpdump = subprocess.Popen(
            ["nsenter", f"--net={lab.netns('underlay')}", "--", *tcpdump_words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.PIPE,
            env=process.marked_environment(lab.name),
        )
        try:
            _wait_listening(tcpdump)

            def lines() -> list[str]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tcpdump.wait(_CAPTURE_SECONDS)
                said.seek(0)
                return said.read().decode(errors="replace").splitlines()

            yield lines
        finally:
            tcpdump.kill()
            tcpdump.communicate()


def _wait_listening(tcpdump: subprocess.Popen[bytes]) -> None:
    assert tcpdump.stderr is not None
    said = b""
    deadline = time.monotonic() + _CAPTURE_SECONDS
    while b"listening on" not in said:
        if not select.select([tcpdump.stderr], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise PodwireError("tcpdump does not begin to listen")
        data = os.read(tcpdump.stderr.fileno(), 4096)
        if not data:
            raise PodwireError(f"tcpdump: {said.decode(errors='replace').strip()}")
        said += data
