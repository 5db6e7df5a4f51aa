"""What a number was measured on: without it a number means nothing to anybody else."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from bench.process import BenchFailed
from bench.reference import plugins
from podwire.install import find_interpreter


def describe() -> dict[str, str]:
    """Kernel, processor and versions, by name."""
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    processor = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    try:
        reference = _package("containernetworking-plugins") or f"of {plugins()}"
    except BenchFailed:
        reference = "not installed"
    return {
        "kernel": f"{platform.release()} {platform.machine()}",
        "processor": f"{processor[1] if processor else 'unknown'}, {os.cpu_count()} cores",
        "memory": f"{int(memory[1]) * 1024 / 1e9:.0f} GB" if memory else "unknown",
        "system": _system(),
        "Python of the daemon": platform.python_version(),
        "Python of the executable": _first_line(str(find_interpreter().path), "--version").removeprefix("Python "),
        "libraries": ", ".join(f"{name} {version(name)}" for name in ("grpcio", "protobuf", "pyroute2", "msgspec")),
        "etcd": _first_line("etcd", "--version").removeprefix("etcd Version: "),
        "reference plugins": f"containernetworking-plugins {reference}",
        "TCP": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "iptables": _first_line("iptables", "--version").removeprefix("iptables "),
        "load before the run": f"{os.getloadavg()[0]:.2f} (one minute), {os.getloadavg()[1]:.2f} (five)",
    }


def _system() -> str:
    found = re.search(r'^PRETTY_NAME="(.*)"$', Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def _package(name: str) -> str:
    return _first_line("dpkg-query", "--show", "--showformat=${Version}", name)


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
