"""The node's own devices: the bridge that pods hang on and the VXLAN device towards the other nodes.

Both are brought to their plan level by level: what is right already is not touched, so a restart changes nothing and
drops nothing. A device of our name with another shape (VNI, port, underlay address) is made anew, because the kernel
cannot change those in place, and the one that there is goes when the new one is there: a VNI that somebody else has
leaves the node with the tunnels that it had. A device of our name and another kind is somebody else's, and is refused.

A gateway of IPv6 is there at once, like a pod's address: there is no duplicate address detection on the bridge, whose
addresses nobody else has, or the first packets to a pod would wait seconds for a source of neighbour solicitations.
Nothing that a pod says makes the node's routes (accept_ra). A node that begins to forward would stop to listen to the
routers of its own underlay, and lose the default route that it has from them: where it listened, it goes on to.

Each gateway's block is a route over the bridge, which the kernel makes with the address (ipam_daemon/connected.py).

Traffic between pods of one node must cross the node's firewall: the bridge's own `nf_call_iptables` and
`nf_call_ip6tables` say so for this bridge alone, whatever the global sysctls are.

Every function here runs on the netlink thread.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from ipam_daemon.connected import add_connected_route, connected_routes
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.model import Address
from ipam_daemon.netlink import NetlinkThread, index_of, naming, read_sysctl, tolerating, write_sysctl
from ipam_daemon.plan import BridgePlan, VxlanPlan
from ipam_daemon.rtnl import add_address
from ipam_daemon.tc_program import add_clsact

_UP = "up"
_FORWARDED_GROUPS = 0xFFF8
"""The reserved addresses 01:80:c2:00:00:03 to :0f, as a mask: a bridge that keeps such a frame to itself learns its
sender's MAC before anybody has looked at it (IEEE 802.1D, table 7-10). The kernel allows no mask for :00 to :02 here;
for a pod's port it does (wires.FORWARDED_GROUPS)."""


