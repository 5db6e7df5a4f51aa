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
from pathlib import Path
from typing import Any

import msgspec

from podwire import manifests
from podwire.errors import PodwireError
from podwire.lab import certificates, names, node, process, proxy, state, topology
from podwire.lab.api.client import Client
from podwire.lab.api.kinds import CONFIG_MAPS, DEPLOYMENTS, PODS, REPLICA_SETS, SECRETS
from podwire.lab.api.kubeconfig import kubeconfig
from podwire.lab.deployments import is_rolled_out
from podwire.lab.etcd import EtcdServer
from podwire.lab.names import ETCD_PORT, LabFiles
from podwire.lab.program import FindObject, container_environment
from podwire.lab.state import LabState
from podwire.lab.supervisor import ApiAddress, find_log
from podwire.lab.workloads import condition, is_controlled_by

SUPERVISOR = "supervisor"
ETCD = "etcd"  # the only member; of three each goes by its name
_START_SECONDS = 120.0
_KILL_SECONDS = 60.0
_PODS_SECONDS = 120.0

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
    if lab.etcd_tls:
        certificates.make(lab)
    start_etcd(lab)
    start_supervisor(lab)
    for each in lab.nodes:
        node.wait_holder(lab, each)
    say("daemons" if lab.proxy == proxy.NONE else "daemons and proxies")
    start_nodes(lab)
    wait_supervisor(lab)
    for each in lab.nodes:
        for member in lab.etcd:
            _still_runs(lab, member.role)
        node.wait_daemon(lab, each.name)
    for each in lab.nodes if lab.proxy != proxy.NONE else ():
        proxy.wait_healthy(lab, each)


def start_nodes(lab: LabState) -> None:
    """Installs and starts every node's daemon, and its proxy. All daemons first: pods wait for both, and for etcd."""
    proxied = lab.nodes if lab.proxy != proxy.NONE else ()
    for each in lab.nodes:
        node.install(lab, each)
        node.start_daemon(lab, each.name)
    if proxied:
        proxy.install_shared(lab)
    for each in proxied:
        proxy.install(lab, each)
        proxy.start(lab, each.name)


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
    """Starts the members of etcd that do not run. Each finds the data that it had."""
    for member in lab.etcd:
        running = process.recorded(lab.files, member.role)
        if running is not None and running.alive:
            continue
        server = EtcdServer(
            lab.files.etcd,
            name=member.name,
            address=member.address,
            client_port=ETCD_PORT,
            peer_port=ETCD_PORT + 1,
            prefix=("nsenter", f"--net={lab.netns(member.part)}", "--"),
            members={each.name: each.peer_url for each in lab.etcd},
            options=certificates.member_options(lab, member.name) if lab.etcd_tls else (),
            tls=lab.etcd_tls,
            peer_tls=lab.etcd_tls,
        )
        process.start(lab.files, member.role, server.command())


def kill_etcd(lab: LabState, name: str) -> None:
    """Ends one member as a power cut would, and waits until it is gone. Raises PodwireError when there is none."""
    for member in lab.etcd:
        running = process.recorded(lab.files, member.role)
        if member.name == name and running is not None:
            running.kill()
            if not running.wait_gone(_KILL_SECONDS):
                raise PodwireError(f"{name} (process {running.pid}) is still there after {_KILL_SECONDS:.0f} s")
            return
    raise PodwireError(f"lab {lab.name} has no etcd member {name!r}; it has {', '.join(m.name for m in lab.etcd)}")


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
    """Deletes what the objects name, in reverse. Returns the names of the pods among them, and of the pods they own."""
    api, pods = client(lab), []
    for obj in reversed(manifests.apply_order(objects)):
        pods += _owned_pods(api, obj)
        there = api.delete(obj)
        name = str(obj["metadata"]["name"])
        say(f"{obj['kind'].lower()}/{name} {'deleted' if there else 'was not there'}")
        if api.kind_of(obj) is PODS:
            pods.append((obj["metadata"].get("namespace") or "default", name))
    return pods


def _owned_pods(api: Client, obj: Object) -> list[PodName]:
    """The pods that go with a Deployment or a ReplicaSet."""
    kind, namespace = api.kind_of(obj), str(obj["metadata"].get("namespace") or "default")
    if kind not in (DEPLOYMENTS, REPLICA_SETS) or not obj["metadata"].get("name"):
        return []
    owner = api.find(kind, obj["metadata"]["name"], namespace)
    if owner is None:
        return []
    owners = [owner]
    if kind is DEPLOYMENTS:
        owners += [one for one in api.list(REPLICA_SETS, namespace) if is_controlled_by(one, owner)]
    found = api.list(PODS, namespace)
    return [(namespace, pod["metadata"]["name"]) for pod in found if any(is_controlled_by(pod, one) for one in owners)]


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
    chosen = _container(pod, container, pod["spec"]["containers"])
    netns = None if pod["spec"].get("hostNetwork") else lab.pod_netns(namespace, name)
    addresses = [entry["ip"] for entry in pod["status"].get("podIPs", [])]
    find = _objects_of(client(lab), namespace)
    return node.enter_command(lab, pod["spec"]["nodeName"], netns), container_environment(pod, chosen, addresses, find)


