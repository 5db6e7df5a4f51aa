"""What installing and uninstalling can end with."""

from __future__ import annotations

from podwire.errors import PodwireError


class InstallError(PodwireError):
    """The executable cannot be laid down as asked. What was there before is still whole."""


class UninstallError(PodwireError):
    """Something of ours stays on the node, and the message says what and why. Asking again goes on from there."""
