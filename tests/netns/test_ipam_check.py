"""`podwire ipam check` and `podwire node` on real nodes: whatever somebody takes apart has a name, and is repaired.

One lab of two nodes. The daemon of node1 looks at nothing by itself for an hour, so that what is repaired there is
`--fix`'s doing; node2's looks twice a second, so that it has to get by without. `podwire` asks a daemon from within
this process, since an interpreter takes longer to start than most answers do; where it asks etcd it needs the network
of the node, and is a process of its own, as it is once where nothing is wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from podwire.cli import main as cli
from podwire.lab import cluster, node
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import WHOLE, Container, containers, nothing_is_held, on_node, status, wait

PODWIRE = (sys.executable, "-m", "podwire.cli.main")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """Two nodes: the first repairs when it is told to, the second all the time."""
    state = LabState(name=f"check-{uuid4().hex[:6]}", nodes=plan_nodes(2))
    try:
        lab = cluster.up(state)
        for name, interval in (("node1", 3600), ("node2", 0.5)):
            file = lab.files.node_path(name, "/etc/podwire") / "ipamd.yaml"
            config = yaml.safe_load(file.read_text()) | {"reconcileInterval": interval, "cooldown": 0}
            file.write_text(yaml.safe_dump(config))
            node.stop_daemon(lab, name)
            node.start_daemon(lab, name)
            node.wait_daemon(lab, name)
        wait(lambda: status(lab, "node1").peers == status(lab, "node2").peers == 1, "the nodes to know each other")
        yield lab
    finally:
        cluster.down(state.name)


def asked(lab: LabState, name: str, *words: str) -> tuple[int, Any]:
    """`podwire` with these words of a node's daemon: its exit code, and what it printed. The command has less patience
    than a test on a machine that stalls."""
    said: list[tuple[int, str, str]] = []

    def is_answered() -> bool:
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = cli.main([*words, "--socket", str(lab.files.ipamd_socket(name)), "-o", "json"])
        said.append((code, out.getvalue(), errors.getvalue()))
        return "no daemon answers" not in errors.getvalue()

    wait(is_answered, f"an answer of {name}'s daemon")
    code, out, errors = said[-1]
    assert not errors, errors
    return code, json.loads(out)


class Check:
    """One `podwire ipam check` on a node."""

    def __init__(self, lab: LabState, name: str, *flags: str) -> None:
        self.code, self.body = asked(lab, name, "ipam", "check", *flags)

    @property
    def kinds(self) -> set[str]:
        return {each["kind"] for each in self.body["differences"]}

    @property
    def left(self) -> set[str]:
        return {each["kind"] for each in self.body["remaining"]}


@contextmanager
def journal(lab: LabState, name: str) -> Iterator[sqlite3.Connection]:
    """The journal of a running daemon, for somebody who should not write to it."""
    path = lab.files.node_path(name, "/run/podwire") / "journal.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


def etcd(lab: LabState, name: str, what: str) -> str:
    """A few lines of Python on `session` and `root`, run where etcd can be reached."""
    script = (
        "import asyncio, sys\nfrom podwire.etcd import EtcdOptions, EtcdSession\n"
        "from ipam_daemon.model import *\nfrom ipam_daemon.registry import ROOT as root\nimport msgspec\n"
        "async def main():\n"
        "    async with EtcdSession(EtcdOptions(endpoints=tuple(sys.argv[1:]))) as session:\n"
        + "".join(f"        {line}\n" for line in what.splitlines())
        + "asyncio.run(main())\n"
    )
    done = on_node(lab, name, sys.executable, "-c", script, *lab.etcd_endpoints)
    assert done.returncode == 0, done.stderr
    return done.stdout


def podwire_node(lab: LabState, on: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`podwire node …` with the configuration of a node's daemon."""
    config = lab.files.node_path(on, "/etc/podwire") / "ipamd.yaml"
    return on_node(lab, on, *PODWIRE, "node", *words, "--config", str(config))


def host_end(lab: LabState, name: str, box: Container) -> str:
    """The node's end of a container's wire."""
    _, said = asked(lab, name, "status")
    return next(str(each["hostIfname"]) for each in said["attachments"] if each.get("containerId") == box.name)


def used(lab: LabState, name: str) -> int:
    return sum(block.used for block in status(lab, name).blocks)


# --- what somebody does to the kernel ---------------------------------------------------------------------------------

