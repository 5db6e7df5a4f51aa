"""The executable's own gRPC client against a real grpcio server, with the generated stubs.

client ── tap ── grpcio server          the tap records the frames of both directions, so that a case can wait for
                                        what it is about (a PING acknowledged, a GOAWAY seen) before it goes on
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from cni_plugin import transport
from cni_plugin.environment import Environment
from cni_plugin.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NoAnswer,
    ProtocolError,
    Refused,
    TransportError,
    Unreachable,
)
from cni_plugin.protocol import METHOD, decode_response, encode_request
from podwire.v1 import cni_pb2, cni_pb2_grpc

DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 4, 6, 7, 8, 9
ACK = 0x1
PREFACE_LENGTH = 24
PATIENCE = 90.0  # for conditions that are certain to come about

Frame = tuple[str, int, int, int]  # "client" or "server", kind, flags, stream
Behaviour = Callable[[cni_pb2.CallRequest, grpc.ServicerContext], cni_pb2.CallResponse]


class Daemon(cni_pb2_grpc.CNIServicer):
    """A CNI service that does what a case wants."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[cni_pb2.CallRequest] = []

    def Call(self, request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:  # noqa: N802
        self.requests.append(request)
        return self.behaviour(request, context)


class Tap:
    """Passes bytes on between a client and the server, and notes the frames as they go by."""

    def __init__(self, path: Path, server: Path) -> None:
        self.frames: list[Frame] = []
        self._changed = threading.Condition()
        self._server = server
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def wait_for(self, seen: Callable[[list[Frame]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: seen(self.frames), PATIENCE), f"not among {self.frames}"

    def count(self, side: str, kind: int) -> int:
        with self._changed:
            return sum(frame[0] == side and frame[1] == kind for frame in self.frames)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._server))
                for side, source, sink in (("client", client, server), ("server", server, client)):
                    self._threads.append(threading.Thread(target=self._pass_on, args=(side, source, sink)))
                    self._threads[-1].start()

    def _pass_on(self, side: str, source: socket.socket, sink: socket.socket) -> None:
        pending = bytearray()
        skip = PREFACE_LENGTH if side == "client" else 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                pending += data
                del pending[: (skipped := min(skip, len(pending)))]
                skip -= skipped
                self._note(side, pending)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        if side == "server":
            sink.close()

    def _note(self, side: str, pending: bytearray) -> None:
        while len(pending) >= 9 and len(pending) >= (end := 9 + int.from_bytes(pending[:3], "big")):
            with self._changed:
                self.frames.append((side, pending[3], pending[4], int.from_bytes(pending[5:9], "big")))
                self._changed.notify_all()
            del pending[:end]


@contextlib.contextmanager
def serving(
    folder: Path, behaviour: Behaviour, options: tuple[tuple[str, Any], ...] = ()
) -> Iterator[tuple[Daemon, Tap, grpc.Server]]:
    """A grpcio server at folder/daemon.sock, a tap before it at folder/tap.sock."""
    daemon = Daemon(behaviour)
    pool = futures.ThreadPoolExecutor(24)
    server = grpc.server(pool, options=list({"grpc.max_receive_message_length": 64 << 20, **dict(options)}.items()))
    cni_pb2_grpc.add_CNIServicer_to_server(daemon, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{folder}/daemon.sock")
    server.start()
    tap = Tap(folder / "tap.sock", folder / "daemon.sock")
    try:
        yield daemon, tap, server
    finally:
        server.stop(0).wait(PATIENCE)
        tap.close()
        pool.shutdown()


def ask(path: Path, stdin: bytes = b"{}", command: bytes = b"ADD", seconds: float = PATIENCE) -> bytes:
    """One call as the executable makes it; what it would print."""
    request = encode_request(Environment(command, b"c0ffee", b"/run/netns/a", b"eth0"), stdin, 7)
    return decode_response(transport.call(str(path), METHOD, request, time.monotonic() + seconds)).stdout


def answering(stdout: bytes) -> Behaviour:
    return lambda _request, _context: cni_pb2.CallResponse(api=1, stdout=stdout)


def echo(request: cni_pb2.CallRequest, _context: grpc.ServicerContext) -> cni_pb2.CallResponse:
    return cni_pb2.CallResponse(api=1, stdout=request.stdin)


# --- what goes well ----------------------------------------------------------------------------------------------

EVERY_BYTE = bytes(range(256))
SMALL_WINDOWS = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
ECHOED: dict[str, tuple[bytes, tuple[tuple[str, Any], ...]]] = {
    "nothing": (b"", ()),
    "every byte there is": (EVERY_BYTE, ()),
    "just beyond one frame": (EVERY_BYTE * 65, ()),
    "just beyond the initial window": (EVERY_BYTE * 257, ()),
    "a megabyte both ways": (EVERY_BYTE * 4096, ()),
    "five megabytes both ways": (EVERY_BYTE * 20480, ()),
    "a megabyte into small windows": (EVERY_BYTE * 4096, SMALL_WINDOWS),
    "a megabyte without window probes": (EVERY_BYTE * 4096, (("grpc.http2.bdp_probe", 0),)),
    "a megabyte to a server with large frames": (EVERY_BYTE * 4096, (("grpc.http2.max_frame_size", 1 << 20),)),
}


@pytest.mark.parametrize("case", ECHOED)
def test_what_is_sent_comes_back(case: str, tmp_path: Path) -> None:
    stdin, options = ECHOED[case]
    with serving(tmp_path, echo, options) as (daemon, _, _):
        assert ask(tmp_path / "tap.sock", stdin) == stdin
        assert daemon.requests[0].stdin == stdin


def test_the_daemon_reads_what_the_runtime_said(tmp_path: Path) -> None:
    environment = Environment(b"DEL", b"c0ffee", b"/run/netns/a", "größe".encode(), b"K=V", b"/opt/cni/bin")
    with serving(tmp_path, answering(b"done")) as (daemon, _, _):
        request = encode_request(environment, b"\xff{}", 2**63, b"boot")
        transport.call(f"{tmp_path}/daemon.sock", METHOD, request, time.monotonic() + PATIENCE)
        assert daemon.requests == [
            cni_pb2.CallRequest(
                api_min=1,
                api_max=1,
                command="DEL",
                container_id="c0ffee",
                netns="/run/netns/a",
                ifname="größe",
                args="K=V",
                path="/opt/cni/bin",
                stdin=b"\xff{}",
                issued_at=2**63,
                boot_id="boot",
            )
        ]


def test_a_long_answer_needs_and_gets_more_window(tmp_path: Path) -> None:
    with serving(tmp_path, answering(EVERY_BYTE * 12_288)) as (_, tap, _):
        assert ask(tmp_path / "tap.sock") == EVERY_BYTE * 12_288
        assert tap.count("client", WINDOW_UPDATE) > 1


def test_headers_of_more_than_one_frame(tmp_path: Path) -> None:
    def verbose(request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:
        context.send_initial_metadata([(f"key-{number}", "v" * 6000) for number in range(8)])
        return echo(request, context)

    with serving(tmp_path, verbose) as (_, tap, _):
        assert ask(tmp_path / "tap.sock", b"short") == b"short"
        assert tap.count("server", CONTINUATION) > 0


def test_pings_are_answered_while_the_daemon_works(tmp_path: Path) -> None:
    """The server gives up on a connection whose PING goes unanswered; the daemon answers only after three were."""
    taps: list[Tap] = []

    def patient(request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:
        taps[0].wait_for(lambda seen: sum(frame[:3] == ("client", PING, ACK) for frame in seen) >= 3)
        return echo(request, context)

    keepalive = (
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 30_000),
        ("grpc.http2.max_pings_without_data", 0),
    )
    with serving(tmp_path, patient, keepalive) as (_, tap, _):
        taps.append(tap)
        assert ask(tmp_path / "tap.sock", b"still there") == b"still there"


def test_a_daemon_that_shuts_down_finishes_the_call(tmp_path: Path) -> None:
    """GOAWAY arrives while the call is in the daemon's hands; the answer arrives after it."""
    parts: list[tuple[Tap, grpc.Server]] = []

    def leaving(request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:
        tap, server = parts[0]
        server.stop(PATIENCE)
        tap.wait_for(lambda seen: any(frame[:2] == ("server", GOAWAY) for frame in seen))
        return echo(request, context)

    with serving(tmp_path, leaving) as (_, tap, server):
        parts.append((tap, server))
        assert ask(tmp_path / "tap.sock", b"last words") == b"last words"


def test_many_at_once_get_their_own_answers(tmp_path: Path) -> None:
    gate = threading.Barrier(20)

    def together(request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:
        gate.wait(PATIENCE)
        return echo(request, context)

    with serving(tmp_path, together), futures.ThreadPoolExecutor(20) as pool:
        said = [str(number).encode() * 5000 for number in range(20)]
        assert list(pool.map(lambda stdin: ask(tmp_path / "daemon.sock", stdin), said)) == said


# --- what goes wrong ---------------------------------------------------------------------------------------------


def raising(_request: cni_pb2.CallRequest, _context: grpc.ServicerContext) -> cni_pb2.CallResponse:
    raise RuntimeError("a bug in the daemon")


def aborting(_request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:
    context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
    raise AssertionError("abort raises")


def compressing(request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:
    """grpcio compresses when it is told to, although the client has not said that it reads that."""
    context.set_compression(grpc.Compression.Gzip)
    return echo(request, context)


WITHOUT_ANSWER: dict[str, tuple[Behaviour, tuple[tuple[str, Any], ...], type[TransportError]]] = {
    "an exception in the daemon": (raising, (), NoAnswer),
    "a gRPC error": (aborting, (), NoAnswer),
    "a request beyond the server's limit": (echo, (("grpc.max_receive_message_length", 1),), NoAnswer),
    "a compressed answer": (compressing, (), ProtocolError),
}


@pytest.mark.parametrize("case", WITHOUT_ANSWER)
def test_an_error_of_grpc_is_no_answer(case: str, tmp_path: Path) -> None:
    behaviour, options, kind = WITHOUT_ANSWER[case]
    with serving(tmp_path, behaviour, options), pytest.raises(kind):
        ask(tmp_path / "tap.sock", stdin=bytes(10_000))


def test_a_method_that_the_daemon_does_not_have(tmp_path: Path) -> None:
    with serving(tmp_path, echo), pytest.raises(NoAnswer):
        transport.call(f"{tmp_path}/daemon.sock", b"/podwire.v9.CNI/Call", b"", time.monotonic() + PATIENCE)


def test_a_daemon_that_hangs_is_left_at_the_deadline_and_learns_of_it(tmp_path: Path) -> None:
    left = threading.Event()
    told: list[float] = []

    def hanging(request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:
        told.append(context.time_remaining())
        context.add_callback(left.set)
        left.wait(PATIENCE)
        return echo(request, context)

    with serving(tmp_path, hanging):
        while not told:  # a machine that stalls may leave a call no time to arrive
            with pytest.raises((DeadlineExceeded, NoAnswer)):  # our clock or the server's, whichever is first
                ask(tmp_path / "tap.sock", seconds=0.5)
        assert left.wait(PATIENCE)
    assert 0 <= told[0] <= 0.5


SERVER = """
import sys, threading
from concurrent import futures
import grpc
from podwire.v1 import cni_pb2_grpc

class Daemon(cni_pb2_grpc.CNIServicer):
    def Call(self, request, context):
        print("called", flush=True)
        threading.Event().wait()

server = grpc.server(futures.ThreadPoolExecutor(1))
cni_pb2_grpc.add_CNIServicer_to_server(Daemon(), server)
server.add_insecure_port("unix:" + sys.argv[1])
server.start()
print("ready", flush=True)
server.wait_for_termination()
"""


def test_a_daemon_killed_half_way(tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    daemon = subprocess.Popen([sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    try:
        assert daemon.stdout.readline() == "ready\n"
        with futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, path)
            assert daemon.stdout.readline() == "called\n"
            daemon.kill()
            with pytest.raises(ConnectionLost):
                asked.result(PATIENCE)
    finally:
        daemon.kill()
        daemon.wait()
        daemon.stdout.close()
    with pytest.raises(Unreachable):
        ask(path)  # the socket's file is still there


# --- peers that are no gRPC servers ------------------------------------------------------------------------------


def say(*words: bytes) -> Callable[[socket.socket], None]:
    def play(connection: socket.socket) -> None:
        connection.sendall(b"".join(words))

    return play


def listen_then_leave(connection: socket.socket) -> None:
    connection.recv(1 << 16)


def hang(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def ping_for_ever(connection: socket.socket) -> None:
    connection.sendall(bytes.fromhex("000000040000000000"))
    while True:
        connection.sendall(bytes.fromhex("000008060000000000") + b"12345678")


def never_read(connection: socket.socket) -> None:
    """Fills the client with PINGs whose acknowledgements it does not read."""
    connection.sendall(bytes.fromhex("000000040000000000"))
    with contextlib.suppress(TimeoutError):
        connection.settimeout(0.2)
        while True:
            connection.sendall((bytes.fromhex("000008060000000000") + b"12345678") * 1000)


GOAWAY_AT_ONCE = bytes.fromhex("0000000400000000000000080700000000000000000000000000")
STRANGERS: dict[str, tuple[Callable[[socket.socket], None], tuple[type[TransportError], ...]]] = {
    "closes at once": (say(), (ConnectionLost,)),
    "listens, then closes": (listen_then_leave, (ConnectionLost,)),
    "listens, and never speaks": (hang, (DeadlineExceeded,)),
    "speaks HTTP/1.1": (say(b"HTTP/1.1 200 OK\r\n\r\n"), (ProtocolError,)),
    "speaks garbage": (say(b"\xff" * 1000), (ProtocolError,)),
    "is leaving": (say(GOAWAY_AT_ONCE), (Refused,)),
    "pings for ever": (ping_for_ever, (DeadlineExceeded, ProtocolError)),
    "pings and never reads": (never_read, (DeadlineExceeded, ProtocolError, ConnectionLost)),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_strangers(case: str, tmp_path: Path) -> None:
    play, kinds = STRANGERS[case]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tmp_path}/stranger.sock")
    listener.listen()

    def accept() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            play(connection)

    stranger = threading.Thread(target=accept)
    stranger.start()
    try:
        with pytest.raises(kinds):
            ask(tmp_path / "stranger.sock", stdin=bytes(300_000), seconds=1 if DeadlineExceeded in kinds else PATIENCE)
    finally:
        stranger.join(PATIENCE)
        listener.close()
    assert not stranger.is_alive()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="No such file"):
        ask(tmp_path / "nobody.sock")
    with pytest.raises(Unreachable, match="too long"):
        ask(tmp_path / ("x" * 200))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unreachable, match="refused"):
        ask(tmp_path / "file")


def test_a_daemon_that_is_stopped_and_whose_backlog_is_full(tmp_path: Path) -> None:
    path = str(tmp_path / "stopped.sock")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(path)
        with pytest.raises(Unreachable, match="not within"):
            ask(tmp_path / "stopped.sock", seconds=0.3)
