"""What the executable itself costs: a whole process, from exec to exit, against a daemon that answers at once.

    python bench/cni_exec.py [--runs 200]

Starts a grpcio server that answers with a fixed result, installs the executable into a temporary folder, and times ADD
with it, an interpreter that does nothing (the floor), and ADD with nobody listening (error 11). Runs alternate, so that
a busy machine is busy for all of them. Prints medians and the 90th percentile, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import grpc

from podwire.install import find_interpreter, install
from podwire.v1 import cni_pb2, cni_pb2_grpc

RESULT = b'{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.244.1.7/24","interface":0}]}'
CONFIGURATION = b'{"cniVersion":"1.0.0","name":"podwire","type":"podwire"}'
ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/none",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
}


class Instant(cni_pb2_grpc.CNIServicer):
    """Answers everything at once."""

    async def Call(  # noqa: N802 (the proto's name)
        self, request: cni_pb2.CallRequest, _context: grpc.aio.ServicerContext
    ) -> cni_pb2.CallResponse:
        return cni_pb2.CallResponse(api=request.api_max, stdout=RESULT)


def timed(command: list[str], exit_code: int) -> float:
    """Milliseconds from exec to exit. Raises RuntimeError when the process ends otherwise than it should."""
    started = time.perf_counter()
    done = subprocess.run(command, input=CONFIGURATION, env=ENVIRONMENT, capture_output=True, check=False)
    taken = (time.perf_counter() - started) * 1000
    if done.returncode != exit_code:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stdout!r} {done.stderr!r}")
    return taken


async def measure(folder: Path, runs: int) -> dict[str, list[float]]:
    """Milliseconds of every run, by what was run."""
    server = grpc.aio.server()
    cni_pb2_grpc.add_CNIServicer_to_server(Instant(), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{folder}/daemon.sock")
    await server.start()
    queue = folder / "queue"
    commands = {
        "interpreter, -IS -c pass": ([os.fspath(find_interpreter().path), "-IS", "-c", "pass"], 0),
        "ADD": ([os.fspath(install(folder / "bin", None, folder / "daemon.sock", queue))], 0),
        "ADD, nobody listening": (
            [os.fspath(install(folder / "down" / "bin", None, folder / "nobody.sock", queue))],
            1,
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for _ in range(runs):
            for name, (command, exit_code) in commands.items():
                taken[name].append(await asyncio.to_thread(timed, command, exit_code))
    finally:
        await server.stop(0)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CNI executable alone.")
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        taken = asyncio.run(measure(Path(folder), runs))
    for name, times in taken.items():
        p90 = statistics.quantiles(times, n=10)[-1]
        print(f"{name:26}  median {statistics.median(times):6.1f} ms   p90 {p90:6.1f} ms   ({len(times)} runs)")


if __name__ == "__main__":
    main()
