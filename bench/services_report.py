"""What the scenario of Services found, as tables, and held against its bounds (bench/scenarios/services.py)."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from bench.report import Bound, Report, Table, milliseconds
from bench.statistic import median, percentile

Seconds = list[float]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A mode with so many Services of so many endpoints each."""

    mode: str
    services: int
    endpoints: int = 3

    def __str__(self) -> str:
        return f"{self.mode}, {self.services:,} × {self.endpoints:,}"


class Connecting(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that new connections took, through Services and past them."""

    service: Seconds
    other: Seconds


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What one shape cost the proxy: times in seconds, CPU with the programs that it runs, memory in MB.

    `cold` counts from the proxy's exec, `listed` from when the API had sent the last list; `changes` until a client
    met the new pod, `written` until the kernel told of the change; `whole` is the CPU time of a look at everything, and
    `meanwhile` how long a change took that came with it.
    """

    cold: float
    listed: float
    changes: Seconds
    written: Seconds
    adds: Seconds
    change_cpu: float
    add_cpu: float
    whole: float
    meanwhile: float
    memory: dict[str, float]
    connecting: Connecting


class ByHand(msgspec.Struct, frozen=True, kw_only=True):
    """The same of rules that were loaded by hand."""

    load: float
    changes: Seconds
    connecting: Connecting


class Modelled(msgspec.Struct, frozen=True):
    """Seconds, of which `decoding`, for so many bytes."""

    seconds: float
    decoding: float
    bytes: int


def report(
    found: dict[Shape, Measured],
    by_hand: dict[Shape, ByHand],
    modelled: Modelled,
    *,
    slices: int,
    connections: int,
    bounded: bool,
) -> Report:
    """`modelled` is of so many `slices`; `bounded` is whether their bound is one of this size."""
    return Report(
        tables=(
            _answer_table(found, by_hand),
            _cost_table(found),
            _connect_table(found, by_hand, connections),
            _model_table(modelled, slices),
        ),
        bounds=_bounds(found, modelled if bounded else None, slices),
        samples={f"{shape}: {name}": values for shape, each in found.items() for name, values in _samples(each)},
    )


def _samples(found: Measured) -> Iterator[tuple[str, Seconds]]:
    yield from (("change", found.changes), ("written", found.written), ("add", found.adds))


def _answer_table(found: dict[Shape, Measured], by_hand: dict[Shape, ByHand]) -> Table:
    rows = [
        (
            str(shape),
            f"{each.cold:.2f}",
            f"{each.listed:.2f}",
            *_spread(each.changes or each.written),
            *_spread(each.adds),
            milliseconds(each.meanwhile),
        )
        for shape, each in found.items()
    ]
    rows += [
        (str(shape), "", f"{each.load:.2f}", milliseconds(median(each.changes)), "", "", "", "")
        for shape, each in by_hand.items()
    ]
    return Table(
        title="Until Services answer: mode, Services × endpoints",
        columns=(
            "",
            "start, s",
            "after the lists, s",
            "change, ms",
            "p99",
            "new one, ms",
            "p99",
            "change during a look at all, ms",
        ),
        rows=tuple(rows),
        notes=(
            "Of rules by hand: the program that loads them, and the one that changes one endpoint of one Service. With "
            "more than three endpoints a change counts until the kernel tells of it.",
        ),
    )


def _cost_table(found: dict[Shape, Measured]) -> Table:
    return Table(
        title="What the proxy costs",
        columns=("", "CPU a change, ms", "CPU a new one, ms", "CPU of a look at all, ms", "VmRSS, MB", "Pss", "VmHWM"),
        rows=tuple(
            (
                str(shape),
                *(milliseconds(value) for value in (each.change_cpu, each.add_cpu, each.whole)),
                *(f"{each.memory[key]:.1f}" for key in ("VmRSS", "Pss", "VmHWM")),
            )
            for shape, each in found.items()
        ),
        notes=("CPU is the proxy's with the programs that it runs. Memory is settled, after all changes.",),
    )


def _connect_table(found: dict[Shape, Measured], by_hand: dict[Shape, ByHand], connections: int) -> Table:
    both = {shape: each.connecting for shape, each in found.items()}
    both |= {shape: each.connecting for shape, each in by_hand.items()}
    return Table(
        title=f"A new connection, µs ({connections:,} each)",
        columns=("", "to a Service", "p90", "past Services", "p90"),
        rows=tuple((str(shape), *_micro(each.service), *_micro(each.other)) for shape, each in both.items()),
    )


def _model_table(modelled: Modelled, count: int) -> Table:
    return Table(
        title=f"{count:,} EndpointSlices, {modelled.bytes / 1e6:.0f} MB",
        columns=("", "s"),
        rows=(
            ("decoded", f"{modelled.decoding:.2f}"),
            ("decoded and modelled", f"{modelled.seconds:.2f}"),
        ),
    )


def _bounds(found: dict[Shape, Measured], modelled: Modelled | None, slices: int) -> tuple[Bound, ...]:
    bounds = list(_everywhere({shape: each for shape, each in found.items() if shape.mode == "nftables"}))

    def add(what: str, measured: float, limit: float, unit: str) -> None:
        bounds.append(Bound(what=what, measured=measured, limit=limit, unit=unit))

    for shape, each in found.items():
        if (shape.mode, shape.services, shape.endpoints) in _COLD:
            limit = _COLD[shape.mode, shape.services, shape.endpoints]
            add(f"{shape}: answering after the lists", each.listed, limit, "s")
        if shape == Shape(mode="nftables", services=10_000):
            for key in ("VmRSS", "Pss"):
                add(f"{shape}: settled {key}", each.memory[key], 140, "MB")
        if shape == Shape(mode="iptables", services=5000):
            add(f"{shape}: change, p50", median(each.changes) * 1000, 100, "ms")
            few = found[Shape(mode="iptables", services=10)].connecting.service
            add(f"{shape}: a new connection, of that with 10", median(each.connecting.service) / median(few), 1.2, "")
    if modelled is not None:
        add(f"{slices:,} slices decoded and modelled", modelled.seconds, 2, "s")
    return tuple(bounds)


def _everywhere(found: dict[Shape, Measured]) -> Iterator[Bound]:
    """What is asked for at every size: the worst of them."""
    changes = [each.changes or each.written for each in found.values()]
    for what, taken in (("a change", changes), ("a new Service", [each.adds for each in found.values()])):
        for percent, limit in ((50, 50), (99, 150)):
            worst = max(percentile(each, percent) for each in taken)
            what_of = f"nftables, at every size: {what}, p{percent}"
            yield Bound(what=what_of, measured=worst * 1000, limit=limit, unit="ms")
    cpu = max(each.change_cpu for each in found.values())
    yield Bound(what="nftables, at every size: CPU of a change", measured=cpu * 1000, limit=30, unit="ms")


_COLD = {("nftables", 10_000, 3): 1.5, ("nftables", 30_000, 3): 5.0, ("iptables", 5000, 3): 2.5}


def _spread(seconds: Seconds) -> tuple[str, str]:
    return milliseconds(median(seconds)), milliseconds(percentile(seconds, 99))


def _micro(seconds: Seconds) -> tuple[str, str]:
    return f"{median(seconds) * 1e6:.0f}", f"{percentile(seconds, 90) * 1e6:.0f}"
