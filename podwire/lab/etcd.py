"""etcd processes of our own: for the lab, where it is the cluster's store, and for tests.

Debian's etcd (3.4) is run as it is, on addresses and ports that are given or chosen, in a network namespace if the
command prefix enters one. It serves when its log says so: the log is a file that can be read from anywhere, while a
health request would have to be made inside the namespace. From exec to serving takes 0.3 s, nearly all of it the
election of a single member, which is why the election timeout is short.

A child can be made to die with its parent (`setpriv --pdeathsig`: one more exec, no code of ours after the fork). The
kernel then ends it when the *thread* that started it ends; a lab whose clusters outlive the command leaves it off.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from podwire.errors import PodwireError

START_S = 90.0
STOP_S = 5.0
_SERVING = b"serving client traffic"  # 3.4 to 3.6, with and without TLS
_PORT_TAKEN = b"address already in use"


class EtcdFailed(PodwireError):
    """etcd could not be started; the message ends with the last of its log."""


class EtcdServer:
    """One member. `start` again after `stop` or `kill` finds the same data on the same ports.

    address      bare, of either family; clients and peers reach it there
    client_port  0 chooses a free one of this process' network namespace at the first start
    prefix       put before the command, such as ("ip", "netns", "exec", "pw-lab-etcd")
    members      name → peer URL of every member, this one included; empty for a cluster of one
    options      further etcd options
    tls          clients, peer_tls other members, are to use https; the certificates are in the options
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "etcd",
        address: str = "127.0.0.1",
        client_port: int = 0,
        peer_port: int = 0,
        prefix: Sequence[str] = (),
        members: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        tls: bool = False,
        peer_tls: bool = False,
        dies_with_parent: bool = False,
    ) -> None:
        self.folder = folder
        self.name = name
        self.client_port = client_port
        self.peer_port = peer_port
        self._address = address
        self._prefix = tuple(prefix)
        self._members = dict(members or {})
        self._options = tuple(options)
        self._scheme = "https" if tls else "http"
        self._peer_scheme = "https" if peer_tls else "http"
        self._dies_with_parent = dies_with_parent
        self._choose = client_port == 0 or peer_port == 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def endpoint(self) -> str:
        """The URL for clients; known after the first start when the port is chosen."""
        return self._url(self._scheme, self.client_port)

    @property
    def log(self) -> Path:
        """Where etcd's output is appended, one JSON object a line."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """The process, or None when none was started or it has ended."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, *, wait: bool = True) -> None:
        """Starts etcd and, if `wait`, returns when it serves. Members of a cluster serve once most are started.

        Raises EtcdFailed. A chosen port that someone else took in the meantime is chosen again.
        """
        if self.pid is not None:
            return
        for attempts_left in (2, 1, 0):
            if self._choose:
                self.client_port, self.peer_port = _free_ports(self._address, 2)
            self._spawn()
            if not wait:
                break
            try:
                self.wait_serving()
                break
            except EtcdFailed:
                if not (self._choose and attempts_left and _PORT_TAKEN in self._new_log()):
                    raise
        self._choose = False

    def wait_serving(self, within: float = START_S) -> None:
        """Returns when this member takes requests. Raises EtcdFailed, and leaves no process behind."""
        deadline = time.monotonic() + within
        while _SERVING not in self._new_log():
            if self.pid is None or time.monotonic() > deadline:
                what = "ended" if self.pid is None else f"did not serve within {within:.0f} s"
                self.kill()
                tail = self._new_log()[-800:].decode(errors="replace").strip()
                raise EtcdFailed(f"etcd {self.name} {what}: {tail}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends etcd in an orderly way, by force after STOP_S. Data and ports stay."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends etcd as a power cut would. Data and ports stay."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """The process stands still: connections stay, and nothing is answered."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a pause."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Forgets the data of a stopped etcd: the next start is a new cluster."""
        shutil.rmtree(self._data, ignore_errors=True)

    def save(self, to: Path) -> None:
        """Copies the data of a stopped etcd, as a backup, to a folder that is not there yet."""
        shutil.copytree(self._data, to)

    def restore(self, backup: Path) -> None:
        """Puts the data of a `save` in the place of a stopped etcd's own."""
        self.wipe()
        shutil.copytree(backup, self._data)

    def __enter__(self) -> EtcdServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _data(self) -> Path:
        return self.folder / f"{self.name}.data"

    def _url(self, scheme: str, port: int) -> str:
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"{scheme}://{host}:{port}"

    def command(self) -> tuple[str, ...]:
        """What is executed."""
        peer = self._url(self._peer_scheme, self.peer_port)
        members = self._members or {self.name: peer}
        dying = ("setpriv", "--pdeathsig", "KILL", "--") if self._dies_with_parent else ()
        return (
            *self._prefix,
            *dying,
            *("etcd", "--name", self.name, "--data-dir", str(self._data)),
            *("--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", ",".join(f"{name}={url}" for name, url in members.items())),
            *("--auto-compaction-retention", "0", "--heartbeat-interval", "50", "--election-timeout", "500"),
            *("--logger", "zap", "--log-outputs", "stderr"),
            *self._options,
        )

    def _spawn(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except FileNotFoundError as error:
                raise EtcdFailed(f"{error.filename} is not installed (Debian: apt install etcd-server)") from error

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(how)  # does nothing to a process that has ended
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None

    def _new_log(self) -> bytes:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read()


class EtcdCluster:
    """Members on loopback that form one cluster, each a server that may be stopped, killed and paused by itself.

    `options`, `tls` and `dies_with_parent` as for EtcdServer. Members are known to each other by ports that are chosen
    at once; one that someone else takes before the start shows as EtcdFailed.
    """

    def __init__(
        self, folder: Path, *, size: int = 3, options: Sequence[str] = (), tls: bool = False,
        dies_with_parent: bool = False,
    ) -> None:  # fmt: skip
        ports = _free_ports("127.0.0.1", 2 * size)
        names = [f"etcd{number}" for number in range(1, size + 1)]
        members = {name: f"http://127.0.0.1:{port}" for name, port in zip(names, ports[:size], strict=True)}
        self.members = tuple(
            EtcdServer(
                folder,
                name=name,
                client_port=ports[size + index],
                peer_port=ports[index],
                members=members,
                options=options,
                tls=tls,
                dies_with_parent=dies_with_parent,
            )
            for index, name in enumerate(names)
        )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs of all members."""
        return tuple(member.endpoint for member in self.members)

    def start(self) -> None:
        """Starts the members that do not run; returns when all serve. Raises EtcdFailed."""
        for member in self.members:
            member.start(wait=False)
        for member in self.members:
            member.wait_serving()

    def stop(self) -> None:
        """Ends every member. Most lose their quorum on the way down, and are killed rather than asked."""
        for member in self.members:
            member.kill()

    def __enter__(self) -> EtcdCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _free_ports(address: str, count: int) -> list[int]:
    """Ports of `address` that nobody listens on, all different."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]
