"""Processes that outlive the command that starts them, and how they are found again.

A process of a lab is detached (its own session, its output in a log file) and marked: its environment says
`PODWIRE_LAB=<lab>`, which its children inherit. Its record is its process id with its start time, since ids are used
again. The mark is there from the first instant, the record follows; so `down` goes by marks and namespaces, and records
serve who wants one certain process. Reading /proc for a hundred processes takes about 3 ms.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from podwire.errors import PodwireError
from podwire.lab.names import LabFiles
from podwire.lab.state import MARK, write_atomically

_PROC = Path("/proc")
_POLL = 0.02  # seconds between looks at a condition


class Process(msgspec.Struct, frozen=True):
    """A process, for good: `started` is field 22 of /proc/PID/stat, in clock ticks since boot."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """False when it is gone, or dead and only waited for, or when another process has its id by now."""
        return _stat(self.pid) == self.started

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        """Sends the signal, when it is still there."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, with_signal)

    def wait_gone(self, seconds: float) -> bool:
        """Waits until it is gone; False when it is still there after `seconds`."""
        with contextlib.suppress(PodwireError):
            wait_for(lambda: not self.alive and _buried(self.pid), seconds, f"process {self.pid} to end")
        return not self.alive


def _buried(pid: int) -> bool:
    """False while a child of this process is there; takes the exit code of a dead one, which else stays as a zombie."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # someone else's
        return True


def _stat(pid: int) -> int | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command before it may hold spaces and brackets
    # The first thread shows as a zombie while others are still on their way out, and hold the namespace.
    ended = fields[0] in "ZX" and int(fields[17]) <= 1
    return None if ended else int(fields[19])


def marked_environment(lab: str) -> dict[str, str]:
    """The environment of a process of the lab: the caller's, with the mark."""
    return {**os.environ, MARK: lab}


def start(files: LabFiles, role: str, command: Sequence[str], environment: dict[str, str] | None = None) -> Process:
    """Starts a detached process with its output appended to the log of its role, and records it."""
    with files.log(role).open("ab") as log:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=marked_environment(files.lab) | (environment or {}),
            start_new_session=True,
            cwd="/",
        )
    process = Process(child.pid, _stat(child.pid) or 0)
    child.returncode = 0  # it is not ours to wait for: Popen must not complain about it
    write_atomically(files.processes / f"{role}.json", msgspec.json.encode(process))
    return process


def recorded(files: LabFiles, role: str) -> Process | None:
    """The process last started in that role, dead or alive; None when there was none."""
    try:
        return msgspec.json.decode((files.processes / f"{role}.json").read_bytes(), type=Process)
    except FileNotFoundError:
        return None


def last_lines(path: Path, count: int = 10) -> str:
    """The end of a log, indented, for an error message; empty when there is no log or nothing in it."""
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_text(errors="replace").splitlines()[-count:]
        return "".join(f"\n    {line}" for line in lines)
    return ""


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until `condition` holds. Raises PodwireError that names `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise PodwireError(f"waited {seconds:.0f} s for {what}")
        time.sleep(_POLL)


# --- finding ----------------------------------------------------------------------------------------------------


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir(_PROC) if entry.isdigit())


def in_namespaces(inodes: frozenset[int]) -> list[int]:
    """The ids of the processes whose network namespace has one of these inode numbers."""
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}/ns/net").st_ino in inodes:
                found.append(pid)
    return found


def marked(lab: str) -> list[int]:
    """The ids of the processes that carry the lab's mark."""
    wanted = f"{MARK}={lab}".encode()
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if wanted in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def kill_all(find: Callable[[], list[int]], seconds: float, spared: frozenset[int] = frozenset()) -> None:
    """Kills what `find` finds, until it finds nothing more. Raises PodwireError when something is left."""
    killed: set[Process] = set()

    def none_left() -> bool:
        pids = [pid for pid in find() if pid not in spared]
        found = [Process(pid, started) for pid in pids if (started := _stat(pid)) is not None]
        killed.update(found)
        for process in found:
            process.kill()
        return not found

    wait_for(none_left, seconds, "the lab's processes to end")
    for process in killed:  # one that is on its way out shows neither its environment nor its namespace any more
        process.wait_gone(seconds)


def ancestors() -> frozenset[int]:
    """This process and those that it descends from: a `down` that is run from inside a lab must not kill itself."""
    found = []
    pid = os.getpid()
    while pid > 1:
        found.append(pid)
        text = (_PROC / str(pid) / "stat").read_text()
        pid = int(text[text.rindex(")") + 2 :].split()[1])
    return frozenset(found)