_PEER_ROUTE = "$(ip -4 route show proto 80 | head -1 | cut -d' ' -f1)"
_VTEP = "$(ip -4 neigh show dev pw-vxlan nud permanent | head -1 | cut -d' ' -f1)"
_FDB = "$(bridge fdb show dev pw-vxlan | grep dst | head -1 | cut -d' ' -f1)"
_GATEWAY = "$(ip -4 -o addr show dev pw0 | head -1 | tr -s ' ' | cut -d' ' -f4)"
DAMAGES: dict[str, tuple[str, set[str]]] = {
    "the entries towards another node are deleted": (
        f"ip neigh del {_VTEP} dev pw-vxlan; bridge fdb del {_FDB} dev pw-vxlan; ip route del {_PEER_ROUTE} proto 80",
        {"neighbour-missing", "fdb-missing", "route-missing"},
    ),
    "the routes to the node's own pods are deleted": (
        "for cidr in $(ip -4 route show dev pw0 proto kernel | cut -d' ' -f1); do ip route del $cidr dev pw0; done",
        {"bridge-route"},
    ),
    "entries that no node has are added, and one is bent": (
        f"ip neigh replace {_VTEP} dev pw-vxlan lladdr 02:00:00:00:00:01 nud permanent;"
        "ip neigh add 10.99.0.2 dev pw-vxlan lladdr 02:00:00:00:00:02 nud permanent;"
        "bridge fdb add 02:00:00:00:00:02 dev pw-vxlan dst 172.31.0.99 self permanent;"
        "ip route add 10.99.0.0/24 via 10.99.0.2 dev pw-vxlan onlink proto 80",
        {"neighbour-changed", "neighbour-stale", "fdb-stale", "route-stale"},
    ),
    "addresses, ports and switches of the node are changed": (
        f"ip addr del {_GATEWAY} dev pw0; ip addr add 10.244.255.1/24 dev pw0; ip link set pw-vxlan down;"
        "ip link set pw0 type bridge nf_call_iptables 0; ip link set {wire} nomaster alias hello;"
        "echo 0 > /proc/sys/net/ipv4/ip_forward; nft flush table inet podwire;"
        "nft add element inet podwire local_blocks4 '{{ 198.51.100.0/24 }}'",
        {
            "bridge-address",
            "vxlan-changed",
            "bridge-changed",
            "port-detached",
            "alias-lost",
            "sysctl-changed",
            "rules-changed",
            "elements-changed",
            *("route-missing", "neighbour-missing"),  # a device that goes down loses them
        },
    ),
    "bridge, VXLAN device and table are deleted": (
        "ip link del pw0; ip link del pw-vxlan; nft delete table inet podwire",
        {
            *("bridge-missing", "port-detached", "vxlan-missing", "rules-changed", "elements-changed"),
            *("route-missing", "neighbour-missing", "fdb-missing", "sysctl-changed"),
        },
    ),
    "what a pod has besides its wire is taken away": (
        "nft flush set bridge podwire bound4; nft flush map inet podwire_hostports any4; ip link del {queue}",
        {"guard-elements", "host-port-missing", "limit-changed"},
    ),
    "what is nobody's is added": (
        "nft add element bridge podwire bound4 '{{ \"pwffffffffffff\" . 0a:58:0a:63:00:01 . 10.99.0.1 }}';"
        "nft add element inet podwire_hostports hairpin4 '{{ 10.99.0.1 . 10.99.0.1 }}';"
        "ip link add pwiffffffffffff type ifb",
        {"guard-stale", "host-port-stale", "orphan-queue"},
    ),
    "the tables of pods are deleted": (
        "nft delete table bridge podwire; nft delete table inet podwire_hostports",
        {"guard-changed", "host-ports-changed", "host-port-missing"},
    ),
    # again while a daemon that mends meanwhile has put it up, which keeps a kernel from giving it another name
    "a wire gets another name": (
        "until ip link set {wire} down && ip link set {wire} name mine up; do sleep 0.01; done",
        {"renamed-wire"},
    ),
}


def damage(lab: LabState, name: str, script: str, box: Container) -> None:
    wire = host_end(lab, name, box)
    words = script.replace("{{", "{").replace("}}", "}").replace("{wire}", wire).replace("{queue}", f"pwi{wire[2:]}")
    done = on_node(lab, name, "sh", "-ec", words)
    assert done.returncode == 0, done.stderr


def reaches(box: Container, address: str) -> bool:
    return box.run("ping", "-c1", "-W1", address).returncode == 0


