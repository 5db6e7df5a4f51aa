"""Programs at an interface by TCX (Linux 6.6): beside each other, without a queueing discipline.

A program that is attached stays until it is detached or its interface goes. To attach the first, or to detach the last,
takes the kernel an RCU grace period (8–16 ms) with RTNL held; to put one in another's place takes none, and so does
looking.

Source: bpf(2); linux/bpf.h, BPF_PROG_ATTACH and BPF_PROG_QUERY; kernel/bpf/tcx.c, kernel/bpf/mprog.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Set
from contextlib import suppress
from enum import IntEnum

from podwire.bpf.syscall import address, bpf, call, new_attributes

_PROGRAM_ATTACH, _PROGRAM_DETACH, _PROGRAM_OF, _INFO, _QUERY = 8, 9, 13, 15, 16
_REPLACE = 1 << 2
_LOOPBACK = 1  # the index that it has in every namespace
_MOST = 64  # BPF_MPROG_MAX
_INFO_BYTES, _NAME_AT, _NAME_BYTES = 128, 64, 16  # struct bpf_prog_info


class Way(IntEnum):
    """Which packets of an interface a program sees."""

    IN = 46
    OUT = 47


def is_supported() -> bool:
    """Whether the kernel has TCX. Raises OSError."""
    try:
        _numbers(_LOOPBACK, Way.IN)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENODEV):
            raise
        return error.errno == errno.ENODEV
    return True


def programs(ifindex: int, way: Way) -> dict[int, str]:
    """The numbers of the programs that are attached, with their names; none before Linux 6.6. Raises OSError."""
    try:
        return {number: _name_of(number) for number in _numbers(ifindex, way)}
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENODEV):
            return {}
        raise


def attach(program: int, ifindex: int, instead_of: Set[str]) -> None:
    """Runs a program, by its descriptor, for what an interface takes in: in the place of the first that has one of
    these names, after all that are there when there is none. Raises OSError; EINVAL before Linux 6.6."""
    old = next((number for number, name in programs(ifindex, Way.IN).items() if name in instead_of), None)
    if old is None:
        bpf(_PROGRAM_ATTACH, struct.pack("=IIII", ifindex, program, Way.IN, 0))
        return
    replaced = bpf(_PROGRAM_OF, struct.pack("=I", old))
    try:
        with suppress(FileExistsError):  # it is this program itself
            bpf(_PROGRAM_ATTACH, struct.pack("=IIIII", ifindex, program, Way.IN, _REPLACE, replaced))
    finally:
        os.close(replaced)


def detach(ifindex: int, names: Set[str]) -> None:
    """Takes programs of these names away. Raises OSError."""
    for number, name in programs(ifindex, Way.IN).items():
        if name in names:
            program = bpf(_PROGRAM_OF, struct.pack("=I", number))
            try:
                bpf(_PROGRAM_DETACH, struct.pack("=IIII", ifindex, program, Way.IN, 0))
            finally:
                os.close(program)


def _numbers(ifindex: int, way: Way) -> list[int]:
    numbers = (ctypes.c_uint32 * _MOST)()
    attributes = new_attributes(struct.pack("=IIIIQI", ifindex, way, 0, 0, ctypes.addressof(numbers), _MOST))
    call(_QUERY, attributes)
    (count,) = struct.unpack_from("=I", attributes, 24)
    return numbers[:count]


def _name_of(number: int) -> str:
    """Empty for one that is gone since."""
    try:
        program = bpf(_PROGRAM_OF, struct.pack("=I", number))
    except FileNotFoundError:
        return ""
    try:
        info = ctypes.create_string_buffer(_INFO_BYTES)
        bpf(_INFO, struct.pack("=IIQ", program, len(info), address(info)))
    finally:
        os.close(program)
    return info.raw[_NAME_AT : _NAME_AT + _NAME_BYTES].split(b"\0")[0].decode(errors="replace")
