"""The executable: what the runtime asks goes to the daemon, what the daemon answers goes to the runtime.

    environment ─▶ checked (code 4) ─▶ standard input ─▶ call ─▶ answer printed, its exit code
                                                          │
                                            no answer ────┴─▶ ADD, CHECK, GC: 11 · STATUS: 50 · DEL: queued, success

VERSION and the about text need no daemon. Every wait has the command's deadline, which is below what the runtimes
themselves give a plugin (kubelet and containerd: two to four minutes), so that they are told why. Standard output gets
one answer or nothing; there are no logs. The installed script calls `main` with what `podwire install` was told.
"""

import posix
from _signal import SIG_DFL, SIGINT, signal  # type: ignore[import-not-found]
from select import POLLIN, poll
from time import CLOCK_BOOTTIME, clock_gettime_ns, monotonic

from cni_plugin.environment import SUPPORTED_VERSIONS, Environment, read_environment
from cni_plugin.errors import CniError, PluginError, TransportError
from cni_plugin.protocol import API_MAX, API_MIN, METHOD, CallResponse, decode_response, encode_request
from cni_plugin.transport import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

# Seconds, standard input and connecting included.
DEADLINES = {"ADD": 90, "CHECK": 60, "GC": 60, "DEL": 30, "STATUS": 10}
MAX_STDIN = 16 << 20

_ERROR_STDIN_TIMEOUT = 1.0  # an error that is known already waits no longer for the cniVersion to tell it in
_VERSIONS = ", ".join(f'"{version}"' for version in SUPPORTED_VERSIONS)
VERSION_ANSWER = f'{{"cniVersion": "{SUPPORTED_VERSIONS[-1]}", "supportedVersions": [{_VERSIONS}]}}\n'.encode()
ABOUT = f"Podwire's CNI plugin; CNI protocol versions {', '.join(SUPPORTED_VERSIONS)}\n".encode()


class Answer:
    """What the process says last: bytes for standard output and standard error, and its exit code."""

    __slots__ = ("exit_code", "stderr", "stdout")

    def __init__(self, stdout: bytes, exit_code: int, stderr: bytes = b"") -> None:
        self.stdout = stdout
        self.exit_code = exit_code
        self.stderr = stderr


def main(socket: str, queue: str, deadlines: "Mapping[str, float]" = DEADLINES) -> "NoReturn":
    """Answers this process's request and ends the process. `socket` and `queue` are absolute paths."""
    issued_at = clock_gettime_ns(CLOCK_BOOTTIME)
    signal(SIGINT, SIG_DFL)  # Python's own handler prints a traceback
    _reserve_standard_descriptors()
    answer = _Request(posix.environ, socket, queue, deadlines, issued_at).answer()
    exit_code = answer.exit_code
    try:
        _write(2, answer.stderr)
        _write(1, answer.stdout)
    except OSError:  # nobody reads: the exit code is all that can still be said
        exit_code = exit_code or 1
    posix._exit(exit_code)  # nothing is left to flush, and taking the interpreter down costs a millisecond


class _Request:
    """One request on its way. Standard input is kept once read, since an error speaks the version that it names."""

    def __init__(
        self, variables: "dict[bytes, bytes]", socket: str, queue: str, deadlines: "Mapping[str, float]", issued_at: int
    ) -> None:
        self.variables = variables
        self.socket = socket
        self.queue = queue
        self.deadlines = deadlines
        self.issued_at = issued_at
        self.stdin: bytes | None = None

    def answer(self) -> Answer:
        """Never raises: what nobody has foreseen becomes an error of code 999."""
        command = self.variables.get(b"CNI_COMMAND", b"")
        if not command:
            return Answer(b"", 0, ABOUT)
        if command == b"VERSION":
            return Answer(VERSION_ANSWER, 0)
        try:
            response = self._ask(read_environment(self.variables))
        except CniError as error:
            return self._failed(error)
        except Exception as error:  # noqa: BLE001 (a traceback is no CNI answer)
            return self._failed(CniError(999, "internal error of the CNI plugin", f"{type(error).__name__}: {error}"))
        return Answer(response.stdout, response.exit_code)

    def _ask(self, environment: Environment) -> CallResponse:
        deadline = monotonic() + self.deadlines[environment.command.decode()]
        self.stdin = b""
        self.stdin = _read_stdin(deadline)
        request = encode_request(environment, self.stdin, self.issued_at)
        try:
            response = decode_response(call(self.socket, METHOD, request, deadline))
        except TransportError as error:
            return self._unanswered(environment, str(error))
        # A daemon that cannot serve us says so in an API of its own: a refusal is printed, a success is not believed.
        if not API_MIN <= response.api <= API_MAX and response.exit_code == 0:
            return self._unanswered(
                environment, f"the daemon answered in API {response.api}, this plugin speaks {API_MIN} to {API_MAX}"
            )
        return response

    def _unanswered(self, environment: Environment, reason: str) -> CallResponse:
        if environment.command == b"STATUS":
            raise CniError(50, "the Podwire daemon of this node is not available", reason)
        if environment.command != b"DEL":
            raise CniError(11, "the Podwire daemon of this node did not answer, try again later", reason)
        from cni_plugin.queue import enqueue

        try:
            enqueue(self.queue, environment, self.stdin or b"", self.issued_at)
        except PluginError as error:
            raise CniError(
                11,
                "the Podwire daemon of this node did not answer, and the deletion cannot be queued",
                f"{reason}; {error}",
            ) from error
        return CallResponse(API_MAX, b"", 0)

    def _failed(self, error: CniError) -> Answer:
        from cni_plugin.failure import render

        if self.stdin is None:
            try:
                self.stdin = _read_stdin(monotonic() + _ERROR_STDIN_TIMEOUT)
            except CniError:
                self.stdin = b""
        return Answer(render(error.code, error.msg, error.details, self.stdin), 1)


def _read_stdin(deadline: float) -> bytes:
    """Standard input to its end. Raises CniError: 5 when it cannot be read or does not end, 6 when it is too much."""
    poller = poll()
    poller.register(0, POLLIN)
    parts: list[bytes] = []
    size = 0
    try:
        while True:
            remaining = deadline - monotonic()
            if remaining <= 0 or not poller.poll(remaining * 1000):
                raise CniError(5, "standard input did not end in time", f"{size} bytes were read")
            part = posix.read(0, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > MAX_STDIN:
                raise CniError(
                    6, "the network configuration is too long", f"more than {MAX_STDIN} bytes on standard input"
                )
    except OSError as error:
        raise CniError(5, "cannot read standard input", error.strerror or str(error)) from error


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[posix.write(descriptor, left) :]


def _reserve_standard_descriptors() -> None:
    """A process started with 0, 1 or 2 closed would get its socket there, and print into it."""
    descriptor = posix.open("/dev/null", posix.O_RDONLY | posix.O_CLOEXEC)
    while descriptor <= 2:
        descriptor = posix.open("/dev/null", posix.O_RDONLY | posix.O_CLOEXEC)
    posix.close(descriptor)
