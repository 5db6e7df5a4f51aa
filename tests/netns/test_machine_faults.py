"""Reboots, power cuts, nodes that lose their namespaces, which end the pods themselves; and a machine that slept."""

from __future__ import annotations

import ipaddress
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from ipam_daemon.model import Block, encode
from ipam_daemon.registry import ROOT
from podwire.lab import cluster, node, process
from podwire.v1.agent_pb2 import BlockStatus
from tests.netns.containers import Container, at_once, containers, on_node, status
from tests.netns.disks import FREE, LOSSLESS, ONCE, PATIENCE, Cast, Disks, Record, add_again, address, wait_empty


def lose_namespaces(disks: Disks, pods: list[Container]) -> None:
    """What a node's restart takes with it: pods, bridge, tunnel, rules."""
    for pod in pods:
        pod.run("ip", "link", "delete", "eth0")
    on_node(disks.lab, "node1", "ip", "link", "delete", "pw0")
    on_node(disks.lab, "node1", "ip", "link", "delete", "pw-vxlan")
    on_node(disks.lab, "node1", "nft", "flush", "ruleset")


@pytest.mark.fault(
    "node restarted: all namespaces gone, same boot", promises=("addresses of vanished pods are freed", ONCE, FREE)
)
def test_a_node_that_lost_its_namespaces_frees_what_nobody_has(disks: Disks, record_property: Record) -> None:
    with containers(disks.lab, "node1", "n", 4) as boxes:
        before = {box.call("ADD").address for box in boxes}
        disks.kill()
        lose_namespaces(disks, boxes)
        began = time.monotonic()
        disks.restart()
        assert boxes[0].call("DEL").error == 0
        assert address(boxes[0], record_property, began) not in before
        process.wait_for(lambda: disks.held() == 1, PATIENCE, "the reconciler to free the others")
        assert {box.call("DEL").error for box in boxes} == {0}
        wait_empty(disks)


@pytest.mark.fault(
    "reboot", promises=("addresses of the time before cool", "rotation goes on", "DELs of the time before are done")
)
def test_after_a_reboot_addresses_of_the_time_before_are_not_reused_at_once(
    disks: Disks, tmp_path: Path, record_property: Record
) -> None:
    fake = tmp_path / "boot_id"
    fake.write_text(f"{uuid.uuid4()}\n")
    kernels = "/proc/sys/kernel/random/boot_id"
    with containers(disks.lab, "node1", "r", 4) as boxes:
        before = [box.call("ADD").address for box in boxes]
        held = disks.state / "held.json"
        process.wait_for(lambda: f'"{before[-1]}"' in held.read_text(), PATIENCE, "the addresses to be written down")
        disks.kill()
        assert boxes[0].call("DEL").error == 0
        for each in disks.run.glob("journal.db*"):  # /run is memory
            each.unlink()
        lose_namespaces(disks, boxes)
        assert on_node(disks.lab, "node1", "mount", "--bind", str(fake), kernels).returncode == 0
        try:
            began = time.monotonic()
            disks.restart()
            assert not list((disks.state / "del-queue").iterdir())
            assert sum(block.cooling for block in status(disks.lab, "node1").blocks) >= 4
            after = [address(box, record_property, began) for box in boxes]
            assert set(after).isdisjoint(before)
            at_once([partial(box.call, "DEL") for box in boxes])
            wait_empty(disks)
        finally:
            disks.kill()
            on_node(disks.lab, "node1", "umount", kernels)
            disks.restart()


@contextmanager
def rebooted(disks: Disks, pods: list[Container], boot_id: Path, meanwhile: Callable[[], None]) -> Iterator[None]:
    """A power cut and another boot, with etcd away from before the daemon starts until after the block.

    `meanwhile` happens to etcd while the node is off.
    """
    boot_id.write_text(f"{uuid.uuid4()}\n")
    kernels = "/proc/sys/kernel/random/boot_id"
    disks.kill()
    for each in disks.run.glob("journal.db*"):  # /run is memory
        each.unlink()
    lose_namespaces(disks, pods)
    meanwhile()
    etcd = process.recorded(disks.lab.files, cluster.ETCD)
    assert etcd is not None
    etcd.kill()
    assert etcd.wait_gone(PATIENCE)
    assert on_node(disks.lab, "node1", "mount", "--bind", str(boot_id), kernels).returncode == 0
    try:
        yield
    finally:
        cluster.start_etcd(disks.lab)
        disks.kill()
        on_node(disks.lab, "node1", "umount", kernels)
        disks.restart()


def written_down(disks: Disks) -> bool:
    """Whether the file for after a reboot has the node's blocks."""
    return all(f'"{block.cidr}"' in (disks.state / "held.json").read_text() for block in blocks(disks))


def blocks(disks: Disks) -> list[BlockStatus]:
    return list(status(disks.lab, "node1").blocks)


