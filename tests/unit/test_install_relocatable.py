"""The runtime that brings its own Python: what it consists of, and what of a node's environment cannot reach it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import cni_plugin
from podwire.cli.main import main
from podwire.install import InstallError, install
from podwire.install import versions as installed_versions
from podwire.install.plan import MACHINES, read_elf_file

pytestmark = pytest.mark.skipif(not shutil.which("patchelf"), reason="needs patchelf (Debian: apt install patchelf)")

VERSION_ANSWER = b'{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}\n'
ATTACHMENT = {
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/a",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
}


def lay(folder: Path, host_cni_bin_dir: Path | None = None, python: Path | None = None) -> Path:
    """Installs into `folder`, with a socket at which nobody listens."""
    return install(
        folder / "bin",
        folder / "net.d",
        folder / "nobody.sock",
        folder / "queue",
        python=python,
        runtime="relocatable",
        host_cni_bin_dir=host_cni_bin_dir,
    )


def runtime_of(executable: Path) -> Path:
    """The one versioned folder beside the executable's."""
    (folder,) = (executable.parent.parent / "podwire").iterdir()
    return folder


def start(
    executable: Path, command: str, variables: Mapping[str, str], stdin: bytes = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    environment = {**variables, "CNI_COMMAND": command}
    return subprocess.run([executable], env=environment, input=stdin, capture_output=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def executable() -> Iterator[Path]:
    """An installed executable; in a folder of its own, since a shebang is short and pytest's names are long."""
    with tempfile.TemporaryDirectory(prefix="pw-") as folder:
        yield lay(Path(folder))


# --- what lies there ------------------------------------------------------------------------------------------------


LOADED = """
import sys, json, cni_plugin.main, cni_plugin.queue, cni_plugin.failure
maps = [line.split() for line in open("/proc/self/maps")]
code = [words[5] for words in maps if "x" in words[1] and words[5:] and words[5][0] == "/"]
specs = [module.__spec__ for module in list(sys.modules.values()) if module.__spec__]
print(json.dumps(code + sys.path + [spec.origin for spec in specs if spec.has_location]))
"""


def test_all_code_that_is_loaded_is_the_runtimes_own(executable: Path) -> None:
    runtime = runtime_of(executable)
    command = [str(runtime / "bin" / "python3"), "-ISXutf8", "-c", LOADED]
    loaded = json.loads(subprocess.run(command, capture_output=True, check=True, env={}).stdout)
    assert len(loaded) > 20
    assert [path for path in loaded if not path.startswith(f"{runtime}/")] == []


def test_the_interpreter_names_its_own_loader_and_searches_its_own_folder_first(executable: Path) -> None:
    runtime = runtime_of(executable)
    elf = read_elf_file(runtime / "bin" / "python3")
    assert Path(elf.interpreter).parent == runtime / "lib"
    assert elf.rpath == (str(runtime / "lib"),)  # DT_RPATH goes before LD_LIBRARY_PATH, DT_RUNPATH after (ld.so(8))
    assert elf.runpath == ()
    libraries = [path for path in runtime.rglob("*") if ".so" in path.name]
    assert {MACHINES[read_elf_file(path).machine].name for path in libraries} <= {MACHINES[elf.machine].name}
    assert not any(read_elf_file(path).rpath or read_elf_file(path).runpath for path in libraries)


def test_modules_are_compiled_without_sources_and_never_checked(executable: Path) -> None:
    runtime = runtime_of(executable)
    assert list((runtime / "lib").rglob("*.py")) == []
    compiled = list(runtime.rglob("*.pyc"))
    assert {"os.pyc", "main.pyc"} <= {path.name for path in compiled}
    assert {path.read_bytes()[4:8] for path in compiled} == {b"\1\0\0\0"}  # PEP 552: by hash, not checked
    assert {path.stem for path in compiled if path.parent.name == "cni_plugin"} == {
        path.stem for path in Path(cni_plugin.__file__).parent.glob("*.py")
    }


def test_the_manifest_is_what_sha256sum_checks(executable: Path) -> None:
    runtime = runtime_of(executable)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "MANIFEST"], cwd=runtime, check=True)
    named = {line.split("  ")[1] for line in (runtime / "MANIFEST").read_text().splitlines()}
    there = {str(path.relative_to(runtime)) for path in runtime.rglob("*") if path.is_file()}
    assert named == there - {"MANIFEST"}


def test_whoever_may_read_it_may_run_it(executable: Path) -> None:
    runtime = runtime_of(executable)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [runtime, *runtime.rglob("*")]}
    programs = {path for path in modes if path.name.startswith("ld-linux") or path.name == "python3"}
    assert {modes[path] for path in modes if path.is_dir()} == {0o755}
    assert {modes[path] for path in programs} == {0o755}
    assert {modes[path] for path in modes if path.is_file() and path not in programs} == {0o644}


