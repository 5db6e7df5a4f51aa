"""The runtime of another machine: Debian's arm64 Python, copied here, read from its ELF headers, run by emulation.

mmdebstrap unpacks the packages without running any of them (`--variant=extract`). QEMU's user emulation runs single
arm64 programs on this kernel: it stands for the processor alone, so the kernel's page size and the exec of a shebang
stay untried. Needs a Debian mirror and takes some seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cni_plugin
from podwire.install import layout as layouts
from podwire.install.interpreter import base_interpreter, survey
from podwire.install.plan import RuntimePlan, plan_runtime, read_elf_file
from podwire.install.runtime import FLAGS, assemble, relocate
from tests.unit.install_fixtures import CONFIGURATION, RESULT, VARIABLES, VERSION_ANSWER, Node, short_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap (Debian: apt install mmdebstrap)"),
    pytest.mark.skipif(not shutil.which("patchelf"), reason="needs patchelf (Debian: apt install patchelf)"),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="needs Debian 12's Python, 3.11, to compile for it"),
]

ARM64 = 183
PLUGIN = Path(cni_plugin.__file__).parent


def unpack(architecture: str, packages: str, folder: Path) -> Path:
    """A folder with these packages and what they depend on, unpacked."""
    command = ["mmdebstrap", "--quiet", f"--arch={architecture}", "--variant=extract", f"--include={packages}"]
    done = subprocess.run([*command, "bookworm", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a Debian mirror: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    """A root of Debian 12 for arm64, as far as its Python needs one."""
    return unpack("arm64", "python3.11,libc-bin", folder / "root")


@pytest.fixture(scope="module")
def qemu(folder: Path) -> str:
    """The emulator of a single arm64 program, itself linked statically."""
    return str(unpack("amd64", "qemu-user-static", folder / "emulator") / "usr/bin/qemu-aarch64-static")


@pytest.fixture(scope="module")
def plan(root: Path, qemu: str) -> RuntimePlan:
    python = root / "usr/bin/python3.11"
    names = sorted(path.stem for path in PLUGIN.glob("*.py") if path.stem != "__init__")
    return plan_runtime(python, survey([qemu, "-L", root, python, FLAGS], PLUGIN.parent, names), root)


@pytest.fixture(scope="module")
def runtime(folder: Path, plan: RuntimePlan) -> Path:
    """The runtime, at the path for which it is made."""
    runtime = folder / "runtime"
    assemble(plan, PLUGIN, runtime, base_interpreter())
    relocate(plan, runtime, runtime)
    return runtime


def test_everything_comes_from_the_foreign_root(plan: RuntimePlan, root: Path) -> None:
    assert plan.machine.name == "arm64"
    assert plan.loader is not None
    assert plan.loader.name == "ld-linux-aarch64.so.1"
    assert {"libc.so.6", "libm.so.6"} <= set(plan.libraries)
    sources = [each.source for each in (*plan.sources, *plan.extensions)]
    files = [plan.python, plan.loader, *plan.libraries.values(), *sources]
    assert [path for path in files if not path.is_relative_to(root)] == []


def test_the_headers_name_the_runtime_and_its_machine_alone(runtime: Path) -> None:
    programs = [path for path in runtime.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"]
    assert {read_elf_file(path).machine for path in programs} == {ARM64}
    python = read_elf_file(runtime / "bin/python3")
    assert (python.interpreter, python.rpath) == (f"{runtime}/lib/ld-linux-aarch64.so.1", (f"{runtime}/lib",))
    there = {path.name for path in (runtime / "lib").iterdir()}
    assert {name for path in programs for name in read_elf_file(path).needed} <= there


def test_its_segments_suit_kernels_with_pages_of_64_k(runtime: Path) -> None:
    data = (runtime / "bin/python3").read_bytes()
    table, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, table + number * size) for number in range(count)]
    loads = [(offset, address, align) for kind, _, offset, address, _, _, _, align in headers if kind == 1]
    assert len(loads) > 1
    assert [(offset - address) % 0x10000 for offset, address, _ in loads] == [0] * len(loads)
    assert min(align for _, _, align in loads) >= 0x10000


def test_it_answers_under_emulation(runtime: Path, qemu: str, folder: Path) -> None:
    node = Node(folder / "node")
    script = folder / "podwire"
    script.write_bytes(layouts.script(runtime / "bin/python3", FLAGS, runtime, node.socket, node.queue, {"ADD": 60}))

    def call(command: str) -> subprocess.CompletedProcess[bytes]:
        environment = {**VARIABLES, "CNI_COMMAND": command, "PYTHONHOME": "/nonexistent", "LD_LIBRARY_PATH": "/lib"}
        words = [qemu, str(runtime / "bin/python3"), FLAGS, str(script)]
        return subprocess.run(words, env=environment, input=CONFIGURATION, capture_output=True, check=False)

    version = call("VERSION")
    assert (version.returncode, version.stdout, version.stderr) == (0, VERSION_ANSWER, b"")
    with node.daemon():
        added = call("ADD")
    assert (added.returncode, added.stdout, added.stderr) == (0, RESULT, b"")
    assert json.loads(call("ADD").stdout)["code"] == 11
    assert os.listdir(runtime / "lib/python3.11/cni_plugin").count("__pycache__") == 0
