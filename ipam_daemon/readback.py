"""The node's namespace, read back for an audit: its links, the entries towards other nodes, our nft tables, sysctls.

Two dumps (links, addresses) serve all pods, and one a family the routes over the bridge. Nothing is changed, and
nothing of others is looked at but to be told from ours.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec

from ipam_daemon.connected import connected_routes
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.facts import Kernel, Link
from ipam_daemon.firewall import Firewall
from ipam_daemon.guard import read_guard
from ipam_daemon.hostport_table import read_table
from ipam_daemon.model import Interface, Network
from ipam_daemon.netlink import NetlinkThread, index_of
from ipam_daemon.peers import Peers
from ipam_daemon.plan import BRIDGE, PeersPlan
from ipam_daemon.wires import DOOMED_GROUP


async def read_kernel(
    thread: NetlinkThread, firewall: Firewall, sysctls: Iterable[str], pools: Iterable[Network] = ()
) -> Kernel:
    """What the kernel has. `sysctls` are paths below /proc/sys, `pools` the cluster's. Raises PlumbingFailed."""
    return Kernel(
        links=await thread.run(_links, thread),
        peers=await thread.run(_peers, thread, tuple(pools)),
        firewall=await firewall.read(),
        sysctls=await thread.run(_sysctls, tuple(sysctls)),
        guard=await thread.run(lambda: read_guard(thread.nftables)),
        host_ports=await thread.run(lambda: read_table(thread.nftables)),
    )


def _links(thread: NetlinkThread) -> dict[str, Link]:
    addresses: dict[int, set[Interface]] = defaultdict(set)
    for each in thread.host.get_addr():
        addresses[each["index"]].add(ipaddress.ip_interface(f"{each.get('address')}/{each['prefixlen']}"))
    links = list(thread.host.get_links())
    names = {each["index"]: str(each.get("ifname")) for each in links}
    found = {
        names[each["index"]]: _link(each, names.get(each.get("master"), ""), frozenset(addresses[each["index"]]))
        for each in links
    }
    if BRIDGE in found and (index := index_of(BRIDGE)):
        versions = {each.version for each in found[BRIDGE].addresses}
        found[BRIDGE] = msgspec.structs.replace(found[BRIDGE], connected=connected_routes(index, versions))
    return found


def _link(link: Any, master: str, addresses: frozenset[Interface]) -> Link:
    kind, data = link.get(("linkinfo", "kind")) or "", link.get(("linkinfo", "data"))
    tunnel, filtered = "", False
    if kind == "vxlan":
        local = data.get("vxlan_local") or data.get("vxlan_local6")
        tunnel = f"{data.get('vxlan_id')} {data.get('vxlan_port')} {local}"
    if kind == "bridge":
        filtered = bool(data.get("br_nf_call_iptables") and data.get("br_nf_call_ip6tables"))
    return Link(
        name=str(link.get("ifname")),
        kind=kind,
        mac=link.get("address") or "",
        mtu=int(link.get("mtu") or 0),
        up=link.get("state") == "up",
        master=master,
        doomed=link.get("group") == DOOMED_GROUP,
        alias=link.get("ifalias") or "",
        tunnel=tunnel,
        filtered=filtered,
        addresses=addresses,
    )


def _peers(thread: NetlinkThread, pools: Iterable[Network]) -> PeersPlan:
    with contextlib.suppress(PlumbingFailed):  # without the device there are none
        return Peers(thread, pools=pools).read()
    return PeersPlan(neighbours={}, fdb={}, routes={})


def _sysctls(paths: Iterable[str]) -> dict[str, str]:
    found = {}
    for path in paths:
        with contextlib.suppress(OSError), open(f"/proc/sys/{path}", encoding="ascii") as file:
            found[path] = file.read().strip()
    return found
