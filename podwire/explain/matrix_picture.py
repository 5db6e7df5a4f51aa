"""The matrix as one picture, SVG or HTML, that needs nothing else: no script, no font, no address to load from. Pure.

A square a cell: green all ports, amber some, red none; a title on each says which ports, and who decided, so a browser
shows it under the pointer. Whatever comes from manifests is escaped: a label is no markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from podwire.explain.matrix import Cell, Group, Matrix
from podwire.explain.matrix_text import letters, sign

_COLOURS = {"all": "#2e9e5b", "some": "#e0a526", "none": "#d9534f", "self": "#c9ced6"}
_MEANING = {"all": "all ports open", "some": "some ports open", "none": "closed", "self": "the pod itself"}
_SIDE, _GAP, _CHARACTER, _MOST = 22, 2, 6.7, 44
_NAMED = 12
_STYLE = "font-family: ui-monospace, monospace; font-size: 11px"


def render_svg(matrix: Matrix) -> str:
    """A complete SVG document."""
    return "\n".join(_svg(matrix)) + "\n"


def render_html(matrix: Matrix) -> str:
    """A complete HTML page: the picture, who is in which group, and what is wrong with policies."""
    known = letters(matrix)
    some = "".join(f"<li>{letter}: {escape(', '.join(ports))} only</li>" for ports, letter in known.items())
    groups = "".join(
        f"<li value={number}>{escape(', '.join(group.pods))}</li>"
        for number, group in enumerate(matrix.groups, start=1)
    )
    problems = "".join(f"<li>{escape(each)}</li>" for each in matrix.problems)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Who reaches whom</title>\n'
        "<style>body { font-family: sans-serif; margin: 1.5em } li { font-family: monospace }</style></head><body>\n"
        "<h1>Who reaches whom</h1>\n<p>From the pods on the left to the pods above.</p>\n"
        f"{render_svg(matrix)}"
        + (f"<h2>Some ports</h2>\n<ul>{some}</ul>\n" if some else "")
        + f"<h2>Pods</h2>\n<ol>{groups}</ol>\n"
        + (f"<h2>Problems</h2>\n<ul>{problems}</ul>\n" if problems else "")
        + "</body></html>\n"
    )


def _svg(matrix: Matrix) -> Iterator[str]:
    known = letters(matrix)
    labels = [_cut(f"{number} {group.label}") for number, group in enumerate(matrix.groups, start=1)]
    margin = int(max((len(each) for each in labels), default=0) * _CHARACTER) + 12
    step = _SIDE + _GAP
    side = margin + len(labels) * step
    height = side + 40
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(side, 480)}" height="{height}"'
        f' viewBox="0 0 {max(side, 480)} {height}" style="{_STYLE}" role="img">'
    )
    yield "<title>Who reaches whom: from the pods on the left to the pods above</title>"
    yield '<rect width="100%" height="100%" fill="#ffffff"/>'
    for number, (label, group) in enumerate(zip(labels, matrix.groups, strict=True)):
        middle = margin + number * step + _SIDE // 2
        title = f"<title>{escape(_named(group))}</title>"
        yield f'<text x="{margin - 6}" y="{middle + 4}" text-anchor="end">{title}{escape(label)}</text>'
        yield f'<text transform="translate({middle + 4} {margin - 6}) rotate(-90)">{title}{escape(label)}</text>'
    for row, cells in enumerate(matrix.cells):
        for column, cell in enumerate(cells):
            x, y = margin + column * step, margin + row * step
            told = escape(_told(matrix.groups[row], matrix.groups[column], cell))
            yield f'<g><title>{told}</title><rect x="{x}" y="{y}" width="{_SIDE}" height="{_SIDE}" rx="3"'
            yield f' fill="{_COLOURS[cell.state]}"/>'
            yield f'<text x="{x + _SIDE // 2}" y="{y + 15}" text-anchor="middle" fill="#fff">{sign(cell, known)}</text>'
            yield "</g>"
    x = 8
    for state, colour in _COLOURS.items():
        yield f'<rect x="{x}" y="{side + 12}" width="14" height="14" rx="3" fill="{colour}"/>'
        yield f'<text x="{x + 19}" y="{side + 23}">{_MEANING[state]}</text>'
        x += 19 + int(len(_MEANING[state]) * _CHARACTER) + 16
    yield "</svg>"


def _told(source: Group, target: Group, cell: Cell) -> str:
    head = f"{source.label} → {target.label}"
    if not cell.sides:
        return f"{head}: itself"
    return "\n".join([head, *(f"{one.port} {'open' if one.allowed else 'closed'}: {one.why}" for one in cell.sides)])


def _named(group: Group) -> str:
    rest = len(group.pods) - _NAMED
    return ", ".join(group.pods[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _cut(label: str) -> str:
    return label if len(label) <= _MOST else label[: _MOST - 1] + "…"
