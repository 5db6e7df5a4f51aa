"""How long a change of endpoints took from its cause to this node's kernel: pure.

The endpoint-slice controller writes into a slice when what made it change happened (a pod became ready), as an
annotation; a change without such a cause has none. What happened before this process was there says nothing about it.

Source: Kubernetes v1.36, `EndpointsLastChangeTriggerTime` in core/v1; kube-proxy's metric of that name.
"""

from __future__ import annotations

from datetime import datetime

from podwire.kube.objects import EndpointSlice

ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"


class TriggerTimes:
    """The causes, after `since` (in seconds since the epoch), of changes that are not in the kernel yet."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._waiting: list[float] = []

    def take(self, obj: EndpointSlice) -> None:
        """A slice that is new or has changed."""
        text = (obj.metadata.annotations or {}).get(ANNOTATION, "")
        when = _seconds(text) if text else 0.0
        if when > self._since:
            self._waiting.append(when)

    def done(self, now: float) -> list[float]:
        """The kernel has everything: how many seconds each change has taken until `now`, in seconds since the epoch."""
        waiting, self._waiting = self._waiting, []
        return [max(0.0, now - each) for each in waiting]


def _seconds(text: str) -> float:
    """0 for what is no time: anybody may write anything."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return 0.0
