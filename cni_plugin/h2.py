"""One unary gRPC call over HTTP/2 (RFC 9113) as bytes in and bytes out: no socket, no clock.

    we      preface · SETTINGS · WINDOW_UPDATE · HEADERS · DATA…        all at once, as far as the windows let us
    peer    SETTINGS · (HEADERS · DATA… · HEADERS)                      and PING, WINDOW_UPDATE, GOAWAY at any time

The whole request leaves in the first write, before the peer has said anything, so that a call is one round trip. An
answer is one message; the moment it is whole the call is over, and trailers are not waited for. Headers are therefore
never decoded: without a message the call has failed whatever they say, and HPACK's tables need not be kept (ours are
sent as literals without indexing, RFC 7541 §6.2.2). A peer that is no gRPC server at all betrays itself by the first
frame, which has to be SETTINGS, or by the first byte of its data, which has to be 0.

Nothing that the peer sends makes this loop or grow: a frame is at most 16 KiB, an answer at most MAX_ANSWER, and what
we owe it (acknowledgements of PING and SETTINGS) is bounded by MAX_UNSENT.
"""

from cni_plugin.errors import ConnectionLost, NoAnswer, ProtocolError, Refused

MAX_ANSWER = 16 << 20
MAX_UNSENT = 32 << 20
WINDOW = 1 << 20  # what the peer may send ahead; far above what a CNI result ever is

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED, _WITH_PRIORITY = 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 2, 4, 5

_FRAME_HEAD = 9
_OUR_MAX_FRAME = 16384  # the protocol's default, which we leave
_DEFAULT_WINDOW = 65535
_MAX_WINDOW = (1 << 31) - 1
_STREAM = 1  # a connection carries one call

_ERROR_NAMES = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)