class Devices:
    """Bridge and VXLAN device of this node."""

    def __init__(self, thread: NetlinkThread) -> None:
        self._thread = thread

    def ensure_bridge(self, plan: BridgePlan) -> list[str]:
        """Brings the bridge to its plan. Returns what had to be done, in words; empty when all was well."""
        done: list[str] = []
        if not index_of(plan.name):
            with naming(f"bridge {plan.name}"):
                self._thread.host.link(
                    "add",
                    ifname=plan.name,
                    kind="bridge",
                    address=plan.mac,
                    br_nf_call_iptables=1,
                    br_nf_call_ip6tables=1,
                    br_group_fwd_mask=_FORWARDED_GROUPS,
                )
                # Until it has been set, a bridge's MTU follows its ports, and is another when the last one has gone.
                # Setting what it has already does not count: it must not be made with this MTU (br_change_mtu).
                self._thread.host.link("set", index=index_of(plan.name), mtu=plan.mtu)
            done.append(f"made bridge {plan.name}")
        index = index_of(plan.name)
        link = self._link(index)
        _refuse_foreign(link, plan.name, "bridge")
        data = link.get(("linkinfo", "data")) or {}
        if not (data.get("br_nf_call_iptables") and data.get("br_nf_call_ip6tables")):
            with naming(f"nf_call_iptables of {plan.name}"):
                self._thread.host.link("set", index=index, kind="bridge", br_nf_call_iptables=1, br_nf_call_ip6tables=1)
            done.append(f"set nf_call_iptables of {plan.name}")
        if data.get("br_group_fwd_mask") != _FORWARDED_GROUPS:
            with naming(f"group_fwd_mask of {plan.name}"):
                self._thread.host.link("set", index=index, kind="bridge", br_group_fwd_mask=_FORWARDED_GROUPS)
            done.append(f"set group_fwd_mask of {plan.name}")
        for path, value in wanted_sysctls(plan).items():
            write_sysctl(path, value)
        done += self._ensure_common(index, link, plan)
        return done + self._ensure_routes(index, plan)

    def ensure_vxlan(self, plan: VxlanPlan) -> list[str]:
        """Brings the VXLAN device to its plan. Returns what had to be done, in words."""
        done = self._remove_beside(plan)
        index = index_of(plan.name)
        if index:
            link = self._link(index)
            _refuse_foreign(link, plan.name, "vxlan")
            if not _same_tunnel(link, plan):
                self._replace_vxlan(link, plan)
                done += [f"removed {plan.name}, which had another shape", f"made {plan.name}"]
        else:
            self._make_vxlan(plan, plan.name)
            done.append(f"made {plan.name}")
        index = index_of(plan.name)
        for path, value in vxlan_sysctls(plan).items():
            write_sysctl(path, value)
        return done + self._ensure_common(index, self._link(index), plan)

    def prepare_underlay(self, names: Iterable[str], forwards: Iterable[int], direct: bool) -> list[str]:
        """Lets the underlay's interfaces do what the node is going to need. Returns what had to be done, in words.

        Before a node forwards IPv6 (`forwards`: the families that it is about to), it learns from routers only where it
        would still when it does: the kernel drops what it has learnt at that moment (ip-sysctl: accept_ra). Where
        packets of pods come `direct`, their way back may be the VXLAN device while the backend changes: they are taken
        if there is any way back (rp_filter 2), where only the one that they came by was taken.
        """
        done: list[str] = []
        begins = 6 in tuple(forwards) and read_sysctl("net/ipv6/conf/all/forwarding") == "0"
        strict_anyway = read_sysctl("net/ipv4/conf/all/rp_filter") == "1"
        for name in names:
            accept, loose = f"net/ipv6/conf/{name}/accept_ra", f"net/ipv4/conf/{name}/rp_filter"
            if begins and read_sysctl(accept) == "1":
                write_sysctl(accept, "2")
                done.append(f"{name} goes on to learn from routers (accept_ra 2)")
            found = read_sysctl(loose)
            if direct and (found == "1" or (found == "0" and strict_anyway)):
                write_sysctl(loose, "2")
                done.append(f"{name} takes packets that have another way back (rp_filter 2)")
        return done

    def _replace_vxlan(self, link: Any, plan: VxlanPlan) -> None:
        """Makes the device anew. It has another index, and nothing of the peers yet.

        A shape that cannot be had, because another has its VNI or port, must not cost the one that there is: so it is
        made beside that one first, and set up. Only when nothing but the address differs the kernel would not have
        both; then nobody else can have what the one in place has.
        """
        takes_turns = _claim_of(link) == (plan.vni, plan.port, plan.local.version)
        if not takes_turns:
            self._make_vxlan(plan, _beside(plan), state=_UP)
        with naming(f"replacing {plan.name}"):
            self._thread.host.link("del", index=link["index"])
            if not takes_turns:
                index = index_of(_beside(plan))
                self._thread.host.link("set", index=index, state="down")  # older kernels rename nothing that is up
                self._thread.host.link("set", index=index, ifname=plan.name)
        if takes_turns:
            self._make_vxlan(plan, plan.name)

    def _remove_beside(self, plan: VxlanPlan) -> list[str]:
        """What a daemon that was killed while it replaced the device has left."""
        name = _beside(plan)
        index = index_of(name)
        if not index:
            return []
        _refuse_foreign(self._link(index), name, "vxlan")
        with naming(f"removing {name}"):
            self._thread.host.link("del", index=index)
        return [f"removed {name}, which was left over"]

    def _make_vxlan(self, plan: VxlanPlan, name: str, **more: str) -> None:
        local = {"vxlan_local" if plan.local.version == 4 else "vxlan_local6": str(plan.local)}
        what = f"VXLAN device {plan.name} (VNI {plan.vni}, UDP port {plan.port})"
        with naming(what):
            try:
                self._thread.host.link(
                    "add",
                    ifname=name,
                    kind="vxlan",
                    address=plan.mac,
                    mtu=plan.mtu,
                    vxlan_id=plan.vni,
                    vxlan_port=plan.port,
                    vxlan_learning=0,
                    **local,
                    **more,
                )
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise
                holder = self._holder_of(plan) or "another VXLAN device"
                raise PlumbingFailed(f"{what}: EEXIST: {holder} has these VNI and port already") from error
        with suppress(OSError):  # before it is up: later that would cost packets; the fast path does without, too
            self._thread.channel.exchange([add_clsact(index_of(name))])

    def _holder_of(self, plan: VxlanPlan) -> str:
        """The other device that has the VNI and the port of the plan; empty when none of this namespace has."""
        wanted = (plan.vni, plan.port, plan.local.version)
        for link in self._thread.host.get_links(kind="vxlan"):
            name = str(link.get("ifname"))
            if link.get(("linkinfo", "kind")) == "vxlan" and name != plan.name and _claim_of(link) == wanted:
                return name
        return ""

    def _ensure_common(self, index: int, link: Any, plan: BridgePlan | VxlanPlan) -> list[str]:
        done = []
        wrong: dict[str, object] = {}
        if link.get("address") != plan.mac:
            wrong["address"] = plan.mac
        if link.get("mtu") != plan.mtu:
            wrong["mtu"] = plan.mtu
        if link.get("state") != _UP:
            wrong["state"] = _UP
        if wrong:
            with naming(f"{plan.name}: setting {', '.join(wrong)}"):
                self._thread.host.link("set", index=index, **wrong)
            done.append(f"set {', '.join(wrong)} of {plan.name}")
        return done + self._ensure_addresses(index, plan)

    def _ensure_addresses(self, index: int, plan: BridgePlan | VxlanPlan) -> list[str]:
        """Those of the plan, and of the pools no others: gateways and VTEPs of blocks that were returned, or lost, are
        another node's. What is in no pool is somebody else's, and stays."""
        there = [
            ipaddress.ip_interface(f"{each.get('address')}/{each['prefixlen']}")
            for each in self._thread.host.get_addr(index=index)
        ]
        done = []
        for interface in plan.addresses:
            if interface not in there:
                with naming(f"address {interface} on {plan.name}"):
                    self._thread.channel.exchange([add_address(index, interface)])
                done.append(f"added {interface} to {plan.name}")
        for interface in there:
            if interface not in plan.addresses and any(interface.ip in pool for pool in plan.pools):
                with naming(f"address {interface} on {plan.name}"):
                    self._thread.host.addr(
                        "del", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen
                    )
                done.append(f"removed {interface} from {plan.name}")
        return done

    def _ensure_routes(self, index: int, plan: BridgePlan) -> list[str]:
        with naming(f"routes of {plan.name}"):
            there = connected_routes(index, {interface.version for interface in plan.addresses})
        done = []
        for interface in plan.addresses:
            if interface.network not in there:
                with naming(f"route to {interface.network} on {plan.name}"), tolerating(errno.EEXIST):
                    self._thread.channel.exchange([add_connected_route(index, interface)])
                done.append(f"put back the route to {interface.network} on {plan.name}")
        return done

    def _link(self, index: int) -> Any:
        return self._thread.host.get_links(index)[0]

    def vtep_addresses(self, name: str) -> tuple[Address, ...]:
        """The addresses of the VXLAN device as it is; none when there is none."""
        index = index_of(name)
        found = self._thread.host.get_addr(index=index) if index else ()
        return tuple(ipaddress.ip_address(each.get("address")) for each in found)


