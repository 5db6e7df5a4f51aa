"""The sans-IO call against scripted frames: what grpcio never sends, and what any peer at all could.

A case is what a peer says, in frames, and how the call ends. Every case is fed whole, and byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni_plugin import h2
from cni_plugin.errors import ConnectionLost, NoAnswer, ProtocolError, Refused, TransportError
from cni_plugin.h2 import MAX_ANSWER, WINDOW, UnaryCall

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, WITH_PRIORITY = 0x4, 0x8, 0x20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def frames(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each frame; what is left over must be nothing."""
    while data:
        end = 9 + int.from_bytes(data[:3], "big")
        assert len(data) >= end, "half a frame was sent"
        yield data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]
        data = data[end:]


def setting(key: int, value: int) -> bytes:
    return key.to_bytes(2, "big") + value.to_bytes(4, "big")


def grpc_message(message: bytes, compressed: int = 0) -> bytes:
    return bytes((compressed,)) + len(message).to_bytes(4, "big") + message


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


HELLO = frame(SETTINGS)
HEAD = frame(HEADERS, b"\x88", END_HEADERS, 1)
TRAILERS = frame(HEADERS, b"\x88", END_HEADERS | END_STREAM, 1)
ANSWER = frame(DATA, grpc_message(b"yes"), 0, 1)

ANSWERED = {
    "an ordinary answer": HELLO + HEAD + ANSWER + TRAILERS,
    "no trailers at all": HELLO + HEAD + ANSWER,
    "an answer that ends the stream": HELLO + HEAD + frame(DATA, grpc_message(b"yes"), END_STREAM, 1),
    "an answer over many frames, some empty": HELLO
    + HEAD
    + b"".join(frame(DATA, part, 0, 1) for part in (b"\0", b"", b"\0\0\0", b"\3y", b"e", b"", b"s")),
    "padding, also of nothing": HELLO
    + HEAD
    + frame(DATA, b"\3\0\0" + b"\0\0\0", PADDED, 1)
    + frame(DATA, b"\0\0\0\3yes", PADDED, 1),
    "headers with priority and padding": HELLO
    + frame(HEADERS, b"\2" + b"\0\0\0\0\7" + b"\x88" + b"\0\0", PADDED | WITH_PRIORITY | END_HEADERS, 1)
    + ANSWER,
    "headers in three frames": HELLO
    + frame(HEADERS, b"\x88", 0, 1)
    + frame(CONTINUATION, b"", 0, 1)
    + frame(CONTINUATION, b"\x88", END_HEADERS, 1)
    + ANSWER,
    "informational headers first": HELLO + HEAD + HEAD + ANSWER,
    "frames of no known kind, on any stream": HELLO + frame(0xEE, b"grease", 0xFF, 77) + HEAD + frame(0xB) + ANSWER,
    "priorities, long out of use": HELLO + frame(PRIORITY, b"\0\0\0\0\7", 0, 1) + HEAD + ANSWER,
    "settings of no known number": frame(SETTINGS, setting(0xFE03, 1) + setting(3, 0)) + HEAD + ANSWER,
    "settings twice, and ours acknowledged": HELLO + frame(SETTINGS, b"", ACK) + frame(SETTINGS) + HEAD + ANSWER,
    "a graceful GOAWAY, then the real one": HELLO
    + frame(GOAWAY, number(2**31 - 1) + number(0) + b"bye")
    + HEAD
    + frame(GOAWAY, number(1) + number(0))
    + ANSWER,
    "the reserved bit of the stream is ignored": HELLO + frame(HEADERS, b"\x88", END_HEADERS, 1 << 31 | 1) + ANSWER,
    "noise after the answer": HELLO + HEAD + ANSWER + b"\xff" * 100,
}

