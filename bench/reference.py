"""A node that runs the CNI project's reference plugins, `bridge` with `host-local`, as Debian packages them.

With ipMasq it is the equal of Podwire on one node: pods behind a bridge that is their gateway, masqueraded when they
leave. Without, it is the least that a plugin can do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chained import Chained
from bench.contender import Contender
from bench.process import BenchFailed
from bench.stage import Stage

_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")


def plugins() -> Path:
    """The folder of the reference plugins. Raises BenchFailed when they are not installed."""
    for folder in map(Path, _FOLDERS):
        if (folder / "bridge").exists() and (folder / "host-local").exists():
            return folder
    raise BenchFailed("the reference plugins are not installed (Debian: apt install containernetworking-plugins)")


def reference_node(stage: Stage, name: str, label: str, *, masquerade: bool) -> Contender:
    """bridge + host-local on a node of their own."""
    return Contender(label, stage.node(name), plugins() / "bridge", _bridge(stage, name, masquerade=masquerade))


def reference_chain(stage: Stage, name: str, label: str) -> Chained:
    """bridge (ipMasq) + host-local + portmap + bandwidth on a node of their own."""
    folder = plugins()
    after = [(folder / "portmap", "portMappings"), (folder / "bandwidth", "bandwidth")]
    return Chained(label, stage.node(name), folder / "bridge", _bridge(stage, name, masquerade=True), after)


def _bridge(stage: Stage, name: str, *, masquerade: bool) -> dict[str, Any]:
    return {
        "type": "bridge",
        "bridge": "cni0",
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipMasq": masquerade,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.88.0.0/16"}]],
            "dataDir": str(stage.disk / name / "host-local"),
        },
    }
