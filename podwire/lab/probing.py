"""Making probes as a kubelet does: from the node's network, over the real wire, to the pod's own address.

    one thread: enter the node's namespace ─▶ open a socket ─▶ leave        (0.1 ms)
    event loop:                                   connect, GET, read the status ─▶ why it failed, or nothing

A socket belongs for life to the namespace that it was opened in, so no process and no thread waits with a probe:
hundreds of them cost the event loop some sockets. Only an exec probe is a process, in the pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from podwire import netns
from podwire.errors import PodwireError
from podwire.lab.probes import Action, Exec, HttpGet, Probe, TcpSocket

_LONGEST_HEAD = 10 * 1024


class SocketOpener:
    """Opens sockets in network namespaces, on a thread of its own that does nothing else."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sockets")

    async def open(self, path: Path, family: socket.AddressFamily) -> socket.socket:
        """A non-blocking TCP socket of the namespace at `path`. Raises NetnsError."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, _open, path, family)


def _open(path: Path, family: socket.AddressFamily) -> socket.socket:
    descriptor = netns.open_netns(str(path))
    try:
        with netns.inside(descriptor):
            opened = socket.socket(family, socket.SOCK_STREAM)
    finally:
        os.close(descriptor)
    opened.setblocking(False)
    return opened


class Prober:
    """Probes one pod. `node` is the node's namespace, `enter` the words before a command that runs in the pod."""

    def __init__(
        self, opener: SocketOpener, node: Path, address: str, enter: Sequence[str], mark: Mapping[str, str]
    ) -> None:
        self._opener = opener
        self._node = node
        self._address = address
        self._enter = tuple(enter)
        self._mark = dict(mark)

    async def why_not(self, probe: Probe, environment: Mapping[str, str]) -> str:
        """Makes the probe once. Returns why it failed, empty when it succeeded. `environment` is for a command."""
        try:
            async with asyncio.timeout(probe.timeout):
                return await self._attempt(probe.action, environment)
        except TimeoutError:
            return f"no answer within {probe.timeout:g} s"
        except (OSError, ssl.SSLError, PodwireError, ValueError) as error:
            return str(error) or type(error).__name__

    async def _attempt(self, action: Action, environment: Mapping[str, str]) -> str:
        if isinstance(action, Exec):
            return await self._execute(action, environment)
        connected = await self._connect(action)
        if isinstance(action, TcpSocket):
            connected.close()
            return ""
        return await self._get(action, connected)

    async def _connect(self, action: HttpGet | TcpSocket) -> socket.socket:
        loop = asyncio.get_running_loop()
        host = action.host or self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        opened = await self._opener.open(self._node, family)
        try:
            await loop.sock_connect(opened, (host, action.port))
        except OSError as error:
            opened.close()
            why = os.strerror(error.errno).lower() if error.errno else str(error)
            raise OSError(f"dial tcp {host}:{action.port}: {why}") from error
        except asyncio.CancelledError:
            opened.close()
            raise
        return opened

    async def _get(self, action: HttpGet, connected: socket.socket) -> str:
        context = _unverified() if action.tls else None
        reader, writer = await asyncio.open_connection(
            sock=connected, ssl=context, server_hostname="" if context else None, limit=_LONGEST_HEAD
        )
        try:
            writer.write(request(action, self._address))
            status = (await reader.readline()).decode("latin-1").split(" ", 2)
        finally:
            writer.close()
        if len(status) < 2 or not status[1].isdigit():
            return "HTTP probe failed: the answer is not HTTP"
        return "" if 200 <= int(status[1]) < 400 else f"HTTP probe failed with statuscode: {status[1].strip()}"

    async def _execute(self, action: Exec, environment: Mapping[str, str]) -> str:
        child = await asyncio.create_subprocess_exec(
            *self._enter,
            *action.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**environment, **self._mark},
            start_new_session=True,
        )
        try:
            said, _ = await child.communicate()
        finally:
            if child.returncode is None:  # too slow: it and what it started go
                with contextlib.suppress(ProcessLookupError):  # ended meanwhile; what ended the wait is not to be lost
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        return (
            said.decode(errors="replace").strip()[-500:] or f"exit code {child.returncode}" if child.returncode else ""
        )


def request(action: HttpGet, address: str) -> bytes:
    """The whole of a probe's request."""
    host = action.host or address
    headers = {"host": f"[{host}]:{action.port}" if ":" in host else f"{host}:{action.port}"}
    headers |= {"user-agent": "kube-probe/1.31", "accept": "*/*"}
    headers |= {name.lower(): value for name, value in action.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"GET {action.path} HTTP/1.1\r\n{head}connection: close\r\n\r\n".encode()


def _unverified() -> ssl.SSLContext:
    """TLS as kubelet's probes do it: whoever answers, answers."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
