"""Generates the Python stubs of `proto/` into the `podwire` package.

Run as a script by `make setup`, and as a build hook when a wheel or an editable install is made, so that no stub is
ever committed and none is ever older than its source.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, where no wheel is being built
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT = Path(__file__).resolve().parent.parent


def generate(root: Path = ROOT) -> list[Path]:
    """Writes `podwire/v1/*_pb2{.py,.pyi,_grpc.py}` below `root` and returns the sources that they come from."""
    from grpc_tools import protoc

    sources = sorted((root / "proto").glob("podwire/v1/*.proto"))
    arguments = [
        "protoc",
        f"-I{root / 'proto'}",
        f"--python_out={root}",
        f"--pyi_out={root}",
        f"--grpc_python_out={root}",
    ]
    if protoc.main([*arguments, *map(str, sources)]) != 0:
        raise SystemExit("proto/generate.py: protoc failed; its message is above")
    return sources


class StubsBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc]
    """Hatchling's entry: stubs exist before the package's files are collected."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        generate(Path(self.root))
        build_data["artifacts"].append("podwire/v1/*_pb2*")


if __name__ == "__main__":
    print(*generate(), sep="\n", file=sys.stderr)
