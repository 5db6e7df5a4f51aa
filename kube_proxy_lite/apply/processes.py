"""Programs that change the kernel's rules, run as processes, and known by their numbers afterwards."""

from __future__ import annotations

import asyncio
import os
from collections import deque

from kube_proxy_lite.render.interface import ApplyFailed

_REMEMBERED = 256
_WORDS = 2000


class ProgramRefused(ApplyFailed):
    """The program ran, and said no; the message has its words."""


class Processes:
    """Those that one applier starts."""

    def __init__(self) -> None:
        self._started: deque[int] = deque(maxlen=_REMEMBERED)

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here, of the last 256."""
        return pid in self._started

    async def run(self, *command: str, stdin: str = "", seconds: float = 30.0) -> str:
        """What it printed. It is killed when it takes longer, and when who waits is cancelled.

        Raises ApplyFailed, and of that ProgramRefused when the program ran and returned something else than 0.
        """
        pipe = asyncio.subprocess.PIPE
        words = os.environ | {"LC_ALL": "C"}  # messages are looked at, here and there
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=words)
        except OSError as error:
            raise ApplyFailed(f"{command[0]} cannot be run: {error.strerror}") from error
        self._started.append(process.pid)
        try:
            async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may lose a cancellation
                out, err = await process.communicate(stdin.encode())
        except TimeoutError as error:
            raise ApplyFailed(f"{' '.join(command)} gave no answer within {seconds:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            said = " ".join(err.decode(errors="replace").split())[:_WORDS] or f"ended with {process.returncode}"
            raise ProgramRefused(f"{' '.join(command)}: {said}")
        return out.decode(errors="replace")
