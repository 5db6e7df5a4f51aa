"""Who this daemon is: the machine's node id, its boot, and that it is the only daemon here."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from pathlib import Path

from podwire.errors import PodwireError


class AlreadyRunning(PodwireError):
    """Another daemon runs on this node."""


def boot_id() -> str:
    """The kernel's id of this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def boottime_ns() -> int:
    """CLOCK_BOOTTIME in nanoseconds: goes on while the machine sleeps, and nobody sets it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boottime() -> float:
    """`boottime_ns` in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def node_id(state_dir: Path) -> str:
    """The UUID of this machine as a node, made at its first start and kept in `state_dir`."""
    path = state_dir / "node-id"
    try:
        return str(uuid.UUID(path.read_text(encoding="ascii").strip()))
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise PodwireError(f"{path} does not hold a UUID; remove it to make this a new node") from error
    made = str(uuid.uuid4())
    temporary = path.with_suffix(".new")
    with open(temporary, "w", encoding="ascii") as file:
        file.write(made + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(state_dir)
    return made


def take_lock(run_dir: Path) -> int:
    """A lock that lasts as long as the process. Raises AlreadyRunning, naming the holder's process id."""
    path = run_dir / "ipamd.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise AlreadyRunning(
            f"{path} is locked by process {holder or '?'}: one daemon runs on this node already"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def sync_directory(path: Path) -> None:
    """Makes a rename or removal in the directory durable (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
