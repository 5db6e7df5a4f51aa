"""What is known about a lab without asking it: one JSON file, written before the first thing exists.

`down` must find everything also after a crash or a killed `up`. So nothing that has to be found depends on a record
made afterwards: namespaces are found by the prefix of their names, processes by the namespace that they are in, by
the mark in their environment (`MARK`), or by their record; files by the lab's folder. This file says that there is
such a lab.

Two kinds of locks (flock on a file that is removed by whoever ends last): one per lab, so that `up` and `down` of a
lab follow each other; one for the root folder, which is held for moments, while a lab is entered or taken out.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from podwire.errors import PodwireError
from podwire.lab import names
from podwire.lab.names import LabFiles

MARK = "PODWIRE_LAB"


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """A node: its name and its bare addresses on the underlay."""

    name: str
    addresses: tuple[str, ...]


class EtcdMember(msgspec.Struct, frozen=True, kw_only=True):
    """A member of the lab's etcd. `part` is the namespace that it is in, `role` what its process is recorded as."""

    name: str
    part: str
    role: str
    address: str
    scheme: str = "http"

    @property
    def endpoint(self) -> str:
        """Where clients reach it."""
        return f"{self.scheme}://{names.url_host(self.address)}:{names.ETCD_PORT}"

    @property
    def peer_url(self) -> str:
        """Where the other members reach it."""
        return f"{self.scheme}://{names.url_host(self.address)}:{names.ETCD_PORT + 1}"