FAILED: dict[str, tuple[bytes, type[TransportError]]] = {
    "a peer that says nothing": (b"", ConnectionLost),
    "half a frame": (HELLO[:5], ConnectionLost),
    "half an answer, then the end": (HELLO + HEAD + frame(DATA, b"\0\0\0\0\3y", 0, 1), ConnectionLost),
    "HTTP/1.1": (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", ProtocolError),
    "no settings first": (frame(PING, b"\0" * 8), ProtocolError),
    "an acknowledgement first": (frame(SETTINGS, b"", ACK), ProtocolError),
    "trailers alone, as gRPC tells an error": (HELLO + TRAILERS, NoAnswer),
    "headers, then trailers": (HELLO + HEAD + TRAILERS, NoAnswer),
    "an empty end": (HELLO + HEAD + frame(DATA, b"", END_STREAM, 1), NoAnswer),
    "half an answer, then trailers": (HELLO + HEAD + frame(DATA, b"\0\0\0\0\3y", 0, 1) + TRAILERS, NoAnswer),
    "trailers in two frames": (
        HELLO + frame(HEADERS, b"\x88", END_STREAM, 1) + frame(CONTINUATION, b"", END_HEADERS, 1),
        NoAnswer,
    ),
    "the stream reset": (HELLO + HEAD + frame(RST_STREAM, number(8), 0, 1), NoAnswer),
    "the stream reset for no known reason": (HELLO + frame(RST_STREAM, number(999), 0, 1), NoAnswer),
    "GOAWAY before our stream": (HELLO + frame(GOAWAY, number(0) + number(0)), Refused),
    "GOAWAY for bad behaviour": (HELLO + frame(GOAWAY, number(0) + number(11) + b"too_many_pings"), Refused),
    "graceful GOAWAY, then the end": (HELLO + frame(GOAWAY, number(1) + number(0)), ConnectionLost),
    "a compressed answer": (HELLO + HEAD + frame(DATA, grpc_message(b"yes", compressed=1), 0, 1), ProtocolError),
    "a web page": (HELLO + HEAD + frame(DATA, b"<html>", END_STREAM, 1), ProtocolError),
    "two answers": (HELLO + HEAD + frame(DATA, grpc_message(b"yes") * 2, 0, 1), ProtocolError),
    "an answer too long": (HELLO + HEAD + frame(DATA, b"\0" + number(MAX_ANSWER + 1), 0, 1), ProtocolError),
    "a frame too long": (HELLO + b"\x00\x40\x01" + b"\0" * 6, ProtocolError),
    "data before headers": (HELLO + ANSWER, ProtocolError),
    "data on a stream that we never opened": (HELLO + HEAD + frame(DATA, b"", 0, 3), ProtocolError),
    "headers on the connection": (HELLO + frame(HEADERS, b"\x88", END_HEADERS, 0), ProtocolError),
    "trailers that do not end": (HELLO + HEAD + frame(DATA, b"\0", 0, 1) + HEAD, ProtocolError),
    "a header block interrupted": (HELLO + frame(HEADERS, b"", 0, 1) + frame(PING, b"\0" * 8), ProtocolError),
    "a header block interrupted by an unknown frame": (HELLO + frame(HEADERS, b"", 0, 1) + frame(0xEE), ProtocolError),
    "a header block from nowhere": (HELLO + frame(CONTINUATION, b"", END_HEADERS, 1), ProtocolError),
    "padding longer than its frame": (HELLO + HEAD + frame(DATA, b"\5\0\0", PADDED, 1), ProtocolError),
    "padding without its length": (HELLO + HEAD + frame(DATA, b"", PADDED, 1), ProtocolError),
    "a priority cut short": (HELLO + frame(HEADERS, b"\0\0", WITH_PRIORITY | END_HEADERS, 1), ProtocolError),
    "a push": (HELLO + frame(PUSH_PROMISE, number(2), END_HEADERS, 1), ProtocolError),
    "a short ping": (HELLO + frame(PING, b"\0"), ProtocolError),
    "a ping on a stream": (HELLO + frame(PING, b"\0" * 8, 0, 1), ProtocolError),
    "a short GOAWAY": (HELLO + frame(GOAWAY, number(0)), ProtocolError),
    "a long reset": (HELLO + frame(RST_STREAM, b"\0" * 5, 0, 1), ProtocolError),
    "settings cut short": (frame(SETTINGS, b"\0" * 5), ProtocolError),
    "settings on a stream": (frame(SETTINGS, b"", 0, 1), ProtocolError),
    "an acknowledgement that says something": (HELLO + frame(SETTINGS, setting(1, 1), ACK), ProtocolError),
    "an initial window too large": (frame(SETTINGS, setting(4, 1 << 31)), ProtocolError),
    "frames too small": (frame(SETTINGS, setting(5, 16383)), ProtocolError),
    "frames too large": (frame(SETTINGS, setting(5, 1 << 24)), ProtocolError),
    "a window opened by nothing": (HELLO + frame(WINDOW_UPDATE, number(0)), ProtocolError),
    "a window opened too far": (HELLO + frame(WINDOW_UPDATE, number(2**31 - 1)), ProtocolError),
    "the stream's window opened too far": (HELLO + frame(WINDOW_UPDATE, number(2**31 - 1), 0, 1), ProtocolError),
    "a window of no stream of ours": (HELLO + frame(WINDOW_UPDATE, number(1), 0, 5), ProtocolError),
    "half a window": (HELLO + frame(WINDOW_UPDATE, b"\0\0"), ProtocolError),
}


def call(message: bytes = b"ask") -> UnaryCall:
    return UnaryCall(b"/podwire.v1.CNI/Call", message, 90_000)


def converse(pieces: list[bytes]) -> bytes:
    """Feeds a call to its end; returns the answer or raises."""
    unary = call()
    for piece in pieces:
        unary.receive(piece)
        unary.outgoing()
    unary.receive_end()
    assert unary.answer is not None
    return unary.answer


@pytest.mark.parametrize("case", ANSWERED)
def test_answered(case: str) -> None:
    script = ANSWERED[case]
    assert converse([script]) == b"yes"
    assert converse([script[at : at + 1] for at in range(len(script))]) == b"yes"


@pytest.mark.parametrize("case", FAILED)
def test_failed(case: str) -> None:
    script, kind = FAILED[case]
    with pytest.raises(kind):
        converse([script])
    with pytest.raises(kind):
        converse([script[at : at + 1] for at in range(len(script))])


def test_the_request_leaves_whole_before_the_peer_has_spoken() -> None:
    out = call(b"ask").outgoing()
    assert out.startswith(PREFACE)
    sent = list(frames(out[len(PREFACE) :]))
    assert [(kind, flags, stream) for kind, flags, stream, _ in sent] == [
        (SETTINGS, 0, 0),
        (WINDOW_UPDATE, 0, 0),
        (HEADERS, END_HEADERS, 1),
        (DATA, END_STREAM, 1),
    ]
    assert sent[3][3] == grpc_message(b"ask")


def test_what_is_asked_of_us_is_acknowledged() -> None:
    unary = call()
    unary.outgoing()
    unary.receive(HELLO + frame(PING, b"12345678") + frame(PING, b"ourselves"[:8], ACK))
    assert list(frames(unary.outgoing())) == [(SETTINGS, ACK, 0, b""), (PING, ACK, 0, b"12345678")]


def test_pings_without_end_are_not_hoarded(monkeypatch: pytest.MonkeyPatch) -> None:
    unsent = 1 << 20  # two million PINGs are many, and say no more
    assert unsent < h2.MAX_UNSENT
    monkeypatch.setattr(h2, "MAX_UNSENT", unsent)
    unary = call()
    flood = frame(PING, b"12345678") * 10_000
    unary.receive(HELLO)
    for _ in range(unsent // len(flood)):
        unary.receive(flood)
    with pytest.raises(ProtocolError):
        unary.receive(flood)


def test_a_long_answer_is_given_window_as_it_is_read() -> None:
    """A peer that keeps to the windows gets the longest answer through; they are its only pace."""
    message = grpc_message(bytes(MAX_ANSWER))
    unary = call()
    granted = {0: 65535, 1: 65535}
    unary.receive(HELLO + HEAD)
    at = 0
    while unary.answer is None:
        out = unary.outgoing()
        for kind, _, stream, payload in frames(out.removeprefix(PREFACE)):
            if kind == WINDOW_UPDATE:
                granted[stream] += int.from_bytes(payload, "big")
            for at_setting in range(0, len(payload) if kind == SETTINGS else 0, 6):
                if payload[at_setting : at_setting + 2] == b"\0\4":  # INITIAL_WINDOW_SIZE
                    granted[1] = int.from_bytes(payload[at_setting + 2 : at_setting + 6], "big")
        size = min(16384, *granted.values())
        assert size > 0, "the call starves its peer"
        part = message[at : at + size]
        granted = {stream: window - len(part) for stream, window in granted.items()}
        assert max(granted.values()) <= WINDOW
        unary.receive(frame(DATA, part, 0, 1))
        at += len(part)
    assert unary.answer == message[5:]


def test_more_than_the_window_allows_is_refused() -> None:
    unary = call()
    unary.receive(HELLO + HEAD)
    unary._receive_window = 10_000  # as if half of the window were on its way
    with pytest.raises(ProtocolError, match="window"):
        unary.receive(frame(DATA, b"\0\0\1\0\0" + bytes(10_000), 0, 1))


# --- our own sending, against a receiver that counts -------------------------------------------------------------

GRANTS = st.one_of(
    st.tuples(st.just("stream"), st.integers(1, 200_000)),
    st.tuples(st.just("connection"), st.integers(1, 200_000)),
    st.tuples(st.just("initial"), st.integers(0, 200_000)),
    st.tuples(st.just("frame"), st.integers(16384, 60_000)),
)


@given(size=st.integers(0, 400_000), grants=st.lists(GRANTS, max_size=12))
@settings(max_examples=60)
def test_a_request_never_exceeds_what_the_peer_allows_and_always_arrives(
    size: int, grants: list[tuple[str, int]]
) -> None:
    message = bytes(range(256)) * (size // 256 + 1)
    unary = call(message)
    peer = Receiver()
    peer.take(unary.outgoing().removeprefix(PREFACE))
    unary.receive(HELLO)
    for kind, value in [*grants, ("initial", 2**30), ("connection", 2**30)]:
        unary.receive(peer.grant(kind, value))
        peer.take(unary.outgoing())
    assert bytes(peer.body) == grpc_message(message)
    assert peer.ended


class Receiver:
    """The peer's side of flow control (RFC 9113 §6.9), kept independently; it checks whatever arrives."""

    def __init__(self) -> None:
        self.stream = self.connection = self.initial = 65535
        self.largest = 16384
        self.body = bytearray()
        self.ended = False

    def grant(self, kind: str, value: int) -> bytes:
        if kind == "stream":
            self.stream += value
            return frame(WINDOW_UPDATE, number(value), 0, 1)
        if kind == "connection":
            self.connection += value
            return frame(WINDOW_UPDATE, number(value))
        if kind == "initial":
            self.stream += value - self.initial
            self.initial = value
            return frame(SETTINGS, setting(4, value))
        self.largest = value
        return frame(SETTINGS, setting(5, value))

    def take(self, data: bytes) -> None:
        for kind, flags, stream, payload in frames(data):
            if kind != DATA:
                continue
            assert stream == 1
            assert not self.ended
            assert len(payload) <= self.largest
            self.stream -= len(payload)
            self.connection -= len(payload)
            assert self.stream >= 0
            assert self.connection >= 0
            self.body += payload
            self.ended = bool(flags & END_STREAM)


# --- any peer at all ---------------------------------------------------------------------------------------------

ANY_FRAME = st.builds(
    frame,
    st.integers(0, 10),
    st.binary(max_size=40) | st.just(grpc_message(b"yes")) | st.sampled_from([number(1), bytes(8)]),
    st.integers(0, 255) | st.sampled_from([0, END_STREAM, END_HEADERS]),
    st.sampled_from([0, 1, 1, 1, 3]),
)
ANYTHING = st.lists(st.sampled_from([HELLO, HEAD, ANSWER, TRAILERS]) | ANY_FRAME | st.binary(max_size=30), max_size=12)


def outcome(pieces: list[bytes]) -> bytes | type[TransportError]:
    try:
        return converse(pieces)
    except TransportError as error:
        return type(error)


@given(said=ANYTHING, greeted=st.booleans(), data=st.data())
@settings(max_examples=300)
def test_any_peer_is_answered_or_refused_however_its_bytes_are_cut(
    said: list[bytes], greeted: bool, data: st.DataObject
) -> None:
    script = (HELLO if greeted else b"") + b"".join(said)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(script)), max_size=8)))
    pieces = [script[start:end] for start, end in pairwise([0, *cuts, len(script)])]
    whole = outcome([script])
    assert outcome(pieces) == whole
    assert isinstance(whole, bytes) or issubclass(whole, TransportError)
