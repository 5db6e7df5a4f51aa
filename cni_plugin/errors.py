"""What can go wrong in the executable, as types. `main` maps them to CNI errors; nothing else prints.

PluginError
├── CniError          has its code; the runtime is told as it is
├── TransportError    the daemon gave no answer: error 11, 50, or a queued DEL
│   ├── Unreachable       nothing was sent
│   ├── Refused           the daemon is leaving and has not begun with the call
│   ├── ConnectionLost    it went away half way
│   ├── NoAnswer          it ended the call without a message
│   ├── DeadlineExceeded
│   └── ProtocolError     it does not speak as it should
└── QueueError        a DEL could not be queued
"""


class PluginError(Exception):
    """The root. The message is one line."""


class CniError(PluginError):
    """An error of the CNI specification: `code` (§ Error), `msg` in short, `details` at length."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details


class TransportError(PluginError):
    """The daemon gave no answer. Whether it has acted is unknown, unless the subclass says so."""


class Unreachable(TransportError):
    """There was no connection; nothing was sent."""


class Refused(TransportError):
    """The daemon is leaving (GOAWAY below our stream, RFC 9113 §6.8) and has not begun with the call."""


class ConnectionLost(TransportError):
    """The connection ended before the answer was whole."""


class NoAnswer(TransportError):
    """The daemon ended the call without a message."""


class DeadlineExceeded(TransportError):
    """The answer was not there in time."""


class ProtocolError(TransportError):
    """The peer broke HTTP/2 (RFC 9113), gRPC's framing, or the encoding of protobuf."""


class QueueError(PluginError):
    """A DEL could not be queued, and is therefore not done."""
