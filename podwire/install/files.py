"""Files that are seen whole or not at all, by runtimes that may open them at any moment, and after a power cut.

A name is given to a file only when the content is synced: rename(2) replaces what carried the name, and whoever has
that open or runs it keeps it. Nothing is opened for writing under the name that others use: no exec meets ETXTBSY.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def replace(path: Path, content: bytes, mode: int) -> None:
    """Writes a file so that whoever opens it sees the old or the new one, whole; does nothing when it is there."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content and path.stat().st_mode & 0o7777 == mode and not path.is_symlink():
            return
    temporary = temporary_beside(path)
    try:
        write_synced(temporary, content, mode)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, which `is_temporary` recognises."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether the name is one that `temporary_beside` makes: an attempt that was cut short, or goes on."""
    return name.startswith(".") and name.endswith(".tmp")


def write_synced(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that must not exist, with its mode whatever the umask, and syncs it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Syncs a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other installations out of it. The lock is on the folder itself and leaves no file."""
    while True:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_still(descriptor, folder):
                continue  # an uninstallation has removed it while we waited
            yield
            return
        finally:
            os.close(descriptor)


def _is_still(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
