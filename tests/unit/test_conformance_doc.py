"""docs/conformance.md: every test that it names exists, every row says what shows it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent.parent
DOCUMENT = TESTS.parent / "docs" / "conformance.md"
NAMED = re.compile(r"`((?:unit|golden|etcd|netns|runtime|vm|kind)/\w+\.py)(?:::(\w+))?`")


@cache
def functions(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def rows() -> list[list[str]]:
    """The cells of every row but the heads."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if len(row) > 1 and row[1] != "shown by"]


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(DOCUMENT.read_text())
    absent = [
        f"{file}::{test}"
        for file, test in named
        if not (TESTS / file).exists() or (test and test not in functions(TESTS / file))
    ]
    assert absent == []
    assert len(named) > 100


def test_every_row_says_what_shows_it_or_why_nothing_does() -> None:
    silent = [
        row for row in rows() if len(row) != 2 or not re.search(r"::test_|not applicable: |not yet|sections", row[1])
    ]
    assert silent == []


def test_every_conformance_test_has_its_row() -> None:
    named = {test for _, test in NAMED.findall(DOCUMENT.read_text())}
    written = {
        name
        for file in (TESTS / "netns").glob("test_conformance*.py")
        for name in functions(file)
        if name.startswith("test_")
    }
    assert written - named == set()
