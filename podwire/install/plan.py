"""What a relocatable Python consists of: decided from files, before anything is written, for the machine they are of.

    interpreter ─▶ PT_INTERP ─▶ loader                     lib/ld-linux-x86-64.so.2
         │  DT_NEEDED, searched as ld.so(8) does ─▶ libraries   lib/libc.so.6 …
    survey ─▶ modules ─┬─ from source ─▶ compiled          lib/python3.11/json/__init__.pyc
                       └─ extensions ─▶ their libraries     lib/python3.11/lib-dynload/….so

Nothing of this asks which machine it runs on: the files say which machine they are of, MACHINES says which of those
are known, and a library of another machine on the search path is passed over. A root other than / is a foreign one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from podwire.install.elf import ElfFile, is_elf, read_elf
from podwire.install.errors import InstallError
from podwire.install.interpreter import Survey


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine by its Debian name, and where libraries of it lie without configuration."""

    name: str
    library_dirs: tuple[str, ...]


_COMMON_DIRS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
MACHINES = {
    62: Machine(name="amd64", library_dirs=("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", *_COMMON_DIRS)),
    183: Machine(name="arm64", library_dirs=("/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu", *_COMMON_DIRS)),
}
"""By e_machine (gABI, § ELF Header)."""


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A module's source or extension, and the place of its .pyc or copy below the standard library's folder."""

    source: Path
    place: str


class RuntimePlan(msgspec.Struct, frozen=True, kw_only=True):
    """All files of a runtime. `stdlib` is relative to its folder; libraries go by the name they are asked for."""

    machine: Machine
    python: Path
    loader: Path | None
    libraries: dict[str, Path]
    stdlib: str
    sources: tuple[Placed, ...]
    extensions: tuple[Placed, ...]


def plan_runtime(python: Path, survey: Survey, root: Path = Path("/")) -> RuntimePlan:
    """The runtime made of the interpreter `python`, a path that exists here, and of what `survey` found it to load.

    `root` is where the libraries are looked for. Raises InstallError when a file or library is not there, or is of a
    machine that is not known.
    """
    binary = read_elf_file(python)
    machine = MACHINES.get(binary.machine)
    if machine is None:
        known = ", ".join(each.name for each in MACHINES.values())
        raise InstallError(f"{python} is for the ELF machine {binary.machine}; a runtime can be made for {known}")
    stdlib = os.path.relpath(survey.stdlib, survey.prefix)
    if stdlib.startswith(".."):
        raise InstallError(f"the standard library {survey.stdlib} is not below {survey.prefix}, and cannot be copied")
    sources, extensions = _places(survey)
    search = _Search(root, machine, binary)
    for extension in extensions:
        search.add(extension.source)
    search.add(python)
    return RuntimePlan(
        machine=machine,
        python=python,
        loader=search.loader(),
        libraries=search.found,
        stdlib=stdlib,
        sources=tuple(sources),
        extensions=tuple(extensions),
    )


def read_elf_file(path: Path) -> ElfFile:
    """The ELF file at `path`. Raises InstallError, which names it."""
    try:
        return read_elf(path.read_bytes())
    except (OSError, InstallError) as error:
        raise InstallError(f"cannot read {path}: {error}") from error


def _places(survey: Survey) -> tuple[list[Placed], list[Placed]]:
    """Where each module goes. `os` goes in any case: by its file the interpreter knows its own folder (getpath)."""
    sources = {"os.pyc": Placed(source=Path(survey.stdlib, "os.py"), place="os.pyc")}
    extensions = []
    for module in survey.modules:
        origin = Path(module.origin)
        if module.name.split(".")[0] == "cni_plugin":
            continue
        if origin.suffix == ".py":
            inner = module.name.replace(".", "/") + ("/__init__.pyc" if module.package else ".pyc")
            sources[inner] = Placed(source=origin, place=inner)
        elif origin.suffix == ".so":
            inner = "/".join(["lib-dynload", *module.name.split(".")[:-1], origin.name])
            extensions.append(Placed(source=origin, place=inner))
        else:
            raise InstallError(f"the module {module.name} is loaded from {origin}, which cannot be copied")
    return [sources[place] for place in sorted(sources)], extensions


class _Search:
    """Libraries by name, found as the loader would (ld.so(8)), of one machine only."""

    def __init__(self, root: Path, machine: Machine, program: ElfFile) -> None:
        self.root = root
        self.machine = machine
        self.program = program
        self.found: dict[str, Path] = {}
        self.dirs = [*_configured(root), *(_inside(root, each) for each in machine.library_dirs)]

    def add(self, path: Path, inherited: Sequence[Path] = ()) -> None:
        """Finds what `path` needs, and what that needs. `inherited` is the DT_RPATH of those that asked for it."""
        elf = read_elf_file(path)
        rpath = [*_origin(path, elf.rpath, self.root), *inherited] if not elf.runpath else list(inherited)
        own = rpath if not elf.runpath else _origin(path, elf.runpath, self.root)
        for name in elf.needed:
            if name in self.found or name == self._loader_name():
                continue
            self.found[name] = self._find(name, path, own)
            self.add(self.found[name], rpath)

    def loader(self) -> Path | None:
        """The program's loader; None when it is linked statically."""
        if not self.program.interpreter:
            return None
        path = _inside(self.root, self.program.interpreter)
        if read_elf_file(path).machine != self.program.machine:
            raise InstallError(f"the loader {path} is of another machine than the interpreter")
        return path

    def _find(self, name: str, wanted_by: Path, own: Sequence[Path]) -> Path:
        for folder in (*own, *self.dirs):
            path = folder / name
            if path.is_file() and self._is_of_machine(path):
                return path
        raise InstallError(f"{wanted_by} needs the library {name}, which is in none of the loader's folders")

    def _is_of_machine(self, path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(20)
        return is_elf(head) and int.from_bytes(head[18:20], "little") == self.program.machine

    def _loader_name(self) -> str:
        return os.path.basename(self.program.interpreter)


def _origin(path: Path, folders: Iterable[str], root: Path) -> list[Path]:
    """DT_RPATH or DT_RUNPATH of `path`, with $ORIGIN as the folder that it is in."""
    here = os.path.dirname(os.path.realpath(path))
    return [
        Path(os.path.normpath(folder.replace("${ORIGIN}", here).replace("$ORIGIN", here)))
        if "ORIGIN" in folder
        else _inside(root, folder)
        for folder in folders
    ]


def _configured(root: Path, path: str = "/etc/ld.so.conf", depth: int = 5) -> list[Path]:
    """The folders that ldconfig(8) is told of, in order; none when there is no such file."""
    try:
        lines = _inside(root, path).read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in (line.partition("#")[0].strip() for line in lines):
        if line.startswith("include ") and depth:
            pattern = os.path.join(os.path.dirname(path), line.removeprefix("include ").strip())
            for match in sorted(glob.glob(str(_inside(root, pattern)))):
                folders += _configured(root, "/" + os.path.relpath(match, root), depth - 1)
        elif line.startswith("/"):
            folders.append(_inside(root, line))
    return folders


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")
