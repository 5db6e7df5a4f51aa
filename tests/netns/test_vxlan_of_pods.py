"""A pod that sends VXLAN to a machine, and goes on when the machine becomes a node, or the port that of VXLAN.

Only the first packet of a connection meets the rules (ipam_daemon/ruleset.py), so the daemon has to forget what is
older than the node. The pod sends from one port, which is one connection to conntrack, however long it goes on.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from podwire.lab import node, process, topology
from podwire.lab.state import LabState
from tests.netns.containers import PATIENCE, containers, on_node, status
from tests.netns.lab_fixtures import lab

__all__ = ["lab"]

_SEND = """import socket, sys, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("", 5555))
for _ in range(5000):
    one.sendto(b"frame", (sys.argv[1], int(sys.argv[2])))
    time.sleep(0.02)
"""
_HEAR = """import socket, struct, sys
raw = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
raw.bind((sys.argv[1], 0))
raw.settimeout(float(sys.argv[2]))
try:
    while True:
        packet = raw.recv(2048)
        if packet[9] == 17 and packet[28:] == b"frame":
            print("heard")
            break
except TimeoutError:
    print("nothing")
"""


@contextmanager
def sending(command: list[str]) -> Iterator[None]:
    running = subprocess.Popen(command)
    try:
        yield
    finally:
        running.kill()
        running.wait()


def hears(lab: LabState, seconds: float) -> bool:
    """Whether one of the pod's frames reaches node2 within so long."""
    enter = ["nsenter", f"--net={lab.netns('node2')}", "--", "python3", "-IS", "-c", _HEAR]
    return topology.run([*enter, "eth0", str(seconds)]).strip() == "heard"


def podwire(lab: LabState, *words: str) -> None:
    """The command, on node1."""
    config = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
    done = on_node(lab, "node1", *node.PYTHON, "-m", "podwire.cli.main", *words, "--config", str(config))
    assert done.returncode == 0, done.stderr


def test_what_a_pod_sends_as_vxlan_ends_when_its_destination_becomes_a_node(lab: LabState) -> None:
    address = lab.nodes[1].addresses[0]
    with containers(lab, "node1", "liar", 1) as (liar,):
        assert liar.call("ADD").code == 0
        try:
            node.stop_daemon(lab, "node2")
            podwire(lab, "node", "forget", "node2", "--yes")
            process.wait_for(lambda: status(lab, "node1").peers == 1, PATIENCE, "node1 to have forgotten node2")
            with sending(["nsenter", f"--net={liar.netns}", "--", "python3", "-IS", "-c", _SEND, address, "4789"]):
                assert hears(lab, PATIENCE), "it is any machine's port while it is no node's"
                node.start_daemon(lab, "node2")
                node.wait_daemon(lab, "node2")
                process.wait_for(lambda: status(lab, "node1").peers == 2, PATIENCE, "node1 to know node2 again")
                process.wait_for(lambda: not hears(lab, 1.0), PATIENCE, "the connection to be forgotten")
        finally:
            liar.call("DEL")


def test_what_a_pod_sends_to_a_nodes_port_ends_when_it_becomes_that_of_vxlan(lab: LabState) -> None:
    address = lab.nodes[1].addresses[0]
    with containers(lab, "node1", "liar", 1) as (liar,):
        assert liar.call("ADD").code == 0
        process.wait_for(lambda: status(lab, "node1").peers == 2, PATIENCE, "node1 to know the others")
        try:
            with sending(["nsenter", f"--net={liar.netns}", "--", "python3", "-IS", "-c", _SEND, address, "8472"]):
                assert hears(lab, PATIENCE), "it is any port of the node's while it is not that of VXLAN"
                podwire(lab, "cluster", "set", "--port", "8472")
                process.wait_for(lambda: not hears(lab, 1.0), PATIENCE, "the connection to be forgotten")
        finally:
            podwire(lab, "cluster", "set", "--port", "4789")
            liar.call("DEL")
