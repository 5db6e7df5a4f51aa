"""The guard of a real daemon: between nodes, through a kill and a restart, counted where an operator looks."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time

from ipam_daemon.plan import mac_of
from podwire.lab import node, topology
from podwire.lab.state import LabState
from tests.netns.containers import PATIENCE, Answer, Container, add_again, containers, know_each_other
from tests.netns.frames import IPV4, Raw, ethernet, raw, udp
from tests.netns.guarded import without_learnt
from tests.netns.lab_fixtures import lab

__all__ = ["lab"]

STRANGER, TOKEN, LAST = "198.51.100.1", b"spoofed-or-not", b"and-that-was-all"
COUNTED = re.compile(r'^podwire_spoofed_packets_total\{reason="(\w+)"\} (\S+)$', re.MULTILINE)
SCRAPE = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9817/metrics', timeout=60).read().decode())"
VXLAN = 4789


def counted(lab: LabState) -> dict[str, int]:
    """What the daemon of node1 says was dropped, by reason."""
    text = topology.run(["nsenter", f"--net={lab.netns('node1')}", "--", "python3", "-IS", "-c", SCRAPE])
    return {reason: int(float(packets)) for reason, packets in COUNTED.findall(text)}


class Liar:
    """A pod of node1 with a raw socket, that sends to a pod of its node and to one of another."""

    def __init__(self, lab: LabState, here: Container, near: Container, far: Container) -> None:
        self.lab = lab
        said: Answer = here.call("ADD")
        self.address, self.mac = said.address, said.body["interfaces"][1]["mac"]
        self.gateway = said.body["ips"][0]["gateway"]
        beside = near.call("ADD")
        self.targets = {
            near: (beside.address, beside.body["interfaces"][1]["mac"]),
            far: (far.call("ADD").address, mac_of(ipaddress.ip_address(self.gateway))),
        }
        self._here = here

    def heard(self) -> list[str]:
        """Sends spoofs, and an honest frame after them, to each target. What of the spoofs arrived."""
        return asyncio.run(self._send())

    async def _send(self) -> list[str]:
        arrived = []
        mouth = await raw(self._here.netns)
        for target, (address, mac) in self.targets.items():
            ear: Raw = await raw(target.netns)
            for source in (STRANGER, self.gateway, address):
                mouth.send(ethernet(self.mac, mac, IPV4, udp(source, address, TOKEN + source.encode())))
            mouth.send(ethernet("02:00:00:00:00:99", mac, IPV4, udp(self.address, address, TOKEN + b"MAC")))
            mouth.send(ethernet(self.mac, mac, IPV4, udp(self.address, address, LAST)))
            arrived += [f"{target.name}: {frame!r}" for frame in await ear.hear(LAST) if TOKEN in frame]
            ear.close()
        mouth.close()
        return arrived


def test_no_spoof_gets_through_whatever_becomes_of_the_daemon(lab: LabState) -> None:
    with containers(lab, "node1", "liar", 3) as (here, near, late), containers(lab, "node2", "far", 1) as (far,):
        liar = Liar(know_each_other(lab), here, near, far)
        before = counted(lab)
        assert liar.heard() == []
        after = counted(lab)
        assert {reason: after[reason] - before[reason] for reason in ("address", "mac")} == {"address": 6, "mac": 2}
        node.kill_daemon(lab, "node1")
        assert liar.heard() == []
        node.start_daemon(lab, "node1")
        assert add_again(late, lambda *_: None, time.monotonic()).code == 0
        assert liar.heard() == []
        assert counted(lab)["address"] == after["address"] + 12, "a restart changes nothing"
        late.call("DEL")
        topology.run(["nsenter", f"--net={lab.netns('node1')}", "--", "nft", "delete", "table", "bridge", "podwire"])
        assert late.call("ADD").code == 0, "which brings it back"
        assert liar.heard() == []
        for box in (here, near, late, far):
            assert box.call("DEL").code == 0
        table = topology.run(
            ["nsenter", f"--net={lab.netns('node1')}", "--", "nft", "list", "table", "bridge", "podwire"]
        )
        assert '"pw' not in without_learnt(table).replace('"pw*"', "")


def test_vxlan_of_a_pod_reaches_no_node_and_is_counted(lab: LabState) -> None:
    with containers(lab, "node1", "tunnel", 1) as (box,):
        said = box.call("ADD")
        gateway = said.body["ips"][0]["gateway"]
        targets = [*(each.addresses[0] for each in lab.nodes), gateway]

        async def send() -> None:
            mouth = await raw(box.netns)
            for target in targets:
                payload = udp(said.address, target, bytes(8), port=VXLAN)
                mouth.send(
                    ethernet(said.body["interfaces"][1]["mac"], mac_of(ipaddress.ip_address(gateway)), IPV4, payload)
                )
            mouth.close()

        before = counted(lab)["vxlan"]
        asyncio.run(send())
        deadline = time.monotonic() + PATIENCE
        while counted(lab)["vxlan"] < before + len(targets) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert counted(lab)["vxlan"] == before + len(targets)
        box.call("DEL")
