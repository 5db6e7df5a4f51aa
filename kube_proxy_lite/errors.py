"""The proxy's errors."""

from __future__ import annotations

from podwire.errors import PodwireError


class ModeUnavailable(PodwireError):
    """The kernel or a program that a mode needs is not there; the message says which, and what would be right."""
