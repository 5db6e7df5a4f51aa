"""`podwire.v1.CallRequest` and `CallResponse` (proto/podwire/v1/cni.proto) in protobuf's wire format, by hand.

A message is a sequence of fields, each a tag (number << 3 | wire type, a varint) and a value; a field at its default is
left out, and a reader passes over numbers that it does not know, which is what lets the two ends differ in age.
Source: protobuf.dev/programming-guides/encoding. The contract tests compare both ways with the generated code.
"""

from cni_plugin.environment import Environment
from cni_plugin.errors import ProtocolError

METHOD = b"/podwire.v1.CNI/Call"
API_MIN = 1
API_MAX = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


class CallResponse:
    """The daemon's answer: `stdout` is printed as it is, `exit_code` is a process's (0–255)."""

    __slots__ = ("api", "exit_code", "stdout")

    def __init__(self, api: int, stdout: bytes, exit_code: int) -> None:
        self.api = api
        self.stdout = stdout
        self.exit_code = exit_code


def encode_request(environment: Environment, stdin: bytes, issued_at: int, boot_id: bytes = b"") -> bytes:
    """A CallRequest. `issued_at` is CLOCK_BOOTTIME in nanoseconds; `boot_id` is text, for a DEL that is queued."""
    texts = (
        (3, environment.command),
        (4, environment.container_id),
        (5, environment.netns),
        (6, environment.ifname),
        (7, environment.args),
        (8, environment.path),
        (9, stdin),
        (11, boot_id),
    )
    parts = [_number(1, API_MIN), _number(2, API_MAX), _number(10, issued_at)]
    for field, value in texts:
        if value:
            parts += (_varint(field << 3 | _BYTES), _varint(len(value)), value)
    return b"".join(parts)


def decode_response(data: bytes) -> CallResponse:
    """The CallResponse in `data`. Raises ProtocolError when it is not one."""
    api, stdout, exit_code = 0, b"", 0
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at, 5)
        field, wire = tag >> 3, tag & 7
        if not 0 < field < 1 << 29:
            raise ProtocolError(f"an answer with a field number of {field}")
        if wire == _VARINT:
            number, at = _read_varint(data, at, 10)
            if field == 1:
                api = number & 0xFFFFFFFF
            elif field == 3:
                exit_code = number & 0xFFFFFFFF
            continue
        if wire == _BYTES:
            size, at = _read_varint(data, at, 5)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise ProtocolError(f"an answer with wire type {wire}")
        if size > len(data) - at:
            raise ProtocolError("an answer that ends inside a field")
        if field == 2 and wire == _BYTES:
            stdout = data[at : at + size]
        at += size
    return CallResponse(api, stdout, exit_code if exit_code < 256 else 1)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: bytes, at: int, longest: int) -> "tuple[int, int]":
    """The varint at `at`, of at most `longest` bytes, and where it ends. Tags and sizes have 32 bits, numbers 64."""
    value = shift = 0
    for byte in data[at : at + longest]:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            return value, at
    raise ProtocolError("an answer that ends inside a number, or with a number that is too long")
