"""Maps and programs in the kernel: what is put is there, what is removed is not, and what is refused is said why."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from podwire import netns
from podwire.bpf import kernel
from podwire.bpf.assembler import R0, R1, R6, R10, Assembler, Size, Sum, Test
from podwire.bpf.kernel import Map, MapKind, Refused
from tests.netns.bpf_run import run
from tests.netns.node_fixtures import Netns

NUMBERS = [struct.pack("=I", number) for number in range(4)]
FRAME = bytes(12) + b"\x88\xcc" + bytes(46)
PASS, DROP = 0, 2
LOOPBACK = 1


@contextmanager
def made(kind: MapKind, value: int = 8, entries: int = 3) -> Iterator[Map]:
    with closing(Map(kind, key=4, value=value, entries=entries, name="test_map")) as it:
        yield it


def returning(number: int) -> Assembler:
    program = Assembler()
    program.set(R0, number)
    program.exit()
    return program


@contextmanager
def loaded(program: Assembler) -> Iterator[int]:
    descriptor = kernel.load(program.assemble(), "test_program")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_map_has_what_was_put_until_it_is_removed() -> None:
    with made(MapKind.HASH) as it:
        assert it.get(NUMBERS[0]) is None
        for key in NUMBERS[:3]:
            it.put(key, key * 2)
        it.put(NUMBERS[1], b"another!")
        assert [it.get(key) for key in NUMBERS] == [NUMBERS[0] * 2, b"another!", NUMBERS[2] * 2, None]
        with pytest.raises(OSError, match="too long") as full:
            it.put(NUMBERS[3], b"too many")
        assert full.value.errno == errno.E2BIG
        assert it.remove(NUMBERS[1])
        assert not it.remove(NUMBERS[1])
        assert [it.get(key) for key in NUMBERS] == [NUMBERS[0] * 2, None, NUMBERS[2] * 2, None]
        it.put(NUMBERS[3], b"now fits")
        assert it.get(NUMBERS[3]) == b"now fits"


def test_every_key_of_a_thousand_is_found_and_removed() -> None:
    """A key that is not there any more when the kernel reads it is some other key."""
    keys = [struct.pack("=I", 7919 * number) for number in range(1000)]
    with made(MapKind.HASH, entries=1000) as it:
        for key in keys:
            it.put(key, key * 2)
        assert [key for key in keys if it.get(key) != key * 2] == []
        assert [key for key in keys if not it.remove(key)] == []
        assert [key for key in keys if it.get(key) is not None] == []


def test_an_array_has_all_its_places_from_the_beginning() -> None:
    with made(MapKind.ARRAY, value=6) as it:
        assert it.get(NUMBERS[2]) == bytes(6)
        it.put(NUMBERS[2], b"sixth!")
        assert [it.get(key) for key in NUMBERS] == [bytes(6), bytes(6), b"sixth!", None]
        with pytest.raises(OSError, match="nvalid"):
            it.remove(NUMBERS[2])


@pytest.mark.parametrize("value", [8, 4])
def test_an_array_per_cpu_has_a_value_for_each(value: int) -> None:
    """Each padded to eight bytes, for every processor that there could be."""
    possible = Path("/sys/devices/system/cpu/possible").read_text().strip()
    processors = int(possible.rpartition("-")[2]) + 1
    with made(MapKind.ARRAY_PER_CPU, value=value) as it:
        assert it.get(NUMBERS[0]) == bytes(8 * processors)
        assert it.get(NUMBERS[3]) is None


def test_what_a_program_counts_is_counted_where_it_runs() -> None:
    with made(MapKind.ARRAY_PER_CPU) as it:
        program = Assembler()
        program.store_number(Size.WORD, R10, -4, 1)
        program.load_map(R1, it.descriptor)
        program.frame(2, -4)
        program.call(1)  # bpf_map_lookup_elem
        program.jump_if(Test.EQUAL, R0, 0, "none")
        program.load(Size.DOUBLE, R1, R0, 0)
        program.compute(Sum.ADD, R1, 1)
        program.store(Size.DOUBLE, R0, 0, R1)
        program.label("none")
        program.set(R0, 5)
        program.exit()
        allowed = os.sched_getaffinity(0)
        with loaded(program) as descriptor:
            try:
                for times, cpu in enumerate(sorted(allowed), 1):
                    os.sched_setaffinity(0, {cpu})
                    assert [run(descriptor, FRAME, LOOPBACK) for _ in range(times)] == [(5, FRAME)] * times
            finally:
                os.sched_setaffinity(0, allowed)
        numbers = struct.unpack(f"={len(it.get(NUMBERS[1]) or b'') // 8}Q", it.get(NUMBERS[1]) or b"")
        assert [numbers[cpu] for cpu in sorted(allowed)] == list(range(1, len(allowed) + 1))
        assert it.get(NUMBERS[0]) == bytes(8 * len(numbers))


def test_a_program_reads_the_one_value_of_an_array() -> None:
    with made(MapKind.ARRAY, entries=1) as it:
        program = Assembler()
        program.load_map_value(R1, it.descriptor, 4)
        program.load(Size.WORD, R0, R1, 0)
        program.exit()
        with loaded(program) as descriptor:
            for number in (7, 12):
                it.put(NUMBERS[0], struct.pack("=II", 99, number))
                assert run(descriptor, FRAME, LOOPBACK)[0] == number


def without_an_end() -> Assembler:
    program = Assembler()
    program.set(R0, 0)
    return program


def reading_nowhere() -> Assembler:
    program = Assembler()
    program.load(Size.WORD, R0, R6, 0)
    program.exit()
    return program


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (reading_nowhere(), "R6 !read_ok"),
        (without_an_end(), "last insn is not an exit or jmp"),
        (Assembler(), "too long"),
    ],
)
def test_what_the_verifier_says_is_in_the_error(program: Assembler, says: str) -> None:
    with pytest.raises(Refused, match=says) as refused:
        kernel.load(program.assemble(), "test_program")
    assert refused.value.errno in (errno.EINVAL, errno.EACCES, errno.E2BIG)
    assert "eBPF program test_program" in str(refused.value)


def test_a_program_is_attached_while_its_link_is_open() -> None:
    with Netns("tcx") as node, Netns("tcx-peer") as peer:
        node.ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", peer.name)
        for each, name, address in ((node, "here", "192.0.2.1/24"), (peer, "there", "192.0.2.2/24")):
            each.ip("addr", "add", address, "dev", name)
            each.ip("link", "set", name, "up")
        index = int(node.json("link", "show", "here")[0]["ifindex"])
        assert peer.pings("192.0.2.1", seconds=60)
        inside = netns.open_netns(node.path)
        try:
            with loaded(returning(DROP)) as dropping, netns.inside(inside):
                link = kernel.attach_while_open(dropping, index)
        finally:
            os.close(inside)
        assert not peer.pings("192.0.2.1", seconds=0.3), "the link holds the program, whose descriptor is closed"
        os.close(link)
        assert peer.pings("192.0.2.1", seconds=60)


def test_the_kernel_knows_its_own_types() -> None:
    types = kernel.read_btf()
    assert types.offset("__sk_buff", "gso_size") == 176
    assert types.offset("nf_conntrack_tuple", "src.u3") == 0
    assert types.count > 1000
    assert kernel.read_module_btf("no_module_of_this_name", types) is None
