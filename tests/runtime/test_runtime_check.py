"""`podwire ipam check --runtime-endpoint` against containerd: attachments and sandboxes, either without the other."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from contextlib import closing
from sqlite3 import connect
from typing import Any

from podwire.lab import process
from podwire.lab.state import LabState
from tests.netns.containers import Container, containers
from tests.runtime.agent import attachments
from tests.runtime.containerd import Containerd
from tests.runtime.pods import Pods

ENDPOINT = "unix:///run/containerd/containerd.sock"
PATIENCE = 90.0


def check(lab: LabState, *flags: str, endpoint: str = ENDPOINT) -> dict[str, Any]:
    """What `podwire ipam check` says of the first node, as JSON."""
    where = ["--socket", str(lab.files.ipamd_socket("node1")), "--runtime-endpoint", endpoint, "-o", "json"]
    command = [sys.executable, "-m", "podwire.cli.main", "ipam", "check", *where, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == bool(said["remaining"])
    return said


def kinds(said: dict[str, Any], which: str = "differences") -> dict[str, str]:
    """Kind to subject, of those that are about sandboxes."""
    return {each["kind"]: each["subject"] for each in said[which] if each["kind"].startswith(("sandbox", "runtime"))}


def call(box: Container, command: str, container_id: str, **more: str) -> dict[str, Any]:
    """The executable, as containerd calls it on the first node; in the network that containerd has."""
    folder = box.lab.files.node_path("node1", "/etc/cni/net.d")
    name = json.loads(next(folder.glob("*.conflist")).read_text())["name"]
    executable = box.lab.files.node_path("node1", "/opt/cni/bin") / "podwire"
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container_id,
        "CNI_NETNS": box.netns,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(executable.parent),
        **more,
    }
    config = json.dumps({"cniVersion": "1.0.0", "name": name, "type": "podwire"})
    done = subprocess.run([str(executable)], input=config, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout or "{}"))


def age(lab: LabState, container_id: str) -> None:
    """Makes the attachment an hour older: what is young has no sandbox yet, perhaps."""
    with closing(connect(lab.files.node_path("node1", "/run/podwire") / "journal.db", isolation_level=None)) as db:
        query = "SELECT body FROM attachment WHERE container_id = ?"
        (body,) = db.execute(query, (container_id,)).fetchone()
        row = json.loads(body)
        row["created"] -= 3600
        db.execute("UPDATE attachment SET body = ? WHERE container_id = ?", (json.dumps(row).encode(), container_id))


def test_an_attachment_whose_sandbox_is_gone_is_named_and_removed(lab: LabState, pods: Pods) -> None:
    pod = pods.run()
    age(lab, pod.sandbox)
    assert kinds(check(lab)) == {}, "a sandbox that runs is no difference, however old"
    lost = f"lost-{uuid.uuid4().hex}"
    with containers(lab, "node1", "lost", 2) as (box, bare):
        call(box, "ADD", lost, CNI_ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=lost")
        call(bare, "ADD", f"{lost}-bare")
        assert kinds(check(lab)) == {}, "it may be on its way"
        for each in (lost, f"{lost}-bare"):
            age(lab, each)
        found = check(lab)
        assert set(kinds(found)) == {"sandbox-gone"}, "who was attached without a pod has no sandbox"
        assert lost in attachments(lab, "node1"), "looking changes nothing"
        fixed = check(lab, "--fix")
        assert kinds(fixed) == kinds(found)
        assert kinds(fixed, "remaining") == {}
        assert any(lost in line for line in fixed["done"])
        process.wait_for(lambda: lost not in attachments(lab, "node1"), PATIENCE, "the attachment to be gone")
        assert pods.attached(pod)
        call(bare, "DEL", f"{lost}-bare")


def test_a_ready_sandbox_without_attachment_is_named_and_left_alone(
    lab: LabState, pods: Pods, containerd: Containerd
) -> None:
    pod = pods.run()
    config = {
        "metadata": {"name": "host", "namespace": "shop", "uid": str(uuid.uuid4())},
        "linux": {
            "cgroupParent": f"/{lab.name}",
            "securityContext": {"namespaceOptions": {"network": "NODE"}},
        },
    }
    host = containerd.cri.call("RunPodSandbox", config=config)["podSandboxId"]
    try:
        assert kinds(check(lab)) == {}, "a pod in the node's network needs no attachment"
        with containers(lab, "node1", "un", 1) as (box,):
            call(box, "DEL", pod.sandbox)
        found = check(lab, "--fix")
        assert kinds(found) == kinds(found, "remaining") == {"sandbox-unattached": pod.sandbox}
        assert pods.inspect(pod).ready
    finally:
        containerd.cri.stop(host)
        containerd.cri.remove(host)


def test_a_runtime_that_does_not_answer_is_a_difference_and_the_rest_is_compared(lab: LabState, pods: Pods) -> None:
    pod = pods.run()
    age(lab, pod.sandbox)
    for endpoint in ("unix:///run/containerd/nobody.sock", "tcp://192.0.2.1:1"):
        found = check(lab, "--fix", endpoint=endpoint)
        assert kinds(found) == {"runtime-unreachable": "runtime"}
    assert pods.attached(pod), "not to know the sandboxes is not to know that they are gone"
