"""BTF: what a kernel says of its own types, as far as a program needs it: a function's number, a member's place. Pure.

A structure of the kernel differs from one build to the next, so a program that reads one asks the running kernel where
its members are. A module's types follow the kernel's own: their numbers go on where the kernel's end, and so do their
names. The kernel's are some 100,000, read in 50 ms and not kept.

Source: Documentation/bpf/btf.rst; linux/btf.h.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, header's length, types' place and length, strings'
_TYPE = struct.Struct("=III")  # name, what it is, size or the type that it is of
_MEMBER = struct.Struct("=III")  # name, type, offset in bits
_ENUMERATOR = struct.Struct("=Ii")  # name, value
_MAGIC = 0xEB9F
_INT, _ARRAY_KIND, _STRUCT, _UNION, _ENUM, _FUNC, _FUNC_PROTO, _VAR, _DATASEC, _DECL_TAG, _ENUM64 = (
    1, 3, 4, 5, 6, 12, 13, 14, 15, 17, 19,
)  # fmt: skip
_FOLLOWED_BY = {_INT: 4, _ARRAY_KIND: 12, _VAR: 4, _DECL_TAG: 4}
"""Bytes after a type, by its kind."""
_EACH = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
"""The same for each of those that it says it has."""
_TRANSPARENT = frozenset((8, 9, 10, 11, 18))
"""typedef, volatile, const, restrict and type tag: a name for another type."""


class BtfError(ValueError):
    """BTF that is none, or lacks what was looked for."""


class Btf:
    """The types of the kernel, or of a module on top of its."""

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        """`data` is a file of /sys/kernel/btf. Raises BtfError."""
        if len(data) < _HEADER.size:
            raise BtfError(f"BTF has {len(data)} bytes, expected a header of {_HEADER.size}")
        magic, _, _, header, types, types_length, strings, strings_length = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise BtfError(f"BTF begins with {magic:#x}, expected {_MAGIC:#x}")
        whole = header + max(types + types_length, strings + strings_length)
        if len(data) < whole:
            raise BtfError(f"BTF has {len(data)} bytes, expected {whole}")
        self._data, self._base = data, base
        self._types, self._types_end = header + types, header + types + types_length
        self._strings, self._strings_end = header + strings, header + strings + strings_length
        self._first: int = base.count if base else 1  # type 0 is void, which is nowhere
        self._names_before: int = base._names_after if base else 0
        self._names_after: int = self._names_before + strings_length
        self._places = self._find_types()
        self.count: int = self._first + len(self._places)
        """The number that the next type would have."""

    def function(self, name: str) -> int:
        """The number of a function's type. Raises BtfError when there is none of the name."""
        return self._named(name, _FUNC, "function")

    def size(self, struct_name: str) -> int:
        """The size of a structure, in bytes. Raises BtfError."""
        _, _, size = self._read(self._named(struct_name, _STRUCT, "structure"))
        return size

    def offset(self, struct_name: str, path: str) -> int:
        """Where a member is, in bytes from the structure's beginning; `path` names the members on the way, with a dot
        between. Raises BtfError."""
        bits = self._offset(self._named(struct_name, _STRUCT, "structure"), path.split("."))
        if bits is None:
            raise BtfError(f"{struct_name} has no member {path}")
        return bits // 8

    def enumerator(self, enum_name: str, name: str) -> int | None:
        """The value of an enumerator, None where the enumeration has none of the name. Raises BtfError."""
        number = self._named(enum_name, _ENUM, "enumeration")
        owner = self._owner(number)
        _, what, _ = owner._read(number)
        at = owner._places[number - owner._first] + _TYPE.size
        for place in range(at, at + 8 * (what & 0xFFFF), 8):
            found, value = _ENUMERATOR.unpack_from(owner._data, place)
            if owner._name(found) == name:
                return int(value)
        return None

    # --- types

    def _find_types(self) -> array[int]:
        places, at, data = array("I"), self._types, self._data
        while at < self._types_end:
            places.append(at)
            what = _TYPE.unpack_from(data, at)[1]
            kind, count = what >> 24 & 0x1F, what & 0xFFFF
            at += _TYPE.size + _FOLLOWED_BY.get(kind, 0) + count * _EACH.get(kind, 0)
        return places

    def _read(self, number: int) -> tuple[int, int, int]:
        owner = self._owner(number)
        name, what, size = _TYPE.unpack_from(owner._data, owner._places[number - owner._first])
        return name, what, size

    def _owner(self, number: int) -> Btf:
        return self._base._owner(number) if self._base and number < self._first else self

    def _named(self, name: str, kind: int, word: str) -> int:
        wanted = self._name_number(name)
        if wanted is not None:
            for index, place in enumerate(self._places):
                found, what, _ = _TYPE.unpack_from(self._data, place)
                if found == wanted and what >> 24 & 0x1F == kind:
                    return self._first + index
        if self._base:
            return self._base._named(name, kind, word)
        raise BtfError(f"the kernel's BTF has no {word} {name}")

    def _name_number(self, name: str) -> int | None:
        """Where a name is among this file's strings, or the base's, which a module's types use, too."""
        place = self._data.find(b"\0" + name.encode() + b"\0", self._strings, self._strings_end)
        if place >= 0:
            return int(self._names_before + place + 1 - self._strings)
        return self._base._name_number(name) if self._base else None

    def _name(self, number: int) -> str:
        if self._base and number < self._names_before:
            return self._base._name(number)
        begin = self._strings + number - self._names_before
        return self._data[begin : self._data.index(b"\0", begin)].decode()

    def _offset(self, number: int, path: list[str]) -> int | None:
        """In bits; looks into members without a name."""
        for name, member, bits in self._members(number):
            if name == path[0]:
                if len(path) == 1:
                    return bits
                inner = self._offset(member, path[1:])
                return None if inner is None else bits + inner
            inner = None if name else self._offset(member, path)
            if inner is not None:
                return bits + inner
        return None

    def _members(self, number: int) -> Iterator[tuple[str, int, int]]:
        _, what, of = self._read(number)
        while what >> 24 & 0x1F in _TRANSPARENT:
            number = of
            _, what, of = self._read(number)
        if what >> 24 & 0x1F not in (_STRUCT, _UNION):
            return
        owner = self._owner(number)
        at = owner._places[number - owner._first] + _TYPE.size
        for _ in range(what & 0xFFFF):
            name, member, offset = _MEMBER.unpack_from(owner._data, at)
            yield self._name(name), member, offset & 0xFFFFFF if what >> 31 else offset
            at += _MEMBER.size
