"""A lab from its beginning to its end: `up`, `down`, and what is asked of it in between.

    up    lock ─▶ state on disk ─▶ namespaces, links ─▶ holders ─▶ etcd, supervisor ─▶ install, daemons ─▶ all ready
    down  lock ─▶ supervisor dies ─▶ every process of the lab dies ─▶ namespaces go ─▶ files go

`up` that fails takes down what it made and says why. `up` that is killed leaves a state, and `down` needs no more
than the lab's name. `down` asks nothing of anybody: namespaces, and with them all links, rules and mounts, go with
their last process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from podwire.errors import PodwireError
from podwire.lab import manifests, names, node, process, state, topology
from podwire.lab.api.client import Client
from podwire.lab.api.kinds import PODS
from podwire.lab.api.kubeconfig import kubeconfig
from podwire.lab.etcd import EtcdServer
from podwire.lab.names import ETCD_PORT, LabFiles
from podwire.lab.program import container_environment
from podwire.lab.state import LabState
from podwire.lab.supervisor import ApiAddress

SUPERVISOR = "supervisor"
ETCD = "etcd"
_START_SECONDS = 30.0
_KILL_SECONDS = 10.0

Say = Callable[[str], None]
Object = dict[str, Any]
PodName = tuple[str, str]  # namespace, name


def up(lab: LabState, say: Say = lambda _: None) -> LabState:
    """Builds the lab and returns when every node's daemon is ready. `say` is told each step as it begins.

    Raises PodwireError, with the end of the log of what failed, and then nothing of the lab is left.
    """
    names.check_lab_name(lab.name)
    with state.locked(lab.files.lock):
        if lab.files.folder.exists():
            whole = "exists" if is_complete(lab.name) else "was not completed"
            raise PodwireError(f"lab {lab.name} {whole}; `podwire lab down --name {lab.name}` removes it")
        try:
            state.enter(lab)
            _build(lab, say)
        except BaseException:
            _remove(lab.name)
            raise
        lab = msgspec.structs.replace(lab, complete=True)
        state.save(lab)
    return lab


def _build(lab: LabState, say: Say) -> None:
    say("namespaces and links")
    topology.build(lab)
    for each in lab.nodes:
        node.start_holder(lab, each)
    say("etcd and API server")
    start_etcd(lab)
    start_supervisor(lab)
    for each in lab.nodes:
        node.wait_holder(lab, each)
    say("daemons")
    for each in lab.nodes:
        node.install(lab, each)
        node.start_daemon(lab, each.name)
    wait_supervisor(lab)
    for each in lab.nodes:
        _still_runs(lab, ETCD)
        node.wait_daemon(lab, each.name)


def is_complete(name: str) -> bool:
    """Whether the lab is there and its `up` has got through."""
    with contextlib.suppress(PodwireError):
        return state.load(name).complete
    return False


def down(name: str, say: Say = lambda _: None) -> bool:
    """Removes all of a lab, in whatever state it is. Returns whether there was anything to remove."""
    files = LabFiles(names.check_lab_name(name))
    if not (files.folder.exists() or topology.namespaces(name)):
        return False
    say(f"removing lab {name}")
    with state.locked(files.lock):
        _remove(name)
    return True


def _remove(name: str) -> None:
    spared = process.ancestors()
    supervisor = process.recorded(LabFiles(name), SUPERVISOR)
    if supervisor is not None:  # first: it would start things again
        supervisor.kill()
        supervisor.wait_gone(_KILL_SECONDS)
    process.kill_all(lambda: _members(name), _KILL_SECONDS, spared)
    topology.delete_namespaces(topology.namespaces(name))
    state.take_out(LabFiles(name))


def _members(name: str) -> list[int]:
    """The ids of all processes of the lab: those with its mark, and those in its namespaces."""
    inodes = []
    for namespace in topology.namespaces(name):
        with contextlib.suppress(FileNotFoundError):
            inodes.append(names.netns_path(namespace).stat().st_ino)
    return sorted({*process.marked(name), *process.in_namespaces(frozenset(inodes))})


# --- etcd and the supervisor ------------------------------------------------------------------------------------


def start_etcd(lab: LabState) -> None:
    """Starts etcd in the control namespace."""
    member = EtcdServer(
        lab.files.etcd,
        name="etcd1",
        address=str(names.CONTROL_ADDRESS),
        client_port=ETCD_PORT,
        peer_port=ETCD_PORT + 1,
        prefix=("nsenter", f"--net={lab.netns('control')}", "--"),
    )
    process.start(lab.files, ETCD, member.command())


def start_supervisor(lab: LabState) -> None:
    """Starts the process that holds the control plane."""
    process.start(lab.files, SUPERVISOR, [*node.PYTHON, "-m", "podwire.lab.supervisor", lab.name])


def wait_supervisor(lab: LabState) -> ApiAddress:
    """Waits until the API server answers, and writes the kubeconfig."""

    def answers() -> bool:
        _still_runs(lab, SUPERVISOR)
        return lab.files.api.exists()

    process.wait_for(answers, _START_SECONDS, "the API server")
    address = api_address(lab)
    state.write_atomically(lab.files.kubeconfig, kubeconfig(address.url, f"podwire-{lab.name}").encode())
    return address


def api_address(lab: LabState) -> ApiAddress:
    """Where the API server listens. Raises PodwireError when the lab has none (any more)."""
    try:
        return msgspec.json.decode(lab.files.api.read_bytes(), type=ApiAddress)
    except FileNotFoundError:
        raise PodwireError(
            f"lab {lab.name} was not completed; `podwire lab down --name {lab.name}` removes it"
        ) from None


def _still_runs(lab: LabState, role: str) -> None:
    running = process.recorded(lab.files, role)
    if running is None or not running.alive:
        raise PodwireError(f"{role} has ended:{process.last_lines(lab.files.log(role))}")


# --- pods -------------------------------------------------------------------------------------------------------


def apply(lab: LabState, objects: Sequence[Object], say: Say = lambda _: None) -> list[PodName]:
    """Applies objects as `kubectl apply` does, namespaces first. Returns the names of the pods among them."""
    api, pods = client(lab), []
    for obj in manifests.apply_order(objects):
        made = api.apply(obj)
        say(str(made))
        for warning in made.warnings:
            say(f"  warning: {warning}")
        if made.kind is PODS:
            pods.append((made.namespace, made.name))
    return pods


def delete(lab: LabState, objects: Sequence[Object], say: Say = lambda _: None) -> list[PodName]:
    """Deletes what the objects name, in reverse. Returns the names of the pods among them."""
    api, pods = client(lab), []
    for obj in reversed(manifests.apply_order(objects)):
        there = api.delete(obj)
        name = str(obj["metadata"]["name"])
        say(f"{obj['kind'].lower()}/{name} {'deleted' if there else 'was not there'}")
        if api.kind_of(obj) is PODS:
            pods.append((obj["metadata"].get("namespace") or "default", name))
    return pods


def client(lab: LabState) -> Client:
    """A client of the lab's API server. Raises PodwireError when the lab was not completed."""
    return Client(api_address(lab).url, manager="podwire-lab")


