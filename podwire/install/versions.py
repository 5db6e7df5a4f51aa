"""The versioned folders beside the CNI bin directory: made whole, recognised, and collected when no call needs them.

    <version>-<12 hex digits>/              what an executable names; never changes once it is there
        MANIFEST                            sha256 of every file in it, as sha256sum(1) writes and checks it
        SUPERSEDED                          since when no executable names it (the file's time)
    .<name>.<random>.tmp/                   an attempt that was cut short, or a removal

**When an old folder goes.** A runtime that has opened the old executable may still be on its way to the interpreter
that it names, and a call under way loads modules when it first needs them. So a folder goes only when no executable has
named it for longer than a call can last (every wait of a call has a deadline), and no process runs from it. The first
is enough by itself, which counts where the node's processes cannot be seen: an installer in a container. What has to
stay goes with a later installation.

A damaged folder is mended file by file, because the moment between two renames of a folder is one in which calls fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import podwire
from podwire.install.files import is_temporary, sync, temporary_beside, write_synced
from podwire.install.layout import Layout

PYTHON = "bin/python3"
"""The interpreter of a version that brings one."""
MANIFEST = "MANIFEST"
SUPERSEDED = "SUPERSEDED"
_FORMAT = b"1"
"""Changes when the same parts are laid out in another way."""
_VERSION_NAME = re.compile(r".+-[0-9a-f]{12}")


class Version(Protocol):
    """What an executable runs on: a folder of this name with `cni_plugin` in it, and what the shebang says."""

    @property
    def name(self) -> str:
        """The folder's name, which other content would not have."""

    @property
    def interpreter(self) -> Path:
        """The shebang's Python, where the node sees it."""

    @property
    def flags(self) -> str:
        """The shebang's one argument."""

    def build(self, folder: Path) -> None:
        """Fills a folder that does not exist yet. Raises InstallError and OSError."""

    def check(self) -> None:
        """Raises InstallError when a call could not start from the folder that is now in its place."""


def name_version(parts: Mapping[str, bytes]) -> str:
    """The folder's name for these parts; other parts, another name."""
    digest = hashlib.sha256()
    for what, content in sorted({**parts, "format": _FORMAT}.items()):
        digest.update(f"\0{what}\0{len(content)}\0".encode() + content)
    return f"{podwire.__version__}-{digest.hexdigest()[:12]}"


def plugin_parts(plugin: Path) -> dict[str, bytes]:
    """The sources of the package `plugin`, as parts of a version's name."""
    return {f"cni_plugin {source.name}": source.read_bytes() for source in plugin.glob("*.py")}


def copy_plugin(plugin: Path, folder: Path) -> list[Path]:
    """Copies the sources of the package `plugin` to `folder`/cni_plugin, which must not exist; returns the copies."""
    package = folder / "cni_plugin"
    package.mkdir(parents=True)
    copies = []
    for source in sorted(plugin.glob("*.py")):
        copies.append(package / source.name)
        shutil.copyfile(source, copies[-1])
        copies[-1].chmod(0o644)
    return copies


def lay(layout: Layout, version: Version) -> None:
    """Makes sure that the version's folder is there, whole, and works. The caller holds the lock on its parent."""
    folder = layout.versions / version.name
    if not is_whole(folder):
        temporary = temporary_beside(folder)
        try:
            version.build(temporary)
            _seal(temporary)
            _put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    version.check()


def is_whole(folder: Path) -> bool:
    """Whether the folder holds what its manifest says, and nothing else."""
    try:
        manifest = (folder / MANIFEST).read_text()
        return manifest.endswith("\n") and manifest == _manifest(folder)
    except (OSError, UnicodeError):
        return False


def _seal(folder: Path) -> None:
    """Writes the manifest of a folder that is complete, gives its folders their mode and syncs all of it."""
    for path in _files(folder):
        sync(path)
    write_synced(folder / MANIFEST, _manifest(folder).encode(), 0o644)
    for path in [*(each for each in folder.rglob("*") if each.is_dir()), folder]:
        path.chmod(0o755)
        sync(path)


def _put_in_place(sealed: Path, folder: Path) -> None:
    """Gives a sealed folder its name; when there is a damaged one, it is mended from the sealed one instead."""
    if not folder.is_dir():
        folder.unlink(missing_ok=True)
        sealed.rename(folder)
    else:
        new = {path.relative_to(sealed) for path in [*_files(sealed), sealed / MANIFEST]}
        for inner in sorted(new, key=lambda path: path.name == MANIFEST):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            (sealed / inner).rename(folder / inner)
        for path in _files(folder):
            if path.relative_to(folder) not in new:
                path.unlink()
    sync(folder.parent)


def collect(layout: Layout, current: str, grace: float) -> None:
    """Removes the versions other than `current` that no executable has named for `grace` seconds and no process uses.

    The caller holds the lock on the versions' folder. Raises OSError.
    """
    for path in list(layout.versions.iterdir()):
        if is_temporary(path.name):
            shutil.rmtree(path, ignore_errors=True)
    (layout.versions / current / SUPERSEDED).unlink(missing_ok=True)
    old = [folder for folder in version_folders(layout) if folder.name != current]
    due = [folder for folder in old if _superseded_for(folder) >= grace]
    if not due:
        return
    used = in_use(layout, due)
    for folder in due:
        if folder not in used:
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a version so that it is never seen half; what resists is left under a name that the next one removes."""
    leftover = temporary_beside(folder)
    folder.rename(leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def version_folders(layout: Layout) -> list[Path]:
    """The versioned folders that are there, by name; whatever else lies beside them is not ours."""
    if not layout.versions.is_dir():
        return []
    return sorted(each for each in layout.versions.iterdir() if _VERSION_NAME.fullmatch(each.name) and each.is_dir())


def in_use(layout: Layout, folders: Iterable[Path]) -> dict[Path, list[int]]:
    """The folders from which processes run, with their ids, as far as /proc shows them.

    A runtime of ours is known by its interpreter's inode, which is the same in every mount namespace. A call on the
    node's own Python does not show which version it has loaded, so it holds all those without an interpreter.
    """
    by_inode: dict[tuple[int, int], Path] = {}
    without = []
    for folder in folders:
        try:
            status = (folder / PYTHON).stat()
            by_inode[status.st_dev, status.st_ino] = folder
        except OSError:
            without.append(folder)
    used: dict[Path, list[int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            status = os.stat(f"/proc/{pid}/exe")
            runtime = by_inode.get((status.st_dev, status.st_ino))
            if runtime:
                used.setdefault(runtime, []).append(pid)
            elif without and _runs(pid, layout.node_executable):
                for folder in without:
                    used.setdefault(folder, []).append(pid)
    return used


def _runs(pid: int, executable: Path) -> bool:
    """Whether the process is our script on some Python: interpreter, flags and script are its first three words."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return len(words) > 3 and words[1].startswith(b"-IS") and words[2] == os.fsencode(executable)


def _superseded_for(folder: Path) -> float:
    """Seconds since the folder was first seen superseded, which is now when it was not yet. Wall-clock time."""
    stamp = folder / SUPERSEDED
    with contextlib.suppress(FileExistsError):
        write_synced(stamp, b"", 0o644)
    return max(0.0, time.time() - stamp.stat().st_mtime)


def _manifest(folder: Path) -> str:
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" for path in _files(folder)]
    return "\n".join(lines) + "\n"


def _files(folder: Path) -> list[Path]:
    ours = (folder / MANIFEST, folder / SUPERSEDED)
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path not in ours)
