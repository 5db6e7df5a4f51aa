"""`podwire install`: what lies on the node afterwards, and what is refused before anything is touched."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import podwire.install
from podwire.cli.main import main
from podwire.install import InstallError, find_interpreter, install

Tree = dict[str, tuple[int, int, int, bytes]]


def tree(folder: Path) -> Tree:
    """Every file below `folder`: inode, mode, time stamp and content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_ino,
            stat.S_IMODE(path.stat().st_mode),
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def lay(folder: Path, network: str = "podwire", socket: str = "/run/podwire/ipamd.sock") -> Path:
    return install(folder / "bin", folder / "net.d", Path(socket), folder / "queue", network)


def version_of(executable: Path) -> object:
    done = subprocess.run([executable], env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True)
    return json.loads(done.stdout)["cniVersion"]


def test_what_lies_there_afterwards(tmp_path: Path) -> None:
    executable = lay(tmp_path, "green")
    assert executable == tmp_path / "bin" / "podwire"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "net.d", "podwire"]
    assert [path.name for path in (tmp_path / "bin").iterdir()] == ["podwire"]
    assert stat.S_IMODE(executable.stat().st_mode) == 0o755
    (conflist,) = (tmp_path / "net.d").iterdir()
    assert conflist.name == "10-podwire.conflist"
    assert json.loads(conflist.read_text()) == {
        "name": "green",
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "plugins": [
            {
                "type": "podwire",
                "capabilities": dict.fromkeys(("bandwidth", "ips", "mac", "portMappings"), True),
                "last": True,
            }
        ],
    }
    assert version_of(executable) == "1.1.0"


def test_every_module_is_compiled_and_not_checked_against_its_source(tmp_path: Path) -> None:
    lay(tmp_path)
    (package,) = (tmp_path / "podwire").glob("*/cni_plugin")
    compiled = {path.name.split(".")[0]: path.read_bytes() for path in (package / "__pycache__").iterdir()}
    assert sorted(compiled) == sorted(path.stem for path in package.glob("*.py"))
    assert {content[4:8] for content in compiled.values()} == {b"\1\0\0\0"}  # PEP 552: by hash, not checked


def test_installing_again_changes_nothing(tmp_path: Path) -> None:
    lay(tmp_path)
    before = tree(tmp_path)
    lay(tmp_path)
    assert tree(tmp_path) == before


def test_running_leaves_nothing_behind(tmp_path: Path) -> None:
    executable = lay(tmp_path)
    before = tree(tmp_path)
    version_of(executable)
    assert tree(tmp_path) == before


def test_other_settings_replace_the_script_and_keep_the_package(tmp_path: Path) -> None:
    executable = lay(tmp_path)
    old = executable.read_text()
    with executable.open() as running:
        lay(tmp_path, socket="/run/other.sock")
        assert running.read() == old  # whoever has it open keeps it whole
    assert "/run/other.sock" in executable.read_text()
    assert len(list((tmp_path / "podwire").iterdir())) == 1


def test_a_new_version_stands_beside_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = lay(tmp_path)
    (old,) = (tmp_path / "podwire").iterdir()
    monkeypatch.setattr(podwire, "__version__", "99.0")
    lay(tmp_path)
    assert old.is_dir()
    assert len(list((tmp_path / "podwire").iterdir())) == 2
    assert "/99.0-" in executable.read_text()
    assert version_of(executable) == "1.1.0"


@pytest.mark.parametrize("victim", ["main.py", "h2.py", "__pycache__"])
def test_a_damaged_package_is_made_whole(victim: str, tmp_path: Path) -> None:
    executable = lay(tmp_path)
    (package,) = (tmp_path / "podwire").glob("*/cni_plugin")
    if victim.endswith(".py"):
        (package / victim).write_text("raise SystemExit(9)")
    else:
        for compiled in (package / victim).iterdir():
            compiled.write_bytes(b"")
    lay(tmp_path)
    assert version_of(executable) == "1.1.0"
    assert [path.name for path in (tmp_path / "podwire").iterdir()] == [package.parent.name]
    assert "SystemExit" not in "".join(path.read_text() for path in package.glob("*.py"))


def test_without_a_configuration_folder_there_is_no_configuration(tmp_path: Path) -> None:
    install(tmp_path / "bin", None, Path("/run/s"), Path("/var/q"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "podwire"]


def test_paths_with_quotes_and_spaces(tmp_path: Path) -> None:
    executable = lay(tmp_path / 'it\'s a "bin" größe', socket="/run/it's.sock")
    assert version_of(executable) == "1.1.0"


def test_the_script_names_an_interpreter_outside_of_any_virtual_environment(tmp_path: Path) -> None:
    shebang = lay(tmp_path).read_text().splitlines()[0]
    assert shebang == f"#!{os.path.realpath(sys._base_executable)} -IS"  # type: ignore[attr-defined]


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """Says that it is Python 3.8."""
    path = tmp_path / "python3.8"
    path.write_text("#!/bin/sh\necho 3 8 cpython-38\n")
    path.chmod(0o755)
    return path


def test_a_python_that_is_too_old(fake_python: Path) -> None:
    with pytest.raises(InstallError, match=r"needs 3\.9"):
        find_interpreter(fake_python)


PYTHONS = {
    "relative": ("python3", "absolute path"),
    "white space": ("/opt/my python/bin/python3", "white space"),
    "too long for a shebang": ("/" + "x" * 125, "127 bytes"),
    "not there": ("/nonexistent/python3", "does not run"),
    "not a Python": ("/bin/true", "does not run"),
}


@pytest.mark.parametrize("case", PYTHONS)
def test_pythons_that_cannot_serve(case: str, tmp_path: Path) -> None:
    python, reason = PYTHONS[case]
    with pytest.raises(InstallError, match=reason):
        install(tmp_path / "bin", None, Path("/run/s"), Path("/var/q"), python=Path(python))
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "a relative socket": (["--socket", "ipamd.sock"], "absolute path"),
    "a socket too long": (["--socket", "/" + "s" * 107], "107 bytes"),
    "a relative queue": (["--queue-dir", "queue"], "absolute path"),
    "a network that is a path": (["--network", "../green"], "network name"),
    "a network without a name": (["--network", ""], "network name"),
    "a Python that is none": (["--python", "/bin/true"], "does not run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_command_tells_in_one_line_what_is_wrong(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, reason = WRONG[case]
    folders = ["--cni-bin-dir", str(tmp_path / "bin"), "--cni-conf-dir", str(tmp_path / "net.d")]
    assert main(["install", *folders, *flags]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["install", "--cni-bin-dir", f"{tmp_path}/file/bin", "--cni-conf-dir", str(tmp_path)]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_the_command_installs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--cni-bin-dir", str(tmp_path / "bin"), "--cni-conf-dir", str(tmp_path / "net.d")]
    assert main(["install", *folders]) == 0
    assert str(tmp_path / "bin" / "podwire") in capsys.readouterr().out
    script = (tmp_path / "bin" / "podwire").read_text()
    assert str(podwire.install.SOCKET) in script
    assert str(podwire.install.QUEUE_DIR) in script
