"""The relocatable Python: an interpreter with all that it needs, which nothing of the node can reach into.

    bin/python3                    the interpreter; its loader and DT_RPATH are this folder's, by absolute path
    lib/ld-linux-….so, libc.so.6   loader and libraries, as they were
    lib/python3.11/*.pyc           the few modules of the standard library that a call or an error of it loads
    lib/python3.11/lib-dynload/    extension modules; the folder is there when there are none, or Python complains
    lib/python3.11/cni_plugin/     the executable's own modules
    cni_plugin/*.py                their sources, for readers and for an interpreter that is not this one (layout.py)

**Why DT_RPATH**, which is called obsolete: the loader searches it before LD_LIBRARY_PATH, and DT_RUNPATH after; and it
holds for the libraries' own needs as well, so only the interpreter has to be patched. A library that brings a
DT_RUNPATH of its own would step out of that, and loses it.

**Why .pyc without sources**, marked as not to be checked (PEP 552): a call never compiles, stats no source, and does
not mind which time stamps a copy or an image layer gives. **Why -Xutf8**: otherwise a LANG such as ja_JP.EUC-JP makes
the interpreter look for a codec that is not here, and it dies before the first line of ours.

Made once per version, in a folder that is not yet in use; what it costs is in docs/adr/0003-relocatable-runtime.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from podwire.install.errors import InstallError
from podwire.install.interpreter import base_interpreter, compile_modules, run, survey
from podwire.install.layout import Layout, check_shebang
from podwire.install.plan import RuntimePlan, plan_runtime, read_elf_file
from podwire.install.versions import PYTHON, copy_plugin, name_version, plugin_parts

FLAGS = "-ISXutf8"


class RelocatableVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version of this plan (versions.Version)."""

    layout: Layout
    plugin: Path
    plan: RuntimePlan
    name: str
    flags: str = FLAGS

    @property
    def interpreter(self) -> Path:
        """The copy, where the node sees it."""
        return self.layout.node_versions / self.name / PYTHON

    def build(self, folder: Path) -> None:
        """Copies, tries, relocates."""
        assemble(self.plan, self.plugin, folder, self.plan.python)
        verify(self.plan, self.plugin, folder)
        relocate(self.plan, folder, self.layout.node_versions / self.name)

    def check(self) -> None:
        """Starts the interpreter as the kernel will; where only the node can do that, `verify` has to suffice."""
        if self.layout.bin_dir == self.layout.node_bin_dir:
            run([self.interpreter, FLAGS, "-c", "import cni_plugin.main"])


def relocatable_version(layout: Layout, plugin: Path, python: Path | None = None) -> RelocatableVersion:
    """The version that brings a copy of `python`, by default of the base interpreter of this process.

    Raises InstallError when it cannot be made, and OSError.
    """
    if shutil.which("patchelf") is None:
        raise InstallError(
            "a relocatable runtime needs patchelf (Debian: apt install patchelf); "
            "on a node that has a Python of its own, --runtime system does without"
        )
    plan = plan_from(Path(os.path.realpath(python or base_interpreter())), plugin)
    parts = digest_inputs(plan) | plugin_parts(plugin) | {"for": os.fsencode(layout.node_versions)}
    version = RelocatableVersion(layout=layout, plugin=plugin, plan=plan, name=name_version(parts))
    check_shebang(version.interpreter, FLAGS)
    return version


def digest_inputs(plan: RuntimePlan) -> dict[str, bytes]:
    """All bytes that the runtime is made of, by what they are: the same ones make the same runtime."""
    files = {f"library {name}": path for name, path in plan.libraries.items()}
    files |= {f"module {each.place}": each.source for each in (*plan.sources, *plan.extensions)}
    files |= {"python": plan.python} | ({"loader": plan.loader} if plan.loader else {})
    return {what: path.read_bytes() for what, path in sorted(files.items())}


def plan_from(python: Path, plugin: Path) -> RuntimePlan:
    """The plan of a runtime that is made of this machine's `python`, for the package `plugin`. Raises InstallError."""
    return plan_runtime(python, survey([python, FLAGS], plugin.parent, _module_names(plugin)))


def assemble(plan: RuntimePlan, plugin: Path, folder: Path, compiler: Path) -> None:
    """Copies and compiles all files into `folder`, which must not exist. `compiler` is a Python of the plan's version
    that runs here. Raises InstallError and OSError.
    """
    libraries, stdlib = folder / "lib", folder / plan.stdlib
    (stdlib / "lib-dynload").mkdir(parents=True)
    libraries.mkdir(exist_ok=True)
    todo = [(each.source, each.place, stdlib / each.place) for each in plan.sources]
    todo += [
        (copy, f"cni_plugin/{copy.name}", stdlib / "cni_plugin" / f"{copy.stem}.pyc")
        for copy in copy_plugin(plugin, folder)
    ]
    for _, _, target in todo:
        target.parent.mkdir(parents=True, exist_ok=True)
    compile_modules(compiler, todo)
    for extension in plan.extensions:
        _copy_object(extension.source, stdlib / extension.place)
    for name, path in plan.libraries.items():
        _copy_object(path, libraries / name)
    if plan.loader:
        _copy(plan.loader, libraries / plan.loader.name, 0o755)
    _copy(plan.python, folder / PYTHON, 0o755)


def verify(plan: RuntimePlan, plugin: Path, folder: Path) -> None:
    """Runs what was assembled in `folder` through all that a call may load. Raises InstallError when that fails.

    It is not yet where it will be, so its own loader is started by hand, and it must not be relocated yet.
    """
    command: list[str | Path] = [folder / PYTHON]
    if plan.loader:
        command = [folder / "lib" / plan.loader.name, "--library-path", folder / "lib", *command]
    found = survey([*command, FLAGS], None, _module_names(plugin))
    outside = [module.name for module in found.modules if not module.origin.startswith(f"{folder}/")]
    if outside or not found.stdlib.startswith(f"{folder}/"):
        raise InstallError(f"the copied Python still loads from elsewhere: {', '.join(outside) or found.stdlib}")


def relocate(plan: RuntimePlan, folder: Path, node_folder: Path) -> None:
    """Ties the interpreter in `folder` to the loader and libraries below `node_folder`, where the node will see it."""
    if plan.loader:
        libraries = node_folder / "lib"
        flags = ["--set-interpreter", str(libraries / plan.loader.name), "--force-rpath", "--set-rpath", str(libraries)]
        _patchelf(flags, folder / PYTHON)


def _module_names(plugin: Path) -> list[str]:
    return sorted(source.stem for source in plugin.glob("*.py") if source.stem != "__init__")


def _copy(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _copy_object(source: Path, target: Path) -> None:
    _copy(source, target, 0o644)
    elf = read_elf_file(source)
    if elf.rpath or elf.runpath:
        _patchelf(["--remove-rpath"], target)


def _patchelf(arguments: list[str], path: Path) -> None:
    done = subprocess.run(["patchelf", *arguments, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallError(f"patchelf cannot change the copy of {path.name}: {' '.join(done.stderr.split())[-300:]}")
