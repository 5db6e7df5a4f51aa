"""The daemon's memory: when it is ready, with 200 pods, and when they are gone; and what the 200th ADD costs.

Read when it has settled: when VmRSS has not moved by more than 0.1 MB for two seconds. VmRSS counts pages that other
processes share (libraries); Pss counts those by the share.
"""

from __future__ import annotations

import time
from typing import Protocol

from bench.podwire_node import Memory, podwire_node
from bench.report import Bound, Report, Table, milliseconds
from bench.stage import Stage
from bench.statistic import median

_LIMIT = 80.0  # MB
_CALM = 2.0  # seconds
_SETTLED_WITHIN = 20.0
_STEP = 0.1  # MB


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how many pods there are at once."""
    edge = max(1, rounds // 10)
    with podwire_node(stage, "memory") as node:
        pods = stage.pods(rounds + 1)
        node.contender.delete(node.contender.add(pods.pop()))
        empty = settled(node)
        added = [node.contender.add(pod) for pod in pods]
        full = settled(node)
        deleted = [node.contender.delete(each) for each in added]
        after = settled(node)
    adds = [each.finished.seconds for each in added]
    dels = [each.finished.seconds for each in deleted]
    memory = Table(
        title=f"The daemon's memory, MB (10⁶ bytes), settled, {rounds} pods",
        columns=("", "VmRSS", "Pss", "VmHWM"),
        rows=tuple(
            (name, *(f"{found[key]:.1f}" for key in ("VmRSS", "Pss", "VmHWM")))
            for name, found in (("ready", empty), (f"with {rounds} pods", full), ("when they are gone", after))
        ),
    )
    growth = Table(
        title="Whole process, ms, medians, by the number of pods on the node",
        columns=("", f"{edge} emptiest", f"{edge} fullest"),
        rows=(
            ("ADD", milliseconds(median(adds[:edge])), milliseconds(median(adds[-edge:]))),
            ("DEL", milliseconds(median(dels[-edge:])), milliseconds(median(dels[:edge]))),
        ),
    )
    return Report(
        tables=(memory, growth),
        bounds=tuple(
            Bound(what=f"the daemon's {key} with {rounds} pods", measured=full[key], limit=_LIMIT, unit="MB")
            for key in ("VmRSS", "Pss")
        ),
        samples={"ADD": adds, "DEL": dels},
    )


class Measurable(Protocol):
    """A process that says how much memory it has."""

    def memory(self) -> Memory:
        """Its memory now."""
        ...


def settled(node: Measurable) -> Memory:
    """A process's memory once it has not moved for a while."""
    deadline = time.monotonic() + _SETTLED_WITHIN
    seen, since = node.memory(), time.monotonic()
    while time.monotonic() - since < _CALM and time.monotonic() < deadline:
        time.sleep(0.2)
        now = node.memory()
        if abs(now["VmRSS"] - seen["VmRSS"]) > _STEP:
            seen, since = now, time.monotonic()
    return node.memory()
