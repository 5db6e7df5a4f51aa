"""A version that uses the Python of the node: `cni_plugin` and its .pyc, nothing else.

It is laid down in 40 ms and takes 300 kB, which suits a lab and a node whose Python stays. The .pyc are compiled by the
interpreter that the executable names, which must be there under the same path on the node.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from podwire.install.interpreter import FLAGS, Interpreter, compile_modules, find_interpreter
from podwire.install.layout import Layout
from podwire.install.versions import copy_plugin, name_version, plugin_parts


class SystemVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version for this interpreter (versions.Version)."""

    layout: Layout
    plugin: Path
    python: Interpreter
    name: str
    flags: str = FLAGS

    @property
    def interpreter(self) -> Path:
        """The node's own."""
        return self.python.path

    def build(self, folder: Path) -> None:
        """Copies and compiles."""
        copies = copy_plugin(self.plugin, folder)
        cache = folder / "cni_plugin" / "__pycache__"
        cache.mkdir()
        tag = self.python.cache_tag
        compile_modules(self.python.path, [(copy, copy.name, cache / f"{copy.stem}.{tag}.pyc") for copy in copies])

    def check(self) -> None:
        """The interpreter has been asked for its version already."""


def system_version(layout: Layout, plugin: Path, python: Path | None = None) -> SystemVersion:
    """The version for `python`, by default the base interpreter of this process. Raises InstallError and OSError."""
    interpreter = find_interpreter(python)
    parts = plugin_parts(plugin) | {"cache tag": interpreter.cache_tag.encode()}
    return SystemVersion(layout=layout, plugin=plugin, python=interpreter, name=name_version(parts))
