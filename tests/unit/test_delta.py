"""DeltaTracker: stories by name, and one law over random histories."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.delta import DeltaTracker

Step = tuple[Any, ...]  # a method of the tracker and its arguments

STORIES: dict[str, tuple[list[Step], list[tuple[str, int]], list[str]]] = {
    "nothing known, nothing to do": ([], [], []),
    "a new key is created": ([("set_desired", "a", 1)], [("a", 1)], []),
    "a key found and not desired is deleted": ([("set_actual", "a", 1)], [], ["a"]),
    "a key found with another value is updated": ([("set_desired", "a", 1), ("set_actual", "a", 2)], [("a", 1)], []),
    "a key found as desired needs nothing": ([("set_desired", "a", 1), ("set_actual", "a", 1)], [], []),
    "desired, then not, before it was applied": ([("set_desired", "a", 1), ("drop_desired", "a")], [], []),
    "applied, then not desired": (
        [("set_desired", "a", 1), ("set_actual", "a", 1), ("drop_desired", "a")],
        [],
        ["a"],
    ),
    "someone deleted it behind our back": (
        [("set_desired", "a", 1), ("set_actual", "a", 1), ("drop_actual", "a")],
        [("a", 1)],
        [],
    ),
    "desire changed while the old value was being applied": (
        [("set_desired", "a", 1), ("set_desired", "a", 2), ("set_actual", "a", 1)],
        [("a", 2)],
        [],
    ),
    "a resync finds one lost, one changed, one strange": (
        [("replace_desired", {"a": 1, "b": 2, "c": 3}), ("replace_actual", {"b": 9, "c": 3, "d": 4})],
        [("a", 1), ("b", 2)],
        ["d"],
    ),
    "a resync that finds nothing asks for everything": (
        [("replace_desired", {"a": 1}), ("replace_actual", {"a": 1}), ("replace_actual", {})],
        [("a", 1)],
        [],
    ),
    "a value that is false is a value": ([("set_desired", "a", 0), ("set_actual", "a", 0)], [], []),
}


def after(steps: list[Step]) -> DeltaTracker[str, int]:
    tracker = DeltaTracker[str, int]()
    for method, *arguments in steps:
        getattr(tracker, method)(*arguments)
    return tracker


@pytest.mark.parametrize("name", STORIES)
def test_story(name: str) -> None:
    steps, updates, deletions = STORIES[name]
    tracker = after(steps)
    assert (list(tracker.pending_updates()), list(tracker.pending_deletions())) == (updates, deletions)
    assert tracker.in_sync is (not updates and not deletions)


KEYS = st.sampled_from("abcdef")
STATES = st.dictionaries(KEYS, st.integers(0, 2))
STEPS = st.one_of(
    st.tuples(st.sampled_from(["set_desired", "set_actual"]), KEYS, st.integers(0, 2)),
    st.tuples(st.sampled_from(["drop_desired", "drop_actual"]), KEYS),
    st.tuples(st.sampled_from(["replace_desired", "replace_actual"]), STATES),
)


@given(st.lists(STEPS))
def test_applying_what_is_pending_makes_actual_equal_desired(steps: list[Step]) -> None:
    tracker = after(steps)
    kernel = dict(tracker.actual)
    for key, value in tracker.pending_updates():
        assert kernel.get(key) != value, "an update that changes nothing"
        kernel[key] = value
        tracker.set_actual(key, value)
    for key in tracker.pending_deletions():
        del kernel[key]
        tracker.drop_actual(key)
    assert kernel == tracker.desired == tracker.actual
    assert tracker.in_sync
