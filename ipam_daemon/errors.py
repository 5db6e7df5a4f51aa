"""The daemon's errors and, in one table, the CNI error codes that they become.

Codes 1–99 are the specification's (CNI 1.1.0, "Error", codes 1–11 and 50–51; 8 is what the Go library uses for a bad
network namespace); 100 and above are Podwire's own, listed in docs/errors.md.
"""

from __future__ import annotations

from podwire.errors import PodwireError, TryAgain


class CniError(PodwireError):
    """An error with a CNI code. `code` says what the runtime may do, the message names field, value and remedy."""

    code = 999

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class IncompatibleVersion(CniError):
    """The configuration asks for a CNI version that Podwire does not speak."""

    code = 1


class UnsupportedField(CniError):
    """A field of the configuration that Podwire understands but cannot honour."""

    code = 2


class InvalidEnvironment(CniError):
    """A CNI_ variable that is missing or ill-formed."""

    code = 4


class UndecodableConfig(CniError):
    """Standard input is not JSON."""

    code = 6


class InvalidConfig(CniError):
    """The configuration is JSON, but a field of it is missing or ill-formed."""

    code = 7


class InvalidNetns(CniError):
    """CNI_NETNS does not lead to a network namespace other than the node's own."""

    code = 8


class TryAgainLater(CniError, TryAgain):
    """The daemon cannot do this yet, or not for now."""

    code = 11


class Unavailable(CniError):
    """STATUS: an ADD cannot succeed now."""

    code = 50


class Impaired(CniError):
    """STATUS: an ADD cannot succeed now, and pods that run are cut off, too."""

    code = 51


class Exhausted(CniError):
    """No address is free. The message names the pool and says how many addresses are in which state."""

    code = 100


class InterfaceExists(CniError):
    """The container's namespace has an interface of this name already, or the attachment exists."""

    code = 101


class DeletedMeanwhile(CniError):
    """A DEL of the same attachment was issued after this ADD and has won."""

    code = 102


class CheckFailed(CniError):
    """CHECK found a difference between the journal, the kernel and the previous result."""

    code = 103


class PlumbingFailed(CniError):
    """The kernel refused a link, an address or a route."""

    code = 5


class EntriesRefused(PlumbingFailed):
    """The kernel refused entries towards other nodes, and has all the others."""


class AddressUnavailable(CniError):
    """An address that was asked for by name cannot be had here. The message says why."""

    code = 104


class PortTaken(CniError):
    """A port of the node that was asked for leads to another pod already, or the node itself listens on it."""

    code = 105


def code_of(error: BaseException) -> int:
    """The CNI code for any exception: its own, 11 for what may go away by itself, 999 for what was not foreseen."""
    if isinstance(error, CniError):
        return error.code
    return TryAgainLater.code if isinstance(error, TryAgain) else CniError.code
