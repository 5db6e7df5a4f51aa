"""The Python that is used in place or copied: found, asked what it is, and asked what it imports.

Nothing lists what an interpreter needs to start: which modules are compiled in or frozen differs by distribution and
version. So the interpreter itself is asked. SURVEY imports the executable's modules and walks its error paths in a
process of its own, with the flags of the real thing, and says which modules came from files. The same program run on
the copy (`podwire.install.runtime`) shows that nothing was forgotten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from podwire.install.errors import InstallError
from podwire.install.layout import check_shebang

OLDEST_PYTHON = (3, 9)
FLAGS = "-IS"
_SECONDS = 30

_PROBE = "import sys; print(sys.version_info[0], sys.version_info[1], sys.implementation.cache_tag)"

# The codecs are those that json.loads may guess of bytes (RFC 4627 § 3), and those of a process's own texts.
SURVEY = """
import sys
sys.dont_write_bytecode = True
if sys.argv[1]:
    sys.path.append(sys.argv[1])
for name in sys.argv[2:]:
    __import__("cni_plugin." + name)
import codecs, json
for codec in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be", "utf-32-le", "ascii",
              "latin-1"):
    codecs.lookup(codec)
    json.loads('{"a": [1, 2.5, "b", null]}'.encode(codec))
try:
    json.loads(b"{")
except ValueError:
    pass
import os
files = [(name, module.__spec__.origin, bool(module.__spec__.submodule_search_locations))
         for name, module in sorted(sys.modules.items())
         if getattr(module, "__spec__", None) and module.__spec__.has_location]
print(json.dumps({"stdlib": os.path.dirname(os.__file__), "prefix": sys.prefix, "modules": files}))
"""

COMPILE = """
import json, py_compile, sys
for source, shown, target in json.load(sys.stdin):
    py_compile.compile(source, target, shown, True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


class Interpreter(msgspec.Struct, frozen=True, kw_only=True):
    """A Python that can run the executable: its absolute path and the tag that its .pyc carry ("cpython-311")."""

    path: Path
    cache_tag: str


class LoadedModule(msgspec.Struct, frozen=True, array_like=True):
    """A module that came from a file: its dotted name, the file, and whether it is a package."""

    name: str
    origin: str
    package: bool


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What running the executable's modules loads: the modules from files, and where the standard library lies."""

    stdlib: str
    prefix: str
    modules: tuple[LoadedModule, ...]


def base_interpreter() -> Path:
    """The Python that runs this, not that of a virtual environment, which may go away."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))


def find_interpreter(python: Path | None = None) -> Interpreter:
    """`python`, or the base interpreter of this process, if a shebang can name it.

    Raises InstallError when the path does not fit a shebang, does not run, or is older than 3.9.
    """
    python = python or base_interpreter()
    check_shebang(python, FLAGS)
    try:
        major, minor, cache_tag = run([python, FLAGS, "-c", _PROBE]).split()
        version = int(major), int(minor)
    except ValueError as error:
        raise InstallError(f"the Python {str(python)!r} does not run: it says other things than a Python") from error
    if version < OLDEST_PYTHON:
        raise InstallError(f"the Python {str(python)!r} is {major}.{minor}, the executable needs 3.9 or newer")
    return Interpreter(path=python, cache_tag=cache_tag)


def survey(command: Sequence[str | Path], package_parent: Path | None, names: Sequence[str]) -> Survey:
    """What the Python started by `command` loads for the modules `names` of cni_plugin, found in `package_parent`
    or, when that is None, on its own search path. Raises InstallError when something is missing to it.
    """
    said = run([*command, "-c", SURVEY, str(package_parent or ""), *names])
    try:
        return msgspec.json.decode(said, type=Survey)
    except msgspec.DecodeError as error:
        raise InstallError(f"the Python {str(command[0])!r} did not say what it loads: {error}") from error


def compile_modules(python: Path, modules: Iterable[tuple[Path, str, Path]]) -> None:
    """Compiles each (source, name that errors show, target), marked as not to be checked against its source.

    Raises InstallError when one cannot be.
    """
    todo = [(str(source), shown, str(target)) for source, shown, target in modules]
    run([python, FLAGS, "-c", COMPILE], json.dumps(todo))
    for _, _, target in todo:
        os.chmod(target, 0o644)


def run(command: Sequence[str | Path], stdin: str = "") -> str:
    """What a Python prints. Raises InstallError with the end of its complaint."""
    what = f"the Python {str(command[0])!r} does not run"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, input=stdin)
    except (OSError, subprocess.SubprocessError) as error:
        raise InstallError(f"{what}: {' '.join(str(error).split())}") from error
    if done.returncode:
        raise InstallError(f"{what}: {' '.join(done.stderr.split())[-300:] or f'it ended with {done.returncode}'}")
    return done.stdout
