"""A stream of bytes, cut into lines: a watch is one JSON object a line, and a line may have several megabytes.

New bytes are searched once and a line's pieces joined once, so a line costs its length, however it arrives. Bytes after
the last line end stay for the next call; whoever drops the splitter when a connection breaks drops them with it, since
half an object says nothing.
"""

from __future__ import annotations

from podwire.kube.errors import Garbled

LONGEST = 64 << 20  # bytes; etcd takes objects of 1.5 MB, and a server that sends more than this sends no objects


class LineSplitter:
    """Feed it bytes, get whole lines (without their ends; empty ones are passed over)."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._pieces: list[bytes] = []
        self._held = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes. Raises Garbled when the one that is begun is longer than allowed."""
        end = data.rfind(b"\n")
        if end < 0:
            self._hold(data)
            return []
        whole = b"".join((*self._pieces, data[:end]))
        self._pieces, self._held = [], 0
        lines = [line for line in whole.split(b"\n") if line]
        self._hold(data[end + 1 :])
        return lines

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        self._held += len(data)
        if self._held > self._longest:
            raise Garbled(f"a line of more than {self._longest} bytes")
        self._pieces.append(data)
