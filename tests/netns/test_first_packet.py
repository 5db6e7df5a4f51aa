"""A wire works when ADD says so, also on a busy machine.

The node's end of a new wire drops what it is given until the kernel's link watch has run, in a worker that a busy
machine lets wait. The pod then waits a second for the answer to its first ARP request. Here it asks only once.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipam_daemon.allocator import Layout
from ipam_daemon.model import Attachment
from ipam_daemon.plan import gateways, plan_attachment
from podwire.netns import inside, open_netns
from tests.netns.node_fixtures import Engine, block, call, engine, play, pods

PODS = 50
SECONDS = 20  # in which also a slow machine answers, if nothing is lost


@contextmanager
def busy(processes: int = 4) -> Iterator[None]:
    """Every core has something to do."""
    spinners = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(processes)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def attach_and_send(it: Engine, attachment: Attachment) -> str:
    """What the pod's first datagram to a closed port of its gateway meets, the moment the wire is made.

    Neither the datagram nor the ARP request before it is sent again: TCP would, and would hide what was lost.
    """
    gateway = str(Layout.of(it.cidr).gateway)
    fd = open_netns(attachment.netns)
    try:
        with inside(fd):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.settimeout(SECONDS)
            it.wires.attach(attachment, gateways([block(it.cidr)]))
            with inside(fd):
                neighbours = Path("/proc/sys/net/ipv4/neigh/eth0")
                (neighbours / "mcast_solicit").write_text("1")
                (neighbours / "retrans_time_ms").write_text(str(SECONDS * 1000))
            try:
                client.connect((gateway, 9))
                client.send(b"?")
                client.recv(1)
            except OSError as error:
                return type(error).__name__
            return "an answer"
    finally:
        os.close(fd)


def test_the_first_packet_of_a_pod_is_answered(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path, "10.244.1.0/24") as it:
            with pods(PODS) as boxes, busy():
                for number, box in enumerate(boxes):
                    addresses = it.attachments.addresses.allocator.allocate(time.time())
                    attachment = plan_attachment(call("ADD", f"box{number}", box.path), addresses, 1450, time.time())
                    met = await it.node.thread.run(attach_and_send, it, attachment)
                    assert met == "ConnectionRefusedError", f"the first packet of pod {number}"

    play(story)
