"""An assembler for eBPF: methods for instructions, names for jump targets, bytes for bpf(2). Pure.

    program = Assembler()
    program.load(Size.WORD, R1, R6, 40)         r1 = *(u32 *)(r6 + 40)
    program.jump_if(Test.EQUAL, R1, 7, "ours")  if r1 == 7 goto ours
    program.set(R0, 1)                          r0 = 1
    program.label("ours")
    program.exit()

Registers: r0 is what a call returns, r1 to r5 are its arguments and gone after it, r6 to r9 stay, r10 is the frame's
end, from which the stack's 512 bytes go down. A jump may go forward alone, so that every program ends.

Source: Documentation/bpf/standardization/instruction-set.rst (RFC 9669). An instruction is opcode, registers, offset
and immediate in eight bytes; multi-byte fields are the host's, as bpf(2) takes them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)
"""The registers."""

_INSTRUCTION = struct.Struct("=BBhi")
_LOAD, _STORE, _STORE_NUMBER, _WIDE = 0x61, 0x63, 0x62, 0x18
_ALU64, _ALU32, _JUMP, _JUMP32, _FROM_REGISTER = 0x07, 0x04, 0x05, 0x06, 0x08
_MOVE, _CALL, _EXIT, _GOTO = 0xB0, 0x85, 0x95, 0x05
_MAP, _MAP_VALUE, _KERNEL_FUNCTION = 1, 2, 2  # what the source register of a wide load or a call says it is
_MOST = 1 << 31


class Size(IntEnum):
    """How much an access takes."""

    WORD = 0x00  # 4 bytes
    HALF = 0x08  # 2
    BYTE = 0x10  # 1
    DOUBLE = 0x18  # 8


class Sum(IntEnum):
    """What an operation does with its two numbers."""

    ADD = 0x00
    SUBTRACT = 0x10
    OR = 0x40
    AND = 0x50
    LEFT = 0x60
    RIGHT = 0x70


class Test(IntEnum):
    """When a jump is taken: the register on the left, unsigned but for LESS_SIGNED."""

    __test__ = False  # no test of pytest's

    EQUAL = 0x10
    GREATER = 0x20
    ANY_BIT = 0x40
    DIFFERENT = 0x50
    LESS = 0xA0
    AT_MOST = 0xB0
    LESS_SIGNED = 0xC0


class Assembler:
    """A program in the making. Numbers that are written into it have 32 bits, with or without sign."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int, int]] = []  # opcode, target, source, offset, number
        self._labels: dict[str, int] = {}
        self._jumps: dict[int, str] = {}

    # --- registers

    def set(self, target: int, number: int) -> None:
        """target = number"""
        self._add(_ALU64 | _MOVE, target, number=number)

    def copy(self, target: int, source: int) -> None:
        """target = source"""
        self._add(_ALU64 | _MOVE | _FROM_REGISTER, target, source)

    def frame(self, target: int, offset: int) -> None:
        """target = r10 + offset: the address of what is on the stack there; `offset` is negative."""
        self.copy(target, R10)
        self.compute(Sum.ADD, target, offset)

    def compute(self, operation: Sum, target: int, number: int) -> None:
        """target = target (operation) number"""
        self._add(_ALU64 | operation, target, number=number)

    def compute_with(self, operation: Sum, target: int, source: int) -> None:
        """target = target (operation) source"""
        self._add(_ALU64 | operation | _FROM_REGISTER, target, source)

    def compute32(self, operation: Sum, target: int, number: int) -> None:
        """The same with the lower 32 bits, the upper being 0 then."""
        self._add(_ALU32 | operation, target, number=number)

    def compute32_with(self, operation: Sum, target: int, source: int) -> None:
        """The same with another register's lower 32 bits."""
        self._add(_ALU32 | operation | _FROM_REGISTER, target, source)

    # --- memory

    def load(self, size: Size, target: int, base: int, offset: int) -> None:
        """target = *(base + offset)"""
        self._add(_LOAD | size, target, base, offset)

    def store(self, size: Size, base: int, offset: int, source: int) -> None:
        """*(base + offset) = source"""
        self._add(_STORE | size, base, source, offset)

    def store_number(self, size: Size, base: int, offset: int, number: int) -> None:
        """*(base + offset) = number"""
        self._add(_STORE_NUMBER | size, base, 0, offset, number)

    def load_map(self, target: int, descriptor: int) -> None:
        """target = the map, for a call"""
        self._add(_WIDE, target, _MAP, number=descriptor)
        self._add(0)

    def load_map_value(self, target: int, descriptor: int, offset: int = 0) -> None:
        """target = the address of the one value of an array, and `offset` bytes"""
        self._add(_WIDE, target, _MAP_VALUE, number=descriptor)
        self._add(0, number=offset)

    # --- what comes next

    def jump(self, label: str) -> None:
        """goto label"""
        self._jump(_GOTO, 0, 0, 0, label)

    def jump_if(self, test: Test, target: int, number: int, label: str) -> None:
        """if target (test) number goto label"""
        self._jump(_JUMP | test, target, 0, number, label)

    def jump_if_with(self, test: Test, target: int, source: int, label: str) -> None:
        """if target (test) source goto label"""
        self._jump(_JUMP | test | _FROM_REGISTER, target, source, 0, label)

    def jump32_if(self, test: Test, target: int, number: int, label: str) -> None:
        """The same with the lower 32 bits."""
        self._jump(_JUMP32 | test, target, 0, number, label)

    def label(self, name: str) -> None:
        """What comes next has this name. Raises ValueError for one that is taken."""
        if name in self._labels:
            raise ValueError(f"label {name!r} is there already, expected another name")
        self._labels[name] = len(self._instructions)

    def call(self, helper: int) -> None:
        """r0 = a helper function by its number in enum bpf_func_id (linux/bpf.h)"""
        self._add(_CALL, number=helper)

    def call_kernel(self, function: int, module: int = 0) -> None:
        """r0 = a kernel function by its type's number in BTF, that of the module at this place of fd_array (0: none)"""
        self._add(_CALL, 0, _KERNEL_FUNCTION, module, function)

    def exit(self) -> None:
        """return r0"""
        self._add(_EXIT)

    def assemble(self) -> bytes:
        """The instructions, eight bytes each. Raises ValueError for a label that is nowhere, or not ahead."""
        return b"".join(self._encoded())

    def _encoded(self) -> Iterator[bytes]:
        for at, (opcode, target, source, offset, number) in enumerate(self._instructions):
            if at in self._jumps:
                offset = self._distance(at, self._jumps[at])
            signed = number - (1 << 32) if number >= _MOST else number
            yield _INSTRUCTION.pack(opcode, target | source << 4, offset, signed)

    def _distance(self, at: int, label: str) -> int:
        if label not in self._labels:
            raise ValueError(f"label {label!r} is nowhere, expected it after instruction {at}")
        if self._labels[label] <= at:
            raise ValueError(f"label {label!r} is at {self._labels[label]}, expected it after instruction {at}")
        return self._labels[label] - at - 1

    def _add(self, opcode: int, target: int = 0, source: int = 0, offset: int = 0, number: int = 0) -> None:
        self._instructions.append((opcode, target, source, offset, number))

    def _jump(self, opcode: int, target: int, source: int, number: int, label: str) -> None:
        self._jumps[len(self._instructions)] = label
        self._add(opcode, target, source, number=number)
