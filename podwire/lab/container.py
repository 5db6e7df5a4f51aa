"""A container of the lab: a process of this machine in its pod's network namespace.

    plan ─▶ process ─▶ running ─▶ probes ─▶ ended ─▶ restart policy ─▶ back-off ─▶ plan …
                                     └ liveness or startup failed: the process is ended, the pod keeps its address

What runs is decided anew for every start (program.py). The process is its own session and writes to a log file; the
log of the run before is kept beside it. What it ends with, and what its restart policy says, decides whether it is
started again, with a back-off that doubles from RESTART_SECONDS; kubelet's own starts at 10 s, which is long for
watching. When its first process ends, all of its session is ended, as in a process namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from podwire.lab.probes import Exec, Health, Probe, plan_probes
from podwire.lab.program import ConfigMissing, Program
from podwire.lab.state import MARK

RESTART_SECONDS = 1.0
_LONGEST_RESTART_SECONDS = 30.0
_LAST_SECONDS = 2.0  # between SIGTERM and SIGKILL where a preStop hook has used the grace up
_CONFIG_SECONDS = 0.5  # between looks for a ConfigMap that is not there

Report = Callable[[str, str, str], None]  # reason, message, Warning or Normal
WhyNot = Callable[[Probe, Mapping[str, str]], Awaitable[str]]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a container runs, and who is told. `enter` is the words before a command that runs in the pod.

    `changed` is called when the container's status is another; `why_not` makes a probe (probing.Prober).
    """

    enter: tuple[str, ...]
    log: Path
    lab: str
    grace_seconds: float
    changed: Callable[[], None]
    report: Report
    why_not: WhyNot


