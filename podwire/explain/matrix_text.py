"""The matrix as text: numbered rows, columns by the same numbers, one or two characters a cell. Pure.

           1  2  3
    1 shop/web +2   ✓  ✓  ·        ✓ all ports open, · none, a, b, … some: a legend says which

Fifty groups are 150 characters wide; what is wider than the terminal is broken into pieces by column.
"""

from __future__ import annotations

from collections.abc import Iterator

from podwire.explain.matrix import Cell, Matrix

SIGNS = {"all": "✓", "none": "·", "self": "-"}
_LABEL = 40
_PODS_A_LINE = 6


def letters(matrix: Matrix) -> dict[tuple[str, ...], str]:
    """Open ports → the letter that stands for them, where some are open and others not."""
    found = dict.fromkeys(cell.open_ports for row in matrix.cells for cell in row if cell.state == "some")
    return {ports: _letter(number) for number, ports in enumerate(found)}


def _letter(number: int) -> str:
    """a … z, aa, ab …"""
    return (_letter(number // 26 - 1) if number >= 26 else "") + "abcdefghijklmnopqrstuvwxyz"[number % 26]


def sign(cell: Cell, known: dict[tuple[str, ...], str]) -> str:
    """What stands for a cell."""
    return SIGNS.get(cell.state) or known[cell.open_ports]


def render_text(matrix: Matrix, width: int = 120) -> list[str]:
    """The matrix as lines of at most `width` characters, if a name leaves room for that."""
    return list(_lines(matrix, width))


def _lines(matrix: Matrix, width: int) -> Iterator[str]:
    if not matrix.groups:
        yield "no pod has an address"
        yield from (f"problem: {each}" for each in matrix.problems)
        return
    known = letters(matrix)
    count = len(matrix.groups)
    labels = [f"{number} {_cut(group.label)}" for number, group in enumerate(matrix.groups, start=1)]
    left = max(map(len, labels))
    column = max(len(str(count)), *(len(each) for each in known.values()), 1) + 1
    a_piece = max(1, (width - left) // column)
    yield "from the pod on the left to the pod of that number"
    for start in range(0, count, a_piece):
        end = min(start + a_piece, count)
        yield " " * left + "".join(f"{number:>{column}}" for number in range(start + 1, end + 1))
        for label, row in zip(labels, matrix.cells, strict=True):
            yield label.ljust(left) + "".join(f"{sign(cell, known):>{column}}" for cell in row[start:end])
        yield ""
    yield f"{SIGNS['all']} open   {SIGNS['none']} closed   {SIGNS['self']} itself" + "".join(
        f"   {letter} {', '.join(ports)} only" for ports, letter in known.items()
    )
    for number, group in enumerate(matrix.groups, start=1):
        if len(group.pods) > 1:
            yield f"{number}: " + f",\n{' ' * (len(str(number)) + 2)}".join(_broken(group.pods))
    yield from (f"problem: {each}" for each in matrix.problems)


def _broken(pods: tuple[str, ...]) -> Iterator[str]:
    for start in range(0, len(pods), _PODS_A_LINE):
        yield ", ".join(pods[start : start + _PODS_A_LINE])


def _cut(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"
