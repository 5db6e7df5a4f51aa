"""eBPF instructions against their bytes in RFC 9669: eight each, opcode, source and target, offset, number."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from podwire.bpf.assembler import R0, R1, R2, R3, R6, R7, R9, R10, Assembler, Size, Sum, Test

# RFC 9669: opcode (class, source or size, operation or mode), then target in the lower four bits and source in the
# upper, the offset and the immediate little end first.
INSTRUCTIONS: dict[str, tuple[Callable[[Assembler], None], str]] = {
    "r6 = r1 (5.: MOV, X, ALU64)": (lambda it: it.copy(R6, R1), "bf 16 0000 00000000"),
    "r0 = -1 (MOV, K, ALU64)": (lambda it: it.set(R0, -1), "b7 00 0000 ffffffff"),
    "r3 = 0x12345678": (lambda it: it.set(R3, 0x12345678), "b7 03 0000 78563412"),
    "r3 = 0x80000000, which is negative": (lambda it: it.set(R3, 0x80000000), "b7 03 0000 00000080"),
    "r2 = r10 - 48, in two": (lambda it: it.frame(R2, -48), "bf a2 0000 00000000  07 02 0000 d0ffffff"),
    "r1 += 34": (lambda it: it.compute(Sum.ADD, R1, 34), "07 01 0000 22000000"),
    "r1 -= 14": (lambda it: it.compute(Sum.SUBTRACT, R1, 14), "17 01 0000 0e000000"),
    "r7 |= 8": (lambda it: it.compute(Sum.OR, R7, 8), "47 07 0000 08000000"),
    "r7 &= 0xffff": (lambda it: it.compute(Sum.AND, R7, 0xFFFF), "57 07 0000 ffff0000"),
    "r1 <<= 32": (lambda it: it.compute(Sum.LEFT, R1, 32), "67 01 0000 20000000"),
    "r1 >>= 4": (lambda it: it.compute(Sum.RIGHT, R1, 4), "77 01 0000 04000000"),
    "r7 |= r1": (lambda it: it.compute_with(Sum.OR, R7, R1), "4f 17 0000 00000000"),
    "w1 &= 0xffff": (lambda it: it.compute32(Sum.AND, R1, 0xFFFF), "54 01 0000 ffff0000"),
    "w1 -= w2": (lambda it: it.compute32_with(Sum.SUBTRACT, R1, R2), "1c 21 0000 00000000"),
    "r9 = *(u8 *)(r7 + 23)": (lambda it: it.load(Size.BYTE, R9, R7, 23), "71 79 1700 00000000"),
    "r1 = *(u16 *)(r7 + 12)": (lambda it: it.load(Size.HALF, R1, R7, 12), "69 71 0c00 00000000"),
    "r1 = *(u32 *)(r6 + 40)": (lambda it: it.load(Size.WORD, R1, R6, 40), "61 61 2800 00000000"),
    "r7 = *(u64 *)(r1 - 8)": (lambda it: it.load(Size.DOUBLE, R7, R1, -8), "79 17 f8ff 00000000"),
    "*(u8 *)(r10 - 8) = r9": (lambda it: it.store(Size.BYTE, R10, -8, R9), "73 9a f8ff 00000000"),
    "*(u16 *)(r10 - 8) = r1": (lambda it: it.store(Size.HALF, R10, -8, R1), "6b 1a f8ff 00000000"),
    "*(u32 *)(r10 - 8) = r1": (lambda it: it.store(Size.WORD, R10, -8, R1), "63 1a f8ff 00000000"),
    "*(u64 *)(r0 + 0) = r1": (lambda it: it.store(Size.DOUBLE, R0, 0, R1), "7b 10 0000 00000000"),
    "*(u32 *)(r10 - 96) = -1": (lambda it: it.store_number(Size.WORD, R10, -96, -1), "62 0a a0ff ffffffff"),
    "a map (5.4: wide, source 1)": (lambda it: it.load_map(R1, 5), "18 11 0000 05000000  00 00 0000 00000000"),
    "a map's value (wide, source 2)": (
        lambda it: it.load_map_value(R1, 5, 16),
        "18 21 0000 05000000  00 00 0000 10000000",
    ),
    "call helper 155": (lambda it: it.call(155), "85 00 0000 9b000000"),
    "call the kernel's function 7": (lambda it: it.call_kernel(7), "85 20 0000 07000000"),
    "call a module's function": (lambda it: it.call_kernel(0x12345, 1), "85 20 0100 45230100"),
    "exit": (lambda it: it.exit(), "95 00 0000 00000000"),
}
JUMPS: dict[str, tuple[Callable[[Assembler], None], str]] = {
    "goto": (lambda it: it.jump("there"), "05 00 0100 00000000"),
    "if r1 == 7": (lambda it: it.jump_if(Test.EQUAL, R1, 7, "there"), "15 01 0100 07000000"),
    "if r1 > 7": (lambda it: it.jump_if(Test.GREATER, R1, 7, "there"), "25 01 0100 07000000"),
    "if r1 & 7": (lambda it: it.jump_if(Test.ANY_BIT, R1, 7, "there"), "45 01 0100 07000000"),
    "if r1 != 7": (lambda it: it.jump_if(Test.DIFFERENT, R1, 7, "there"), "55 01 0100 07000000"),
    "if r1 < 7": (lambda it: it.jump_if(Test.LESS, R1, 7, "there"), "a5 01 0100 07000000"),
    "if r1 <= 7": (lambda it: it.jump_if(Test.AT_MOST, R1, 7, "there"), "b5 01 0100 07000000"),
    "if r1 > r2": (lambda it: it.jump_if_with(Test.GREATER, R1, R2, "there"), "2d 21 0100 00000000"),
    "if w1 < 5000, signed": (lambda it: it.jump32_if(Test.LESS_SIGNED, R1, 5000, "there"), "c6 01 0100 88130000"),
    "if w1 != 0xfffffff0": (lambda it: it.jump32_if(Test.DIFFERENT, R1, 0xFFFFFFF0, "there"), "56 01 0100 f0ffffff"),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_is_what_the_rfc_says(name: str) -> None:
    write, expected = INSTRUCTIONS[name]
    program = Assembler()
    write(program)
    assert program.assemble() == bytes.fromhex(expected)


@pytest.mark.parametrize("name", JUMPS)
def test_a_jump_counts_the_instructions_that_it_leaves_out(name: str) -> None:
    write, expected = JUMPS[name]
    program = Assembler()
    write(program)
    program.exit()
    program.label("there")
    program.exit()
    assert program.assemble()[:8] == bytes.fromhex(expected)


def test_what_takes_two_places_counts_twice() -> None:
    program = Assembler()
    program.jump("end")
    program.jump("next")
    program.label("next")
    program.load_map(R1, 5)
    program.label("end")
    program.exit()
    code = program.assemble()
    assert [code[at + 2 : at + 4].hex() for at in (0, 8)] == ["0300", "0000"]


def missing(program: Assembler) -> None:
    program.jump("nirvana")


def twice(program: Assembler) -> None:
    program.label("nirvana")
    program.exit()
    program.label("nirvana")


def backward(program: Assembler) -> None:
    program.label("nirvana")
    program.set(R0, 0)
    program.jump_if(Test.EQUAL, R0, 0, "nirvana")


def onto_itself(program: Assembler) -> None:
    program.label("nirvana")
    program.jump("nirvana")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (missing, "'nirvana' is nowhere, expected it after instruction 0"),
        (twice, "'nirvana' is there already"),
        (backward, "'nirvana' is at 0, expected it after instruction 1"),
        (onto_itself, "'nirvana' is at 0, expected it after instruction 0"),
    ],
)
def test_a_label_that_cannot_be_is_named(write: Callable[[Assembler], None], says: str) -> None:
    def assemble() -> bytes:
        program = Assembler()
        write(program)
        program.exit()
        return program.assemble()

    with pytest.raises(ValueError, match=says):
        assemble()