class Container:
    """One container of a pod. `policy` is its restart policy; `plan` says what to run and may raise ConfigMissing."""

    def __init__(self, spec: Mapping[str, Any], plan: Callable[[], Program], policy: str, place: Place) -> None:
        self.name = str(spec["name"])
        self.restarts = 0
        self.begun = False
        self.settled = asyncio.Event()  # set once it has started, or has ended for good
        self.state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        self._last: dict[str, Any] = {}
        self._image = str(spec.get("image", ""))
        self._probes, left_out = plan_probes(spec)
        self._plan = plan
        self._pre_stop: Mapping[str, Any] = (spec.get("lifecycle") or {}).get("preStop") or {}
        self._environment: Mapping[str, str] = {}
        self._policy = policy
        self._place = place
        self._health: Health | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._said: set[str] = set()
        for text in left_out:
            place.report("ProbeLeftOut", f"container {self.name}: {text}", "Warning")

    # --- running ------------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Runs it until its restart policy says that it has ended."""
        step = 0
        while True:
            program = await self._program()
            started = asyncio.get_running_loop().time()
            code = await self._run_once(program)
            if self._policy == "Never" or (self._policy == "OnFailure" and code == 0):
                self.settled.set()
                return
            self._last = self.state
            if asyncio.get_running_loop().time() - started > 10 * _LONGEST_RESTART_SECONDS:
                step = 0
            seconds = min(RESTART_SECONDS * 2 ** min(step, 10), _LONGEST_RESTART_SECONDS)
            message = f"back-off {seconds:.0f}s restarting container={self.name}"
            self._become({"waiting": {"reason": "CrashLoopBackOff", "message": message}})
            await asyncio.sleep(seconds)
            step += 1
            self.restarts += 1

    async def _program(self) -> Program:
        """What to run, as soon as all that it refers to is there."""
        while True:
            try:
                program = self._plan()
                break
            except ConfigMissing as error:
                self._say("Failed", f"Error: {error}")
                self._become({"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}})
            await asyncio.sleep(_CONFIG_SECONDS)
        for warning in program.warnings:
            self._say("ContainerChanged", f"container {self.name}: {warning}")
        return program

    async def _run_once(self, program: Program) -> int:
        started = now()
        try:
            child = await self._start(program)
        except OSError as error:  # no memory or no process to be had: as good as a crash
            failed = {"exitCode": 128, "reason": "StartError", "message": str(error)}
            self._become({"terminated": failed | {"startedAt": started, "finishedAt": now()}})
            return 128
        watching = None
        try:
            if child.returncode is None:
                self._health = Health(self._probes, asyncio.get_running_loop().time())
                self._become({"running": {"startedAt": started}})
                if self._probes:
                    watching = asyncio.create_task(self._watch(self._health, program))
            code = await child.wait()
        finally:
            if watching is not None:
                watching.cancel()
            self._health = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        ended = {"exitCode": code if code >= 0 else 128 - code, "reason": "Error" if code else "Completed"}
        self._become({"terminated": ended | {"startedAt": started, "finishedAt": now()}})
        return code

    async def _start(self, program: Program) -> asyncio.subprocess.Process:
        words, log = list(program.words), self._place.log
        with contextlib.suppress(FileNotFoundError):
            log.replace(previous_log(log))
        readable, writable = os.pipe() if program.echo else (-1, -1)
        if program.echo:
            words[-1] = json.dumps(json.loads(words[-1]) | {"ready": writable})
        try:
            with log.open("ab") as output:
                child = await asyncio.create_subprocess_exec(
                    *self._place.enter,
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=program.environment | {MARK: self._place.lab},
                    pass_fds=(writable,) if program.echo else (),
                    start_new_session=True,
                )
        finally:
            if program.echo:
                os.close(writable)
        self._child, self._environment = child, program.environment
        if program.echo:
            await _first_byte(readable)
        return child

    async def stop(self, seconds: float) -> None:
        """Ends its process: its preStop hook, SIGTERM, and SIGKILL for all of its session.

        SIGKILL comes `seconds` after the call, or _LAST_SECONDS after SIGTERM when the hook took longer.
        """
        child = self._child
        if child is None or child.returncode is not None:
            return
        deadline = asyncio.get_running_loop().time() + seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._before_stop(seconds)
        if self._pre_stop and seconds:
            seconds = max(_LAST_SECONDS, deadline - asyncio.get_running_loop().time())
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()

    async def _before_stop(self, seconds: float) -> None:
        """Does what `lifecycle.preStop` says, so that whoever still sends to a pod that ends has time to hear of it."""
        if sleep := self._pre_stop.get("sleep"):
            await asyncio.sleep(float(sleep.get("seconds") or 0))
        elif command := (self._pre_stop.get("exec") or {}).get("command"):
            hook = Probe(action=Exec(command=tuple(map(str, command))), timeout=seconds)
            why = await self._place.why_not(hook, self._environment)
            if why:
                self._place.report("FailedPreStopHook", f"container {self.name}: preStop: {why}", "Warning")
        elif self._pre_stop:
            self._say("FailedPreStopHook", f"container {self.name}: preStop is left out: the lab knows sleep and exec")

    # --- probes -------------------------------------------------------------------------------------------------

    async def _watch(self, health: Health, program: Program) -> None:
        """Makes the probes of one run until it ends, or ends it."""
        while kinds := health.kinds:
            tasks = [asyncio.create_task(self._repeat(kind, health, program)) for kind in kinds]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
            for task in done:
                task.result()
        if not health.failed:  # there was a startup probe, and nothing to look at after it
            return
        message = f"Container {self.name} failed {health.failed} probe, will be restarted"
        self._place.report("Killing", message, "Normal")
        await self.stop(self._place.grace_seconds)

    async def _repeat(self, kind: str, health: Health, program: Program) -> None:
        """Makes one kind of probe for as long as it is to be made."""
        clock, probe = asyncio.get_running_loop().time, self._probes[kind]
        while kind in health.kinds:
            await asyncio.sleep(health.due_at(kind) - clock())
            why = await self._place.why_not(probe, program.environment)
            if why:
                self._place.report("Unhealthy", f"{kind.capitalize()} probe failed: {why}", "Warning")
            if health.record(kind, not why, clock()):
                self._publish()

    # --- what it looks like -------------------------------------------------------------------------------------

    def _become(self, state: dict[str, Any]) -> None:
        if state == self.state:
            return
        self.state = state
        self.begun = self.begun or "waiting" not in state
        self._publish()

    def _publish(self) -> None:
        if self.started:
            self.settled.set()
        self._place.changed()

    def _say(self, reason: str, message: str) -> None:
        """Reports a warning, once."""
        if message not in self._said:
            self._said.add(message)
            self._place.report(reason, message, "Warning")

    @property
    def started(self) -> bool:
        """Whether it runs and its startup probe has passed."""
        return "running" in self.state and self._health is not None and self._health.started

    @property
    def ready(self) -> bool:
        """Whether it is ready to serve: it runs, and its probes say so."""
        return self.started and self._health is not None and self._health.ready

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
            "started": self.started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self._last,
        }


def previous_log(log: Path) -> Path:
    """Where the log of the run before is kept."""
    return log.with_suffix(".previous.log")


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
