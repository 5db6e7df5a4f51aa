"""A program for packets, run once over a frame as if an interface had taken it in (BPF_PROG_TEST_RUN).

The kernel makes a packet of the frame and returns what the program has returned, and the frame as it is then. What a
program asks of conntrack, the routing table and its maps is asked of the real ones, of the namespace that the calling
thread is in; where it redirects to is not told, and not done.

Source: bpf(2); net/bpf/test_run.c, which takes frames that have all of their IP header, and fit into a page.
"""

from __future__ import annotations

import ctypes
import struct

from podwire.bpf.syscall import call

_PROGRAM_RUN = 10
_CONTEXT, _IFINDEX, _GSO_SIZE = 192, 40, 176  # struct __sk_buff


def run(program: int, frame: bytes, ifindex: int, gso_size: int = 0) -> tuple[int, bytes]:
    """What a program returns for a frame that an interface of this thread's namespace has taken in, and the frame after
    it. With `gso_size` the frame stands for several of so many bytes of payload. Raises OSError."""
    given, out = ctypes.create_string_buffer(frame, len(frame)), ctypes.create_string_buffer(len(frame) + 256)
    context = ctypes.create_string_buffer(_CONTEXT)
    struct.pack_into("=I", context, _IFINDEX, ifindex)
    struct.pack_into("=I", context, _GSO_SIZE, gso_size)
    places = [ctypes.addressof(each) for each in (given, out, context)]
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIQQIIIIQQ", program, 0, len(frame), len(out), *places[:2], 1, 0, _CONTEXT, 0, places[2], 0),
        152,
    )
    call(_PROGRAM_RUN, attributes)
    returned, _, length = struct.unpack_from("=iII", attributes, 4)
    return returned, out.raw[:length]
