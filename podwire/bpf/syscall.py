"""bpf(2) itself, and the memory that it is given.

A buffer lives for as long as somebody holds it: who passes an address holds the buffer until the call is over.

Source: bpf(2); linux/bpf.h, union bpf_attr.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

Buffer = ctypes.Array[ctypes.c_char]

_NUMBERS = {"x86_64": 321, "aarch64": 280}  # of bpf(2)
_ATTRIBUTES = 152  # bytes: as much of the union as is used here, the rest being 0
_libc = ctypes.CDLL(None, use_errno=True)


def buffer(content: bytes) -> Buffer:
    """Memory of the process that holds these bytes."""
    return ctypes.create_string_buffer(content, len(content))


def address(of: Buffer | None) -> int:
    """Where a buffer is; 0 for none."""
    return ctypes.addressof(of) if of is not None else 0


def new_attributes(content: bytes) -> Buffer:
    """What a call is given, for who reads what it has written there."""
    return ctypes.create_string_buffer(content, _ATTRIBUTES)


def bpf(command: int, attributes: bytes) -> int:
    """What the system call returns. Raises OSError."""
    return call(command, new_attributes(attributes))


def call(command: int, attributes: Buffer) -> int:
    """The same with attributes that the kernel writes to. Raises OSError."""
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"eBPF is not known on {platform.machine()}")
    returned = int(_libc.syscall(number, command, attributes, _ATTRIBUTES))
    if returned < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return returned