class LabState(msgspec.Struct, frozen=True, kw_only=True):
    """A lab as it was asked for. `complete` is False until the first `up` has got through.

    `pod_cidr` is a network, or one of each family with a comma between; the underlay has the families of the pods.
    `service_cidr` likewise; a family of the pods that it has no network of gets the usual one. `proxy` is the mode of
    the nodes' proxies, `none` for no proxies.
    """

    name: str
    nodes: tuple[NodeState, ...]
    backend: str = "vxlan"
    proxy: str = "none"
    pod_cidr: str = "10.244.0.0/16"
    service_cidr: str = ""
    etcd_members: int = 1
    etcd_tls: bool = False
    id: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    complete: bool = False

    @property
    def files(self) -> LabFiles:
        """Where the lab's files are."""
        return LabFiles(self.name)

    @property
    def etcd(self) -> tuple[EtcdMember, ...]:
        """The members of etcd: one in `control`, or several with a namespace each, so that they can be partitioned."""
        scheme = "https" if self.etcd_tls else "http"
        if self.etcd_members == 1:
            only = EtcdMember(name="etcd1", part="control", role="etcd", address=self.control_address, scheme=scheme)
            return (only,)
        addresses = {n: str(names.etcd_address(n, self.families[0])) for n in range(1, self.etcd_members + 1)}
        return tuple(
            EtcdMember(name=f"etcd{number}", part=f"etcd{number}", role=f"etcd{number}", address=address, scheme=scheme)
            for number, address in addresses.items()
        )

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        """The networks that pods get addresses of, one of each family."""
        return tuple(self.pod_cidr.split(","))

    @property
    def service_cidrs(self) -> tuple[str, ...]:
        """The networks that Services get addresses of, one of each family of the pods, in the same order."""
        given = {6 if ":" in cidr else 4: cidr for cidr in self.service_cidr.split(",") if cidr}
        return tuple(given.get(family) or str(names.SERVICE_CIDRS[family]) for family in self.families)

    @property
    def families(self) -> tuple[int, ...]:
        """The families of pods and of the underlay, in the order of `pod_cidr`."""
        return families(self.pod_cidr)

    @property
    def control_address(self) -> str:
        """Where the API server is on the underlay."""
        return str(names.control_address(self.families[0]))

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """Where the nodes reach etcd."""
        return tuple(member.endpoint for member in self.etcd)

    def netns(self, part: str) -> Path:
        """The path of the network namespace of a node, of `underlay`, `control`, `outside`, `balancer` or `etcd<n>`."""
        return names.netns_path(names.namespace(self.name, part))

    def pod_netns(self, namespace: str, pod: str) -> Path:
        """The path of a pod's own network namespace."""
        return names.netns_path(names.pod_namespace(self.name, namespace, pod))

    def node(self, name: str) -> NodeState:
        """The node of that name. Raises PodwireError when there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise PodwireError(f"lab {self.name} has no node {name!r}; it has {', '.join(n.name for n in self.nodes)}")


def families(pod_cidr: str) -> tuple[int, ...]:
    """The families of the networks in a `pod_cidr`."""
    return tuple(6 if ":" in cidr else 4 for cidr in pod_cidr.split(","))


def plan_nodes(count: int, pod_cidr: str = "10.244.0.0/16", segments: int = 1) -> tuple[NodeState, ...]:
    """The nodes of a lab of that size, with an address of each family of `pod_cidr`, in turn on each segment."""
    if not 1 <= count <= names.MAX_NODES:
        raise PodwireError(f"a lab has 1 to {names.MAX_NODES} nodes, not {count}")
    if not 1 <= segments <= names.MAX_SEGMENTS:
        raise PodwireError(f"a lab has 1 to {names.MAX_SEGMENTS} segments, not {segments}")
    return tuple(
        NodeState(
            name=names.node_name(number),
            addresses=tuple(
                str(names.node_address(number, family, (number - 1) % segments)) for family in families(pod_cidr)
            ),
        )
        for number in range(1, count + 1)
    )


def load(name: str) -> LabState:
    """The state of the lab called `name`. Raises PodwireError when there is no such lab, or its file is broken."""
    path = LabFiles(names.check_lab_name(name)).state
    try:
        return msgspec.json.decode(path.read_bytes(), type=LabState)
    except FileNotFoundError:
        others = ", ".join(labs()) or "none"
        raise PodwireError(f"there is no lab {name!r} (labs: {others}); `podwire lab up` makes one") from None
    except msgspec.DecodeError as error:
        raise PodwireError(f"{path}: {error}; `podwire lab down --name {name}` removes the lab") from error


def save(state: LabState) -> None:
    """Writes the state in one step: a reader sees the old or the new one."""
    write_atomically(state.files.state, msgspec.json.format(msgspec.json.encode(state)))


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file in one step. The folder must exist: a process of a removed lab must not bring it back."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def labs() -> list[str]:
    """The names of the labs of this machine, whole or not."""
    if not names.ROOT.is_dir():
        return []
    return sorted(entry.name for entry in names.ROOT.iterdir() if entry.is_dir())


_HELD: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("descriptors of locks", default=())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file at `path`, waiting for it, and removes it at the end. A process that is given `held()` holds
    it, too: whoever waits then waits for its end, also when the one that started it was killed.

    A waiter may wake up with the lock on a file that is gone by then, so a lock counts when the path still leads to it.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the root folder went between the two
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _leads_to(path, descriptor):
            break
        os.close(descriptor)
    token = _HELD.set((*_HELD.get(), descriptor))
    try:
        yield
    finally:
        _HELD.reset(token)
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # the last one out takes the folder along
            path.parent.rmdir()


def held() -> tuple[int, ...]:
    """The descriptors of the locks that this thread holds."""
    return _HELD.get()


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# --- entering and taking out ------------------------------------------------------------------------------------

_ROOT_LOCK = names.ROOT / ".lock"
_MADE = names.ROOT / ".made"


def enter(state: LabState) -> None:
    """Makes the lab's folder with its state, and the mount points that the machine lacks.

    A node's mount namespace can only cover a path that exists, so missing ones are made, empty, on the machine. Which
    ones is written down first, and whoever takes the last lab out removes them.
    """
    with locked(_ROOT_LOCK):
        made = set(_MADE.read_text().splitlines()) if _MADE.exists() else set()
        missing = [str(path) for folder in names.NODE_FOLDERS for path in _missing(Path(folder))]
        if missing:
            _MADE.write_text("\n".join(sorted(made.union(missing))) + "\n")
        for folder in names.NODE_FOLDERS:
            Path(folder).mkdir(parents=True, exist_ok=True)
        for own in (state.files.folder, state.files.processes, state.files.logs):
            own.mkdir(mode=0o755)
        save(state)


def _missing(path: Path) -> list[Path]:
    return [step for step in (path, *path.parents) if not step.exists()]


def take_out(files: LabFiles) -> None:
    """Removes the lab's folder and, with the last lab, the mount points that labs made. Nothing may run in it."""
    with locked(_ROOT_LOCK):
        if files.folder.exists():
            shutil.rmtree(files.folder)
        if labs() or not _MADE.exists():
            return
        # Longest first: a folder goes before the one that it is in. One that something else uses by now stays.
        for line in sorted(_MADE.read_text().splitlines(), key=len, reverse=True):
            with contextlib.suppress(OSError):
                Path(line).rmdir()
        _MADE.unlink()
