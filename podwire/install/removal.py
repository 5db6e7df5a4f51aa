"""`podwire uninstall`: takes away what `podwire install` laid down, and nothing else.

    conflist ─▶ executable ─▶ calls under way end ─▶ versioned folders ─▶ queue

In that order, the reverse of installing: a runtime stops calling before there is nothing to call. What carries our
name and is not ours (another plugin's executable, a conflist of another network) stays and is named. Deletions that
wait in the queue are promises to a runtime, which was told that they are done: they are not thrown away unasked.

Every step may have been done already, so that a second attempt goes on where the first one stopped.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path

import msgspec

from cni_plugin.main import DEADLINES
from cni_plugin.queue import SUFFIX
from podwire.install import layout as layouts
from podwire.install import versions
from podwire.install.errors import UninstallError
from podwire.install.files import is_temporary, locked, sync
from podwire.install.layout import CONFLIST, EXECUTABLE, MARK, NETWORK, QUEUE_DIR, Layout

PATIENCE = max(DEADLINES.values()) + 10.0
"""Seconds within which every call that is under way has ended."""
_POLL = 0.05


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed, in order, and what carries our name and stays because it is not ours: path and reason."""

    removed: tuple[Path, ...]
    kept: tuple[tuple[Path, str], ...]


def uninstall(
    cni_bin_dir: Path,
    cni_conf_dir: Path | None,
    queue_dir: Path = QUEUE_DIR,
    network: str = NETWORK,
    *,
    force: bool = False,
    host_cni_bin_dir: Path | None = None,
    patience: float = PATIENCE,
) -> Removal:
    """Removes executable, versions and queue, and with a `cni_conf_dir` the configuration of `network`.

    `force` also removes deletions that wait in the queue; their pods' addresses and wires stay until the daemon's own
    repair. Waits up to `patience` seconds for calls under way. Raises UninstallError; what is removed by then stays so.
    """
    waiting = _queued(queue_dir)
    if waiting and not force:
        raise UninstallError(
            f"{len(waiting)} deletions wait in {queue_dir} for the daemon, and the runtime was told that they are "
            "done: start the daemon until the folder is empty, or give them up with --force"
        )
    layout = layouts.layout(cni_bin_dir, host_cni_bin_dir)
    removed: list[Path] = []
    kept: list[tuple[Path, str]] = []
    try:
        if cni_conf_dir is not None:
            _remove_file(
                cni_conf_dir / CONFLIST, _why_not_our_conflist(cni_conf_dir / CONFLIST, network), removed, kept
            )
        if layout.versions.is_dir():
            with locked(layout.versions):
                _remove_executable(layout, removed, kept)
                _wait_for_calls(layout, patience)
                _remove_versions(layout, removed, kept)
        else:
            _remove_executable(layout, removed, kept)
        _remove_queue(queue_dir, force, removed, kept)
    except OSError as error:
        raise UninstallError(f"cannot uninstall from {layout.bin_dir}: {error}") from error
    return Removal(removed=tuple(removed), kept=tuple(kept))


def _remove_executable(layout: Layout, removed: list[Path], kept: list[tuple[Path, str]]) -> None:
    _remove_file(layout.executable, _why_not_our_executable(layout.executable), removed, kept)


def _remove_file(path: Path, foreign: str, removed: list[Path], kept: list[tuple[Path, str]]) -> None:
    if foreign:
        kept.append((path, foreign))
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()
        sync(path.parent)
        removed.append(path)


def _why_not_our_executable(path: Path) -> str:
    """Why the file is not ours; empty when it is, or is not there."""
    try:
        second = path.read_bytes()[:4096].split(b"\n")[1:2]
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except IsADirectoryError:
        return "it is a folder"
    return "" if second and second[0].startswith(MARK) else "it was not written by podwire install"


def _why_not_our_conflist(path: Path, network: str) -> str:
    """Why the file is not ours; empty when it is, or is not there. Ours has our network's name and plugin type."""
    try:
        configuration = json.loads(path.read_bytes())
        types = [plugin["type"] for plugin in configuration["plugins"]]
        name = configuration["name"]
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except IsADirectoryError:
        return "it is a folder"
    except (ValueError, LookupError, TypeError):
        return "it is no network configuration list"
    if EXECUTABLE not in types:
        return f"it has no plugin of type {EXECUTABLE}"
    return "" if name == network else f"it is the network {name!r}, not {network!r}"


def _wait_for_calls(layout: Layout, patience: float) -> None:
    deadline = time.monotonic() + patience
    while used := versions.in_use(layout, versions.version_folders(layout)):
        if time.monotonic() > deadline:
            pids = sorted({pid for each in used.values() for pid in each})
            raise UninstallError(
                f"{', '.join(str(folder) for folder in used)} is still in use by the processes {pids}, and stays; "
                "the executable is gone, ask again when they have ended"
            )
        time.sleep(_POLL)


def _remove_versions(layout: Layout, removed: list[Path], kept: list[tuple[Path, str]]) -> None:
    for folder in versions.version_folders(layout):
        versions.remove(folder)
        removed.append(folder)
    for path in list(layout.versions.iterdir()):
        if is_temporary(path.name):
            shutil.rmtree(path)
    if others := sorted(path.name for path in layout.versions.iterdir()):
        kept.append((layout.versions, f"it holds what is not ours: {', '.join(others)}"))
        return
    layout.versions.rmdir()
    sync(layout.versions.parent)
    removed.append(layout.versions)


def _remove_queue(queue_dir: Path, force: bool, removed: list[Path], kept: list[tuple[Path, str]]) -> None:
    """The queue's folder, and above it what only the queue had needed."""
    if not queue_dir.is_dir():
        return
    waiting = _queued(queue_dir)
    if waiting and not force:
        raise UninstallError(
            f"{len(waiting)} deletions have come into {queue_dir} meanwhile; it stays, as does nothing else"
        )
    for path in [*waiting, *(path for path in queue_dir.iterdir() if is_temporary(path.name))]:
        path.unlink(missing_ok=True)
    if others := sorted(path.name for path in queue_dir.iterdir()):
        kept.append((queue_dir, f"it holds what is not ours: {', '.join(others)}"))
        return
    queue_dir.rmdir()
    removed.append(queue_dir)


def _queued(queue_dir: Path) -> list[Path]:
    """The deletions that wait; none when there is no such folder."""
    return sorted(queue_dir.glob(f"*{SUFFIX}")) if queue_dir.is_dir() else []
