"""ADD and DEL, whole processes: Podwire, bridge + host-local with ipMasq, bridge + host-local without.

A round is an ADD and a DEL of each, in an order that rotates from round to round; a turn ends when the link is gone, so
that what Podwire does after its answer falls into nobody else's turn. Podwire's phases are read from the daemon's own
histogram before and after each call, which gives them for every single call.

The executable's own share of an ADD is the whole process less the daemon's `total`: starting the interpreter, its own
code, and gRPC on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from bench.contender import Added, Contender, Deleted
from bench.podwire_node import PodwireNode, podwire_node, spent
from bench.process import BenchFailed
from bench.reference import reference_node
from bench.report import Bound, Report, Table, milliseconds
from bench.stage import Namespace, Stage
from bench.statistic import median, percentile, ratio_of_medians

_WARM_UP = 3
_PAUSE = 0.01  # seconds between calls
_COUNTED_WITHIN = 5.0  # seconds
_LATE = 0.5  # seconds; ARP and TCP send a lost first packet again after one
_MASQUERADED = "bridge + host-local, ipMasq"
_BARE = "bridge + host-local, bare"
_SHARE = "executable's own share"
_BACKGROUND = "reap"  # a phase of DEL that begins when it has been answered

Samples = dict[str, list[float]]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` rounds after a few to warm up."""
    with podwire_node(stage, "podwire") as node:
        references = [
            reference_node(stage, "masq", _MASQUERADED, masquerade=True),
            reference_node(stage, "bare", _BARE, masquerade=False),
        ]
        turns: list[Callable[[Namespace, Samples], None]] = [
            _PodwireTurn(node),
            *(partial(_reference_turn, each) for each in references),
        ]
        pods = iter(stage.pods((rounds + _WARM_UP) * len(turns)))
        samples: Samples = {}
        for number in range(-_WARM_UP, rounds):
            into: Samples = samples if number >= 0 else {}
            first = number % len(turns)
            for turn in (*turns[first:], *turns[:first]):
                turn(next(pods), into)
                time.sleep(_PAUSE)
    return _report(samples, rounds)


def _reference_turn(contender: Contender, pod: Namespace, samples: Samples) -> None:
    added = contender.add(pod)
    time.sleep(_PAUSE)
    deleted = contender.delete(added)
    _note_turn(samples, contender.name, added, deleted)
    _note(samples, f"{contender.name}: ADD CPU", added.finished.cpu_seconds)
    _note(samples, f"{contender.name}: DEL CPU", deleted.finished.cpu_seconds)


class _PodwireTurn:
    """Reads the phases once a turn, at its end: a scrape shortly before a call would warm the daemon up for it."""

    def __init__(self, node: PodwireNode) -> None:
        self._node = node
        self._phases = node.phases()

    def __call__(self, pod: Namespace, samples: Samples) -> None:
        node, name = self._node, self._node.contender.name
        on_cpu = [node.cpu_seconds()]
        added = node.contender.add(pod)
        time.sleep(_PAUSE)
        on_cpu.append(node.cpu_seconds())
        deleted = node.contender.delete(added)
        time.sleep(_PAUSE)
        on_cpu.append(node.cpu_seconds())
        _note_turn(samples, name, added, deleted)
        _note(samples, f"{name}: ADD CPU", added.finished.cpu_seconds + on_cpu[1] - on_cpu[0])
        _note(samples, f"{name}: DEL CPU", deleted.finished.cpu_seconds + on_cpu[2] - on_cpu[1])
        for (command, phase), seconds in self._spent().items():
            if command in ("ADD", "DEL"):
                _note(samples, f"{command} {phase}", seconds)
        for command in ("ADD", "DEL"):
            share = samples[f"{name}: {command}"][-1] - samples[f"{command} total"][-1]
            _note(samples, f"{command} {_SHARE}", share)

    def _spent(self) -> dict[tuple[str, str], float]:
        """The turn's phases, when the last of them, which ends a moment after the link, is counted."""
        before, deadline = self._phases, time.monotonic() + _COUNTED_WITHIN
        last = ("DEL", _BACKGROUND)
        while True:
            self._phases = self._node.phases()
            if self._phases.get(last, 0.0) > before.get(last, 0.0):
                return spent(before, self._phases)
            if time.monotonic() > deadline:
                raise BenchFailed(f"the daemon did not count the phase {' '.join(last)}")
            time.sleep(_PAUSE)


