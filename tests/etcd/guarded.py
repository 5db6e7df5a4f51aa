"""An etcd that knows users and roles, set up with etcdctl as an administrator does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from podwire.lab.etcd import EtcdServer


class Guarded:
    """A server that knows users. `etcdctl` and `recipe` speak to it as root."""

    def __init__(self, server: EtcdServer, *certificates: str) -> None:
        self.server = server
        self._environment = {
            **os.environ,
            "ETCDCTL_API": "3",
            "ETCDCTL_ENDPOINTS": server.endpoint,
            **dict(zip(("ETCDCTL_CACERT", "ETCDCTL_CERT", "ETCDCTL_KEY"), certificates, strict=False)),
        }

    def enable(self) -> None:
        """From now on every request needs a user."""
        self.etcdctl("user", "add", "root:secret")
        self.etcdctl("auth", "enable")
        self._environment["ETCDCTL_USER"] = "root:secret"

    def etcdctl(self, *words: str) -> str:
        return self._run(["etcdctl", *words])

    def recipe(self, node: str, *words: str) -> None:
        """Makes the role and the user of a node in the way that docs/etcd.md describes."""
        command = [sys.executable, "-m", "podwire.cli.main", "etcd-role", node, *words]
        self._run(["sh", "-e", "-c", self._run(command)])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False, timeout=90)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout


def guarded(folder: Path, *options: str) -> EtcdServer:
    """A server whose passwords are cheap to check."""
    need("etcd", "etcdctl")
    return EtcdServer(folder, dies_with_parent=True, options=("--bcrypt-cost", "4", *options))


def need(*tools: str) -> None:
    """Skips the test when a program is missing."""
    packages = {"etcd": "etcd-server", "etcdctl": "etcd-client", "openssl": "openssl"}
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt install {packages[tool]})")
