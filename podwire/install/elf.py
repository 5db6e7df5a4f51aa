"""What an ELF file asks of its loader: read from the file alone, for any machine of 64 bits and little end.

`ldd` runs the file's own loader and so cannot read another machine's files. These are the few fields that decide what
a program needs to start (ELF-64 Object File Format 1.5 and the gABI, § Dynamic Section):

    header ─▶ program headers ─┬─ PT_INTERP    the loader's path, of programs only
                               ├─ PT_LOAD      where in the file an address is
                               └─ PT_DYNAMIC   DT_NEEDED, DT_SONAME, DT_RPATH, DT_RUNPATH ─▶ offsets into DT_STRTAB
"""

from __future__ import annotations

import struct

import msgspec

from podwire.install.errors import InstallError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_MAGIC_64_LITTLE = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 14, 15, 29


class ElfFile(msgspec.Struct, frozen=True, kw_only=True):
    """`machine` is e_machine (62 x86-64, 183 aarch64); what the file does not have is empty; paths are unresolved."""

    machine: int
    interpreter: str
    needed: tuple[str, ...]
    soname: str
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]


class _Segment(msgspec.Struct, frozen=True, kw_only=True):
    kind: int
    offset: int
    address: int
    size: int


def is_elf(data: bytes) -> bool:
    """Whether the bytes begin as a 64-bit little-endian ELF file does."""
    return data.startswith(_MAGIC_64_LITTLE)


def read_elf(data: bytes) -> ElfFile:
    """The file in `data`. Raises InstallError when it is no ELF file of 64 bits and little end, or cut short."""
    if not is_elf(data):
        raise InstallError("it is no 64-bit little-endian ELF file")
    try:
        return _read(data)
    except (struct.error, ValueError) as error:
        raise InstallError(f"it is a damaged ELF file: {error}") from error


def _read(data: bytes) -> ElfFile:
    (_, _, machine, _, _, table, _, _, _, entry_size, entries, _, _, _) = _HEADER.unpack_from(data)
    segments = [_read_segment(data, table + number * entry_size) for number in range(entries)]
    interpreter = next((_text(data, each.offset) for each in segments if each.kind == _PT_INTERP), "")
    dynamic = next((_read_dynamic(data, each) for each in segments if each.kind == _PT_DYNAMIC), [])
    strings = next((_offset_of(value, segments) for tag, value in dynamic if tag == _DT_STRTAB), 0)

    def texts(wanted: int) -> tuple[str, ...]:
        return tuple(_text(data, strings + value) for tag, value in dynamic if tag == wanted)

    return ElfFile(
        machine=machine,
        interpreter=interpreter,
        needed=texts(_DT_NEEDED),
        soname="".join(texts(_DT_SONAME)),
        rpath=_folders(texts(_DT_RPATH)),
        runpath=_folders(texts(_DT_RUNPATH)),
    )


def _read_segment(data: bytes, at: int) -> _Segment:
    kind, _, offset, address, _, size, _, _ = _PROGRAM_HEADER.unpack_from(data, at)
    return _Segment(kind=kind, offset=offset, address=address, size=size)


def _read_dynamic(data: bytes, segment: _Segment) -> list[tuple[int, int]]:
    entries = []
    for at in range(segment.offset, segment.offset + segment.size, _DYNAMIC.size):
        tag, value = _DYNAMIC.unpack_from(data, at)
        if tag == _DT_NULL:
            break
        entries.append((tag, value))
    return entries


def _offset_of(address: int, segments: list[_Segment]) -> int:
    for each in segments:
        if each.kind == _PT_LOAD and each.address <= address < each.address + each.size:
            return each.offset + address - each.address
    raise ValueError("its strings are in no segment")


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _folders(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(folder for value in values for folder in value.split(":") if folder)