def _container(pod: Object, name: str, among: Sequence[Object]) -> Object:
    """The container of that name; without a name the first of the pod's. Raises PodwireError."""
    chosen = name or pod["spec"]["containers"][0]["name"]
    for one in among:
        if one["name"] == chosen:
            return one
    metadata, known = pod["metadata"], ", ".join(one["name"] for one in among)
    raise PodwireError(f"pod {metadata['namespace']}/{metadata['name']} has no container {name!r}; it has {known}")


def _objects_of(api: Client, namespace: str) -> FindObject:
    kinds = {"ConfigMap": CONFIG_MAPS, "Secret": SECRETS}
    return lambda kind, name: api.find(kinds[kind], name, namespace)


def container_log(lab: LabState, namespace: str, name: str, container: str = "", *, previous: bool = False) -> Path:
    """The file with a container's output, or that of its run before the last restart.

    Raises PodwireError when there is no such pod or container, or no such run.
    """
    pod = client(lab).get(PODS, name, namespace)
    spec = pod["spec"]
    chosen = _container(pod, container, [*spec["containers"], *(spec.get("initContainers") or ())])["name"]
    path = find_log(lab, namespace, name, chosen, previous)
    if not path.exists():
        which = "has not been restarted" if previous else f"has not begun: the pod {what_lacks(pod) or 'has ended'}"
        raise PodwireError(f"pod {namespace}/{name}: container {chosen} {which}")
    return path


def wait_ready(lab: LabState, wanted: Sequence[PodName], seconds: float = _PODS_SECONDS) -> None:
    """Waits until these pods are ready, or have succeeded. Raises PodwireError that says what each lacks."""

    def lacking() -> dict[str, str]:
        found = {(pod["metadata"]["namespace"], pod["metadata"]["name"]): pod for pod in pods(lab)}
        return {"/".join(key): what_lacks(found.get(key)) for key in wanted}

    _wait_nothing_lacks(lab, lacking, seconds)


def wait_rolled_out(lab: LabState, objects: Sequence[Object], seconds: float = _PODS_SECONDS) -> None:
    """Waits until the Deployments and ReplicaSets among these have all their pods, ready and of the present template.

    Raises PodwireError that says what each lacks.
    """
    api = client(lab)
    wanted = [
        (kind, str(obj["metadata"]["name"]), str(obj["metadata"].get("namespace") or "default"))
        for obj in objects
        if (kind := api.kind_of(obj)) in (DEPLOYMENTS, REPLICA_SETS) and obj["metadata"].get("name")
    ]

    def lacking() -> dict[str, str]:
        found = {
            f"{kind.kind.lower()} {space}/{name}": rollout_lacks(api.find(kind, name, space))
            for kind, name, space in wanted
        }
        return found | ({} if not any(found.values()) else {
            f"pod {pod['metadata']['namespace']}/{pod['metadata']['name']}": what_lacks(pod) for pod in pods(lab)
        })  # fmt: skip

    _wait_nothing_lacks(lab, lacking, seconds)


def rollout_lacks(workload: Object | None) -> str:
    """What a Deployment or a ReplicaSet lacks to have all its pods, in words; empty when it has them."""
    if workload is None:
        return "is not there"
    status, replicas = workload.get("status") or {}, workload["spec"].get("replicas", 1)
    if workload["kind"] == DEPLOYMENTS.kind and is_rolled_out(workload, status):
        return ""
    if workload["kind"] == REPLICA_SETS.kind and status.get("availableReplicas") == replicas == status.get("replicas"):
        return ""
    why = condition(workload, "Progressing").get("message", "") if workload["kind"] == DEPLOYMENTS.kind else ""
    return f"has {status.get('availableReplicas', 0)} of {replicas} pods available{f'; {why}' if why else ''}"


def _wait_nothing_lacks(lab: LabState, lacking: Callable[[], dict[str, str]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := {what: lacks for what, lacks in lacking().items() if lacks}:
        _still_runs(lab, SUPERVISOR)
        if time.monotonic() > deadline:
            lines = "".join(f"\n    {what}: {lacks}" for what, lacks in sorted(left.items()))
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
    statuses = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    waiting = [
        f"container {one['name']}: {', '.join(str(v) for v in one['state'].get('waiting', {}).values())}"
        for one in statuses
        if "waiting" in one.get("state", {})
    ]
    unready = [f"container {one['name']} is not ready" for one in statuses if "running" in one["state"]]
    return str(status.get("message") or "; ".join(waiting or unready) or f"is {status.get('phase', 'Pending')}")


def wait_deleted(lab: LabState, gone: Sequence[PodName], seconds: float = _PODS_SECONDS) -> None:
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
