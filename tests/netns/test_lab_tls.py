"""A lab whose etcd speaks TLS only: three members, each with a certificate, and a node of its own name each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from podwire.lab import certificates, cluster, process, state
from podwire.lab.state import LabState
from tests.etcd.guarded import need
from tests.netns.containers import add_again, containers, know_each_other, on_node, status
from tests.netns.lab_fixtures import fresh_name

PATIENCE = 90
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    need("openssl", "etcdctl")
    made = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(2), etcd_members=3, etcd_tls=True))
    try:
        yield know_each_other(made)
    finally:
        cluster.down(made.name)


def etcdctl(lab: LabState, *words: str, within: int = 2) -> subprocess.CompletedProcess[str]:
    """As anybody on the underlay who has an etcdctl. `within` so many seconds: who is refused asks for as long."""
    command = ["env", "ETCDCTL_API=3", "etcdctl", f"--command-timeout={within}s", f"--dial-timeout={within}s"]
    where = ["--endpoints", lab.etcd_endpoints[0]]
    return on_node(lab, "node2", *command, *where, *words)


def test_pods_of_two_nodes_reach_each_other_when_all_of_etcd_speaks_tls(lab: LabState) -> None:
    with containers(lab, "node1", "tls", 1) as (one,), containers(lab, "node2", "far", 1) as (other,):
        assert one.call("ADD").error == 0
        address = other.call("ADD").address
        assert one.run("ping", "-c1", "-W30", address).returncode == 0
        assert {each.call("DEL").code for each in (one, other)} == {0}
    assert all(endpoint.startswith("https://") for endpoint in lab.etcd_endpoints)


def test_nobody_gets_in_without_a_certificate(lab: LabState) -> None:
    own = certificates.node_folder(lab, lab.node("node2"))
    ours = ("--cert", str(own / "node.pem"), "--key", str(own / "node.key"))
    assert etcdctl(lab, "--cacert", str(own / "ca.pem"), *ours, "get", "/", within=60).returncode == 0
    assert etcdctl(lab, "--cacert", str(own / "ca.pem"), "get", "/").returncode != 0
    assert etcdctl(lab, "get", "/").returncode != 0
    peer = lab.etcd[1].peer_url.removeprefix("https://")
    hello = ["openssl", "s_client", "-brief", "-tls1_2", "-CAfile", str(own / "ca.pem"), "-connect", peer]
    assert on_node(lab, "node2", *hello).returncode != 0, "with TLS 1.3 a client does not hear of it in the handshake"
    mine = ["-cert", str(own / "node.pem"), "-key", str(own / "node.key")]
    assert on_node(lab, "node2", *hello, *mine).returncode == 0


def test_the_node_list_is_read_with_the_nodes_own_certificate(lab: LabState) -> None:
    config = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
    command = [sys.executable, "-m", "podwire.cli.main", "node", "list", "-o", "json", "--config", str(config)]
    listed = on_node(lab, "node1", *command)
    assert listed.returncode == 0, listed.stderr
    assert [each["name"] for each in json.loads(listed.stdout)] == ["node1", "node2"]


@pytest.mark.fault("an etcd member with TLS dies", promises=("another is asked", "ADD and DEL go on"))
def test_a_member_dies_and_the_others_are_asked_over_tls(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "fail", 1) as (box,):
        cluster.kill_etcd(lab, "etcd1")
        try:
            add_again(box, record_property, time.monotonic())
            process.wait_for(lambda: status(lab, "node1").etcd.connected, PATIENCE, "another member")
            assert box.call("DEL").code == 0
        finally:
            cluster.start_etcd(lab)
