"""What it takes to look into objects that anybody may have written: copies, lists that may be none, values in words."""

from __future__ import annotations

from typing import Any, TypeVar

Object = dict[str, Any]
Problem = tuple[str, str]
"""A field, and what is wrong with it."""
T = TypeVar("T")


def copied(value: T) -> T:
    """A deep copy of what JSON can say; several times faster than `copy.deepcopy`."""
    copy: T = _copied(value)
    return copy


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def dicts(value: Any) -> list[Object]:
    """The objects in a list; none when it is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def is_number(value: Any, first: int, last: int) -> bool:
    """Whether it is a whole number from `first` to `last`."""
    return isinstance(value, int) and not isinstance(value, bool) and first <= value <= last


def shown(value: Any) -> str:
    """A value as messages show it: text in quotes."""
    return f'"{value}"' if isinstance(value, str) else str(value)
