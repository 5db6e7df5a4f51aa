"""Elements of nft sets, three ways: a process, the library that the process uses, and a packed message.

What is changed are the sets of the spoof guard, by what a pod's ADD adds to them (five elements, IPv4), once where no
other pod is and once where 200 are; and a thousand elements at once. All three leave the same; each change is undone
before the next, untimed. A way that did not do it fails the benchmark.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import ipaddress
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from bench.process import BenchFailed
from bench.report import Report, Table
from bench.stage import Stage
from bench.statistic import median, percentile
from ipam_daemon.model import Attachment, AttachmentKey
from ipam_daemon.plan import mac_of
from ipam_daemon.spoofguard import TABLE, Element, elements, render, text
from podwire.nfelements import add, delete
from podwire.nfnetlink import Nftables

_OTHERS = 200
_MANY = 200  # pods, which have 1,000 elements
_WARM_UP = 2

Way = Callable[[Sequence[Element]], None]


def run(stage: Stage, rounds: int) -> Report:
    """Every way in turn, `rounds` times."""
    node = stage.node("elements")
    taken: dict[str, list[float]] = {}
    with node.entered(), _ways() as (ways, nftables):
        for others in (0, _OTHERS):
            there = [element for number in range(others) for element in _pod(number)]
            _nft(render(there))
            pod = _pod(others)
            jobs = {f"one element, {others} pods": pod[:1], f"a pod's {len(pod)}, {others} pods": pod}
            if not others:
                jobs["1,000 elements at once"] = [each for number in range(_MANY) for each in _pod(number)]
            for job, wanted in jobs.items():
                for number in range(-_WARM_UP, rounds):
                    for name, way in ways.items():
                        began = time.perf_counter()
                        way(wanted)
                        seconds = time.perf_counter() - began
                        _expect(nftables, len(there) + len(wanted))
                        nftables.commit(delete(TABLE, each.set, each.key) for each in wanted)
                        if number >= 0:
                            taken.setdefault(f"{job}: {name}", []).append(seconds)
    rows = tuple((name, _ms(median(each)), _ms(percentile(each, 90))) for name, each in taken.items())
    table = Table(
        title=f"Adding elements to the sets of the spoof guard, ms ({rounds} times each)",
        columns=("", "median", "p90"),
        rows=rows,
        notes=("The time is that of the one who asks, until the kernel has them.",),
    )
    return Report(tables=(table,), samples=taken)


@contextlib.contextmanager
def _ways() -> Iterator[tuple[dict[str, Way], Nftables]]:
    nftables = Nftables()
    ways: dict[str, Way] = {"an nft process": lambda wanted: _nft(_script(wanted))}
    library = _Library.load()
    if library is not None:
        loaded = library
        ways["libnftables, text"] = lambda wanted: loaded.run(_script(wanted))
    ways["packed message"] = lambda wanted: nftables.commit(add(TABLE, each.set, each.key) for each in wanted)
    try:
        yield ways, nftables
    finally:
        nftables.close()
        if library is not None:
            library.close()


def _pod(number: int) -> list[Element]:
    address = ipaddress.ip_interface(f"10.244.{number // 250}.{number % 250 + 3}/24")
    pod = Attachment(
        key=AttachmentKey("bench", str(number), "eth0"),
        netns="",
        host_ifname=f"pw{number:012x}",
        mac=mac_of(address.ip),
        mtu=1450,
        addresses=(address,),
        created=0.0,
        created_ns=0,
    )
    return sorted(elements(pod))


def _script(wanted: Sequence[Element]) -> str:
    listed: dict[str, list[str]] = {}
    for element in wanted:
        listed.setdefault(element.set, []).append(text(element))
    return "\n".join(f"add element {TABLE} {name} {{ {', '.join(found)} }}" for name, found in listed.items()) + "\n"


def _nft(script: str) -> None:
    done = subprocess.run(("nft", "-f", "-"), input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchFailed(f"nft: {done.stderr.strip()}")


def _expect(nftables: Nftables, number: int) -> None:
    found = sum(
        len(nftables.elements(TABLE, name) or ()) for name in ("macs", "bound4", "bound6", "targets6", "options6")
    )
    if found != number:
        raise BenchFailed(f"{found} elements are there, expected {number}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"


class _Library:
    """libnftables(3), for comparison: what an nft process does, without the process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        library.nft_ctx_buffer_error.argtypes = library.nft_ctx_free.argtypes = [ctypes.c_void_p]
        self._library = library
        self._context = library.nft_ctx_new(0)
        library.nft_ctx_buffer_error(self._context)

    @classmethod
    def load(cls) -> _Library | None:
        """None where there is none."""
        name = ctypes.util.find_library("nftables")
        return cls(ctypes.CDLL(name)) if name else None

    def run(self, script: str) -> None:
        """Carries a script out."""
        if self._library.nft_run_cmd_from_buffer(self._context, script.encode()):
            raise BenchFailed("libnftables refused a script")

    def close(self) -> None:
        """Frees what it holds."""
        self._library.nft_ctx_free(self._context)
