"""What sandboxes, and who runs them, may count on when containerd or the daemon dies or a namespace goes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
import yaml

from podwire.lab import node, process
from podwire.lab.state import LabState
from podwire.v1 import cni_pb2
from tests.runtime.agent import attachments
from tests.runtime.containerd import PATIENCE, Containerd
from tests.runtime.pods import Pod, Pods, host_links, pings

Record = Callable[[str, object], None]
NETNS_FOLDER = "/run/containerd/io.containerd.grpc.v1.cri/netns"
OFTEN = 0.2  # seconds between two rounds of the daemon's reconciler


def resume(lab: LabState) -> None:
    """Starts the first node's daemon again."""
    node.start_daemon(lab, "node1")
    node.wait_daemon(lab, "node1")


def queued(lab: LabState) -> list[cni_pb2.CallRequest]:
    """The DELs that wait for the first node's daemon."""
    folder = lab.files.node_path("node1", "/var/lib/podwire") / "del-queue"
    return [cni_pb2.CallRequest.FromString(path.read_bytes()) for path in sorted(folder.glob("*.del"))]


def namespaces(lab: LabState) -> list[str]:
    """The network namespaces that containerd of the first node keeps."""
    return sorted(path.name for path in lab.files.node_path("node1", NETNS_FOLDER).iterdir())


def remove_namespace(containerd: Containerd, path: str) -> None:
    """Takes a namespace's name from it, as nobody should: containerd finds nothing where it put the namespace."""
    done = containerd.command("sh", "-c", f"umount {path} && rm {path}")
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def reconciling_often(lab: LabState) -> Iterator[None]:
    """The first node's daemon with rounds in quick succession."""
    config = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
    before = config.read_text()

    def configure(text: str) -> None:
        node.stop_daemon(lab, "node1")
        config.write_text(text)
        resume(lab)

    configure(yaml.safe_dump(yaml.safe_load(before) | {"reconcileInterval": OFTEN}))
    try:
        yield
    finally:
        configure(before)


# --- containerd dies --------------------------------------------------------------------------------------------


@pytest.mark.fault("containerd killed", promises=("pods keep their network",))
def test_sandboxes_keep_their_network_when_containerd_is_killed(
    lab: LabState, pods: Pods, containerd: Containerd, peer: str, record_property: Record
) -> None:
    pod, other = pods.run(), pods.run()
    before = {each: pods.inspect(each) for each in (pod, other)}
    containerd.kill()
    for sandbox in before.values():
        assert pings(sandbox.process_netns, peer)
    began = time.monotonic()
    containerd.start()
    pods.stop(pods.run())
    record_property("add_again_s", round(time.monotonic() - began, 2))
    assert {each: pods.inspect(each) for each in before} == before
    assert pings(before[pod].process_netns, before[other].address)
    pods.stop(pod)
    assert list(attachments(lab, "node1")) == [other.sandbox]
    assert pings(before[other].process_netns, peer)


@pytest.mark.fault(
    "containerd killed, and a sandbox with it",
    promises=("it can be stopped later", "nothing is held after the runtime's DEL"),
)
def test_a_sandbox_whose_process_died_with_containerd_is_stopped_later(pods: Pods, containerd: Containerd) -> None:
    pod = pods.run()
    pid = pods.inspect(pod).pid
    containerd.kill()
    os.kill(pid, signal.SIGKILL)
    containerd.start()
    process.wait_for(lambda: not pods.inspect(pod).ready, PATIENCE, "containerd to see the sandbox dead")
    assert pods.attached(pod), "nobody has deleted it yet"
    pods.stop(pod)
    pods.wait_freed()


# --- the daemon is away -----------------------------------------------------------------------------------------

ENDS: dict[str, Callable[[LabState, str], None]] = {"stopped": node.stop_daemon, "killed": node.kill_daemon}
ends = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


