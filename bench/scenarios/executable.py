"""The executable alone: a whole process, from exec to exit, against a daemon that answers at once.

Beside it stand the floors that it cannot get under, a process that does nothing and an interpreter that does nothing,
and what it costs when nobody listens (error 11).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.contender import cni_environment
from bench.process import BenchFailed
from bench.process import run as run_process
from bench.report import Report, Table, milliseconds
from bench.stage import Stage
from bench.statistic import median, percentile
from podwire.install import find_interpreter, install

_CONFIGURATION = b'{"cniVersion":"1.0.0","name":"podwire","type":"podwire"}'
_WARM_UP = 3
_START = 10.0  # seconds


def run(stage: Stage, rounds: int) -> Report:
    """Every command, alternately, `rounds` times."""
    folder, down = stage.memory / "executable", stage.memory / "executable-down"
    folder.mkdir()
    path = folder / "daemon.sock"
    python = os.fspath(find_interpreter().path)
    executable = install(folder / "bin", None, path, folder / "queue")
    commands = {
        "a process that does nothing (/bin/true)": (["/bin/true"], 0),
        "an interpreter that does nothing (python3 -IS -c pass)": ([python, "-IS", "-c", "pass"], 0),
        "ADD, answered at once": ([str(executable)], 0),
        "ADD, nobody listens": ([str(install(down / "bin", None, folder / "nobody.sock", folder / "queue"))], 1),
    }
    environment = cni_environment("ADD", Path("/run/netns/none"), "c0ffee", executable.parent)
    taken: dict[str, list[float]] = {name: [] for name in commands}
    with _instant_daemon(path):
        for number in range(-_WARM_UP, rounds):
            for name, (command, exit_code) in commands.items():
                finished = run_process(command, environment, _CONFIGURATION)
                if finished.exit_code != exit_code:
                    raise BenchFailed(
                        f"{name} ended with {finished.exit_code}: {finished.stdout!r} {finished.stderr!r}"
                    )
                if number >= 0:
                    taken[name].append(finished.seconds)
    rows = tuple((name, milliseconds(median(each)), milliseconds(percentile(each, 90))) for name, each in taken.items())
    table = Table(
        title=f"The executable alone, whole process, ms ({rounds} runs each)", columns=("", "median", "p90"), rows=rows
    )
    return Report(tables=(table,), samples=taken)


@contextlib.contextmanager
def _instant_daemon(path: Path) -> Iterator[None]:
    command = ("setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "bench.instant_daemon", str(path))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START
        while not _listens(path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed("the instant daemon does not listen")
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(os.fspath(path)) == 0
