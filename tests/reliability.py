"""docs/reliability.md: the faults that the tests make, what is promised under each, the test that shows it, its result.

A test that makes a fault says so:

    @pytest.mark.fault("full disk under /run", promises=("error 11", "ADD works once there is room"))

This is the pytest plugin that knows the mark (tests/conftest.py loads it). `pytest --write-reliability` writes the
document from the tests that were collected and what became of them, so it is run over all of them; a test that did not
run keeps the result that the document has. tests/unit/test_reliability.py holds the document against the tests.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
HEADER = ("fault", "what is promised", "test", "result", "ADD again, s")
_RESULTS = pytest.StashKey[dict[str, "Outcome"]]()
_ROWS = pytest.StashKey[list["Row"]]()


@dataclass(frozen=True)
class Row:
    """One fault of one test."""

    fault: str
    promises: tuple[str, ...]
    test: str
    result: str = "not run"
    again: str = ""

    def line(self) -> str:
        """The row as Markdown."""
        cells = (self.fault, "; ".join(self.promises), f"`{self.test}`", self.result, self.again)
        return f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |"


@dataclass(frozen=True)
class Outcome:
    """What became of a test. `again` is the time until an ADD worked, where the test measured it."""

    result: str
    again: str = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that writes the document."""
    parser.addoption("--write-reliability", action="store_true", help="write docs/reliability.md from this run")
    parser.addoption("--list-faults", action="store_true", help="print the rows of the document, run nothing")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the mark known."""
    config.addinivalue_line("markers", "fault(name, promises): a fault of docs/reliability.md that the test makes")
    config.stash[_RESULTS], config.stash[_ROWS] = {}, []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remembers which faults there are."""
    config.stash[_ROWS] = [
        Row(str(mark.args[0]), tuple(mark.kwargs["promises"]), item.nodeid)
        for item in items
        for mark in item.iter_markers("fault")
    ]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prints them, when asked to."""
    if session.config.getoption("--list-faults"):
        rows = session.config.stash[_ROWS]
        print("\n" + render(rows))
        session.items.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remembers the worst of a test's phases."""
    report = yield
    results = item.config.stash[_RESULTS]
    if report.when == "call" or report.outcome != "passed":
        again = dict(item.user_properties).get("add_again_s", "")
        results[item.nodeid] = Outcome(report.outcome, f"{again}")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the document."""
    config = session.config
    if config.getoption("--write-reliability"):
        former, rows, results = DOCUMENT.read_text(), config.stash[_ROWS], config.stash[_RESULTS]
        rows = with_results(rows, results | _known(former, results))
        DOCUMENT.write_text(replace_table(former, render(rows)))


# --- text -----------------------------------------------------------------------------------------------------------


def with_results(rows: Iterable[Row], results: Mapping[str, Outcome]) -> list[Row]:
    """The rows with what became of their tests."""
    return [
        replace(row, result=outcome.result, again=outcome.again) if (outcome := results.get(row.test)) else row
        for row in rows
    ]


def render(rows: Iterable[Row]) -> str:
    """The table."""
    ruler = f"|{'|'.join('---' for _ in HEADER)}|"
    return "\n".join([f"| {' | '.join(HEADER)} |", ruler, *(row.line() for row in rows)])


def parse(document: str) -> list[Row]:
    """The rows of a document."""
    found = []
    for line in _table(document).splitlines()[2:]:
        fault, promises, test, result, again = (cell.strip() for cell in line.strip("|").split("|"))
        found.append(Row(fault, tuple(promises.split("; ")), test.strip("`"), result, again))
    return found


def replace_table(document: str, table: str) -> str:
    """The document with another table between its marks. Raises ValueError when they are missing."""
    _table(document)
    return re.sub(f"{BEGIN}\n.*?{END}", lambda _: f"{BEGIN}\n{table}\n{END}", document, flags=re.DOTALL)


def _table(document: str) -> str:
    found = re.search(f"{BEGIN}\n(.*?){END}", document, re.DOTALL)
    if found is None:
        raise ValueError(f"no table between {BEGIN} and {END}")
    return found[1]


def _known(document: str, fresh: Mapping[str, Outcome]) -> dict[str, Outcome]:
    return {row.test: Outcome(row.result, row.again) for row in parse(document) if row.test not in fresh}
