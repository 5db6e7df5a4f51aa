"""nft elements of nodes that come and go: sent by themselves, and the whole table mended when that does not work."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest

from ipam_daemon.firewall import Firewall
from ipam_daemon.plan import FirewallPlan
from ipam_daemon.ruleset import desired
from tests.netns.node_fixtures import Node, play


def plan(*vteps: str) -> FirewallPlan:
    return FirewallPlan(
        local_blocks=frozenset({ipaddress.ip_network("10.244.1.0/24")}),
        unmasqueraded=frozenset({ipaddress.ip_network("10.244.0.0/16")}),
        vteps=frozenset(map(ipaddress.ip_address, vteps)),
        vxlan_port=4789,
    )


BEFORE = plan("192.0.2.2", "192.0.2.3", "2001:db8::2")
AFTER = plan("192.0.2.3", "192.0.2.4", "2001:db8::3")
MEANWHILE = {
    "nobody touched it": "",
    "somebody deleted the element that goes": "delete element inet podwire vteps4 { 192.0.2.2 }",
    "somebody added the element that comes": "add element inet podwire vteps4 { 192.0.2.4 }",
    "somebody deleted the table": "delete table inet podwire",
}


@pytest.mark.parametrize("script", MEANWHILE.values(), ids=MEANWHILE.keys())
def test_nodes_come_and_go(script: str) -> None:
    async def story() -> None:
        async with Node() as node:
            firewall = Firewall(("ip", "netns", "exec", node.name, "nft"))
            await firewall.ensure(BEFORE)
            node.run("nft", "-f", "-", stdin=script)
            assert await firewall.ensure(AFTER, BEFORE)
            assert await firewall.read() == desired(AFTER)

    play(story)


def test_where_more_differs_the_whole_table_is_looked_at() -> None:
    async def story() -> None:
        async with Node() as node:
            firewall = Firewall(("ip", "netns", "exec", node.name, "nft"))
            await firewall.ensure(BEFORE)
            after = msgspec.structs.replace(AFTER, local_blocks=frozenset({ipaddress.ip_network("10.244.9.0/24")}))
            assert await firewall.ensure(after, BEFORE)
            assert await firewall.read() == desired(after)

    play(story)
