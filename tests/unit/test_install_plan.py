"""What a runtime consists of, decided from files alone: the loader's search, and machines other than this one.

The ELF files of the table are written here, as small as they can be: header, program headers, one dynamic segment.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from podwire.install import InstallError
from podwire.install.elf import read_elf
from podwire.install.interpreter import LoadedModule, Survey
from podwire.install.plan import plan_runtime

AMD64, ARM64, RISCV = 62, 183, 243
_NEEDED, _STRTAB, _SONAME, _RPATH, _RUNPATH = 1, 5, 14, 15, 29


def elf(
    machine: int = AMD64, interpreter: str = "", needed: tuple[str, ...] = (), rpath: str = "", runpath: str = ""
) -> bytes:
    """An ELF file that asks for this. Its one PT_LOAD puts the file at an address that is not its offset."""
    base, strings, dynamic = 0x400000, b"\0", []
    for tag, value in [*((_NEEDED, name) for name in needed), (_RPATH, rpath), (_RUNPATH, runpath)]:
        if value:
            dynamic.append((tag, len(strings)))
            strings += value.encode() + b"\0"
    head = 64 + 3 * 56
    table = struct.pack("<qQ", _STRTAB, base + head)
    table += b"".join(struct.pack("<qQ", *entry) for entry in dynamic) + struct.pack("<qQ", 0, 0)
    path = interpreter.encode() + b"\0"
    at_table, at_path = head + len(strings), head + len(strings) + len(table)
    size = at_path + len(path)
    segments = [(1, 0, size), (2, at_table, len(table)), (3 if interpreter else 0, at_path, len(path))]
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    programs = b"".join(
        struct.pack("<IIQQQQQQ", kind, 4, offset, base + offset, base + offset, length, length, 1)
        for kind, offset, length in segments
    )
    return header + programs + strings + table + path


class Root:
    """A root file system of a few files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, path: str, content: bytes | str) -> Path:
        target = self.folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
        return target

    def survey(self, *modules: LoadedModule) -> Survey:
        return Survey(stdlib=f"{self.folder}/usr/lib/python3.11", prefix=f"{self.folder}/usr", modules=modules)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_what_is_written_is_read() -> None:
    found = read_elf(elf(ARM64, "/lib/ld.so", ("libm.so.6", "libc.so.6"), "/a:/b", "$ORIGIN/../lib"))
    assert (found.machine, found.interpreter, found.needed) == (ARM64, "/lib/ld.so", ("libm.so.6", "libc.so.6"))
    assert (found.rpath, found.runpath) == (("/a", "/b"), ("$ORIGIN/../lib",))


WHOLE = elf(interpreter="/lib/ld.so", needed=("libc.so.6",))
NO_ELF = {
    "a script": b"#!/bin/sh\n",
    "nothing": b"",
    "32 bits": b"\x7fELF\1" + WHOLE[5:],
    "big end": b"\x7fELF\2\2" + WHOLE[6:],
    "a header that is cut": WHOLE[:60],
    "program headers that are cut": WHOLE[:100],
    "strings that are cut": WHOLE[:-3],
}


@pytest.mark.parametrize("case", NO_ELF)
def test_what_is_no_such_file(case: str) -> None:
    with pytest.raises(InstallError, match="ELF file"):
        read_elf(NO_ELF[case])


# where the library lies, and who says that it does: the loader's order (ld.so(8)), first to last
PLACES = ["the program's DT_RPATH", "ld.so.conf", "a file that ld.so.conf includes", "the machine's own folder"]


