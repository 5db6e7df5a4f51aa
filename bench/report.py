"""What a benchmark says: tables and bounds, as text that reads the same in a terminal and in Markdown. Pure.

docs/performance.md holds the numbers of one run between markers that name the scenario; everything outside of them is
written by hand and stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

_MARKED = "<!-- bench:{name} -->"
_ENDED = "<!-- /bench:{name} -->"


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table; the first column is text, the others are numbers. `notes` are sentences below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is asked for: at most `limit`, or at least."""

    what: str
    measured: float
    limit: float
    unit: str = ""
    least: bool = False

    @property
    def reached(self) -> bool:
        """True when the measured value is within the limit."""
        return self.measured >= self.limit if self.least else self.measured <= self.limit


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A scenario's outcome. `samples` are all values that were measured, by name, for who wants to look closer."""

    tables: tuple[Table, ...]
    bounds: tuple[Bound, ...] = ()
    samples: Mapping[str, Sequence[float]] = {}


def milliseconds(seconds: float) -> str:
    """A time in a table."""
    return f"{seconds * 1000:.1f}"


def render_table(table: Table) -> str:
    """Title, table and notes."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        [f"**{table.title}**", "", line(table.columns), line(ruler), *map(line, table.rows), *_below(table)]
    )


def _below(table: Table) -> list[str]:
    return ["", *table.notes] if table.notes else []


def render_bounds(bounds: Sequence[Bound]) -> str:
    """Every bound with what was measured, and whether it was reached."""
    rows = tuple(
        (
            bound.what,
            f"{'≥' if bound.least else '≤'} {bound.limit:g} {bound.unit}".strip(),
            f"{bound.measured:.2f} {bound.unit}".strip(),
            "reached" if bound.reached else "NOT reached",
        )
        for bound in bounds
    )
    return render_table(Table(title="Bounds", columns=("what", "bound", "measured", ""), rows=rows))


def render(report: Report) -> str:
    """The tables of a scenario."""
    return "\n\n".join(map(render_table, report.tables))


def replace_regions(document: str, regions: Mapping[str, str]) -> str:
    """The document with the text between each region's markers replaced. Raises ValueError when a marker is missing."""
    for name, text in regions.items():
        begin, end = _MARKED.format(name=name), _ENDED.format(name=name)
        pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
        document, count = pattern.subn(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", document)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{count} regions {begin} … {end}, expected one")
    return document
