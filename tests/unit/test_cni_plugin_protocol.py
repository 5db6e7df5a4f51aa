"""The hand-made encoding against the code that protobuf generates from the same proto."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from cni_plugin.environment import Environment
from cni_plugin.errors import ProtocolError
from cni_plugin.protocol import API_MAX, API_MIN, METHOD, CallResponse, decode_response, encode_request
from podwire.v1 import cni_pb2

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def test_the_method_is_the_one_of_the_proto() -> None:
    service = cni_pb2.DESCRIPTOR.services_by_name["CNI"]
    assert METHOD.decode() == f"/{service.full_name}/{service.methods_by_name['Call'].name}"


@given(
    texts=st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT, TEXT),
    stdin=st.binary(max_size=40_000),
    issued_at=st.integers(0, 2**64 - 1),
    boot_id=TEXT,
)
def test_a_request_is_read_by_protobuf_as_it_was_meant(
    texts: tuple[str, ...], stdin: bytes, issued_at: int, boot_id: str
) -> None:
    command, container_id, netns, ifname, args, path = texts
    encoded = encode_request(Environment(*(text.encode() for text in texts)), stdin, issued_at, boot_id.encode())
    assert cni_pb2.CallRequest.FromString(encoded) == cni_pb2.CallRequest(
        api_min=API_MIN,
        api_max=API_MAX,
        command=command,
        container_id=container_id,
        netns=netns,
        ifname=ifname,
        args=args,
        path=path,
        stdin=stdin,
        issued_at=issued_at,
        boot_id=boot_id,
    )


@given(st.integers(0, 2**32 - 1), st.binary(max_size=40_000), st.integers(0, 255))
def test_an_answer_of_protobuf_is_read_as_it_was_meant(api: int, stdout: bytes, exit_code: int) -> None:
    encoded = cni_pb2.CallResponse(api=api, stdout=stdout, exit_code=exit_code).SerializeToString()
    assert plain(decode_response(encoded)) == (api, stdout, exit_code)


READ = {
    "nothing but defaults": (b"", (0, b"", 0)),
    "the last of a repeated field counts": (b"\x08\x01\x08\x02\x12\x01a\x12\x01b", (2, b"b", 0)),
    "fields of a newer daemon are passed over": (
        b"\x20\x07" + b"\x29" + b"\0" * 8 + b"\x32\x02hi" + b"\x3d" + b"\0" * 4 + b"\x08\x01",
        (1, b"", 0),
    ),
    "a known number of another type is another field": (b"\x10\x05" + b"\x0a\x01x" + b"\x08\x01", (1, b"", 0)),
    "an exit code that no process can have": (b"\x18\x80\x02", (0, b"", 1)),
    "a negative exit code": (b"\x18" + b"\xff" * 9 + b"\x01", (0, b"", 1)),
    "a number written longer than need be": (b"\x08\x81\x80\x00", (1, b"", 0)),
}

REFUSED = {
    "ends inside a tag": b"\x80",
    "ends inside a number": b"\x08\x80",
    "ends inside the output": b"\x12\x05abc",
    "an output longer than any memory": b"\x12" + b"\xff" * 9 + b"\x01",
    "ends inside a fixed field": b"\x29\0\0",
    "a number of eleven bytes": b"\x08" + b"\x80" * 10 + b"\x01",
    "a field number of 0": b"\x00\x01",
    "a field number beyond 29 bits": b"\xe1\x80\x80\x80\x10" + b"\0" * 8,
    "a wire type that does not exist": b"\x0f",
}


# What protobuf is made of, so that random bytes get beyond the first tag.
PIECES = [bytes((byte,)) for byte in (0, 1, 2, 3, 8, 0x12, 0x18, 0x1B, 0x1C, 0x21, 0x25, 0x80, 0xFF)] + [b"\0" * 8]


@pytest.mark.parametrize("case", READ)
def test_read(case: str) -> None:
    data, expected = READ[case]
    assert plain(decode_response(data)) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    with pytest.raises(ProtocolError):
        decode_response(REFUSED[case])
    with pytest.raises(DecodeError):
        cni_pb2.CallResponse.FromString(REFUSED[case])


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=8).map(b"".join))
def test_what_is_read_from_any_bytes_is_what_protobuf_reads(data: bytes) -> None:
    try:
        ours = decode_response(data)
    except ProtocolError:
        return
    theirs = cni_pb2.CallResponse.FromString(data)
    exit_code = theirs.exit_code if 0 <= theirs.exit_code < 256 else 1
    assert plain(ours) == (theirs.api, theirs.stdout, exit_code)


def plain(response: CallResponse) -> tuple[int, bytes, int]:
    return response.api, response.stdout, response.exit_code