def test_installing_again_and_running_change_nothing(executable: Path) -> None:
    folder = executable.parent.parent

    def state() -> dict[str, tuple[int, int, str]]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            str(path): (path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in files
        }

    before = state()
    lay(folder)
    start(executable, "ADD", ATTACHMENT, b"\xff")
    assert state() == before


@pytest.mark.parametrize("victim", ["bin/python3", "lib/libc.so.6", "encodings/__init__.pyc", "MANIFEST", "more"])
def test_a_damaged_runtime_is_mended_without_being_away(victim: str, executable: Path) -> None:
    runtime = runtime_of(executable)
    inode = runtime.stat().st_ino
    path = next((path for path in runtime.rglob("*") if str(path).endswith(victim)), runtime / "lib/python3.11/json.py")
    damaged = path.with_name("damaged")
    damaged.write_bytes(b"damaged")
    damaged.rename(path)
    lay(executable.parent.parent)
    assert installed_versions.is_whole(runtime)
    assert runtime_of(executable).stat().st_ino == inode
    assert start(executable, "VERSION", {}).stdout == VERSION_ANSWER


# --- a hostile environment ------------------------------------------------------------------------------------------

PYTHON_VARIABLES = {
    "PYTHONHOME": "/nonexistent",
    "PYTHONPATH": "{trap}",
    "PYTHONPLATLIBDIR": "elsewhere",
    "PYTHONSTARTUP": "{trap}/json.py",
    "PYTHONHASHSEED": "none",
    "PYTHONMALLOC": "none",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "none",
    "PYTHONWARNINGS": "error",
    "PYTHONDEVMODE": "1",
    "PYTHONINSPECT": "1",
    "PYTHONVERBOSE": "1",
    "PYTHONEXECUTABLE": "/nonexistent",
    "PYTHONSAFEPATH": "",
}
HOSTILE: dict[str, dict[str, str]] = {
    "nothing at all": {},
    "PYTHONPATH with modules of the same names": {"PYTHONPATH": "{trap}"},
    "PYTHONHOME": {"PYTHONHOME": "/nonexistent"},
    "every variable of Python": PYTHON_VARIABLES,
    "libraries of the same names": {"LD_LIBRARY_PATH": "{trap}"},
    "a library path of nonsense": {"LD_LIBRARY_PATH": ":::/nonexistent:$ORIGIN:\x01;"},
    "a locale that is not there": {"LC_ALL": "xx_XX.KOI8-R", "LANG": "tr_TR", "LANGUAGE": "xx"},
    "a locale that is no text": {"LC_ALL": "\udcff" * 300},
    "a locale of another code": {"LC_ALL": "{locale}", "LOCPATH": "{locales}"},
    "a locale that cannot be converted": {"LC_ALL": "{locale}", "LOCPATH": "{locales}", "GCONV_PATH": "{trap}"},
    "a home that is not there": {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "PATH": ""},
}


@pytest.fixture(scope="module")
def trap() -> Iterator[Path]:
    """A folder of modules and libraries with names that a call needs, none of which may be loaded."""
    with tempfile.TemporaryDirectory(prefix="pw-") as name:
        folder = Path(name)
        for module in ("socket", "json", "re", "os", "posix", "sitecustomize", "encodings", "cni_plugin", "errno"):
            (folder / f"{module}.py").write_text("raise SystemExit('the trap was loaded')")
        for library in ("libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1"):
            (folder / library).write_text("this is no library")
        (folder / "EUC-JP.so").write_text("this is no library")
        (folder / "gconv-modules").write_text("module EUC-JP// INTERNAL EUC-JP 1\nmodule INTERNAL EUC-JP// EUC-JP 1\n")
        yield folder


@pytest.fixture(scope="module")
def foreign_locale(trap: Path) -> dict[str, str]:
    """A compiled locale whose code is not UTF-8, and where it is; without it the name alone."""
    locale = "ja_JP.EUC-JP"
    if shutil.which("localedef"):
        command = ["localedef", "-i", "ja_JP", "-f", "EUC-JP", str(trap / "locales" / locale)]
        (trap / "locales").mkdir(exist_ok=True)
        subprocess.run(command, capture_output=True, check=False)
    return {"locale": locale, "locales": str(trap / "locales")}


def quiet_error(done: subprocess.CompletedProcess[bytes]) -> int:
    """The code of the CNI error that was printed, alone and on standard output."""
    assert done.returncode == 1, done
    assert done.stderr == b""
    return int(json.loads(done.stdout)["code"])