@pytest.mark.parametrize("first", range(len(PLACES)))
@pytest.mark.parametrize(("machine", "triplet"), [(AMD64, "x86_64-linux-gnu"), (ARM64, "aarch64-linux-gnu")])
def test_a_library_is_taken_from_where_the_loader_would(machine: int, triplet: str, first: int, root: Root) -> None:
    folders = ["/opt/python/lib", "/first", "/second", f"/lib/{triplet}"]
    root.write("/etc/ld.so.conf", "# comment\n/first\ninclude ld.so.conf.d/*.conf\n")
    root.write("/etc/ld.so.conf.d/more.conf", "/second # here\n")
    loader = root.write("/lib/ld-linux.so", elf(machine))
    for folder in folders[first:]:
        root.write(f"{folder}/libc.so.6", elf(machine))
    other = ARM64 if machine == AMD64 else AMD64
    for folder in folders[:first]:
        root.write(f"{folder}/libc.so.6", elf(other))  # of another machine: passed over
    python = root.write("/usr/bin/python3", elf(machine, "/lib/ld-linux.so", ("libc.so.6",), "/opt/python/lib"))
    plan = plan_runtime(python, root.survey(), root.folder)
    assert plan.libraries == {"libc.so.6": root.folder / folders[first].lstrip("/") / "libc.so.6"}
    assert plan.loader == loader


def test_libraries_of_libraries_and_of_extensions(root: Root) -> None:
    root.write("/lib/ld.so", elf())
    root.write("/usr/lib/liba.so", elf(needed=("libb.so", "ld.so")))
    root.write("/usr/lib/libb.so", elf(needed=("liba.so",), runpath="/nowhere"))
    root.write("/usr/lib/python3.11/own/libown.so", elf())
    needing = elf(needed=("libown.so",), runpath="$ORIGIN/../own")
    extension = root.write("/usr/lib/python3.11/lib-dynload/_json.so", needing)
    python = root.write("/usr/bin/python3", elf(interpreter="/lib/ld.so", needed=("liba.so",)))
    module = LoadedModule("_json", str(extension), False)
    plan = plan_runtime(python, root.survey(module), root.folder)
    assert sorted(plan.libraries) == ["liba.so", "libb.so", "libown.so"]
    assert [each.place for each in plan.extensions] == ["lib-dynload/_json.so"]


def test_modules_go_where_the_interpreter_looks(root: Root) -> None:
    folder = f"{root.folder}/usr/lib/python3.11"
    python = root.write("/usr/bin/python3", elf())
    survey = root.survey(
        LoadedModule("json", f"{folder}/json/__init__.py", True),
        LoadedModule("json.decoder", f"{folder}/json/decoder.py", False),
        LoadedModule("cni_plugin.main", "/elsewhere/cni_plugin/main.py", False),
    )
    plan = plan_runtime(python, survey, root.folder)
    assert plan.stdlib == "lib/python3.11"
    assert plan.loader is None  # linked statically
    assert [each.place for each in plan.sources] == ["json/__init__.pyc", "json/decoder.pyc", "os.pyc"]


def refuse_machine(root: Root) -> Survey:
    root.write("/usr/bin/python3", elf(RISCV))
    return root.survey()


def refuse_loader(root: Root) -> Survey:
    root.write("/usr/bin/python3", elf(ARM64, "/lib/ld.so"))
    root.write("/lib/ld.so", elf(AMD64))
    return root.survey()


def refuse_library(root: Root) -> Survey:
    root.write("/usr/bin/python3", elf(needed=("libpython3.11.so.1.0",)))
    return root.survey()


def refuse_archive(root: Root) -> Survey:
    root.write("/usr/bin/python3", elf())
    return root.survey(LoadedModule("json", "/usr/lib/python311.zip/json/__init__.pyc", True))


def refuse_stdlib(root: Root) -> Survey:
    root.write("/usr/bin/python3", elf())
    return Survey(stdlib="/elsewhere/python3.11", prefix="/usr", modules=())


REFUSED = {
    "a machine that is not known": (refuse_machine, "ELF machine 243; a runtime can be made for amd64, arm64"),
    "a loader of another machine": (refuse_loader, "of another machine than the interpreter"),
    "a library that is nowhere": (refuse_library, "needs the library libpython3.11.so.1.0"),
    "modules in an archive": (refuse_archive, "cannot be copied"),
    "a standard library apart": (refuse_stdlib, "is not below /usr"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pythons_that_cannot_be_copied(case: str, root: Root) -> None:
    prepare, reason = REFUSED[case]
    survey = prepare(root)
    with pytest.raises(InstallError, match=reason):
        plan_runtime(root.folder / "usr/bin/python3", survey, root.folder)
