"""What runs in a container, decided from its manifest, since there are no images. Pure.

    command, if this machine has that program
    else the echo server on the container's TCP and UDP ports, or with no ports something that sleeps
    else, for an init container, nothing: it "succeeds" at once, as an echo server would never end

The environment is what kubelet makes of `env` and `envFrom`: literal values with `$(NAME)`, the downward API's fields
that a lab's pod has, keys of ConfigMaps and Secrets.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from podwire.errors import TryAgain

_ECHO = Path(__file__).with_name("echo.py")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_VARIABLE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
_MAP_ENTRY = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")

Object = Mapping[str, Any]
FindObject = Callable[[str, str], Object | None]  # ConfigMap or Secret, and its name in the pod's namespace


class ConfigMissing(TryAgain):
    """A ConfigMap, a Secret or a key of one is not there (yet)."""


class Program(msgspec.Struct, frozen=True):
    """What runs in a container. `echo` says that it is the echo server, whose last word then is its configuration."""

    words: tuple[str, ...]
    environment: dict[str, str]
    echo: bool = False
    warnings: tuple[str, ...] = ()


def plan_program(
    pod: Object,
    container: Object,
    addresses: Sequence[str],
    find: Callable[[str], str | None] = lambda program: shutil.which(program, path=_PATH),
    find_object: FindObject = lambda _kind, _name: None,
) -> Program:
    """What runs in `container` of `pod`; `find` tells where a program of this machine is. Raises ConfigMissing."""
    environment = container_environment(pod, container, addresses, find_object)
    own, warning = _own_command(container, environment, find)
    if own:
        return Program(own, environment)
    warnings = [f"{warning}: the echo server takes its place"] if warning else []
    ports = []
    for port in container.get("ports") or ():
        if port.get("protocol", "TCP") in ("TCP", "UDP"):
            ports.append([port.get("protocol", "TCP"), port["containerPort"]])
        else:
            warnings.append(f"port {port['containerPort']}: the echo server does not speak {port['protocol']}")
    if not ports:
        return Program(("/bin/sleep", "infinity"), environment, warnings=tuple(warnings))
    who = {
        "pod": pod["metadata"]["name"],
        "namespace": pod["metadata"]["namespace"],
        "node": pod["spec"].get("nodeName", ""),
        "container": container["name"],
        "ports": ports,
    }
    python = str(getattr(sys, "_base_executable", sys.executable))
    return Program((python, "-IS", str(_ECHO), json.dumps(who)), environment, echo=True, warnings=tuple(warnings))


def plan_init_program(
    pod: Object,
    container: Object,
    addresses: Sequence[str],
    find: Callable[[str], str | None] = lambda program: shutil.which(program, path=_PATH),
    find_object: FindObject = lambda _kind, _name: None,
) -> Program:
    """What runs in an init container: its command, or a note in its log. Raises ConfigMissing."""
    environment = container_environment(pod, container, addresses, find_object)
    own, warning = _own_command(container, environment, find)
    if own:
        return Program(own, environment)
    why = warning or f"there is no command, and no image {container.get('image', '')!r} to take one from"
    note = f"{why}: this init container did nothing"
    return Program(("/bin/echo", f"podwire lab: {note}"), environment, warnings=(note,))


def _own_command(
    container: Object, environment: Mapping[str, str], find: Callable[[str], str | None]
) -> tuple[tuple[str, ...], str]:
    """The container's own command, or none and why."""
    command = [expand(word, environment) for word in container.get("command") or ()]
    if not command:
        return (), ""
    program = find(command[0])
    if program is None:
        return (), f"{command[0]!r} is not a program of this machine"
    return (program, *command[1:], *(expand(word, environment) for word in container.get("args") or ())), ""


# --- the environment --------------------------------------------------------------------------------------------


def container_environment(
    pod: Object,
    container: Object,
    addresses: Sequence[str],
    find_object: FindObject = lambda _kind, _name: None,
) -> dict[str, str]:
    """The container's environment. Raises ConfigMissing for what is neither there nor optional."""
    environment = {"PATH": _PATH, "HOME": "/root", "HOSTNAME": str(pod["metadata"]["name"])}
    for source in container.get("envFrom") or ():
        for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if field in source:
                found = _data(kind, source[field], find_object)
                environment |= {f"{source.get('prefix', '')}{key}": value for key, value in found.items()}
    for variable in container.get("env") or ():
        value = _value(pod, variable, addresses, find_object, environment)
        if value is not None:
            environment[variable["name"]] = value
    return environment


def _value(
    pod: Object, variable: Object, addresses: Sequence[str], find_object: FindObject, environment: Mapping[str, str]
) -> str | None:
    source = variable.get("valueFrom")
    if not source:
        return expand(str(variable.get("value") or ""), environment)
    if "fieldRef" in source:
        return _field(pod, str(source["fieldRef"].get("fieldPath", "")), addresses)
    for kind, field in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        if field in source:
            reference = source[field]
            found = _data(kind, reference, find_object)
            if reference["key"] not in found and not reference.get("optional"):
                raise ConfigMissing(f"couldn't find key {reference['key']} in {kind} {reference['name']}")
            return found.get(reference["key"])
    return None


def _field(pod: Object, path: str, addresses: Sequence[str]) -> str | None:
    """A field of the downward API; None for one that a lab's pod does not have."""
    if match := _MAP_ENTRY.fullmatch(path):
        return str((pod["metadata"].get(match[1]) or {}).get(match[2], ""))
    host = (pod.get("status") or {}).get("hostIP", "")
    fields = {
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": pod["metadata"]["namespace"],
        "metadata.uid": pod["metadata"].get("uid", ""),
        "spec.nodeName": pod["spec"].get("nodeName", ""),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": addresses[0] if addresses else "",
        "status.podIPs": ",".join(addresses),
        "status.hostIP": host,
        "status.hostIPs": ",".join(one["ip"] for one in (pod.get("status") or {}).get("hostIPs") or ()) or host,
    }
    return fields.get(path)


def _data(kind: str, reference: Object, find_object: FindObject) -> dict[str, str]:
    """The keys of a ConfigMap, or of a Secret in plain text; none for one that is optional and not there."""
    found = find_object(kind, reference["name"])
    if found is None:
        if reference.get("optional"):
            return {}
        raise ConfigMissing(f'{kind.lower()} "{reference["name"]}" not found')
    plain = {key: str(value) for key, value in (found.get("data") or {}).items()}
    if kind == "Secret":
        decoded = {key: base64.b64decode(value).decode(errors="replace") for key, value in plain.items()}
        return decoded | {key: str(value) for key, value in (found.get("stringData") or {}).items()}
    return plain


def expand(word: str, environment: Mapping[str, str]) -> str:
    """Replaces `$(NAME)` as kubelet does: unknown names stay, `$$` is one `$`."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], match[0])

    return _VARIABLE.sub(value, word)
