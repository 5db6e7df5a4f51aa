"""Nodes and pods as network namespaces, and a folder each for what lives in memory and on disk.

Everything is made by one Stage and removed when its block is left: by its end, an error, Ctrl-C or SIGTERM. Processes
die with this one (setpriv --pdeathsig). After a kill -9 namespaces and folders stay; their names begin with the id of
the process that made them, so the next stage removes those of processes that are gone.

Namespaces of pods are made before anything is measured and deleted after it: the kernel takes a deleted namespace apart
in the background, and would do so during somebody's turn.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.process import BenchFailed
from podwire.netns import inside, open_netns

_NETNS = Path("/run/netns")
_OURS = re.compile(r"pwbench-(\d+)(-|$)")


class Namespace:
    """A network namespace by name. `fd` is open for as long as the stage is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = _NETNS / name
        self.fd = open_netns(str(self.path))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Runs the block, and what it starts, inside. This process has one thread while it measures."""
        with inside(self.fd):
            yield


class Stage:
    """Where a benchmark takes place. A context manager."""

    def __init__(self) -> None:
        self.name = f"pwbench-{os.getpid()}"
        self.memory = Path(f"/run/{self.name}")
        """A folder on a tmpfs, as /run is."""
        self.disk = Path()
        """A folder on a disk, as /var/lib is."""
        self._namespaces: list[Namespace] = []
        self._count = 0

    def __enter__(self) -> Stage:
        if os.geteuid() != 0:
            raise BenchFailed("needs root, for network namespaces")
        _sweep()
        self.memory.mkdir(mode=0o700)
        self.disk = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir="/var/tmp"))
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in self._namespaces:
            os.close(namespace.fd)
        if self._namespaces:
            _ip([f"netns delete {each.name}" for each in self._namespaces], force=True)
        shutil.rmtree(self.memory, ignore_errors=True)
        shutil.rmtree(self.disk, ignore_errors=True)

    def node(self, name: str) -> Namespace:
        """A namespace that stands for a node: loopback and an uplink with the address 192.0.2.1, both up."""
        namespace = self._make([f"{self.name}-{name}"])[0]
        _ip(
            [
                "link set lo up",
                "link add uplink type veth peer name underlay",
                "address add 192.0.2.1/24 dev uplink",
                "link set uplink up",
                "link set underlay up",
            ],
            namespace.name,
        )
        return namespace

    def segment(self, name: str) -> tuple[Namespace, Namespace]:
        """Two nodes on one wire, with the addresses 192.0.2.1 and 192.0.2.2."""
        one, two = self._make([f"{self.name}-{name}-{number}" for number in (1, 2)])
        _ip([f"link add uplink type veth peer name uplink netns {two.name}"], one.name)
        for number, node in enumerate((one, two), 1):
            commands = ["link set lo up", f"address add 192.0.2.{number}/24 dev uplink", "link set uplink up"]
            _ip(commands, node.name)
        return one, two

    def ip(self, namespace: Namespace, commands: Sequence[str]) -> None:
        """Runs `ip` commands inside. Raises BenchFailed with what it says."""
        _ip(commands, namespace.name)

    def pods(self, count: int) -> list[Namespace]:
        """Empty namespaces."""
        first = self._count
        self._count += count
        return self._make([f"{self.name}-pod{number}" for number in range(first, first + count)])

    def _make(self, names: Sequence[str]) -> list[Namespace]:
        try:
            _ip([f"netns add {name}" for name in names])
        finally:
            made = [Namespace(name) for name in names if (_NETNS / name).exists()]
            self._namespaces += made
        return made


def _ip(commands: Sequence[str], namespace: str = "", *, force: bool = False) -> None:
    """One `ip` for all commands; with `force` it goes on after one that failed."""
    where = ["-netns", namespace] if namespace else []
    options = [*where, *(["-force"] if force else []), "-batch", "-"]
    done = subprocess.run(["ip", *options], input="\n".join(commands), capture_output=True, text=True, check=False)
    if done.returncode and not force:
        raise BenchFailed(f"ip: {done.stderr.strip()}")


def _sweep() -> None:
    """Removes what benchmarks that were killed have left."""
    names = [path.name for path in _NETNS.glob("pwbench-*") if _is_dead(path.name)] if _NETNS.exists() else []
    if names:
        _ip([f"netns delete {name}" for name in names], force=True)
    for folder in (Path("/run"), Path("/var/tmp")):
        for path in folder.glob("pwbench-*"):
            if _is_dead(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _is_dead(name: str) -> bool:
    found = _OURS.match(name)
    return found is not None and not Path(f"/proc/{found[1]}").exists()
