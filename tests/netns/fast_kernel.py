"""What a kernel has of the fast path: programs and maps, read from the links that they are at, so that they can be
looked at while no daemon runs."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import socket
import struct

from ipam_daemon.fastpath_program import COUNT_BYTES, FROM_NODE, KEY_BYTES, LEASE_BYTES, POD_BYTES, TO_NODE, TO_POD
from podwire.bpf import kernel, tcx
from podwire.bpf.syscall import bpf
from podwire.lab.state import LabState
from tests.netns.busy_flows import inside
from tests.netns.containers import on_node

_NEXT_KEY, _PROGRAM_BY_ID, _MAP_BY_ID, _INFO = 4, 13, 14, 15  # linux/bpf.h, enum bpf_cmd
_MAPS = {"podwire_pods": (KEY_BYTES, POD_BYTES), "podwire_lease": (4, LEASE_BYTES), "podwire_ways": (4, COUNT_BYTES)}


def programs(lab: LabState, name: str) -> dict[str, list[str]]:
    """The programs of ours that a node's links run for what they take in, by link; those without one are left out."""
    links = [each["ifname"] for each in json.loads(on_node(lab, name, "ip", "-j", "link").stdout)]
    found = {link: [each for each, _ in _programs(lab, name, link)] for link in links}
    return {link: names for link, names in found.items() if names}


def _programs(lab: LabState, name: str, link: str) -> list[tuple[str, int]]:
    """By tc's filters, and by TCX."""
    shown = on_node(lab, name, "tc", "-j", "filter", "show", "dev", link, "ingress").stdout or "[]"
    options = [each["options"] for each in json.loads(shown) if "options" in each]
    found = [(str(each["bpf_name"]), int(each["prog"]["id"])) for each in options if "podwire" in str(each)]
    beside: dict[int, str] = {}
    with contextlib.suppress(OSError):  # it is gone since
        beside = inside(lab.netns(name), lambda: tcx.programs(socket.if_nametoindex(link), tcx.Way.IN))
    return found + [(each, number) for number, each in beside.items() if each.startswith("podwire")]


class Maps:
    """The maps of the program at a node's link, whoever loaded it, until the end of the block."""

    def __init__(self, lab: LabState, name: str, link: str) -> None:
        ((_, program),) = _programs(lab, name, link)
        descriptor = bpf(_PROGRAM_BY_ID, struct.pack("=I", program))
        try:
            numbers = (ctypes.c_uint32 * 8)()
            info = ctypes.create_string_buffer(256)
            struct.pack_into("=I", info, 52, len(numbers))  # struct bpf_prog_info
            struct.pack_into("=Q", info, 56, ctypes.addressof(numbers))
            _ask(descriptor, info)
            (count,) = struct.unpack_from("=I", info, 52)
        finally:
            os.close(descriptor)
        self._maps = dict(map(_open, numbers[:count]))

    def __enter__(self) -> Maps:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._maps.values():
            each.close()

    def taken(self) -> int:
        """Packets that took the fast way."""
        found = (self._maps["podwire_ways"].get(struct.pack("=I", way)) or b"" for way in (TO_POD, TO_NODE, FROM_NODE))
        return sum(number for values in found for (number,) in struct.iter_unpack("=Q", values))

    def expire(self) -> None:
        """The lease has run out."""
        self._maps["podwire_lease"].put(struct.pack("=I", 0), struct.pack("=Q", 1))

    def pods(self) -> set[str]:
        """The addresses that the programs know."""
        pods, found, key = self._maps["podwire_pods"], set[str](), b""
        while key := _next_key(pods, key):
            address = ipaddress.IPv6Address(key)
            found.add(str(address.ipv4_mapped or address))
        return found


def _open(number: int) -> tuple[str, kernel.Map]:
    """A map by its number, and its name."""
    descriptor = bpf(_MAP_BY_ID, struct.pack("=I", number))
    info = ctypes.create_string_buffer(128)
    _ask(descriptor, info)
    found = kernel.Map.__new__(kernel.Map)
    found.descriptor, name = descriptor, info.raw[24:40].rstrip(b"\0").decode()  # struct bpf_map_info
    found._sizes, found._per_cpu = _MAPS[name], name == "podwire_ways"
    return name, found


def _ask(descriptor: int, info: ctypes.Array[ctypes.c_char]) -> None:
    bpf(_INFO, struct.pack("=IIQ", descriptor, len(info), ctypes.addressof(info)))


def _next_key(of: kernel.Map, key: bytes) -> bytes:
    """The key after this one, or the first; empty after the last."""
    given, found = ctypes.create_string_buffer(key, KEY_BYTES), ctypes.create_string_buffer(KEY_BYTES)
    pointer = ctypes.addressof(given) if key else 0
    try:
        bpf(_NEXT_KEY, struct.pack("=I4xQQ", of.descriptor, pointer, ctypes.addressof(found)))
    except FileNotFoundError:
        return b""
    return found.raw
