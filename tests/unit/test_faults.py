"""A point does nothing, unless the environment names a file that says what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipam_daemon.faults import POINTS, VARIABLE

PROGRAM = "from ipam_daemon.faults import point; point('add.wired'); print('went on')"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != VARIABLE}


def run(file: Path | None) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | ({VARIABLE: str(file)} if file else {})
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("told", "status", "said"),
    [
        pytest.param("add.wired kill", -9, "", id="killed"),
        pytest.param("add.wired raise", 1, "FaultRaised: fault at add.wired", id="raised"),
        pytest.param("add.wired delay 0.01", 0, "went on", id="delayed"),
        pytest.param("add.wired explode", 1, "FaultRaised", id="what is no action fails"),
        pytest.param("del.killed kill", 0, "went on", id="another point"),
        pytest.param("", 0, "went on", id="disarmed"),
        pytest.param(None, 0, "went on", id="no such file"),
    ],
)
def test_a_point_does_what_the_file_says(tmp_path: Path, told: str | None, status: int, said: str) -> None:
    file = tmp_path / "fault"
    if told is not None:
        file.write_text(told)
    done = run(file)
    assert done.returncode == status
    assert said in done.stdout + done.stderr


def test_without_the_variable_nothing_can_be_told() -> None:
    assert run(None).stdout == "went on\n"


def test_every_point_says_what_is_so_there() -> None:
    assert [name for name, words in POINTS.items() if not words or words[0].isupper() or words.endswith(".")] == []
