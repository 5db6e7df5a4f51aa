"""Libcni's job: a network configuration list from a folder, executed plugin by plugin as a container runtime does.

    ADD    each plugin in order; a plugin gets the result of the one before it as `prevResult`
    DEL    each plugin in reverse; each gets the result of the ADD

A plugin is a program: the operation in its environment, its configuration on standard input, its result or its error on
standard output. It runs on the node, that is, in the node's network and mount namespaces, as the runtime would.

Source: CNI specification 1.1.0, section 3 "Execution of network configurations" and section 4 "Plugin execution".
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from podwire.errors import PodwireError

_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")  # what this runtime speaks, the best last


class CniError(PodwireError):
    """What a plugin answered instead of a result. `code` is the specification's, or the plugin's own."""

    def __init__(self, plugin: str, code: int, message: str) -> None:
        super().__init__(f"{plugin}: {message} (code {code})")
        self.code = code


class NetworkList(msgspec.Struct, frozen=True):
    """A network configuration list: its name, the version that is spoken, and its plugins' configurations in order."""

    name: str
    version: str
    plugins: tuple[dict[str, Any], ...]


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime says about the container: `args` become CNI_ARGS, `capabilities` the runtimeConfig."""

    container_id: str
    netns: str
    ifname: str = "eth0"
    args: tuple[tuple[str, str], ...] = ()
    capabilities: tuple[tuple[str, Any], ...] = ()


def load_network(folder: Path) -> NetworkList:
    """The first list of the folder by file name, as runtimes choose it. Raises PodwireError when none is there."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".conflist") if folder.is_dir() else []
    if not files:
        raise PodwireError(f"no network configuration list in {folder}")
    try:
        plain = json.loads(files[0].read_text())
        offered = {plain.get("cniVersion", "0.1.0"), *plain.get("cniVersions", [])}
        version = next(known for known in reversed(_VERSIONS) if known in offered)
        return NetworkList(plain["name"], version, tuple(plain["plugins"]))
    except (ValueError, KeyError, StopIteration) as error:
        raise PodwireError(f"{files[0]}: not a network configuration list that can be used: {error!r}") from error


def plugin_config(
    network: NetworkList, plugin: Mapping[str, Any], attachment: Attachment, previous: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What one plugin gets on standard input: its entry, with name, version, previous result and what it asked for."""
    config = {key: value for key, value in plugin.items() if key != "capabilities"}
    config |= {"name": network.name, "cniVersion": network.version}
    wanted = plugin.get("capabilities", {})
    runtime = {name: value for name, value in attachment.capabilities if wanted.get(name)}
    if runtime:
        config["runtimeConfig"] = runtime
    if previous is not None:
        config["prevResult"] = dict(previous)
    return config


def plugin_environment(command: str, attachment: Attachment, path: Path) -> dict[str, str]:
    """The environment that a plugin gets; CNI_PATH is the one folder `path`."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns,
        "CNI_IFNAME": attachment.ifname,
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in attachment.args),
        "CNI_PATH": str(path),
    }


class Runtime:
    """Executes a node's network configuration. `enter` is the words before a command that runs on the node."""

    def __init__(self, enter: Sequence[str], bin_dir: Path, conf_dir: Path, mark: Mapping[str, str]) -> None:
        self._enter = tuple(enter)
        self._bin_dir = bin_dir
        self._conf_dir = conf_dir
        self._mark = dict(mark)

    async def add(self, attachment: Attachment) -> dict[str, Any]:
        """Attaches; the last plugin's result. Raises CniError, and after it the caller still owes a DEL."""
        network = load_network(self._conf_dir)
        result: dict[str, Any] | None = None
        for plugin in network.plugins:
            result = await self._execute("ADD", network, plugin, attachment, result)
        return result or {}

    async def delete(self, attachment: Attachment, result: Mapping[str, Any] | None) -> None:
        """Detaches; `result` is that of the ADD, when there is one. Raises CniError."""
        network = load_network(self._conf_dir)
        for plugin in reversed(network.plugins):
            await self._execute("DEL", network, plugin, attachment, result)

    async def _execute(
        self,
        command: str,
        network: NetworkList,
        plugin: Mapping[str, Any],
        attachment: Attachment,
        previous: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        config = plugin_config(network, plugin, attachment, previous)
        name = str(plugin["type"])
        child = await asyncio.create_subprocess_exec(
            *self._enter,
            str(self._bin_dir / name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=plugin_environment(command, attachment, self._bin_dir) | self._mark,
        )
        stdout, stderr = await child.communicate(json.dumps(config).encode())
        return _answer(name, child.returncode or 0, stdout, stderr)


def _answer(plugin: str, exit_code: int, stdout: bytes, stderr: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(stdout) if stdout.strip() else {}
    except ValueError:
        answer = {}
    if exit_code == 0:
        return dict(answer)
    said = " ".join(str(answer[key]) for key in ("msg", "details") if answer.get(key))
    complaint = said or (stderr or stdout).decode(errors="replace").strip()[-500:] or f"exit code {exit_code}"
    raise CniError(plugin, int(answer.get("code", 0)), complaint)


def result_addresses(result: Mapping[str, Any]) -> tuple[str, ...]:
    """The bare addresses of a result, in its order."""
    return tuple(str(entry["address"]).split("/")[0] for entry in result.get("ips", []))