class UnaryCall:
    """A call in progress. `outgoing()` is what to write, `receive()` takes what was read, `answer` is the message.

    Every failure is a TransportError, after which the connection is of no more use.
    """

    def __init__(self, method: bytes, message: bytes, timeout_ms: int) -> None:
        """`method` is the path ("/package.Service/Method"), `message` the encoded request, `timeout_ms` goes into the
        `grpc-timeout` header (at most eight digits)."""
        self.answer: bytes | None = None
        self._incoming = bytearray()
        self._message = bytearray()
        self._greeted = False
        self._headers_seen = self._data_seen = False
        self._continued: int | None = None  # the flags of a HEADERS whose block has not ended
        self._receive_window = WINDOW  # of stream and connection alike: the connection has one stream
        self._send_window = self._connection_window = self._peer_initial_window = _DEFAULT_WINDOW
        self._peer_max_frame = _OUR_MAX_FRAME
        self._body = memoryview(b"\0" + len(message).to_bytes(4, "big") + message)
        self._out = bytearray(_PREFACE)
        settings = ((_HEADER_TABLE_SIZE, 0), (_ENABLE_PUSH, 0), (_INITIAL_WINDOW_SIZE, WINDOW))
        self._send(
            _SETTINGS, 0, 0, b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in settings)
        )
        self._send(_WINDOW_UPDATE, 0, 0, (WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big"))
        self._send(_HEADERS, _END_HEADERS, _STREAM, _request_headers(method, timeout_ms))
        self._send_body()

    def outgoing(self) -> bytes:
        """What is to be written now; it is not returned again."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def receive(self, data: bytes) -> None:
        """Takes bytes that were read, any number of them. Raises Refused, NoAnswer, ConnectionLost, ProtocolError."""
        buffer = self._incoming
        buffer += data
        at = 0
        while self.answer is None and len(buffer) - at >= _FRAME_HEAD:
            length = int.from_bytes(buffer[at : at + 3], "big")
            kind, flags = buffer[at + 3], buffer[at + 4]
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big") & _MAX_WINDOW
            self._check_order(kind, flags, stream, length)
            end = at + _FRAME_HEAD + length
            if len(buffer) < end:
                break
            payload = bytes(buffer[at + _FRAME_HEAD : end])
            at = end
            handle = _HANDLERS.get(kind)
            if handle is not None:  # unknown kinds are passed over: RFC 9113 §4.1
                handle(self, flags, stream, payload)
        del buffer[:at]
        if self.answer is None:
            self._send_body()
            if len(self._out) > MAX_UNSENT:
                raise ProtocolError("the peer asks for more acknowledgements than it reads")

    def receive_end(self) -> None:
        """The peer has closed its side. Raises ConnectionLost when there is no answer yet."""
        if self.answer is None:
            raise ConnectionLost("the daemon closed the connection before it answered")

    # --- what we send -------------------------------------------------------------------------------------------

    def _send(self, kind: int, flags: int, stream: int, payload: "bytes | memoryview" = b"") -> None:
        self._out += len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
        self._out += payload

    def _send_body(self) -> None:
        """As much of the request as the peer's windows and its largest frame allow."""
        while self._body:
            size = min(len(self._body), self._send_window, self._connection_window, self._peer_max_frame)
            if size <= 0:
                return
            part, self._body = self._body[:size], self._body[size:]
            self._send_window -= size
            self._connection_window -= size
            self._send(_DATA, 0 if self._body else _END_STREAM, _STREAM, part)

    # --- what we receive ----------------------------------------------------------------------------------------

    def _check_order(self, kind: int, flags: int, stream: int, length: int) -> None:
        """What a frame's head alone can get wrong; checked before its payload is waited for."""
        if not self._greeted and (kind != _SETTINGS or flags & _ACK):
            raise ProtocolError("the peer does not speak HTTP/2")
        if length > _OUR_MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes, the limit is {_OUR_MAX_FRAME}")
        if (self._continued is not None) != (kind == _CONTINUATION):
            raise ProtocolError("a header block that is interrupted, or continued without a beginning")
        if kind in (_SETTINGS, _PING, _GOAWAY):
            if stream != 0:
                raise ProtocolError(f"a frame of type {kind} on stream {stream}")
        elif kind in (_DATA, _HEADERS, _RST_STREAM, _CONTINUATION) and stream != _STREAM:
            raise ProtocolError(f"a frame of type {kind} on stream {stream}, which was never opened")
        self._greeted = True

    def _on_settings(self, flags: int, _stream: int, payload: bytes) -> None:
        if flags & _ACK:
            if payload:
                raise ProtocolError("an acknowledgement of SETTINGS with a payload")
            return
        if len(payload) % 6:
            raise ProtocolError(f"SETTINGS of {len(payload)} bytes")
        for at in range(0, len(payload), 6):
            key, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if key == _INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise ProtocolError(f"an initial window of {value} bytes")
                # The window of an open stream moves along, and may become negative: RFC 9113 §6.9.2.
                self._send_window = _grown(self._send_window, value - self._peer_initial_window)
                self._peer_initial_window = value
            elif key == _MAX_FRAME_SIZE:
                if not _OUR_MAX_FRAME <= value < 1 << 24:
                    raise ProtocolError(f"a largest frame of {value} bytes")
                self._peer_max_frame = value
        self._send(_SETTINGS, _ACK, 0)

    def _on_ping(self, flags: int, _stream: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise ProtocolError(f"a PING of {len(payload)} bytes")
        if not flags & _ACK:
            self._send(_PING, _ACK, 0, payload)

    def _on_window_update(self, _flags: int, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(f"a WINDOW_UPDATE of {len(payload)} bytes")
        increment = int.from_bytes(payload, "big") & _MAX_WINDOW
        if increment == 0 or stream not in (0, _STREAM):
            raise ProtocolError(f"a WINDOW_UPDATE of {increment} for stream {stream}")
        if stream == 0:
            self._connection_window = _grown(self._connection_window, increment)
        else:
            self._send_window = _grown(self._send_window, increment)

    def _on_goaway(self, _flags: int, _stream: int, payload: bytes) -> None:
        if len(payload) < 8:
            raise ProtocolError(f"a GOAWAY of {len(payload)} bytes")
        if int.from_bytes(payload[:4], "big") & _MAX_WINDOW < _STREAM:
            raise Refused(f"the daemon is shutting down ({_error_name(payload[4:8])}) and has not taken the call")

    def _on_rst_stream(self, _flags: int, _stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(f"a RST_STREAM of {len(payload)} bytes")
        raise NoAnswer(f"the daemon ended the call without an answer ({_error_name(payload)})")

    def _on_push_promise(self, _flags: int, _stream: int, _payload: bytes) -> None:
        raise ProtocolError("a PUSH_PROMISE, which our SETTINGS forbid")

    def _on_headers(self, flags: int, _stream: int, payload: bytes) -> None:
        block = _unpadded(flags, payload)
        if flags & _WITH_PRIORITY and len(block) < 5:
            raise ProtocolError("HEADERS too short for their priority")
        self._continued = flags
        if flags & _END_HEADERS:
            self._end_headers()

    def _on_continuation(self, flags: int, _stream: int, _payload: bytes) -> None:
        if flags & _END_HEADERS:
            self._end_headers()

    def _end_headers(self) -> None:
        flags, self._continued = self._continued or 0, None
        self._headers_seen = True
        if flags & _END_STREAM:
            self._on_end_stream()
        elif self._data_seen:
            raise ProtocolError("trailers that do not end the stream")

    def _on_data(self, flags: int, _stream: int, payload: bytes) -> None:
        if not self._headers_seen:
            raise ProtocolError("DATA before HEADERS")
        self._data_seen = True
        self._receive_window -= len(payload)  # padding counts: RFC 9113 §6.9.1
        if self._receive_window < 0:
            raise ProtocolError("more DATA than the window allows")
        self._message += _unpadded(flags, payload)
        self._take_message()
        if self.answer is not None:
            return
        if flags & _END_STREAM:
            self._on_end_stream()
        if self._receive_window < WINDOW // 2:
            increment = (WINDOW - self._receive_window).to_bytes(4, "big")
            self._send(_WINDOW_UPDATE, 0, 0, increment)
            self._send(_WINDOW_UPDATE, 0, _STREAM, increment)
            self._receive_window = WINDOW

    def _on_end_stream(self) -> None:
        begun = "half an answer" if self._message else "no answer"
        raise NoAnswer(f"the daemon ended the call with {begun}")

    def _take_message(self) -> None:
        """gRPC's framing: a byte that says compressed or not, four of length, the message."""
        message = self._message
        if message and message[0] != 0:
            raise ProtocolError("a compressed message, which we did not offer to read, or not gRPC")
        if len(message) < 5:
            return
        size = int.from_bytes(message[1:5], "big")
        if size > MAX_ANSWER:
            raise ProtocolError(f"an answer of {size} bytes, the limit is {MAX_ANSWER}")
        if len(message) > 5 + size:
            raise ProtocolError("more than one message in answer to a unary call")
        if len(message) == 5 + size:
            self.answer = bytes(message[5:])


_HANDLERS = {
    _DATA: UnaryCall._on_data,
    _HEADERS: UnaryCall._on_headers,
    _RST_STREAM: UnaryCall._on_rst_stream,
    _SETTINGS: UnaryCall._on_settings,
    _PUSH_PROMISE: UnaryCall._on_push_promise,
    _PING: UnaryCall._on_ping,
    _GOAWAY: UnaryCall._on_goaway,
    _WINDOW_UPDATE: UnaryCall._on_window_update,
    _CONTINUATION: UnaryCall._on_continuation,
}


def _request_headers(method: bytes, timeout_ms: int) -> bytes:
    """The header block of a gRPC request, each field a literal without indexing and without Huffman coding."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"podwire-cni"),
        (b"grpc-timeout", b"%dm" % timeout_ms),
    )
    # A length below 127 is one byte (RFC 7541 §5.1), and all of these are.
    return b"".join(b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)


def _unpadded(flags: int, payload: bytes) -> bytes:
    """The payload of DATA or HEADERS without its padding."""
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ProtocolError("padding longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def _grown(window: int, by: int) -> int:
    if window + by > _MAX_WINDOW:
        raise ProtocolError("a flow-control window beyond 2^31-1")
    return window + by


def _error_name(code: bytes) -> str:
    number = int.from_bytes(code, "big")
    return _ERROR_NAMES[number] if number < len(_ERROR_NAMES) else f"error {number}"