@pytest.mark.parametrize("case", HOSTILE)
def test_an_environment_that_would_mislead_it(
    case: str, executable: Path, trap: Path, foreign_locale: dict[str, str]
) -> None:
    variables = {name: value.format(trap=trap, **foreign_locale) for name, value in HOSTILE[case].items()}
    version = start(executable, "VERSION", variables, cwd=trap)
    assert (version.returncode, version.stdout, version.stderr) == (0, VERSION_ANSWER, b"")
    assert quiet_error(start(executable, "ADD", {**variables, **ATTACHMENT}, b"{}", cwd=trap)) == 11


def test_a_library_to_preload_that_is_missing_is_the_loaders_complaint_alone(executable: Path) -> None:
    done = start(executable, "VERSION", {"LD_PRELOAD": "/nonexistent/hook.so"})
    assert (done.returncode, done.stdout) == (0, VERSION_ANSWER)
    assert b"cannot be preloaded" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "stdin", [b"\x00{", b"{\x00", b"\xff\xfe{", b"\x00\x00\xfe\xff", b"\xef\xbb\xbf{", b"\xff" * 99]
)
def test_a_configuration_in_any_code_finds_its_codec(stdin: bytes, executable: Path) -> None:
    assert quiet_error(start(executable, "ADD", ATTACHMENT, stdin)) == 11


def test_a_working_directory_that_is_gone(executable: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = 'cd "$0" && rmdir "$0" && exec "$1"'
    done = subprocess.run(
        ["/bin/sh", "-c", shell, gone, executable], env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, VERSION_ANSWER, b"")


# --- a node whose folders are mounted elsewhere ----------------------------------------------------------------------


def test_the_nodes_own_paths_are_written_and_the_files_lie_where_we_see_them(tmp_path: Path) -> None:
    executable = lay(tmp_path / "host", host_cni_bin_dir=Path("/opt/cni/bin"))
    runtime = runtime_of(executable)
    of_the_node = f"/opt/cni/podwire/{runtime.name}"
    assert executable.read_text().splitlines()[0] == f"#!{of_the_node}/bin/python3 -ISXutf8"
    elf = read_elf_file(runtime / "bin" / "python3")
    assert (os.path.dirname(elf.interpreter), elf.rpath) == (f"{of_the_node}/lib", (f"{of_the_node}/lib",))
    assert (runtime / "lib" / os.path.basename(elf.interpreter)).is_file()


def test_another_place_on_the_node_is_another_version(tmp_path: Path) -> None:
    one = lay(tmp_path, host_cni_bin_dir=Path("/opt/cni/bin")).read_text().splitlines()[0]
    two = lay(tmp_path, host_cni_bin_dir=Path("/usr/libexec/cni")).read_text().splitlines()[0]
    assert one.split("/")[-3] != two.split("/")[-3]


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "white space in the node's path": ("/opt/my cni/bin", "without white space"),
    "a node's path that a shebang cuts": (f"/opt/{'x' * 90}/bin", "longer than 127 bytes"),
    "a relative node's path": ("opt/cni/bin", "absolute path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_node_paths_that_cannot_be(case: str, tmp_path: Path) -> None:
    host, reason = REFUSED[case]
    with pytest.raises(InstallError, match=reason):
        lay(tmp_path, host_cni_bin_dir=Path(host))
    assert list(tmp_path.iterdir()) == []


def test_without_patchelf_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folders = ["--cni-bin-dir", str(tmp_path / "bin"), "--cni-conf-dir", str(tmp_path / "net.d")]
    assert main(["install", *folders]) == 1
    said = capsys.readouterr().err
    assert "apt install patchelf" in said
    assert "--runtime system" in said
    assert list(tmp_path.iterdir()) == []
    assert main(["install", *folders, "--runtime", "system"]) == 0


def test_a_python_that_is_named_is_used_in_place(tmp_path: Path) -> None:
    folders = ["--cni-bin-dir", str(tmp_path / "bin"), "--cni-conf-dir", str(tmp_path / "net.d")]
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    assert main(["install", *folders, "--python", python]) == 0
    assert (tmp_path / "bin" / "podwire").read_text().startswith(f"#!{python} -IS\n")


def test_a_script_is_no_python_to_copy(tmp_path: Path) -> None:
    script = tmp_path / "python3"
    script.write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} "$@"\n')
    script.chmod(0o755)
    with pytest.raises(InstallError, match=r"python3: it is no 64-bit little-endian ELF file"):
        lay(tmp_path / "node", python=script)
    assert not (tmp_path / "node").exists()
