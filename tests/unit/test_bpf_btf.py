"""BTF put together by hand as Documentation/bpf/btf.rst has it: where members are, which number a function has."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from podwire.bpf.btf import Btf, BtfError

INT, POINTER, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, VOLATILE, CONST, FUNCTION, PROTOTYPE, VARIABLE, SECTION = (
    1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15,
)  # fmt: skip
FLOAT, DECLARATION_TAG, TYPE_TAG, ENUM64 = 16, 17, 18, 19
BIT_FIELDS = 1 << 31  # kind_flag: a member's offset has its width in the upper byte
VOID = 0


class Writer:
    """BTF in the making. `after` is what it is a module on top of."""

    def __init__(self, after: Writer | None = None) -> None:
        self._names_before: int = after.names_end if after else 0
        self.strings = b"" if after else b"\0"
        self.types = b""
        self.count: int = after.count if after else 1
        self._after = after

    @property
    def names_end(self) -> int:
        return self._names_before + len(self.strings)

    def name(self, text: str) -> int:
        """The number of a name, which may be the base's; 0 for none."""
        if not text:
            return 0
        for each in filter(None, (self._after, self)):
            place = each.strings.find(b"\0" + text.encode() + b"\0")
            if place >= 0:
                return each._names_before + place + 1
        self.strings += (b"" if self.strings else b"\0") + text.encode() + b"\0"
        return self.names_end - len(text) - 1

    def add(self, kind: int, name: str = "", size_or_type: int = 0, more: bytes = b"", count: int = 0) -> int:
        """A type; its number."""
        self.types += struct.pack("=III", self.name(name), kind << 24 | count, size_or_type) + more
        self.count += 1
        return self.count - 1

    def number(self, name: str = "u32") -> int:
        return self.add(INT, name, 4, struct.pack("=I", 32))

    def struct(self, name: str, size: int, *members: tuple[str, int, int], kind: int = STRUCT, flag: int = 0) -> int:
        """A structure of members: name, type, offset in bits."""
        listed = b"".join(struct.pack("=III", self.name(member), of, bits) for member, of, bits in members)
        self.types += struct.pack("=III", self.name(name), kind << 24 | len(members) | flag, size) + listed
        self.count += 1
        return self.count - 1

    def data(self, magic: int = 0xEB9F) -> bytes:
        header = struct.pack("=HBBIIIII", magic, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings


def kernel() -> Writer:
    """One kind of each that is followed by something, so that a wrong length shows; then what is looked for."""
    it = Writer()
    u32 = it.number()
    it.add(ARRAY, "", 0, struct.pack("=III", u32, u32, 4))
    it.add(ENUM, "colour", 4, struct.pack("=IiIi", it.name("RED"), 0, it.name("BLUE"), 1), count=2)
    it.add(ENUM64, "distance", 8, struct.pack("=III", it.name("FAR"), 0, 1), count=1)
    it.add(FLOAT, "double", 8)
    it.add(VARIABLE, "jiffies", u32, struct.pack("=I", 1))
    it.add(SECTION, ".data", 8, struct.pack("=III", 6, 0, 4), count=1)
    it.add(DECLARATION_TAG, "note", u32, struct.pack("=i", -1))
    prototype = it.add(PROTOTYPE, "", VOID, struct.pack("=II", it.name("skb"), u32), count=1)
    it.add(FUNCTION, "lookup", prototype, count=1)
    it.add(FUNCTION, "release", prototype)
    inner = it.struct("place", 8, ("x", u32, 0), ("y", u32, 32))
    hidden_names = it.add(TYPEDEF, "place_t", it.add(CONST, "", it.add(VOLATILE, "", it.add(TYPE_TAG, "tag", inner))))
    either = it.struct("", 8, ("whole", u32, 0), ("halves", hidden_names, 0), kind=UNION)
    nameless = it.struct("", 16, ("deep", u32, 64), ("", either, 0))
    it.struct(
        "connection", 64, ("status", u32, 0), ("where", inner, 64), ("", nameless, 128), ("there", hidden_names, 256)
    )
    it.struct("flags", 8, ("low", u32, 3 << 24 | 0), ("high", u32, 5 << 24 | 40), flag=BIT_FIELDS)
    it.add(POINTER, "", inner)
    it.add(TYPEDEF, "release", u32)  # a name may be a type's and a function's
    return it


OFFSETS = {
    "a member": ("connection", "status", 0),
    "a member of a member": ("connection", "where.y", 12),
    "the member itself": ("connection", "where", 8),
    "one of a structure without a name": ("connection", "deep", 24),
    "one of a union without a name in it": ("connection", "whole", 16),
    "one behind typedef, const, volatile and a tag": ("connection", "there.y", 36),
    "all of it": ("connection", "halves.y", 20),
    "a bit field": ("flags", "low", 0),
    "a bit field behind others": ("flags", "high", 5),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_where_a_member_is(name: str) -> None:
    structure, path, expected = OFFSETS[name]
    assert Btf(kernel().data()).offset(structure, path) == expected


def test_what_a_structure_takes_and_which_number_a_function_has() -> None:
    types = Btf(kernel().data())
    assert [types.size(name) for name in ("connection", "place", "flags")] == [64, 8, 8]
    assert [types.function(name) for name in ("lookup", "release")] == [10, 11]


def test_what_an_enumerator_is() -> None:
    base = kernel()
    module = Writer(after=base)
    module.add(ENUM, "taste", 4, struct.pack("=IiIi", module.name("SWEET"), 7, module.name("RED"), -1), count=2)
    types = Btf(module.data(), Btf(base.data()))
    assert [types.enumerator("colour", name) for name in ("RED", "BLUE", "GREEN")] == [0, 1, None]
    assert [types.enumerator("taste", name) for name in ("RED", "BLUE", "SWEET")] == [-1, None, 7]
    with pytest.raises(BtfError, match="no enumeration smell"):
        types.enumerator("smell", "RED")


def test_a_module_goes_on_with_the_kernel_s_numbers_and_names() -> None:
    base = kernel()
    module = Writer(after=base)
    ours = module.struct("entry", 24, ("status", 1, 0), ("tuple", 12, 64), ("own", 1, 160))
    module.struct("place", 99, ("z", 1, 8))  # the module's own of the name goes before the kernel's
    module.add(FUNCTION, "module_lookup", 9)
    assert ours == base.count, "the stage: its first type has the number after the kernel's last"
    types = Btf(kernel().data())
    found = Btf(module.data(), types)
    assert found.count == types.count + 3
    assert found.function("module_lookup") == base.count + 2
    assert found.function("lookup") == 10
    assert [found.offset("entry", path) for path in ("status", "tuple.y", "own")] == [0, 12, 20]
    assert found.offset("connection", "where.y") == 12
    assert (found.size("place"), types.size("place")) == (99, 8)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda it: it.function("nothing"), "no function nothing"),
        (lambda it: it.function("connection"), "no function connection"),
        (lambda it: it.size("nothing"), "no structure nothing"),
        (lambda it: it.size("lookup"), "no structure lookup"),
        (lambda it: it.size("onnection"), "no structure onnection"),
        (lambda it: it.offset("nothing", "status"), "no structure nothing"),
        (lambda it: it.offset("connection", "z"), "connection has no member z"),
        (lambda it: it.offset("connection", "where.z"), "connection has no member where.z"),
        (lambda it: it.offset("connection", "status.x"), "connection has no member status.x"),
    ],
)
def test_what_is_not_there_is_named(ask: Callable[[Btf], int], says: str) -> None:
    base = Btf(kernel().data())
    for types in (base, Btf(Writer(after=kernel()).data(), base)):
        with pytest.raises(BtfError, match=says):
            ask(types)


def test_what_is_no_btf_is_refused() -> None:
    with pytest.raises(BtfError, match="begins with 0x9feb, expected 0xeb9f"):
        Btf(kernel().data(magic=0x9FEB))
    with pytest.raises(BtfError, match="has 0 bytes, expected a header of 24"):
        Btf(b"")


def test_data_that_is_cut_off_is_no_btf() -> None:
    """A module may go while its BTF is read."""
    data = kernel().data()
    for length in range(len(data)):
        with pytest.raises(BtfError, match=f"has {length} bytes, expected"):
            Btf(data[:length])
