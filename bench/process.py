"""One process, timed from before exec to after its end, by the same path whatever is run.

The clock runs around posix_spawn (which forks nothing of this interpreter's memory), reading standard output to its end
and wait4: what a runtime waits for. Pipes are made and standard input is filled before the clock starts. The spawning
itself costs about 0.5 ms of it, as a benchmark of /bin/true shows, and is the same for everyone.

The process starts in the network namespace of the calling thread, so a caller enters the node first (podwire.netns).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Mapping

import msgspec

from podwire.errors import PodwireError

DEADLINE = 60.0  # seconds; far beyond anything that is measured, for what hangs
_LARGEST_STDIN = 1 << 16  # what a pipe takes before anybody reads it


class BenchFailed(PodwireError):
    """What was to be measured did not work, so there is no number."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A process that has ended: wall and CPU time (its own and that of the processes it waited for), in seconds."""

    seconds: float
    cpu_seconds: float
    exit_code: int
    stdout: bytes
    stderr: bytes


def run(command: list[str], environment: Mapping[str, str], stdin: bytes = b"") -> Finished:
    """Runs `command` (its first word an absolute path) to its end. Raises BenchFailed when it does not end."""
    if len(stdin) > _LARGEST_STDIN:
        raise BenchFailed(f"{len(stdin)} bytes of standard input are more than a pipe holds")
    reading, filling = os.pipe2(os.O_CLOEXEC)
    os.write(filling, stdin)
    os.close(filling)
    answering, writing = os.pipe2(os.O_CLOEXEC)
    complaints = os.memfd_create("stderr", os.MFD_CLOEXEC)
    actions = [
        (os.POSIX_SPAWN_DUP2, reading, 0),
        (os.POSIX_SPAWN_DUP2, writing, 1),
        (os.POSIX_SPAWN_DUP2, complaints, 2),
    ]
    try:
        began = time.perf_counter()
        pid = os.posix_spawn(command[0], command, environment, file_actions=actions, setsigdef=[signal.SIGPIPE])
        os.close(writing)
        writing = -1
        try:
            stdout = _read(answering, command[0])
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - began
        stderr = os.pread(complaints, 1 << 16, 0)
    finally:
        for descriptor in (reading, answering, writing, complaints):
            if descriptor >= 0:
                os.close(descriptor)
    return Finished(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        exit_code=os.waitstatus_to_exitcode(status),
        stdout=stdout,
        stderr=stderr,
    )


def _read(descriptor: int, name: str) -> bytes:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    parts: list[bytes] = []
    while True:
        if not poller.poll(DEADLINE * 1000):
            raise BenchFailed(f"{name} did not answer within {DEADLINE:.0f} s")
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)


def cpu_of(pid: int) -> float:
    """The seconds that all threads of a running process have been on a CPU, to the nanosecond (0 where not counted).

    Source: /proc/PID/task/TID/schedstat, Documentation/scheduler/sched-stats.rst. Threads that ended are not in it.
    """
    total = 0
    for task in os.scandir(f"/proc/{pid}/task"):
        try:
            with open(f"{task.path}/schedstat", encoding="ascii") as file:
                total += int(file.read().split()[0])
        except FileNotFoundError:
            continue
    return total / 1e9
