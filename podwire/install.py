"""Lays the CNI executable down on a node that has a Python.

    <bin dir>/podwire                          a script of a few lines: interpreter, paths, deadlines
    <bin dir>/../podwire/<version>-<hash>/     cni_plugin with its .pyc, which never change once written
    <conf dir>/10-podwire.conflist             last, because a runtime takes the node for ready when it appears

Runtimes may start the executable at any moment of this. So each step leaves something whole: the folder is renamed into
place before the script that names it, the script replaces its predecessor by rename (one that is running keeps its
file), and the old folder stays for executables that are still at work. What is there already is left alone, to the byte
and the time stamp.

The .pyc are compiled by the interpreter that the script names, and marked as not to be checked against their sources:
without them a call takes 50 ms, with them the import costs one. Python's flags -I and -S keep PYTHONPATH, PYTHONHOME,
site-packages and modules beside the script out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

import cni_plugin
import podwire
from cni_plugin.main import DEADLINES
from podwire.errors import PodwireError

BIN_DIR = Path("/opt/cni/bin")
CONF_DIR = Path("/etc/cni/net.d")
SOCKET = Path("/run/podwire/ipamd.sock")
QUEUE_DIR = Path("/var/lib/podwire/del-queue")
NETWORK = "podwire"

EXECUTABLE = "podwire"
CONFLIST = "10-podwire.conflist"
OLDEST_PYTHON = (3, 9)

_SHEBANG_LIMIT = 127  # kernels before 5.1 cut a first line there: BINPRM_BUF_SIZE
_SUN_PATH = 107  # unix(7), without the terminating zero
_NETWORK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # CNI specification, § Network configuration

_SCRIPT = """\
#!{python} -IS
# Podwire's CNI executable, written by `podwire install`, which also overwrites it.
import sys

sys.path.insert(0, {folder!r})
sys.dont_write_bytecode = True
try:
    from cni_plugin.main import main
except Exception as error:
    told = '{{"cniVersion": "1.0.0", "code": 5, "msg": "the CNI plugin is damaged, install it again", "details": "%s"}}'
    print(told % ascii(str(error)).replace("\\\\", "/").replace('"', "'"))
    sys.exit(1)
main(socket={socket!r}, queue={queue!r}, deadlines={deadlines!r})
"""

_PROBE = "import sys; print(sys.version_info[0], sys.version_info[1], sys.implementation.cache_tag)"
_COMPILE = """
import py_compile, sys
for source in sys.argv[1:]:
    py_compile.compile(source, doraise=True, dfile=source.rpartition("/")[2],
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


class InstallError(PodwireError):
    """The executable cannot be laid down as asked. What was there before is still whole."""


class Interpreter(msgspec.Struct, frozen=True, kw_only=True):
    """A Python that can run the executable: its absolute path and the tag that its .pyc carry ("cpython-311")."""

    path: Path
    cache_tag: str


def install(
    cni_bin_dir: Path,
    cni_conf_dir: Path | None,
    socket: Path = SOCKET,
    queue_dir: Path = QUEUE_DIR,
    network: str = NETWORK,
    python: Path | None = None,
    deadlines: Mapping[str, float] = DEADLINES,
) -> Path:
    """Lays down executable and, with a `cni_conf_dir`, configuration; returns the executable's path.

    `socket` is the daemon's, `queue_dir` is where a DEL waits for it; both absolute. `python` defaults to the base of
    the interpreter that runs this, `deadlines` are seconds by CNI command. Raises InstallError.
    """
    _check(socket, queue_dir, network)
    interpreter = find_interpreter(python)
    bin_dir = Path(os.path.abspath(cni_bin_dir))
    try:
        bin_dir.mkdir(parents=True, exist_ok=True)
        folder = _lay_package(bin_dir.parent / "podwire", interpreter)
        script = _SCRIPT.format(
            python=interpreter.path,
            folder=str(folder),
            socket=str(socket),
            queue=str(queue_dir),
            deadlines=dict(deadlines),
        )
        executable = bin_dir / EXECUTABLE
        replace(executable, script.encode(), 0o755)
        if cni_conf_dir is not None:
            cni_conf_dir.mkdir(parents=True, exist_ok=True)
            replace(cni_conf_dir / CONFLIST, conflist(network), 0o644)
    except (OSError, UnicodeError) as error:
        raise InstallError(f"cannot install into {bin_dir}: {error}") from error
    return executable


def conflist(network: str) -> bytes:
    """The network configuration list. It offers 1.1.0 beside 1.0.0: containerd 1.6 and 1.7 reject 1.1.0 alone."""
    configuration = {
        "name": network,
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "plugins": [{"type": EXECUTABLE}],
    }
    return json.dumps(configuration, indent=2).encode() + b"\n"


def find_interpreter(python: Path | None = None) -> Interpreter:
    """`python`, or the base interpreter of this process (a virtual environment may go away), if a shebang can name it.

    Raises InstallError when the path does not fit a shebang, does not run, or is older than 3.9.
    """
    if python is None:
        python = Path(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))
    text = str(python)
    if not python.is_absolute() or any(character.isspace() for character in text):
        raise InstallError(
            f"the Python {text!r} must be an absolute path without white space, a shebang takes no other"
        )
    if len(os.fsencode(f"#!{text} -IS")) > _SHEBANG_LIMIT:
        raise InstallError(
            f"the Python {text!r} makes a shebang longer than {_SHEBANG_LIMIT} bytes; link to it from nearer"
        )
    try:
        probe = subprocess.run([text, "-IS", "-c", _PROBE], capture_output=True, text=True, timeout=30, check=True)
        major, minor, cache_tag = probe.stdout.split()
        version = int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise InstallError(f"the Python {text!r} does not run: {' '.join(str(error).split())}") from error
    if version < OLDEST_PYTHON:
        raise InstallError(f"the Python {text!r} is {major}.{minor}, the executable needs 3.9 or newer")
    return Interpreter(path=python, cache_tag=cache_tag)