@pytest.mark.fault(
    "reboot while etcd is away",
    promises=("ADD and DEL go on in the node's blocks", ONCE, FREE, "the other nodes are reached once etcd is back"),
)
def test_after_a_power_cut_pods_start_before_etcd_is_back(
    disks: Disks, tmp_path: Path, record_property: Record
) -> None:
    lab = disks.lab
    with containers(lab, "node1", "w", 4) as boxes, containers(lab, "node2", "x", 1) as (peer,):
        far = peer.call("ADD").address
        before = [box.call("ADD").address for box in boxes]
        held = disks.state / "held.json"
        process.wait_for(lambda: f'"{before[-1]}"' in held.read_text(), PATIENCE, "the addresses to be written down")
        assert written_down(disks)
        had = [each.cidr for each in blocks(disks)]
        with rebooted(disks, boxes, tmp_path / "boot_id", lambda: None):
            began = time.monotonic()
            node.start_daemon(lab, "node1")
            after = [add_again(boxes[0], record_property, began), *(box.call("ADD").address for box in boxes[1:])]
            assert set(after).isdisjoint(before)
            assert [each.cidr for each in blocks(disks)] == had
            assert boxes[0].run("ping", "-c1", "-W10", after[1]).returncode == 0
            assert boxes[3].call("DEL").code == 0
            cluster.start_etcd(lab)
            process.wait_for(lambda: status(lab, "node1").peers == 1, PATIENCE, "the other node")
            assert boxes[0].run("ping", "-c1", "-W10", far).returncode == 0
            assert [each.cidr for each in blocks(disks)] == had
            at_once([partial(box.call, "DEL") for box in (*boxes, peer)])
            wait_empty(disks)


@pytest.mark.fault(
    "reboot while etcd is away, the node was forgotten meanwhile",
    promises=("who has the block keeps it", "pods in it are cut off once etcd is back", "ADD works when they are gone"),
)
def test_a_block_that_went_to_another_during_a_power_cut_is_given_up(
    disks: Disks, tmp_path: Path, record_property: Record
) -> None:
    lab = disks.lab
    process.wait_for(lambda: written_down(disks), PATIENCE, "the blocks to be written down")
    (lost,) = [each.cidr for each in blocks(disks)]
    etcdctl = partial(on_node, lab, "node2", "env", "ETCDCTL_API=3", "etcdctl", "--endpoints", lab.etcd_endpoints[0])
    taken = Block(cidr=ipaddress.ip_network(lost), pool="default", node="other", node_id="id-other", generation=1)

    def give_away() -> None:
        """What `node forget` and another node's claim leave behind."""
        for key in ("nodes/node1", "live/node1", f"blocks/{lost}"):
            assert etcdctl("del", ROOT + key).returncode == 0
        etcdctl("put", f"{ROOT}forgotten/node1", '{"at": 1}')
        assert etcdctl("put", f"{ROOT}blocks/{lost}", encode(taken).decode()).returncode == 0

    with containers(lab, "node1", "y", 2) as (first, second), rebooted(disks, [], tmp_path / "boot_id", give_away):
        node.start_daemon(lab, "node1")
        address = add_again(first, lambda *_: None, time.monotonic())
        assert ipaddress.ip_address(address) in ipaddress.ip_network(lost), "nobody could know"
        back = time.monotonic()
        cluster.start_etcd(lab)
        process.wait_for(lambda: second.call("STATUS").error == 51, PATIENCE, "the node to find out")
        assert second.call("ADD").error == 11
        assert first.run("ping", "-c1", "-W1", str(ipaddress.ip_network(lost)[1])).returncode != 0, "it is cut off"
        assert first.call("DEL").code == 0
        fresh = add_again(second, record_property, back)
        assert ipaddress.ip_address(fresh) not in ipaddress.ip_network(lost)
        assert f'"{lost}"' not in (disks.state / "held.json").read_text()
        assert b"id-other" in etcdctl("get", "--print-value-only", f"{ROOT}blocks/{lost}").stdout.encode()
        assert second.call("DEL").code == 0
        wait_empty(disks)
    etcdctl("del", f"{ROOT}blocks/{lost}")


@pytest.mark.fault(
    "machine slept, its lease ran out", promises=("the name is taken again", "DEL and ADD go on", LOSSLESS)
)
def test_a_machine_that_slept_takes_its_name_again(disks: Disks, cast: Cast, record_property: Record) -> None:
    running = process.recorded(disks.lab.files, node.daemon_role("node1"))
    assert running is not None
    running.kill(19)  # SIGSTOP
    etcdctl = partial(on_node, disks.lab, "node1", "etcdctl", "--endpoints", disks.lab.etcd_endpoints[0])
    try:
        for each in etcdctl("lease", "list").stdout.split()[3:]:  # unless it has run out by itself
            if "live/node1" in etcdctl("lease", "timetolive", each, "--keys").stdout:
                etcdctl("lease", "revoke", each)
        process.wait_for(
            lambda: "node2" in (live := etcdctl("get", "--prefix", "/podwire/v1/live/").stdout) and "node1" not in live,
            PATIENCE,
            "the name to be free",
        )
    finally:
        began = time.monotonic()
        running.kill(18)  # SIGCONT
    address(cast.boxes[0], record_property, began)
    process.wait_for(
        lambda: "node1" in etcdctl("get", "--prefix", "/podwire/v1/live/").stdout,
        PATIENCE,
        "the name to be taken again",
    )
    assert disks.runs()
