"""Where a DEL waits for a daemon that is down.

A runtime that is told of a failed DEL keeps the pod terminating for as long as the daemon is away, and a runtime that
is told of success never asks again. So success is told when the request is on disk: written to a temporary file,
synced, renamed, the folder synced. The daemon replays `*.del` in the order of their names and deletes them; anything
else in the folder is an attempt that did not come that far.

    <issued_at>-<pid>-<random>.del     one encoded CallRequest with its boot_id       0600, in a folder of 0700
"""

import posix

from cni_plugin.environment import Environment
from cni_plugin.errors import QueueError
from cni_plugin.protocol import encode_request

SUFFIX = ".del"
BOOT_ID = "/proc/sys/kernel/random/boot_id"


def enqueue(folder: str, environment: Environment, stdin: bytes, issued_at: int) -> str:
    """Queues a DEL, durably, and returns the file's path. `issued_at` is CLOCK_BOOTTIME in nanoseconds.

    Raises QueueError with the reason; then nothing is queued.
    """
    name = f"{issued_at:020d}-{posix.getpid()}-{posix.urandom(8).hex()}"
    path = f"{folder}/{name}{SUFFIX}"
    temporary = f"{folder}/.{name}.tmp"
    try:
        request = encode_request(environment, stdin, issued_at, _read_boot_id())
        _make_folder(folder)
        try:
            _write_synced(temporary, request)
            posix.rename(temporary, path)
        except OSError:
            _unlink_quietly(temporary)
            raise
        _sync_folder(folder)
    except OSError as error:
        raise QueueError(f"cannot queue the deletion in {folder}: {error.strerror or error}") from error
    return path


def _read_boot_id() -> bytes:
    descriptor = posix.open(BOOT_ID, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return posix.read(descriptor, 64).strip()
    finally:
        posix.close(descriptor)


def _make_folder(folder: str) -> None:
    """The folder (0700), and its parents where they are missing; each new name is synced into its parent."""
    try:
        posix.mkdir(folder, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        parent = _parent(folder)
        if parent == folder:
            raise
        _make_folder(parent)
        _make_folder(folder)
        return
    _sync_folder(_parent(folder))


def _write_synced(path: str, data: bytes) -> None:
    descriptor = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[posix.write(descriptor, left) :]
        posix.fsync(descriptor)
    finally:
        posix.close(descriptor)


def _sync_folder(folder: str) -> None:
    descriptor = posix.open(folder, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
    try:
        posix.fsync(descriptor)
    finally:
        posix.close(descriptor)


def _unlink_quietly(path: str) -> None:
    """The attempt has failed already, and its reason is what matters."""
    try:  # noqa: SIM105 (contextlib is an import)
        posix.unlink(path)
    except OSError:
        pass


def _parent(folder: str) -> str:
    return folder.rstrip("/").rpartition("/")[0] or "/"
