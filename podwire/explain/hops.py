"""The vocabulary of a path: what is asked of the kernel on the way, what was found, and at which hop. Pure.

A hop is planned by a generator that yields what it wants to read (`Ask`) and is sent what was read (`Reading`), so
that the same plan runs on a lab, on a node, and on texts in a test; `reading` is what runs it.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from kube_proxy_lite.model import Address

T = TypeVar("T")
Key = tuple[str, str]


class State(StrEnum):
    """What is to say of a finding. WARNING: packets pass, and something is wrong. UNSEEN: it was not read back."""

    OK = "ok"
    WARNING = "warning"
    FAILS = "fails"
    UNSEEN = "unseen"


_SEVERITY = {State.OK: 0, State.UNSEEN: 1, State.WARNING: 2, State.FAILS: 3}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. `command` shows it again; `fix` says what mends it, where it fails."""

    state: State
    text: str
    command: str = ""
    fix: str = ""


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the way. `where` is a node or a pod, in words."""

    title: str
    where: str
    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        """The worst of its findings."""
        return max((each.state for each in self.findings), key=_SEVERITY.__getitem__, default=State.OK)


class Where(msgspec.Struct, frozen=True):
    """A network namespace: a node's own, or that of a pod on it."""

    node: str
    pod: Key | None = None

    def __str__(self) -> str:
        return f"pod {'/'.join(self.pod)}" if self.pod else self.node


class Ask(msgspec.Struct, frozen=True):
    """A command to run there. None of them changes anything."""

    where: Where
    words: tuple[str, ...]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What it said. `seen` is False when it could not be run there; `text` then says why. `command` repeats it."""

    seen: bool = True
    code: int = 0
    text: str = ""
    command: str = ""

    @property
    def well(self) -> bool:
        """Whether the command ran and succeeded."""
        return self.seen and self.code == 0

    def items(self) -> list[dict[str, Any]]:
        """What `ip -j` and `bridge -j` list; empty when it is none of that."""
        try:
            found = json.loads(self.text) if self.well else []
        except ValueError:
            return []
        return [each for each in found if isinstance(each, dict) and each] if isinstance(found, list) else []


Steps = Generator[Ask, Reading, T]


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a node but for its kernel. `trouble` is why its daemon did not answer; empty when it did.

    `vteps` are the addresses of its tunnel, `macs` the MACs that may be its tunnel's.
    """

    name: str
    addresses: tuple[Address, ...] = ()
    blocks: tuple[str, ...] = ()
    vteps: tuple[Address, ...] = ()
    macs: tuple[str, ...] = ()
    trouble: str = ""


def ok(text: str, reading: Reading | None = None) -> Finding:
    """It is as it should be."""
    return Finding(state=State.OK, text=text, command=reading.command if reading else "")


def fails(text: str, fix: str, reading: Reading | None = None) -> Finding:
    """Packets do not pass."""
    return Finding(state=State.FAILS, text=text, fix=fix, command=reading.command if reading else "")


def warns(text: str, fix: str, reading: Reading | None = None) -> Finding:
    """Packets pass, and something is wrong."""
    return Finding(state=State.WARNING, text=text, fix=fix, command=reading.command if reading else "")


def unseen(what: str, reading: Reading) -> Finding:
    """It could not be read back here."""
    return Finding(state=State.UNSEEN, text=f"{what}: not seen, {reading.text}", command=reading.command)


def first_line(reading: Reading) -> str:
    """What a command that failed says, in one line."""
    return next((line.strip() for line in reading.text.splitlines() if line.strip()), f"it ended with {reading.code}")
