"""docs/reliability.md lists the faults that the tests make: no more, no fewer, and as they say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import reliability
from tests.reliability import DOCUMENT, TESTS, Outcome, Row

ROW = Row("no room", ("error 11", "it goes on"), "tests/x.py::test_a[b]")


def test_the_document_lists_the_faults_of_the_tests() -> None:
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.fault" in path.read_text()]
    command = [sys.executable, "-m", "pytest", *files, "--list-faults", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent, env=os.environ)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("| ")][1:]
    assert lines, listed.stdout + listed.stderr
    documented = [reliability.with_results([row], {row.test: Outcome("not run")})[0] for row in documented_rows()]
    assert [row.line() for row in documented] == lines, "run pytest --write-reliability over all tests"


def documented_rows() -> list[Row]:
    return reliability.parse(DOCUMENT.read_text())


def test_every_fault_of_the_document_was_survived() -> None:
    assert [row.fault for row in documented_rows() if row.result not in ("passed", "skipped")] == []


def test_what_is_written_is_read_again() -> None:
    rows = reliability.with_results([ROW], {ROW.test: Outcome("passed", "0.7")})
    document = reliability.replace_table(
        "before\n<!-- faults -->\nold\n<!-- /faults -->\nafter\n", reliability.render(rows)
    )
    assert reliability.parse(document) == [Row(*[*rows[0].__dict__.values()])]
    assert document.startswith("before\n")
    assert document.endswith("after\n")


def test_a_document_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no table between"):
        reliability.replace_table("nothing", "")
