"""Many pods without a pause: all added, then all deleted, one after the other and ten at once.

What Podwire puts off until after its answer meets the next calls here, so nothing is hidden. The clock of a batch ends
when the last link is gone. Batches of Podwire and of the reference alternate; a batch begins when the one before it
is gone. With ten at once they compete with the threads that check them, for everyone alike.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from bench.contender import Contender
from bench.podwire_node import podwire_node
from bench.reference import reference_node
from bench.report import Report, Table, milliseconds
from bench.stage import Namespace, Stage
from bench.statistic import median, percentile

_REPEATS = 2
_AT_ONCE = (1, 10)

Samples = dict[str, list[float]]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how many pods a batch has."""
    samples: Samples = {}
    with podwire_node(stage, "churn") as node:
        contenders = (
            node.contender,
            reference_node(stage, "churn-masq", "bridge + host-local, ipMasq", masquerade=True),
        )
        for contender in contenders:
            _batch(contender, stage.pods(3), 1, {})
        pods = stage.pods(rounds)
        for at_once in _AT_ONCE:
            for _ in range(_REPEATS):
                for contender in contenders:
                    _batch(contender, pods, at_once, samples)
    rows = tuple(
        (key, *(milliseconds(each) for each in (median(times), percentile(times, 90))), *_whole(samples, key))
        for key, times in samples.items()
        if not key.endswith("whole")
    )
    table = Table(
        title=f"{rounds} pods at a stretch, ms",
        columns=("", "median", "p90", "whole batch"),
        rows=rows,
        notes=("The whole batch of a DEL ends when the last link is gone; median of two batches.",),
    )
    return Report(tables=(table,), samples=samples)


def _whole(samples: Samples, key: str) -> tuple[str]:
    return (milliseconds(median(samples[f"{key}, whole"])),)


def _batch(contender: Contender, pods: list[Namespace], at_once: int, samples: Samples) -> None:
    how = "one by one" if at_once == 1 else f"{at_once} at once"
    with ThreadPoolExecutor(at_once) as threads:
        began = time.perf_counter()
        added = list(threads.map(contender.add, pods))
        between = time.perf_counter()
        deleted = list(threads.map(contender.detach, added))
        for each in added:
            contender.wait_gone(each)
        ended = time.perf_counter()
    for command, times, whole in (
        ("ADD", [each.finished.seconds for each in added], between - began),
        ("DEL", [each.seconds for each in deleted], ended - between),
    ):
        key = f"{command} {how}: {contender.name}"
        samples.setdefault(key, []).extend(times)
        samples.setdefault(f"{key}, whole", []).append(whole)
