"""ADD and DEL as a container runtime executes them, the same for whoever is measured, and the proof that they worked.

After an ADD: the interface in the pod has the address of the result, and a TCP connection from the pod to its gateway
is refused by the node, which it can only be by way of a wire that works. After a DEL: the node's end of the wire is
down or gone, and in the end it is gone and so is the pod's. All of it is outside of the timed region.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench.process import BenchFailed, Finished, run
from bench.stage import Namespace

IFNAME = "eth0"
CNI_VERSION = "1.0.0"
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1
_IFREQ = struct.Struct("16s24s")
_CLOSED_PORT = 9  # discard
_GONE_WITHIN = 10.0  # seconds
_POLL = 0.0002  # seconds between looks for the link, which take 5 µs each


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    """A pod whose ADD has answered; whether it is attached is still to be proved."""

    pod: Namespace
    container_id: str
    finished: Finished


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """A pod that is attached. `first_connection` is how many seconds its first connection took, right after ADD."""

    pod: Namespace
    container_id: str
    finished: Finished
    result: dict[str, Any]
    host_ifname: str
    first_connection: float


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """A pod that is detached. `gone_seconds` counts, like the process' time, from before its exec."""

    finished: Finished
    gone_seconds: float


class Contender:
    """A CNI plugin on a node."""

    def __init__(self, name: str, node: Namespace, executable: Path, config: dict[str, Any]) -> None:
        """`config` is the plugin's entry of the network configuration, without name and version."""
        self.name = name
        self.node = node
        self.executable = executable
        self.arguments: Callable[[Namespace], str] = lambda _pod: ""
        """What a runtime says of a pod in CNI_ARGS."""
        self._config = {"cniVersion": CNI_VERSION, "name": "bench", **config}

    def add(self, pod: Namespace) -> Added:
        """Attaches the pod. Raises BenchFailed when it is not attached after that."""
        return self.prove(self.attach(pod))

    def attach(self, pod: Namespace) -> Attached:
        """Attaches the pod, and looks at nothing."""
        container_id = f"{pod.name}-{os.urandom(4).hex()}"
        finished = self._execute("ADD", pod, container_id, self._config)
        return Attached(pod=pod, container_id=container_id, finished=finished)

    def refused(self, pod: Namespace) -> tuple[Finished, int]:
        """Asks for an ADD that may be refused. The process, and the CNI error code, 0 for none."""
        with self.node.entered():
            finished = self._call("ADD", pod, f"{pod.name}-refused", self._config)
        return finished, int(json.loads(finished.stdout).get("code", 0)) if finished.exit_code else 0

    def prove(self, attached: Attached) -> Added:
        """Looks at what ADD has done. Raises BenchFailed when the pod is not attached."""
        pod, result = attached.pod, json.loads(attached.finished.stdout)
        host_ifname = self._find_host_link(result)
        address, gateway = result["ips"][0]["address"], result["ips"][0]["gateway"]
        with pod.entered():
            _check_address(self.name, address)
            first_connection = _check_refused(self.name, gateway)
        return Added(
            pod=pod,
            container_id=attached.container_id,
            finished=attached.finished,
            result=result,
            host_ifname=host_ifname,
            first_connection=first_connection,
        )

    def delete(self, added: Added) -> Deleted:
        """Detaches the pod, then waits until its link is gone. Raises BenchFailed when it was not or is not."""
        finished = self.detach(added)
        return Deleted(finished=finished, gone_seconds=finished.seconds + self.wait_gone(added))

    def detach(self, added: Added) -> Finished:
        """Detaches the pod; nothing passes its link any more. Raises BenchFailed when something would."""
        config = {**self._config, "prevResult": added.result}
        finished = self._execute("DEL", added.pod, added.container_id, config)
        self.check_dead(added)
        return finished

    def check_dead(self, added: Added) -> None:
        """Raises BenchFailed when something would pass the pod's link."""
        with self.node.entered():
            if _is_up(added.host_ifname):
                raise BenchFailed(f"{self.name}: {added.host_ifname} is up after DEL")

    def wait_gone(self, added: Added) -> float:
        """Returns when neither the node nor the pod has the link any more, and how many seconds that took."""
        began = time.perf_counter()
        with self.node.entered():
            while _exists(added.host_ifname):
                if time.perf_counter() - began > _GONE_WITHIN:
                    raise BenchFailed(f"{self.name}: {added.host_ifname} is there {_GONE_WITHIN:.0f} s after DEL")
                time.sleep(_POLL)
            waited = time.perf_counter() - began
        with added.pod.entered():
            if _exists(IFNAME):
                raise BenchFailed(f"{self.name}: the pod still has {IFNAME}")
        return waited

    def _execute(self, command: str, pod: Namespace, container_id: str, config: dict[str, Any]) -> Finished:
        with self.node.entered():
            return self._run(command, pod, container_id, config)

    def _run(self, command: str, pod: Namespace, container_id: str, config: dict[str, Any]) -> Finished:
        finished = self._call(command, pod, container_id, config)
        if finished.exit_code != 0:
            said = (finished.stdout + finished.stderr).decode(errors="replace").strip()
            raise BenchFailed(f"{self.name}: {command} ended with {finished.exit_code}: {said[-500:]}")
        return finished

    def _call(self, command: str, pod: Namespace, container_id: str, config: dict[str, Any]) -> Finished:
        environment = cni_environment(command, pod.path, container_id, self.executable.parent)
        environment["CNI_ARGS"] = self.arguments(pod)
        return run([str(self.executable)], environment, json.dumps(config).encode())

    def _find_host_link(self, result: dict[str, Any]) -> str:
        """The node's end of the wire: the interface of the result that is neither the pod's nor the bridge."""
        bridge = self._config.get("bridge")
        names = [
            each["name"] for each in result.get("interfaces", ()) if not each.get("sandbox") and each["name"] != bridge
        ]
        if len(names) != 1:
            raise BenchFailed(f"{self.name}: the result names the links {names} of the node, expected one")
        with self.node.entered():
            if not _is_up(names[0]):
                raise BenchFailed(f"{self.name}: {names[0]} is not up after ADD")
        return str(names[0])


