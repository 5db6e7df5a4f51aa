"""eBPF in the kernel: maps, programs and what they are attached to, as file descriptors of this process.

What is loaded lives as long as somebody holds it: a descriptor, or the place that a program is attached to, which holds
the program and so its maps. A link is the exception on purpose: the program is attached for as long as the link's
descriptor is open, and so never longer than this process lives.

Numbers are of linux/bpf.h. No library: what there is needs libbpf and a compiler's object files, for five system calls.

Source: bpf(2); linux/bpf.h, union bpf_attr, whose numbers these are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from podwire.bpf.btf import Btf, BtfError
from podwire.bpf.syscall import Buffer, address, bpf, buffer, call, new_attributes

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROGRAM_LOAD = 0, 1, 2, 3, 5
_INFO, _BTF_OF, _NEXT_BTF, _LINK_CREATE, _LINK_UPDATE = 15, 19, 23, 28, 29
_SCHED_CLS, _TCX_INGRESS = 3, 46
_LOG = 1 << 18
_LAST_LINES = 4
_BTF_FOLDER = Path("/sys/kernel/btf")


class MapKind(IntEnum):
    """How a map finds a value."""

    HASH = 1
    ARRAY = 2
    ARRAY_PER_CPU = 6


class Refused(OSError):
    """The kernel takes a program not; the message ends with what its verifier said."""


class Map:
    """A map that a program and this process share."""

    def __init__(self, kind: MapKind, *, key: int, value: int, entries: int, name: str) -> None:
        """`key` and `value` are sizes in bytes; `name` has 15 characters at most. Raises OSError."""
        self._sizes = (key, value)
        self._per_cpu = kind is MapKind.ARRAY_PER_CPU
        self.descriptor = bpf(
            _MAP_CREATE, struct.pack("=IIIIIII16s", kind, key, value, entries, 0, 0, 0, name.encode())
        )
        """For the instructions that name the map."""

    def put(self, key: bytes, value: bytes) -> None:
        """Raises OSError; E2BIG when the map is full."""
        with_key, with_value = buffer(key), buffer(value)
        bpf(_MAP_UPDATE, self._element(with_key, with_value))

    def remove(self, key: bytes) -> bool:
        """False when there is no such key. Raises OSError."""
        with_key = buffer(key)  # which lives until the call is over: its address alone would not keep it
        try:
            bpf(_MAP_DELETE, self._element(with_key))
        except FileNotFoundError:
            return False
        return True

    def get(self, key: bytes) -> bytes | None:
        """None when there is no such key; of an array per CPU the values of all, one after another. Raises OSError."""
        with_key, found = buffer(key), ctypes.create_string_buffer(self._length())
        try:
            bpf(_MAP_LOOKUP, self._element(with_key, found))
        except FileNotFoundError:
            return None
        return found.raw

    def close(self) -> None:
        """Programs that use the map keep it."""
        os.close(self.descriptor)

    def _length(self) -> int:
        _, value = self._sizes
        return (value + 7) // 8 * 8 * _possible_cpus() if self._per_cpu else value

    def _element(self, key: Buffer, value: Buffer | None = None) -> bytes:
        return struct.pack("=I4xQQQ", self.descriptor, address(key), address(value), 0)


def load(code: bytes, name: str, modules: Sequence[int] = ()) -> int:
    """A program for packets (BPF_PROG_TYPE_SCHED_CLS), as a descriptor. `modules` are descriptors of the BTF that calls
    of kernel functions name by their place here, which begins with 1. Raises Refused."""
    try:
        return _load(code, name, modules)
    except OSError as error:
        log = ctypes.create_string_buffer(_LOG)
        said = ""
        try:
            os.close(_load(code, name, modules, log))
        except OSError:
            said = " / ".join(log.value.decode(errors="replace").strip().splitlines()[-_LAST_LINES:])
        number = error.errno or errno.EINVAL
        raise Refused(number, f"{os.strerror(number)}{f': {said}' if said else ''}", f"eBPF program {name}") from error


def _load(code: bytes, name: str, modules: Sequence[int], log: Buffer | None = None) -> int:
    instructions, licence = buffer(code), buffer(b"GPL\0")  # the helpers' and conntrack's condition
    places = buffer(struct.pack(f"={len(modules) + 1}i", 0, *modules))
    level, length = (1, len(log)) if log else (0, 0)
    attributes = struct.pack(
        "=IIQQIIQII16sI",
        _SCHED_CLS,
        len(code) // 8,
        address(instructions),
        address(licence),
        level,
        length,
        address(log),
        0,
        0,
        name.encode(),
        0,
    )
    fd_array = struct.pack("=Q", address(places))
    return bpf(_PROGRAM_LOAD, attributes.ljust(120, b"\0") + fd_array)


def attach_while_open(program: int, ifindex: int) -> int:
    """Runs a program for what an interface of this thread's namespace takes in, after all that others have attached, as
    long as the descriptor that is returned is open. Linux 6.6. Raises OSError."""
    return bpf(_LINK_CREATE, struct.pack("=IIII", program, ifindex, _TCX_INGRESS, 0))


def exchange_program(link: int, program: int) -> None:
    """Has what `attach_while_open` has returned run another program, without a packet in between. Raises OSError."""
    bpf(_LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0))


def read_btf() -> Btf:
    """The kernel's own types. Raises BtfError when it does not tell."""
    return _read_btf("vmlinux", None)


def read_module_btf(name: str, base: Btf) -> tuple[Btf, int] | None:
    """A module's types on top of the kernel's, and the descriptor that its functions are called by; None when there is
    no such module, or it is built in. Raises BtfError, OSError."""
    if not (_BTF_FOLDER / name).exists():
        return None
    types, number = _read_btf(name, base), 0
    while True:
        number = _next_btf(number)
        if not number:
            raise BtfError(f"the module {name} has BTF that cannot be opened")
        descriptor = bpf(_BTF_OF, struct.pack("=I", number))
        if _btf_name(descriptor) == name:
            return types, descriptor
        os.close(descriptor)


def _read_btf(name: str, base: Btf | None) -> Btf:
    try:
        return Btf((_BTF_FOLDER / name).read_bytes(), base)
    except OSError as error:
        raise BtfError(f"the kernel does not tell its types: {_BTF_FOLDER / name}: {error.strerror}") from error


def _next_btf(number: int) -> int:
    """The number after this one, 0 when that was the last."""
    attributes = new_attributes(struct.pack("=II", number, 0))
    try:
        call(_NEXT_BTF, attributes)
    except FileNotFoundError:
        return 0
    return int(struct.unpack_from("=I", attributes, 4)[0])


def _btf_name(descriptor: int) -> str:
    name = ctypes.create_string_buffer(64)
    info = ctypes.create_string_buffer(struct.pack("=QIIQII", 0, 0, 0, address(name), len(name), 0), 32)
    bpf(_INFO, struct.pack("=IIQ", descriptor, len(info), address(info)))
    return name.value.decode()


def _possible_cpus() -> int:
    """As many as the kernel has values of; they may be more than are there."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().replace("-", ",").split(",")[-1]
    return int(last) + 1