@pytest.mark.parametrize("what", DAMAGES)
def test_what_somebody_does_to_the_kernel_is_named_and_fixed(lab: LabState, what: str) -> None:
    script, kinds = DAMAGES[what]
    with containers(lab, "node1", "fix", 1) as (box,), containers(lab, "node2", "far", 1) as (peer,):
        assert box.call("ADD", WHOLE).error == 0
        address = peer.call("ADD").address
        damage(lab, "node1", script, box)
        seen = Check(lab, "node1")
        assert (seen.code, seen.kinds) == (1, kinds)
        assert all(each["why"] and each["says"] and each["fix"] for each in seen.body["differences"])
        fixed = Check(lab, "node1", "--fix")
        assert (fixed.code, fixed.kinds, fixed.left) == (0, kinds, set())
        assert fixed.body["done"]
        wait(lambda: reaches(box, address), "the pods to reach each other")
        assert used(lab, "node1") == 1
        for each in (box, peer):
            assert each.call("DEL").code == 0
        wait(lambda: nothing_is_held(lab, "node1"), "node1 to be empty")


def test_reconcile_repairs_all_of_it_without_being_asked(lab: LabState) -> None:
    with containers(lab, "node2", "self", 1) as (box,), containers(lab, "node1", "near", 1) as (peer,):
        assert box.call("ADD", WHOLE).error == 0
        address = peer.call("ADD").address
        repaired: set[str] = set()  # the status shows the latest
        for what, (script, _) in DAMAGES.items():
            damage(lab, "node2", script, box)
            wait(lambda: Check(lab, "node2").code == 0, f"node2 to be well again after {what}")
            wait(lambda: reaches(box, address), f"the pods to reach each other after {what}")
            repaired |= {each.what for each in status(lab, "node2").repairs}
        assert repaired >= {"node", "port", "orphan-wire"}
        for each in (box, peer):
            assert each.call("DEL").code == 0
        wait(lambda: nothing_is_held(lab, "node2"), "node2 to be empty")


# --- what somebody does to the journal, the pods and the queue --------------------------------------------------------


def test_a_node_on_which_nothing_is_wrong_says_so(lab: LabState) -> None:
    with containers(lab, "node1", "well", 2) as boxes:
        for box in boxes:
            box.call("ADD")
        assert (Check(lab, "node1").code, Check(lab, "node1", "--fix").body["done"]) == (0, [])
        command = [*PODWIRE, "ipam", "check", "--socket", str(lab.files.ipamd_socket("node1"))]
        alone = subprocess.run(command, capture_output=True, text=True, check=False)
        said = "node1: etcd, journal, kernel and runtime say the same\n"
        assert (alone.returncode, alone.stdout, alone.stderr) == (0, said, "")
        for box in boxes:
            box.call("DEL")
        wait(lambda: nothing_is_held(lab, "node1"), "node1 to be empty")
    wrong = subprocess.run([*PODWIRE, "ipam", "chekc"], capture_output=True, check=False)
    assert wrong.returncode == 2


def test_a_wire_that_the_journal_lost_is_taken_in_with_its_address(lab: LabState) -> None:
    with containers(lab, "node1", "lost", 2) as (box, other):
        address = box.call("ADD").address
        with journal(lab, "node1") as db:
            db.execute("DELETE FROM attachment")
        assert Check(lab, "node1").kinds == {"orphan-wire", "address-leaked"}
        fixed = Check(lab, "node1", "--fix")
        assert (fixed.code, used(lab, "node1")) == (0, 1)
        assert other.call("ADD").address != address
        wait(lambda: reaches(box, status_gateway(lab, "node1")), "the gateway's answer")
        for each in (box, other):
            assert each.call("DEL").code == 0
        wait(lambda: nothing_is_held(lab, "node1"), "node1 to be empty")


def status_gateway(lab: LabState, name: str) -> str:
    network = status(lab, name).blocks[0].cidr
    return network.rsplit(".", 1)[0] + ".1"


