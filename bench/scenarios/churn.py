"""Many pods without a pause: all added, then all deleted, one after the other, ten at once, and a hundred by twenty.

What Podwire puts off until after its answer meets the next calls here, so nothing is hidden. The clock of a batch ends
when the last link is gone. Batches of Podwire and of the reference alternate; a batch begins when the one before it
is gone. With ten at once they compete with the threads that check them, for everyone alike; of the hundred by twenty
nothing is looked at before the last has answered.

Then twenty pods come and go without end, and the last hundred calls are held against the first.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from bench.contender import Contender
from bench.podwire_node import podwire_node
from bench.reference import reference_node
from bench.report import Bound, Report, Table, milliseconds
from bench.stage import Namespace, Stage
from bench.statistic import Ratio, median, percentile, ratio_of_medians

_REPEATS = 2
_AT_ONCE = (1, 10)
_MASQUERADED = "bridge + host-local, ipMasq"
_BURST, _BURST_AT_ONCE, _BURSTS = 100, 20, 5
_CALLS_FOR_A_POD = 50  # ADDs and DELs of one pod of `rounds`, without a pause: 2,000 calls with 40
_HUNDRED = 100

Samples = dict[str, list[float]]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how many pods a batch has."""
    samples: Samples = {}
    with podwire_node(stage, "churn") as node:
        contenders = (
            node.contender,
            reference_node(stage, "churn-masq", _MASQUERADED, masquerade=True),
        )
        for contender in contenders:
            _batch(contender, stage.pods(3), 1, {})
        pods = stage.pods(rounds)
        for at_once in _AT_ONCE:
            for _ in range(_REPEATS):
                for contender in contenders:
                    _batch(contender, pods, at_once, samples)
        crowd = stage.pods(min(_BURST, 4 * rounds))
        for number in range(_BURSTS):
            for contender in contenders if number % 2 else reversed(contenders):
                _burst(contender, crowd, samples)
        _come_and_go(node.contender, pods[:_BURST_AT_ONCE], rounds * _CALLS_FOR_A_POD // 2, samples)
    rows = tuple(
        (key, *(milliseconds(each) for each in (median(times), percentile(times, 90))), *_whole(samples, key))
        for key, times in samples.items()
        if f"{key}, whole" in samples
    )
    table = Table(
        title=f"{rounds} pods at a stretch, ms",
        columns=("", "median", "p90", "whole batch"),
        rows=rows,
        notes=("The whole batch of a DEL ends when the last link is gone; median of two batches.",),
    )
    burst, ageing = _burst_ratio(samples), _ageing(samples)
    return Report(
        tables=(table, _burst_table(samples, burst, len(crowd)), _ageing_table(samples, ageing)),
        bounds=(
            Bound(
                what=f"{len(crowd)} ADDs by {_BURST_AT_ONCE} at once, of {_MASQUERADED}",
                measured=burst.value,
                limit=0.6,
            ),
            *(
                Bound(
                    what=f"the last hundred {command} of {_calls(samples)} calls, of the first",
                    measured=ratio,
                    limit=1.2,
                )
                for command, ratio in ageing.items()
            ),
        ),
        samples=samples,
    )


def _burst_ratio(samples: Samples) -> Ratio:
    return ratio_of_medians(samples["burst: Podwire"], samples[f"burst: {_MASQUERADED}"])


def _burst_table(samples: Samples, ratio: Ratio, count: int) -> Table:
    names = ("Podwire", _MASQUERADED)
    return Table(
        title=f"{count} ADDs by {_BURST_AT_ONCE} at once, from the first exec to the last answer, ms",
        columns=("", "median", "least", "most"),
        rows=tuple(
            (name, *(milliseconds(each(samples[f"burst: {name}"])) for each in (median, min, max))) for name in names
        ),
        notes=(f"The ratio is {ratio}, over {_BURSTS} bursts of each in turn.",),
    )


def _ageing(samples: Samples) -> dict[str, float]:
    """How much longer the last hundred calls took than the first, by command."""
    found = {}
    for command in ("ADD", "DEL"):
        times = samples[f"{command} without end"]
        found[command] = median(times[-_HUNDRED:]) / median(times[:_HUNDRED])
    return found


def _calls(samples: Samples) -> int:
    return len(samples["ADD without end"]) + len(samples["DEL without end"])


def _ageing_table(samples: Samples, ageing: dict[str, float]) -> Table:
    rows = []
    for command, ratio in ageing.items():
        times = samples[f"{command} without end"]
        hundreds = (times[:_HUNDRED], times[-_HUNDRED:])
        rows.append((f"Podwire: {command}", *(milliseconds(median(each)) for each in hundreds), f"{ratio:.2f}"))
    return Table(
        title=f"{_calls(samples)} calls without a pause, {_BURST_AT_ONCE} at once, medians in ms",
        columns=("", "first hundred", "last hundred", "ratio"),
        rows=tuple(rows),
    )


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


def _burst(contender: Contender, pods: list[Namespace], samples: Samples) -> None:
    with ThreadPoolExecutor(_BURST_AT_ONCE) as threads:
        began = time.perf_counter()
        attached = list(threads.map(contender.attach, pods))
        samples.setdefault(f"burst: {contender.name}", []).append(time.perf_counter() - began)
        added = list(threads.map(contender.prove, attached))
        list(threads.map(contender.detach, added))
    for each in added:
        contender.wait_gone(each)


def _come_and_go(contender: Contender, pods: list[Namespace], pairs: int, samples: Samples) -> None:
    """Every pod is added and deleted again and again, all at the same time; times are in the order of their ends."""
    adds, deletes = samples.setdefault("ADD without end", []), samples.setdefault("DEL without end", [])

    def repeat(pod: Namespace) -> None:
        for _ in range(pairs // len(pods)):
            added = contender.add(pod)
            adds.append(added.finished.seconds)
            deletes.append(contender.detach(added).seconds)

    with ThreadPoolExecutor(len(pods)) as threads:
        list(threads.map(repeat, pods))
