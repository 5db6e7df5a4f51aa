"""Pod sandboxes as a kubelet runs them: containerd's CRI on two nodes, each with its own containerd and daemon."""

from __future__ import annotations

import pytest

from podwire.lab.state import LabState
from podwire.lab.talk import ask
from podwire.v1 import agent_pb2
from tests.runtime.agent import attachments
from tests.runtime.containerd import Containerd
from tests.runtime.pods import Pods, crowd, host_links, pings, seen_by


def test_runtime_and_daemon_tell_the_same_of_a_sandbox(lab: LabState, pods: Pods) -> None:
    for pod in (pods.run("node1"), pods.run("node2")):
        sandbox, attachment = pods.inspect(pod), attachments(lab, pod.node)[pod.sandbox]
        assert sandbox.ready
        assert [address.split("/")[0] for address in attachment.addresses] == [sandbox.address]
        assert attachment.netns == sandbox.netns
        named = (attachment.pod_namespace, attachment.pod_name, attachment.pod_uid)
        assert named == (pod.namespace, pod.name, pod.uid)
        assert (attachment.network, attachment.ifname) == ("podwire", "eth0")
        assert attachment.state == agent_pb2.Attachment.STATE_ATTACHED
        assert attachment.host_ifname in host_links(lab, pod.node)


def test_sandboxes_of_two_nodes_see_each_other_under_their_own_addresses(pods: Pods) -> None:
    first, second = (pods.inspect(pods.run(name)) for name in ("node1", "node2"))
    assert first.address != second.address
    for source, target in ((first, second), (second, first)):
        assert pings(source.process_netns, target.address)
        assert seen_by(target.process_netns, source.process_netns, target.address) == source.address


def test_a_sandbox_talks_to_a_pod_of_the_lab(pods: Pods, peer: str) -> None:
    sandbox = pods.inspect(pods.run("node1"))
    answer = ask(sandbox.process_netns, peer, 8080)
    assert (answer.pod, answer.node, answer.client, answer.untranslated) == ("peer", "node2", sandbox.address, True)


def test_stopping_frees_address_and_link_and_may_be_repeated(lab: LabState, pods: Pods, containerd: Containerd) -> None:
    pod = pods.run()
    address = pods.inspect(pod).address
    link = attachments(lab, "node1")[pod.sandbox].host_ifname
    pods.stop(pod)
    assert not pods.attached(pod)
    pods.wait_freed()
    assert link not in host_links(lab, "node1")
    pods.stop(pod)
    stopped = pods.inspect(pod)
    assert not stopped.ready
    pods.remove(pod)
    pods.remove(pod)
    assert containerd.cri.sandboxes() == []
    assert pods.inspect(pods.run()).address != address, "a freed address cools"


def test_twenty_pods_at_once(pods: Pods) -> None:
    crowd(pods, 20)


@pytest.mark.slow
def test_fifty_pods_at_once(pods: Pods) -> None:
    crowd(pods, 50)
