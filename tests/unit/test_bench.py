"""The benchmark's pure parts: a wrong sum here would be a wrong number in the documentation."""

from __future__ import annotations

import pytest

from bench.podwire_node import parse_phases, spent
from bench.report import Bound, render_bounds, replace_regions
from bench.statistic import median, percentile, ratio_of_medians

EXPOSITION = """\
# TYPE podwire_cni_seconds histogram
podwire_cni_seconds_bucket{command="ADD",le="0.001",phase="wire"} 0.0
podwire_cni_seconds_sum{command="ADD",phase="wire"} 0.0125
podwire_cni_seconds_count{command="ADD",phase="wire"} 3.0
podwire_cni_seconds_sum{command="DEL",phase="total"} 1e-05
podwire_cni_seconds_created{command="DEL",phase="total"} 1.7e+09
"""


def test_phases_are_the_sums_of_the_histogram_alone() -> None:
    assert parse_phases(EXPOSITION) == {("ADD", "wire"): 0.0125, ("DEL", "total"): 1e-05}


def test_a_phase_that_was_not_there_before_counts_in_full() -> None:
    before, after = {("ADD", "wire"): 1.0}, {("ADD", "wire"): 1.25, ("ADD", "lock"): 0.5}
    assert spent(before, after) == {("ADD", "wire"): 0.25, ("ADD", "lock"): 0.5}


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        pytest.param([3.0, 1.0, 2.0], 50, 2.0, id="the middle"),
        pytest.param([1.0, 2.0, 3.0, 4.0, 5.0], 90, 4.6, id="between two"),
        pytest.param([7.0], 90, 7.0, id="of one"),
        pytest.param([1.0, 2.0], 100, 2.0, id="the last"),
    ],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_one_disturbed_round_moves_neither_median_nor_ratio() -> None:
    ours, theirs = [1.0] * 20 + [100.0], [2.0] * 21
    ratio = ratio_of_medians(ours, theirs)
    assert (median(ours), ratio.value, ratio.low, ratio.high) == (1.0, 0.5, 0.5, 0.5)


def test_a_ratio_of_scattered_rounds_lies_within_its_interval() -> None:
    ratio = ratio_of_medians([float(i % 7 + 1) for i in range(60)], [float(i % 5 + 2) for i in range(60)])
    assert ratio.low < ratio.value < ratio.high


def test_a_ratio_needs_both_of_every_round() -> None:
    with pytest.raises(ValueError, match="2 and 1 values"):
        ratio_of_medians([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("measured", "reached"), [(14.9, True), (15.0, True), (15.1, False)])
def test_a_bound_is_reached_up_to_its_limit(measured: float, reached: bool) -> None:
    assert Bound(what="share", measured=measured, limit=15).reached is reached


@pytest.mark.parametrize(("measured", "reached"), [(0.94, False), (0.95, True), (1.2, True)])
def test_what_is_asked_for_may_be_the_least(measured: float, reached: bool) -> None:
    bound = Bound(what="throughput", measured=measured, limit=0.95, least=True)
    assert bound.reached is reached
    assert "≥ 0.95" in render_bounds([bound])


DOCUMENT = (
    "before\n<!-- bench:a -->\nold\n\nolder\n<!-- /bench:a -->\nbetween\n<!-- bench:b -->\n<!-- /bench:b -->\nafter\n"
)


def test_only_what_is_between_the_markers_is_written_anew() -> None:
    assert replace_regions(DOCUMENT, {"a": "new \\1", "b": "first"}) == (
        "before\n<!-- bench:a -->\nnew \\1\n<!-- /bench:a -->\n"
        "between\n<!-- bench:b -->\nfirst\n<!-- /bench:b -->\nafter\n"
    )


def test_writing_twice_is_writing_once() -> None:
    once = replace_regions(DOCUMENT, {"a": "new"})
    assert replace_regions(once, {"a": "new"}) == once


def test_a_region_that_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match="bench:c"):
        replace_regions(DOCUMENT, {"c": "new"})