@ends
@pytest.mark.fault(
    "daemon down, a sandbox is started", promises=("it fails", "nothing is held after the runtime's DEL")
)
def test_without_the_daemon_no_sandbox_starts_and_nothing_of_it_stays(
    lab: LabState, pods: Pods, containerd: Containerd, end: Callable[[LabState, str], None], record_property: Record
) -> None:
    kept = pods.run()
    known = containerd.cri.sandboxes(), namespaces(lab), host_links(lab, "node1")
    end(lab, "node1")
    with pytest.raises(grpc.RpcError, match="did not answer, try again later"):
        pods.run()
    assert (containerd.cri.sandboxes(), namespaces(lab), host_links(lab, "node1")) == known
    began = time.monotonic()
    resume(lab)
    assert list(attachments(lab, "node1")) == [kept.sandbox]
    process.wait_for(lambda: not queued(lab), PATIENCE, "the queue to empty")
    later = pods.run()
    record_property("add_again_s", round(time.monotonic() - began, 2))
    assert pings(pods.inspect(later).process_netns, pods.inspect(kept).address), "later, it works"


@ends
@pytest.mark.fault("daemon down, a sandbox is stopped", promises=("it stops", "its address is freed later"))
def test_without_the_daemon_a_sandbox_stops_and_its_address_is_freed_later(
    lab: LabState, pods: Pods, end: Callable[[LabState, str], None]
) -> None:
    pod, kept = pods.run(), pods.run()
    sandbox = pods.inspect(pod)
    end(lab, "node1")
    pods.stop(pod)
    assert not pods.inspect(pod).ready
    assert [(each.container_id, each.netns) for each in queued(lab)] == [(pod.sandbox, sandbox.netns)]
    pods.remove(pod)
    resume(lab)
    assert list(attachments(lab, "node1")) == [kept.sandbox], "what is owed comes before the first call"
    assert queued(lab) == []


# --- namespaces go ----------------------------------------------------------------------------------------------


@pytest.mark.fault("a sandbox's namespace loses its name", promises=("it can be stopped",))
def test_a_sandbox_whose_namespace_lost_its_name_is_stopped(lab: LabState, pods: Pods, containerd: Containerd) -> None:
    pod = pods.run()
    remove_namespace(containerd, pods.inspect(pod).netns)
    pods.stop(pod)
    pods.wait_freed()
    assert not host_links(lab, "node1")


def test_a_deletion_without_a_namespace_waits_for_the_daemon_like_any_other(
    lab: LabState, pods: Pods, containerd: Containerd
) -> None:
    pod = pods.run()
    remove_namespace(containerd, pods.inspect(pod).netns)
    node.kill_daemon(lab, "node1")
    pods.stop(pod)
    assert [(each.container_id, each.netns) for each in queued(lab)] == [(pod.sandbox, "")]
    resume(lab)
    pods.wait_freed()


def leave_behind(pods: Pods, containerd: Containerd, pod: Pod) -> None:
    """What is left of a sandbox when its node loses it: no process, no namespace, and nobody who calls the plugin."""
    sandbox = pods.inspect(pod)
    containerd.kill()
    os.kill(sandbox.pid, signal.SIGKILL)
    remove_namespace(containerd, sandbox.netns)


@pytest.mark.fault("a sandbox that containerd has forgotten", promises=("its address is freed by GC, and no other",))
def test_the_address_of_a_sandbox_left_behind_is_freed_and_no_other(
    lab: LabState, pods: Pods, containerd: Containerd, peer: str
) -> None:
    lost, kept = pods.run(), pods.run()
    alive = pods.inspect(kept)
    with reconciling_often(lab):
        leave_behind(pods, containerd, lost)
        process.wait_for(lambda: not pods.attached(lost), PATIENCE, "the daemon to miss the sandbox")
        assert list(attachments(lab, "node1")) == [kept.sandbox]
        assert pings(alive.process_netns, peer)
        containerd.start()
        pods.stop(lost)
        pods.remove(lost)
        assert containerd.cri.sandboxes() == [kept.sandbox]
        assert pods.inspect(kept) == alive