def replace(path: Path, content: bytes, mode: int) -> None:
    """Writes a file so that whoever opens it sees the old or the new one, whole; does nothing when it is there."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content and path.stat().st_mode & 0o7777 == mode and not path.is_symlink():
            return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        _write_synced(temporary, content, mode)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _check(socket: Path, queue_dir: Path, network: str) -> None:
    for name, path in (("socket", socket), ("queue directory", queue_dir)):
        if not path.is_absolute():
            raise InstallError(
                f"the {name} {str(path)!r} must be an absolute path: runtimes start the executable anywhere"
            )
    if len(os.fsencode(socket)) > _SUN_PATH:
        raise InstallError(
            f"the socket {str(socket)!r} is longer than the {_SUN_PATH} bytes that a unix socket's path may have"
        )
    if not _NETWORK_NAME.fullmatch(network):
        raise InstallError(
            f"the network name {network!r} must begin with a letter or digit and hold only letters, digits, "
            "'_', '.' and '-'"
        )


def _lay_package(parent: Path, interpreter: Interpreter) -> Path:
    """The folder that holds `cni_plugin` with its .pyc, named by what is in it; made whole or not at all."""
    source = Path(cni_plugin.__file__).parent
    modules = {path.name: path.read_bytes() for path in sorted(source.glob("*.py"))}
    digest = hashlib.sha256(interpreter.cache_tag.encode())
    for name, content in modules.items():
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    folder = parent / f"{podwire.__version__}-{digest.hexdigest()[:12]}"
    if _is_whole(folder, modules, interpreter):
        return folder
    temporary = parent / f".{folder.name}.{secrets.token_hex(6)}.tmp"
    package = temporary / "cni_plugin"
    try:
        package.mkdir(parents=True)
        for name, content in modules.items():
            _write_synced(package / name, content, 0o644)
        _compile(package, modules, interpreter)
        for directory in (package / "__pycache__", package, temporary, parent):
            if directory != parent:
                directory.chmod(0o755)
            _sync(directory)
        if folder.exists():  # damaged: moved aside first, since no folder is renamed over a full one
            folder.rename(temporary.with_suffix(".old"))
        temporary.rename(folder)
        _sync(parent)
    finally:
        for leftover in (temporary, temporary.with_suffix(".old")):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _compile(package: Path, modules: Mapping[str, bytes], interpreter: Interpreter) -> None:
    sources = [str(package / name) for name in modules]
    done = subprocess.run([interpreter.path, "-IS", "-c", _COMPILE, *sources], capture_output=True, text=True)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-300:]
        raise InstallError(f"the Python {str(interpreter.path)!r} cannot compile the executable: {reason}")
    for compiled in (package / "__pycache__").iterdir():
        compiled.chmod(0o644)
        _sync(compiled)


def _is_whole(folder: Path, modules: Mapping[str, bytes], interpreter: Interpreter) -> bool:
    package = folder / "cni_plugin"
    try:
        return all(
            (package / name).read_bytes() == content
            and (package / "__pycache__" / f"{name[:-3]}.{interpreter.cache_tag}.pyc").stat().st_size > 0
            for name, content in modules.items()
        )
    except OSError:
        return False


def _write_synced(path: Path, content: bytes, mode: int) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
