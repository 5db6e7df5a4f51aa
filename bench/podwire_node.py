"""A node that runs Podwire: real etcd, the real daemon as an operator would configure it, the executable as installed.

The daemon has its defaults but for what a second one on the machine must not share: its folders. Its state is in memory
and on disk as on a real node (/run, /var/lib).
"""

from __future__ import annotations

import contextlib
import http.client
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml

from bench.contender import Contender
from bench.process import BenchFailed, cpu_of
from bench.stage import Namespace, Stage
from podwire.install import install
from podwire.lab.etcd import EtcdServer

_HTTP = ("127.0.0.1", 9817)
_READY_WITHIN = 30.0  # seconds
_STOPPED_WITHIN = 10.0
_PHASE = re.compile(r'^podwire_cni_seconds_sum\{command="(\w+)",phase="(\w+)"\} (\S+)$', re.MULTILINE)


class Memory(dict[str, float]):
    """VmRSS, VmHWM and Pss of a process in MB (10⁶ bytes)."""


class PodwireNode:
    """A daemon that is ready."""

    def __init__(
        self, namespace: Namespace, process: subprocess.Popen[bytes], executable: Path, etcd: EtcdServer, socket: Path
    ) -> None:
        self.contender = Contender("Podwire", namespace, executable, {"type": "podwire", "last": True})
        self.etcd = etcd
        self.socket = socket
        """Where the daemon listens."""
        self.began = 0.0
        """CLOCK_MONOTONIC before the daemon's exec, in seconds."""
        self.namespace = namespace
        self._process = process

    def phases(self) -> dict[tuple[str, str], float]:
        """Seconds spent so far by (command, phase): the sums of the histogram podwire_cni_seconds."""
        return parse_phases(self.get("/metrics")[1])

    def cpu_seconds(self) -> float:
        """How long the daemon's threads have been on a CPU so far."""
        return cpu_of(self._process.pid)

    def memory(self) -> Memory:
        """The daemon's memory now."""
        return memory_of(self._process.pid)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of the daemon's HTTP answer. Raises OSError while it does not listen."""
        connection = http.client.HTTPConnection(*_HTTP, timeout=5)
        with self.namespace.entered(), contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def wait_ready(self, log: Path) -> None:
        """Returns when the daemon can serve an ADD. Raises BenchFailed with the end of its log."""
        deadline = time.monotonic() + _READY_WITHIN
        said = ""
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                status, said = self.get("/readyz")
                if status == 200:
                    return
            time.sleep(0.05)
        raise BenchFailed(f"the daemon is not ready: {said}{log.read_text(errors='replace')[-1500:]}")


def memory_of(pid: int) -> Memory:
    """A process's memory now."""
    proc = Path(f"/proc/{pid}")
    text = (proc / "status").read_text() + (proc / "smaps_rollup").read_text()
    found = dict(re.findall(r"^(VmRSS|VmHWM|Pss):\s+(\d+) kB$", text, re.MULTILINE))
    return Memory({name: int(kilobytes) * 1024 / 1e6 for name, kilobytes in found.items()})


def parse_phases(exposition: str) -> dict[tuple[str, str], float]:
    """The sums of podwire_cni_seconds in a Prometheus exposition, by (command, phase)."""
    return {(command, phase): float(value) for command, phase, value in _PHASE.findall(exposition)}


def spent(
    before: Mapping[tuple[str, str], float], after: Mapping[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    """What was added between two readings."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


@contextlib.contextmanager
def podwire_node(stage: Stage, name: str, **changes: object) -> Iterator[PodwireNode]:
    """A node on its own etcd; `name` is its namespace's, and different for every node of a stage. `changes` are
    settings of the daemon that are not its defaults."""
    with prepared_node(stage, name, lambda _namespace, _etcd: None, changes) as node:
        yield node


@contextlib.contextmanager
def prepared_node(
    stage: Stage, name: str, prepare: Callable[[Namespace, EtcdServer], None], changes: Mapping[str, object]
) -> Iterator[PodwireNode]:
    """The same, with something done to etcd before the daemon starts."""
    namespace = stage.node(name)
    with etcd_on(stage, namespace, name) as etcd:
        prepare(namespace, etcd)
        with daemon_on(stage, namespace, name, etcd, changes) as node:
            yield node


@contextlib.contextmanager
def etcd_on(stage: Stage, namespace: Namespace, name: str, address: str = "127.0.0.1") -> Iterator[EtcdServer]:
    """An etcd on a node, reached at `address`."""
    entering = ("ip", "netns", "exec", namespace.name)
    folder = stage.disk / f"{name}-etcd"
    folder.mkdir()
    with EtcdServer(
        folder, address=address, client_port=2379, peer_port=2380, prefix=entering, dies_with_parent=True
    ) as etcd:
        yield etcd


@contextlib.contextmanager
def daemon_on(
    stage: Stage, namespace: Namespace, name: str, etcd: EtcdServer, changes: Mapping[str, object]
) -> Iterator[PodwireNode]:
    """A daemon on a node that has an etcd, here or elsewhere."""
    memory, disk = stage.memory / name, stage.disk / name
    memory.mkdir()
    disk.mkdir()
    settings = {
        "node": name,
        "nodeAddresses": ["192.0.2.1"],
        "etcd": {"endpoints": [etcd.endpoint]},
        "pools": [{"cidr": "10.244.0.0/16"}],
        "runDir": str(memory / "run"),
        "stateDir": str(disk / "state"),
        **changes,
    }
    (disk / "ipamd.yaml").write_text(yaml.safe_dump(settings))
    executable = install(disk / "bin", None, memory / "run" / "ipamd.sock", disk / "state" / "del-queue")
    entering = ("ip", "netns", "exec", namespace.name, "setpriv", "--pdeathsig", "KILL", "--")
    command = (*entering, sys.executable, "-m", "ipam_daemon.main", "--config", str(disk / "ipamd.yaml"))
    log_path = disk / "ipamd.log"
    with log_path.open("wb") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            node = PodwireNode(namespace, process, executable, etcd, memory / "run" / "ipamd.sock")
            node.began = began
            node.wait_ready(log_path)
            yield node
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that was started here."""
    process.terminate()
    try:
        process.wait(_STOPPED_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
