"""The root of Podwire's errors. Every package derives its own small hierarchy from these two.

The difference between them is what the caller should do: the first is permanent until someone changes something, the
second goes away by itself.
"""

from __future__ import annotations


class PodwireError(Exception):
    """Something is wrong that trying again does not mend. The message names it in one line, and what would be right."""


class TryAgain(PodwireError):
    """Something is not there yet, or not there for now; the same call may succeed later."""