def test_a_pod_that_is_gone_is_freed_and_one_whose_namespace_is_kept_is_not(lab: LabState) -> None:
    with containers(lab, "node1", "gone", 3) as (gone, kept, damaged):
        for each in (gone, kept, damaged):
            each.call("ADD")
        on_node(lab, "node1", "ip", "link", "del", host_end(lab, "node1", gone))
        sleeper = kept.start("sleep", "1000")
        try:
            subprocess.run(["umount", kept.netns], check=True)
            damaged.run("ip", "addr", "flush", "dev", "eth0")
            kinds = {"wire-gone", "namespace-gone", "pod-changed"}
            assert Check(lab, "node1").kinds == kinds
            fixed = Check(lab, "node1", "--fix")
            assert (fixed.code, fixed.left) == (1, kinds - {"wire-gone"})
            assert used(lab, "node1") == 2, "an address whose wire lives is not freed"
            assert damaged.call("DEL").code == 0
        finally:
            sleeper.kill()
            sleeper.communicate()
        wait(lambda: Check(lab, "node1", "--fix").code == 0, "the pod to be gone, and freed")
        wait(lambda: nothing_is_held(lab, "node1"), "node1 to be empty")


def test_what_is_left_of_adds_and_dels_is_finished(lab: LabState) -> None:
    with containers(lab, "node1", "half", 2) as (intent, released):
        for each in (intent, released):
            each.call("ADD")
        with journal(lab, "node1") as db:
            row, body = db.execute("SELECT container_id, body FROM attachment WHERE container_id = 'half0'").fetchone()
            adding = json.loads(body) | {"state": "adding"}
            db.execute("UPDATE attachment SET body = ? WHERE container_id = ?", (json.dumps(adding).encode(), row))
            name = host_end(lab, "node1", released)
            address = json.loads(db.execute("SELECT body FROM attachment WHERE container_id = 'half1'").fetchone()[0])[
                "addresses"
            ][0]
            db.execute("DELETE FROM attachment WHERE container_id = 'half1'")
            db.execute("INSERT INTO releasing VALUES (?, ?)", (name, address))
        queue = lab.files.node_path("node1", "/var/lib/podwire") / "del-queue"
        Path(queue / "junk.bad").write_bytes(b"junk")
        assert Check(lab, "node1").kinds == {"unfinished-add", "releasing-stuck", "del-unreadable"}
        fixed = Check(lab, "node1", "--fix")
        assert (fixed.code, fixed.left) == (1, {"del-unreadable"})
        wait(lambda: nothing_is_held(lab, "node1"), "node1 to be empty")
        (queue / "junk.bad").unlink()
        for each in (intent, released):
            assert each.call("DEL").code == 0


def test_two_rows_with_one_address_are_told_of_and_left(lab: LabState) -> None:
    with containers(lab, "node1", "two", 2) as (one, two):
        first = one.call("ADD").address
        second = two.call("ADD").address
        with journal(lab, "node1") as db:
            before = db.execute("SELECT body FROM attachment WHERE container_id = 'two1'").fetchone()[0]
            after = before.replace(second.encode(), first.encode())
            db.execute("UPDATE attachment SET body = ? WHERE container_id = 'two1'", (after,))
            seen = Check(lab, "node1")
            assert seen.kinds >= {"address-twice", "address-leaked"}
            assert all(not each["fix"] for each in seen.body["differences"] if each["kind"] == "address-twice")
            db.execute("UPDATE attachment SET body = ? WHERE container_id = 'two1'", (before,))
        assert Check(lab, "node1").code == 0
        for each in (one, two):
            assert each.call("DEL").code == 0
        wait(lambda: nothing_is_held(lab, "node1"), "node1 to be empty")


# --- what somebody does to etcd ---------------------------------------------------------------------------------------


def test_a_live_key_that_somebody_deleted_is_put_back(lab: LabState) -> None:
    etcd(lab, "node1", "await session.delete(root + 'live/node1')")
    live = "print(await session.get(root + 'live/node1'))"
    wait(lambda: "node1" in etcd(lab, "node1", live), "the live key to be there again")
    assert Check(lab, "node1").code == 0


def test_a_record_that_somebody_changed_is_written_again(lab: LabState) -> None:
    etcd(
        lab,
        "node1",
        "item = await session.get(root + 'nodes/node1')\n"
        "bent = msgspec.structs.replace(decode(item.value, NodeRecord), vtep_mac='02:00:00:00:00:09')\n"
        "await session.put(item.key, encode(bent))",
    )
    wait(lambda: "02:00:00:00:00:09" not in etcd(lab, "node1", "print(await session.get(root + 'nodes/node1'))"),
         "the record to be right again")  # fmt: skip
    assert Check(lab, "node1").code == 0