def _note_turn(samples: Samples, name: str, added: Added, deleted: Deleted) -> None:
    _note(samples, f"{name}: ADD", added.finished.seconds)
    _note(samples, f"{name}: first connection", added.first_connection)
    _note(samples, f"{name}: DEL", deleted.finished.seconds)
    _note(samples, f"{name}: DEL, until the link is gone", deleted.gone_seconds)


def _note(samples: Samples, name: str, value: float) -> None:
    samples.setdefault(name, []).append(value)


# --- what it says -----------------------------------------------------------------------------------------------------


def _report(samples: Samples, rounds: int) -> Report:
    share = median(samples[f"ADD {_SHARE}"])
    bounds = [
        Bound(what="executable's own share of an ADD", measured=share * 1000, limit=15, unit="ms"),
        *(
            Bound(
                what=f"{command}, of the reference's ({_MASQUERADED})",
                measured=median(samples[f"Podwire: {command}"]) / median(samples[f"{_MASQUERADED}: {command}"]),
                limit=limit,
            )
            for command, limit in (("ADD", 0.7), ("DEL", 0.3))
        ),
    ]
    return Report(
        tables=(
            _comparison(samples, rounds),
            _first_connections(samples),
            _profile(samples, "ADD"),
            _profile(samples, "DEL"),
        ),
        bounds=tuple(bounds),
        samples=samples,
    )


def _comparison(samples: Samples, rounds: int) -> Table:
    rows = []
    for what in ("ADD", "DEL", "DEL, until the link is gone"):
        ours = samples[f"Podwire: {what}"]
        rows.append((f"{what}: Podwire", *_times(ours), *_cpu(samples, "Podwire", what), ""))
        for name in (_MASQUERADED, _BARE):
            theirs = samples[f"{name}: {what}"]
            ratio = str(ratio_of_medians(ours, theirs))
            rows.append((f"{what}: {name}", *_times(theirs), *_cpu(samples, name, what), ratio))
    return Table(
        title=f"Whole process, ms ({rounds} rounds, alternating)",
        columns=("", "median", "p90", "CPU", "Podwire / this (95 %)"),
        rows=tuple(rows),
        notes=(
            "CPU is the median of the time on a CPU of the plugin's processes and, for Podwire, of the daemon (for DEL "
            "with what it does until the link is gone).",
        ),
    )


def _first_connections(samples: Samples) -> Table:
    """Whether a wire works when ADD says so: a first packet that is lost is sent again a second later."""
    rows = []
    for name in ("Podwire", _MASQUERADED, _BARE):
        taken = samples[f"{name}: first connection"]
        late = sum(each > _LATE for each in taken)
        rows.append((name, f"{median(taken) * 1000:.2f}", milliseconds(max(taken)), f"{late} of {len(taken)}"))
    return Table(
        title="The pod's first TCP connection to its gateway, right after ADD, ms",
        columns=("", "median", "slowest", f"later than {_LATE:g} s"),
        rows=tuple(rows),
    )


def _cpu(samples: Samples, name: str, what: str) -> tuple[str]:
    values = samples.get(f"{name}: {what} CPU")
    return (milliseconds(median(values)) if values else "",)


def _times(values: Sequence[float]) -> tuple[str, str]:
    return milliseconds(median(values)), milliseconds(percentile(values, 90))


def _profile(samples: Samples, command: str) -> Table:
    """Whole process = own share + total; total = its phases + the rest."""
    names = [name for name in samples if name.startswith(f"{command} ")]
    phases = [name for name in names if name.split()[1] not in ("total", _SHARE.split()[0], _BACKGROUND)]
    total = samples[f"{command} total"]
    rest = [whole - sum(samples[name][i] for name in phases) for i, whole in enumerate(total)]
    rows = [
        ("whole process", *_precise(samples[f"Podwire: {command}"])),
        (f"  {_SHARE}", *_precise(samples[f"{command} {_SHARE}"])),
        ("  daemon: total", *_precise(total)),
        *((f"    {name.split()[1]}", *_precise(samples[name])) for name in sorted(phases)),
        ("    rest", *_precise(rest)),
    ]
    background = samples.get(f"{command} {_BACKGROUND}")
    if background:
        rows.append((f"afterwards: {_BACKGROUND}", *_precise(background)))
    return Table(title=f"Podwire's {command} by phase, ms", columns=("", "median", "p90"), rows=tuple(rows))


def _precise(values: Sequence[float]) -> tuple[str, str]:
    return f"{median(values) * 1000:.2f}", f"{percentile(values, 90) * 1000:.2f}"
