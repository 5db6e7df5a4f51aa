"""A path for people and for programs. Pure but for the console that it is given."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from podwire.explain.hops import Finding, Hop, State
from podwire.explain.path import Path
from podwire.explain.verdict import plain_place

_MARKS = {
    State.OK: ("✓", "green"),
    State.WARNING: ("!", "yellow"),
    State.FAILS: ("✗", "red"),
    State.UNSEEN: ("?", "cyan"),
}


def conclusion(path: Path) -> list[str]:
    """What it comes to: the first hop that fails, else what is wrong besides, else that nothing is."""
    failed = path.first(State.FAILS)
    if failed is not None:
        number, hop, finding = failed
        lines = [f"fails at hop {number}, {_title(hop)}: {finding.text}", f"fix: {finding.fix}"]
        return [*lines, f"see: {finding.command}"] if finding.command else lines
    warned = path.first(State.WARNING)
    if warned is not None:
        number, hop, finding = warned
        return [f"packets pass, but at hop {number}, {_title(hop)}: {finding.text}", f"fix: {finding.fix}"]
    if path.first(State.UNSEEN) is not None:
        return ["nothing that can be seen from here fails; hops with ? were not read back"]
    return ["nothing fails on the whole way"]


def show(path: Path, console: Console, *, commands: bool = True) -> None:
    """Prints the path."""
    end = f" → {path.end}" if path.end and path.end != str(path.target) else ""
    console.print(
        Text(f"{path.source} → {path.target}{end}, {path.protocol} {path.port}", style="bold"), soft_wrap=True
    )
    for number, hop in enumerate(path.hops, start=1):
        mark, colour = _MARKS[hop.state]
        head = Text(f"{number:>3} ").append(mark, style=colour).append(f" {_title(hop)}", style="bold")
        console.print(head, soft_wrap=True)
        for finding in hop.findings:
            _show(finding, console, commands)
    if path.also:
        console.print(Text(f"in order, too: {', '.join(path.also)}"), soft_wrap=True)
    for number, line in enumerate(conclusion(path)):
        state = State.FAILS if path.first(State.FAILS) else State.WARNING if path.first(State.WARNING) else State.OK
        console.print(Text(line, style=f"bold {_MARKS[state][1]}" if not number else ""), soft_wrap=True)


def _show(finding: Finding, console: Console, commands: bool) -> None:
    mark, colour = _MARKS[finding.state]
    console.print(Text("      ").append(mark, style=colour).append(f" {finding.text}"), soft_wrap=True)
    if commands and finding.command:
        console.print(Text(f"        $ {finding.command}", style="dim"), soft_wrap=True)


def _title(hop: Hop) -> str:
    return f"{hop.title} ({hop.where})" if hop.where else hop.title


def plain(path: Path) -> dict[str, Any]:
    """The path as JSON has it; the keys are stable. `hop` counts from 1."""
    first = path.first(State.FAILS) or path.first(State.WARNING)
    return {
        "from": plain_place(path.source),
        "to": plain_place(path.target),
        "protocol": str(path.protocol),
        "port": path.port,
        "end": path.end,
        "in_order_too": list(path.also),
        "passes": path.first(State.FAILS) is None,
        "hops": [{**msgspec.to_builtins(hop), "state": hop.state.value} for hop in path.hops],
        "first": None
        if first is None
        else {"hop": first[0], "title": first[1].title, "where": first[1].where, **msgspec.to_builtins(first[2])},
        "conclusion": conclusion(path),
    }