def wanted_sysctls(plan: BridgePlan) -> dict[str, str]:
    """Path below /proc/sys → value. A node forwards; and it never tells a pod of a shorter way, which would go round
    the firewall and NAT.

    Redirects are sent when `all` or the interface says so (ip-sysctl: send_redirects), hence both. A kernel without
    IPv6 has none of its own to set.
    """
    versions = {interface.version for interface in plan.addresses}
    wanted = {f"net/ipv4/conf/{name}/send_redirects": "0" for name in ("all", plan.name)}
    if os.path.exists("/proc/sys/net/ipv6"):
        wanted[f"net/ipv6/conf/{plan.name}/accept_ra"] = "0"
    if 6 in versions:
        wanted |= {f"net/ipv6/conf/{plan.name}/{name}": "0" for name in ("disable_ipv6", "accept_dad", "dad_transmits")}
    forwarding = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}
    return wanted | {path: "1" for version, path in forwarding.items() if version in versions}


def vxlan_sysctls(plan: VxlanPlan) -> dict[str, str]:
    """The same of the VXLAN device: a packet from it may have its way back by the underlay, while a backend changes."""
    wanted = {f"net/ipv4/conf/{plan.name}/rp_filter": "2"}
    if any(interface.version == 6 for interface in plan.addresses):
        wanted[f"net/ipv6/conf/{plan.name}/disable_ipv6"] = "0"
    return wanted


def _refuse_foreign(link: Any, name: str, kind: str) -> None:
    found = link.get(("linkinfo", "kind"))
    if found != kind:
        raise PlumbingFailed(
            f"{name} exists and is a {found or 'device without kind'}, expected a {kind}; it is not ours"
        )


def _beside(plan: VxlanPlan) -> str:
    """The name of a device that is going to take the place of the one in place."""
    return f"{plan.name}-new"


def _same_tunnel(link: Any, plan: VxlanPlan) -> bool:
    return (*_claim_of(link), _local_of(link)) == (plan.vni, plan.port, plan.local.version, str(plan.local))


def _claim_of(link: Any) -> tuple[int, int, int]:
    """What the kernel gives to one VXLAN device alone: VNI, UDP port and the family of the outer packets."""
    data = link.get(("linkinfo", "data"))
    return data.get("vxlan_id"), data.get("vxlan_port"), 6 if ":" in _local_of(link) else 4


def _local_of(link: Any) -> str:
    data = link.get(("linkinfo", "data"))
    return data.get("vxlan_local") or data.get("vxlan_local6") or ""