def pods(lab: LabState) -> list[Object]:
    """All pods, as the API shows them."""
    return client(lab).list(PODS)


def exec_command(lab: LabState, namespace: str, name: str, container: str = "") -> tuple[list[str], dict[str, str]]:
    """The words before a command that runs in a pod, and what the container adds to its environment.

    Raises PodwireError when there is no such pod or container, or it does not run.
    """
    pod = client(lab).get(PODS, name, namespace)
    if pod.get("status", {}).get("phase") != "Running":
        raise PodwireError(f"pod {namespace}/{name} does not run: it {what_lacks(pod) or 'has ended'}")
    known = {one["name"]: one for one in pod["spec"]["containers"]}
    chosen = known.get(container or next(iter(known)))
    if chosen is None:
        raise PodwireError(f"pod {namespace}/{name} has no container {container!r}; it has {', '.join(known)}")
    netns = None if pod["spec"].get("hostNetwork") else lab.pod_netns(namespace, name)
    addresses = [entry["ip"] for entry in pod["status"].get("podIPs", [])]
    return node.enter_command(lab, pod["spec"]["nodeName"], netns), container_environment(pod, chosen, addresses)


def wait_ready(lab: LabState, wanted: Sequence[PodName], seconds: float = 60.0) -> None:
    """Waits until these pods are ready, or have succeeded. Raises PodwireError that says what each lacks."""
    missing: dict[str, str] = {}

    def all_ready() -> bool:
        found = {(pod["metadata"]["namespace"], pod["metadata"]["name"]): pod for pod in pods(lab)}
        missing.clear()
        for key in wanted:
            lacks = what_lacks(found.get(key))
            if lacks:
                missing["/".join(key)] = lacks
        return not missing

    deadline = time.monotonic() + seconds
    while not all_ready():
        _still_runs(lab, SUPERVISOR)
        if time.monotonic() > deadline:
            lines = "".join(f"\n    {pod}: {lacks}" for pod, lacks in sorted(missing.items()))
            raise PodwireError(f"waited {seconds:.0f} s for pods to run:{lines}")
        time.sleep(0.05)


def what_lacks(pod: Object | None) -> str:
    """What a pod lacks to be ready, in words; empty when it is, or has succeeded."""
    if pod is None:
        return "is not there"
    status = pod.get("status", {})
    conditions = {one["type"]: one["status"] for one in status.get("conditions", [])}
    if status.get("phase") == "Succeeded" or conditions.get("Ready") == "True":
        return ""
    if not pod["spec"].get("nodeName"):
        return "is on no node"
    waiting = [
        f"container {one['name']}: {', '.join(str(v) for v in one['state'].get('waiting', {}).values())}"
        for one in status.get("containerStatuses", [])
        if "waiting" in one.get("state", {})
    ]
    return str(status.get("message") or "; ".join(waiting) or f"is {status.get('phase', 'Pending')}")


def wait_deleted(lab: LabState, gone: Sequence[PodName], seconds: float = 60.0) -> None:
    """Waits until these pods are gone. Raises PodwireError that names those left."""
    left: set[PodName] = set()

    def all_gone() -> bool:
        left.clear()
        left.update({(p["metadata"]["namespace"], p["metadata"]["name"]) for p in pods(lab)}.intersection(gone))
        return not left

    with contextlib.suppress(PodwireError):
        process.wait_for(all_gone, seconds, "pods to go")
    if not all_gone():
        raise PodwireError(f"after {seconds:.0f} s these pods are still there: {', '.join('/'.join(k) for k in left)}")
