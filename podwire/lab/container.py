"""A container of the lab: a process of this machine in its pod's network namespace.

What runs is decided by `plan_program` (pure): the container's `command`, when this machine has that program; else,
since there are no images, the echo server on its ports; with no ports either, something that sleeps. The process is
its own session and writes to a log file. What it ends with, and what its restart policy says, decides whether it is
started again, with a back-off that doubles from RESTART_SECONDS; kubelet's own starts at 10 s, which is long for
watching.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from podwire.lab import echo
from podwire.lab.state import MARK

RESTART_SECONDS = 1.0
_LONGEST_RESTART_SECONDS = 30.0
_ECHO = Path(echo.__file__)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Program(msgspec.Struct, frozen=True):
    """What runs in a container. `echo` says that it is the echo server, whose last word then is its configuration."""

    words: tuple[str, ...]
    environment: dict[str, str]
    echo: bool = False
    warnings: tuple[str, ...] = ()


def plan_program(
    pod: Mapping[str, Any],
    container: Mapping[str, Any],
    addresses: Sequence[str],
    find: Callable[[str], str | None] = lambda program: shutil.which(program, path=_PATH),
) -> Program:
    """What runs in `container` of `pod`; `find` tells where a program of this machine is."""
    environment = container_environment(pod, container, addresses)
    command = [expand(word, environment) for word in container.get("command") or ()]
    warnings = []
    if command:
        program = find(command[0])
        if program is not None:
            arguments = [expand(word, environment) for word in container.get("args") or ()]
            return Program((program, *command[1:], *arguments), environment)
        warnings.append(f"{command[0]!r} is not a program of this machine: the echo server takes its place")
    ports = []
    for port in container.get("ports") or ():
        if port.get("protocol", "TCP") in ("TCP", "UDP"):
            ports.append([port.get("protocol", "TCP"), port["containerPort"]])
        else:
            warnings.append(f"port {port['containerPort']}: the echo server does not speak {port['protocol']}")
    if not ports:
        return Program(("/bin/sleep", "infinity"), environment, warnings=tuple(warnings))
    who = {
        "pod": pod["metadata"]["name"],
        "namespace": pod["metadata"]["namespace"],
        "node": pod["spec"].get("nodeName", ""),
        "container": container["name"],
        "ports": ports,
    }
    python = str(getattr(sys, "_base_executable", sys.executable))
    return Program((python, "-IS", str(_ECHO), json.dumps(who)), environment, echo=True, warnings=tuple(warnings))


def container_environment(
    pod: Mapping[str, Any], container: Mapping[str, Any], addresses: Sequence[str]
) -> dict[str, str]:
    """The container's environment: literal values, and the fields of the downward API that a lab's pod has."""
    address = addresses[0] if addresses else ""
    fields = {
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": pod["metadata"]["namespace"],
        "metadata.uid": pod["metadata"].get("uid", ""),
        "spec.nodeName": pod["spec"].get("nodeName", ""),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": address,
        "status.podIPs": ",".join(addresses),
        "status.hostIP": pod.get("status", {}).get("hostIP", ""),
    }
    environment = {"PATH": _PATH, "HOME": "/root", "HOSTNAME": pod["metadata"]["name"]}
    for variable in container.get("env") or ():
        field = ((variable.get("valueFrom") or {}).get("fieldRef") or {}).get("fieldPath")
        if field in fields:
            environment[variable["name"]] = fields[field]
        elif "value" in variable:
            environment[variable["name"]] = expand(str(variable["value"]), environment)
    return environment


def expand(word: str, environment: Mapping[str, str]) -> str:
    """Replaces `$(NAME)` as kubelet does: unknown names stay, `$$` is one `$`."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", value, word)


# --- running ----------------------------------------------------------------------------------------------------


class Container:
    """One container of a pod, started again as its pod's restart policy says. `changed` is called when its status is.

    `enter` is the words before a command that runs in the pod.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        program: Program,
        enter: Sequence[str],
        log: Path,
        policy: str,
        lab: str,
        changed: Callable[[], None],
    ) -> None:
        self.name = str(spec["name"])
        self.restarts = 0
        self.ready = False
        self.begun = False
        self.state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        self._last: dict[str, Any] = {}
        self._image = str(spec.get("image", ""))
        self._program = program
        self._enter = tuple(enter)
        self._log = log
        self._policy = policy
        self._lab = lab
        self._changed = changed
        self._child: asyncio.subprocess.Process | None = None

    async def keep(self) -> None:
        """Runs it until its restart policy says that it has ended."""
        while True:
            started = asyncio.get_running_loop().time()
            code = await self._run_once()
            if self._policy == "Never" or (self._policy == "OnFailure" and code == 0):
                return
            self._last = self.state
            if asyncio.get_running_loop().time() - started > 10 * _LONGEST_RESTART_SECONDS:
                self.restarts = 0
            seconds = min(RESTART_SECONDS * 2 ** min(self.restarts, 10), _LONGEST_RESTART_SECONDS)
            message = f"back-off {seconds:.0f}s restarting container={self.name}"
            self._become({"waiting": {"reason": "CrashLoopBackOff", "message": message}})
            await asyncio.sleep(seconds)
            self.restarts += 1

    async def _run_once(self) -> int:
        started = now()
        words = list(self._program.words)
        readable, writable = os.pipe() if self._program.echo else (-1, -1)
        if self._program.echo:
            words[-1] = json.dumps(json.loads(words[-1]) | {"ready": writable})
        try:
            with self._log.open("ab") as log:
                self._child = await asyncio.create_subprocess_exec(
                    *self._enter,
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._program.environment | {MARK: self._lab},
                    pass_fds=(writable,) if self._program.echo else (),
                    start_new_session=True,
                )
        finally:
            if self._program.echo:
                os.close(writable)
        if self._program.echo:
            await _first_byte(readable)
        if self._child.returncode is None:
            self._become({"running": {"startedAt": started}}, ready=True)
        code = await self._child.wait()
        ended = {"exitCode": code if code >= 0 else 128 - code, "reason": "Error" if code else "Completed"}
        self._become({"terminated": ended | {"startedAt": started, "finishedAt": now()}})
        return code

    def _become(self, state: dict[str, Any], ready: bool = False) -> None:
        self.state, self.ready = state, ready
        self.begun = self.begun or "waiting" not in state
        self._changed()

    async def stop(self, seconds: float) -> None:
        """Ends its process: SIGTERM, and SIGKILL for all of its session when it is still there after `seconds`."""
        child = self._child
        if child is None or child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()

    @property
    def ended(self) -> int | None:
        """The exit code, when it has ended and is not started again."""
        code = self.state.get("terminated", {}).get("exitCode")
        return None if code is None else int(code)

    def status(self) -> dict[str, Any]:
        """Its `containerStatuses` entry."""
        return {
            "name": self.name,
            "image": self._image,
            "imageID": "",
            "ready": self.ready,
            "started": "running" in self.state,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self._last,
        }


async def _first_byte(descriptor: int) -> None:
    """Waits until something is written to the pipe, or its other end is closed; closes it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