def nodes_of(lab: LabState) -> dict[str, dict[str, Any]]:
    listed = podwire_node(lab, "node1", "list", "-o", "json")
    assert listed.returncode == 0, listed.stderr
    return {each["name"]: each for each in json.loads(listed.stdout)}


def block_of(lab: LabState, name: str) -> list[str]:
    """A node's blocks in etcd; none while it is not known there."""
    return list(nodes_of(lab).get(name, {"blocks": []})["blocks"])


def stop(lab: LabState, name: str) -> None:
    """Ends a node's daemon. Its name goes with it, or with its lease when etcd did not hear."""
    node.stop_daemon(lab, name)
    wait(lambda: nodes_of(lab)[name]["live"] is False, f"{name} not to be live")


def test_a_node_that_comes_back_after_its_block_was_given_away_cuts_its_pods_off(lab: LabState) -> None:
    with containers(lab, "node2", "late", 2) as (box, new):
        box.call("ADD")
        (cidr,) = nodes_of(lab)["node2"]["blocks"]
        stop(lab, "node2")
        assert podwire_node(lab, "node1", "forget", "node2", "--yes").returncode == 0
        block = f"Block(cidr=ipaddress.ip_network('{cidr}'), pool='default', node='node9', node_id='9', generation=1)"
        etcd(lab, "node1", f"await session.put(root + 'blocks/{cidr}', encode({block}))")
        node.start_daemon(lab, "node2")
        wait(lambda: any("are cut off" in each for each in _reasons(lab, "node2")), "node2 to see it")
        assert not reaches(box, status_gateway(lab, "node2"))
        assert new.call("STATUS").error == 51
        assert Check(lab, "node2").kinds == {"address-stranded"}
        assert Check(lab, "node2", "--fix").left == {"address-stranded"}
        assert new.call("ADD").error == 11
        assert box.call("DEL").code == 0
        assert new.call("ADD").error == 0
        assert nodes_of(lab)["node2"]["blocks"] != [cidr]
        assert new.call("DEL").code == 0
        etcd(lab, "node1", f"await session.delete(root + 'blocks/{cidr}')")
        wait(lambda: nothing_is_held(lab, "node2") and Check(lab, "node2").code == 0, "node2 to be well")


def test_a_node_is_forgotten_when_it_is_gone_and_comes_back_to_its_block(lab: LabState) -> None:
    with containers(lab, "node2", "back", 1) as (box,), containers(lab, "node1", "stay", 1) as (peer,):
        address = box.call("ADD").address
        peer.call("ADD")
        before = nodes_of(lab)
        assert (before["node2"]["live"], before["node2"]["problems"]) == (True, [])
        refused = podwire_node(lab, "node1", "forget", "node2", "--yes")
        assert (refused.returncode, "node 'node2' lives" in refused.stderr) == (1, True)
        assert podwire_node(lab, "node1", "forget", "node7", "--yes").returncode == 1
        stop(lab, "node2")
        unsure = podwire_node(lab, "node1", "forget", "node2")
        assert (unsure.returncode, nodes_of(lab)["node2"]["blocks"]) == (1, before["node2"]["blocks"])
        forgotten = podwire_node(lab, "node1", "forget", "node2", "--yes")
        assert (forgotten.returncode, "node2" in nodes_of(lab)) == (0, False)
        wait(lambda: not on_node(lab, "node1", "ip", "route", "show", "proto", "80").stdout, "the routes to it to go")
        node.start_daemon(lab, "node2")
        node.wait_daemon(lab, "node2")
        wait(lambda: block_of(lab, "node2") == before["node2"]["blocks"], "it to have its block again")
        wait(lambda: reaches(peer, address), "its pod to be reached again")
        for each in (box, peer):
            assert each.call("DEL").code == 0


def _reasons(lab: LabState, name: str) -> list[str]:
    try:
        return list(status(lab, name).reasons)
    except AssertionError:  # not there yet
        return []


def test_status_says_who_the_peers_are_and_what_was_repaired(lab: LabState) -> None:
    command = [*PODWIRE, "status", "--socket", str(lab.files.ipamd_socket("node1"))]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "DELs wait" in shown.stdout
    assert "PEER" in shown.stdout
    plain = json.loads(subprocess.run([*command, "-o", "json"], capture_output=True, text=True, check=False).stdout)
    assert [each["name"] for each in plain["status"]["peerNodes"]] == ["node2"]
    assert {"waitingDels", "releasingWires", "obstacle", "repairs"} <= plain["status"].keys()
