"""Pods with a port of the node and with limits: Podwire against the chain of reference plugins that does the same.

    Podwire      one process, capabilities portMappings and bandwidth
    the chain    bridge (ipMasq) ─exec▶ host-local · portmap ─exec▶ iptables … · bandwidth

Rounds of an ADD and a DEL each, in turn; then a hundred ADDs by twenty at once. Beside them, in the same rounds,
Podwire's pods that ask for neither, and the least that a plugin can do (bridge + host-local without masquerade): what a
plain pod costs. Podwire's phases, of the pods that ask, are read from the daemon's histogram.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from bench.chained import Chained
from bench.contender import Contender
from bench.podwire_node import PodwireNode, podwire_node, spent
from bench.reference import reference_chain, reference_node
from bench.report import Bound, Report, Table, milliseconds
from bench.stage import Namespace, Stage
from bench.statistic import median, percentile, ratio_of_medians

_OURS, _CHAIN = "Podwire, with port and limits", "the chain"
_PLAIN, _BARE = "Podwire, a plain pod", "bridge + host-local, bare"
_CAPABILITIES = ("portMappings", "bandwidth")
_WARM_UP, _PAUSE = 2, 0.01
_CROWD, _AT_ONCE, _BURSTS = 100, 20, 3
_COMMANDS = ("ADD", "DEL")

Samples = dict[str, list[float]]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` rounds after a few to warm up."""
    samples: Samples = {}
    with podwire_node(stage, "chain-ours") as node:
        plain = node.contender
        ours = Chained(_OURS, plain.node, plain.executable, {"type": "podwire", "last": True}, own=_CAPABILITIES)
        chain = reference_chain(stage, "chain-theirs", _CHAIN)
        plain.name = _PLAIN
        contenders = [ours, chain, plain, reference_node(stage, "chain-bare", _BARE, masquerade=False)]
        pods = iter(stage.pods((rounds + _WARM_UP) * len(contenders)))
        for number in range(-_WARM_UP, rounds):
            for contender in contenders if number % 2 else reversed(contenders):
                _turn(contender, next(pods), node, samples if number >= 0 else {})
        crowd = stage.pods(min(_CROWD, 4 * rounds))
        for number in range(_BURSTS):
            for contender in (ours, chain) if number % 2 else (chain, ours):
                _burst(contender, crowd, samples)
    return _report(samples, rounds, len(crowd))


def _turn(contender: Contender, pod: Namespace, node: PodwireNode, samples: Samples) -> None:
    before = node.phases() if contender.name == _OURS else {}
    time.sleep(_PAUSE)
    added = contender.add(pod)
    time.sleep(_PAUSE)
    deleted = contender.delete(added)
    time.sleep(_PAUSE)
    for command, finished in zip(_COMMANDS, (added.finished, deleted.finished), strict=True):
        samples.setdefault(f"{contender.name}: {command}", []).append(finished.seconds)
    if before:
        for (command, phase), seconds in spent(before, node.phases()).items():
            if command in _COMMANDS and phase != "reap":
                samples.setdefault(f"{command} {phase}", []).append(seconds)


def _burst(contender: Contender, pods: list[Namespace], samples: Samples) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        began = time.perf_counter()
        attached = list(threads.map(contender.attach, pods))
        samples.setdefault(f"burst: {contender.name}", []).append(time.perf_counter() - began)
        added = [contender.prove(each) for each in attached]
        list(threads.map(contender.detach, added))
    for each in added:
        contender.wait_gone(each)


# --- what it says -----------------------------------------------------------------------------------------------------


def _report(samples: Samples, rounds: int, crowd: int) -> Report:
    rows: list[tuple[str, ...]] = []
    for command in _COMMANDS:
        for name, against in ((_OURS, _CHAIN), (_CHAIN, ""), (_PLAIN, _BARE), (_BARE, "")):
            times = samples[f"{name}: {command}"]
            ratio = str(ratio_of_medians(times, samples[f"{against}: {command}"])) if against else ""
            rows.append((f"{command}: {name}", milliseconds(median(times)), milliseconds(percentile(times, 90)), ratio))
    bursts = {name: samples[f"burst: {name}"] for name in (_OURS, _CHAIN)}
    burst = ratio_of_medians(bursts[_OURS], bursts[_CHAIN])
    for name, times in bursts.items():
        whole = f"{crowd} ADDs by {_AT_ONCE} at once: {name}"
        rows.append((whole, milliseconds(median(times)), milliseconds(max(times)), str(burst) if name == _OURS else ""))
    phases = sorted(name for name in samples if name.split()[0] in _COMMANDS and ":" not in name)
    table = Table(
        title=f"A port of the node and limits, ms ({rounds} rounds, {_BURSTS} bursts)",
        columns=("", "median", "p90 or most", "of the next row"),
        rows=tuple(rows),
    )
    inside = Table(
        title="Podwire's daemon by phase, a pod with a port and limits, ms",
        columns=("", "median", "p90"),
        rows=tuple((name, *(f"{1000 * f(samples[name]):.2f}" for f in (median, _p90))) for name in phases),
    )
    ratios = {command: _ratio(samples, command, _OURS, _CHAIN) for command in _COMMANDS}
    bounds = [
        Bound(what=f"{command} with a port and limits, of the chain's", measured=ratios[command], limit=limit)
        for command, limit in (("ADD", 0.3), ("DEL", 0.15))
    ]
    bounds.append(
        Bound(what=f"{crowd} of these ADDs by {_AT_ONCE} at once, of the chain's", measured=burst.value, limit=0.3)
    )
    plain = _ratio(samples, "ADD", _PLAIN, _BARE)
    bounds.append(Bound(what="ADD of a plain pod, of bare bridge + host-local's", measured=plain, limit=1.6))
    return Report(tables=(table, inside), bounds=tuple(bounds), samples=samples)


def _ratio(samples: Samples, command: str, ours: str, theirs: str) -> float:
    return ratio_of_medians(samples[f"{ours}: {command}"], samples[f"{theirs}: {command}"]).value


def _p90(values: list[float]) -> float:
    return percentile(values, 90)
