"""For the tests of installing: a node's folders, the executable on either runtime, a daemon that can be made to wait.

A node's folder is not pytest's own: a shebang is short (127 bytes) and pytest's names are long.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Literal

import grpc
import pytest

from podwire.install import NETWORK, install
from podwire.install.removal import PATIENCE, Removal, uninstall
from podwire.v1 import cni_pb2, cni_pb2_grpc

SECONDS = 90.0  # by then what is waited for has happened, or never will
VERSION_ANSWER = b'{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}\n'
CONFIGURATION = b'{"cniVersion":"1.0.0","name":"podwire","type":"podwire"}'
RESULT = b'{"cniVersion":"1.0.0"}\n'
VARIABLES = {
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/a",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
}

RuntimeName = Literal["relocatable", "system"]
RUNTIMES = [
    pytest.param(
        "relocatable", marks=pytest.mark.skipif(not shutil.which("patchelf"), reason="needs patchelf (apt install)")
    ),
    "system",
]


class Daemon(cni_pb2_grpc.CNIServicer):
    """Answers at once; while `hung` is set it holds the calls, and `called` says that there is one. Where it `fails`, a
    call that was held gets an error."""

    def __init__(self) -> None:
        self.hung = self.fails = False
        self.called = threading.Event()
        self.released = threading.Event()

    def Call(self, _request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:  # noqa: N802
        if self.hung:
            context.add_callback(self.released.set)
            self.called.set()
            self.released.wait(SECONDS)
            if self.fails:
                context.abort(grpc.StatusCode.UNAVAILABLE, "it ends")
        return cni_pb2.CallResponse(api=1, stdout=RESULT)


class Node:
    """A node's folders. `seen_as` is where the node's own mount namespace has `folder`; None for the same place."""

    def __init__(self, folder: Path, runtime: RuntimeName = "system", seen_as: Path | None = None) -> None:
        self.folder = folder
        self.runtime: RuntimeName = runtime
        self.seen = seen_as or folder
        self.bin_dir = folder / "opt/cni/bin"
        self.conf_dir = folder / "etc/cni/net.d"
        self.queue = folder / "var/lib/podwire/del-queue"
        self.socket = folder / "run/podwire/ipamd.sock"
        self.socket.parent.mkdir(parents=True)

    def install(
        self,
        *,
        runtime: RuntimeName | None = None,
        network: str = NETWORK,
        seconds: float = SECONDS,
        grace: float | None = None,
    ) -> Path:
        """Installs; `seconds` is the deadline of each command."""
        return install(
            self.bin_dir,
            self.conf_dir,
            self._seen(self.socket),
            self._seen(self.queue),
            network,
            deadlines=dict.fromkeys(("ADD", "DEL", "CHECK", "GC", "STATUS"), seconds),
            runtime=runtime or self.runtime,
            host_cni_bin_dir=None if self.seen == self.folder else self._seen(self.bin_dir),
            grace=grace,
        )

    def uninstall(self, *, network: str = NETWORK, force: bool = False, patience: float = PATIENCE) -> Removal:
        """Uninstalls what `install` has laid down."""
        return uninstall(self.bin_dir, self.conf_dir, self.queue, network, force=force, patience=patience)

    def call(
        self, command: str, stdin: bytes = CONFIGURATION, variables: Mapping[str, str] = VARIABLES
    ) -> subprocess.CompletedProcess[bytes]:
        """One call, as a runtime makes it."""
        environment = {**variables, "CNI_COMMAND": command}
        return subprocess.run(
            [self.bin_dir / "podwire"], env=environment, input=stdin, capture_output=True, timeout=SECONDS, check=False
        )

    @contextlib.contextmanager
    def calling(self, command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A call that is under way, with its configuration sent; it has ended after the block."""
        executable = self.bin_dir / "podwire"
        environment = {**VARIABLES, "CNI_COMMAND": command}
        pipe = subprocess.PIPE
        with subprocess.Popen([executable], env=environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            assert process.stdin is not None
            process.stdin.write(CONFIGURATION)
            process.stdin.close()
            process.stdin = None
            try:
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def calling_daemon(self, command: str, daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
        """As `calling`; the call has reached `daemon`. Where its deadline was over before, another one has."""
        reached = False
        while not reached:
            with self.calling(command) as call:
                while not (reached := daemon.called.wait(0.01)) and call.poll() is None:
                    pass
                if reached:
                    yield call

    @contextlib.contextmanager
    def daemon(self) -> Iterator[Daemon]:
        """The daemon at the node's socket."""
        daemon = Daemon()
        pool = futures.ThreadPoolExecutor(32)
        server = grpc.server(pool)
        cni_pb2_grpc.add_CNIServicer_to_server(daemon, server)  # type: ignore[no-untyped-call]
        server.add_insecure_port(f"unix:{self.socket}")
        server.start()
        try:
            yield daemon
        finally:
            daemon.released.set()
            server.stop(0).wait(SECONDS)
            pool.shutdown()

    def versions(self) -> list[str]:
        """The names beside the executable's folder that are the versions', without the digits of their content."""
        folder = self.folder / "opt/cni/podwire"
        return sorted(path.name.rpartition("-")[0] for path in folder.iterdir()) if folder.exists() else []

    def files(self) -> list[str]:
        """All files and empty folders of the node."""
        found = (path for path in self.folder.rglob("*") if not path.is_dir() or not any(path.iterdir()))
        return sorted(str(path.relative_to(self.folder)) for path in found)

    def _seen(self, path: Path) -> Path:
        return self.seen / path.relative_to(self.folder)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short name, which is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="pw-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def wait_until(condition: object, what: str) -> None:
    """Waits until the callable `condition` is true; fails when it does not become so."""
    assert callable(condition)
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)