def cni_environment(command: str, netns: Path, container_id: str, bin_dir: Path) -> dict[str, str]:
    """What a runtime puts into the environment of a plugin."""
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container_id,
        "CNI_NETNS": str(netns),
        "CNI_IFNAME": IFNAME,
        "CNI_PATH": str(bin_dir),
    }


# --- in the namespace of this thread ----------------------------------------------------------------------------------


def _exists(ifname: str) -> bool:
    try:
        socket.if_nametoindex(ifname)
    except OSError:
        return False
    return True


def _is_up(ifname: str) -> bool:
    answer = _ioctl(_SIOCGIFFLAGS, ifname)
    return answer is not None and bool(struct.unpack_from("H", answer)[0] & _IFF_UP)


def _check_address(who: str, expected: str) -> None:
    answer = _ioctl(_SIOCGIFADDR, IFNAME)
    found = str(ipaddress.ip_address(answer[4:8])) if answer else "none"
    if found != expected.split("/")[0]:
        raise BenchFailed(f"{who}: {IFNAME} has address {found}, the result says {expected}")


def _check_refused(who: str, gateway: str) -> float:
    began = time.perf_counter()
    with socket.socket() as client:
        client.settimeout(5)
        number = client.connect_ex((gateway, _CLOSED_PORT))
    taken = time.perf_counter() - began
    if number != errno.ECONNREFUSED:
        said = os.strerror(number) if number else "accepted"
        raise BenchFailed(f"{who}: a connection from the pod to its gateway {gateway} was to be refused: {said}")
    return taken


def _ioctl(request: int, ifname: str) -> bytes | None:
    """The 24 bytes of the answer's union (netdevice(7)); None when there is no such interface or address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, request, _IFREQ.pack(ifname.encode(), b""))
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
                return None
            raise
    return bytes(_IFREQ.unpack(answer)[1])
