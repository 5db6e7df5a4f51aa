"""The lab's namespaces and links: planned as `ip -batch` text (pure), applied by one `ip` process per namespace.

    underlay   bridge br0 (MTU 1500, firewall hooks off: it is a switch and nothing else)
      ├─ control   eth0 172.31.0.2/24     API server, and etcd if there is one member
      ├─ etcd<n>   eth0 172.31.0.<2+n>/24 a member of three
      ├─ node<n>   eth0 172.31.0.1<n>/24  default route over outside, as over a router
      └─ outside   eth0 172.31.0.250/24   and 198.51.100.1 beyond it, for what leaves the cluster

The outside host has no route to pods: what leaves the cluster comes back only when the node has masqueraded it.
Three nodes take about 0.1 s.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import msgspec

from podwire.errors import PodwireError
from podwire.lab import names
from podwire.lab.state import LabState

UNDERLAY_MTU = 1500
_PREFIX = names.UNDERLAY.prefixlen


class Host(msgspec.Struct, frozen=True):
    """A namespace on the underlay: its part of the lab, and the `ip` commands to run in it once its link is there."""

    part: str
    commands: tuple[str, ...]


def plan_hosts(state: LabState) -> tuple[Host, ...]:
    """Every host on the underlay, with its addresses and routes."""
    control = Host("control", _host_commands(str(names.CONTROL_ADDRESS)))
    members = (Host(member.part, _host_commands(member.address)) for member in state.etcd if member.part != "control")
    beyond = f"address add {names.BEYOND_ADDRESS}/32 dev lo"
    outside = Host("outside", (*_host_commands(str(names.OUTSIDE_ADDRESS)), beyond))
    default = f"route add default via {names.OUTSIDE_ADDRESS}"
    nodes = (Host(node.name, (*_host_commands(node.addresses[0]), default)) for node in state.nodes)
    return (control, *members, *nodes, outside)


def _host_commands(address: str) -> tuple[str, ...]:
    return ("link set lo up", f"address add {address}/{_PREFIX} dev eth0", "link set eth0 up")


def plan_underlay(lab: str, hosts: Sequence[Host]) -> tuple[str, ...]:
    """The `ip` commands that make the switch and the hosts' links. A port is called as the part that it leads to."""
    bridge = "link add br0 type bridge nf_call_iptables 0 nf_call_ip6tables 0 nf_call_arptables 0"
    commands = [bridge, f"link set br0 mtu {UNDERLAY_MTU} up", "link set lo up"]
    for host in hosts:
        peer = f"peer name eth0 mtu {UNDERLAY_MTU} netns {names.namespace(lab, host.part)}"
        commands.append(f"link add {host.part} mtu {UNDERLAY_MTU} type veth {peer}")
        commands.append(f"link set {host.part} master br0 up")
    return tuple(commands)


def build(state: LabState) -> None:
    """Makes the namespaces and everything in them that belongs to the underlay. Raises PodwireError."""
    hosts = plan_hosts(state)
    parts = ["underlay", *(host.part for host in hosts)]
    for part in parts:
        run(["ip", "netns", "add", names.namespace(state.name, part)])
    _batch(names.namespace(state.name, "underlay"), plan_underlay(state.name, hosts))
    for host in hosts:
        _batch(names.namespace(state.name, host.part), host.commands)


def _batch(namespace: str, commands: Sequence[str]) -> None:
    run(["ip", "-n", namespace, "-batch", "-"], "\n".join(commands) + "\n")


def namespaces(lab: str) -> list[str]:
    """The names of the lab's network namespaces that there are."""
    prefix = names.namespace_prefix(lab)
    if not names.NETNS_FOLDER.is_dir():
        return []
    return sorted(entry.name for entry in names.NETNS_FOLDER.iterdir() if entry.name.startswith(prefix))


def delete_namespaces(found: Sequence[str]) -> None:
    """Deletes namespaces by name; their links go with them. One that is gone already is no error."""
    for name in found:
        done = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True, check=False)
        if done.returncode and names.netns_path(name).exists():
            raise PodwireError(f"ip netns delete {name}: {done.stderr.strip()}")


def run(command: Sequence[str], stdin: str | None = None) -> str:
    """Runs a command and returns what it prints. Raises PodwireError with its complaint when it fails."""
    try:
        done = subprocess.run(list(command), input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PodwireError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise PodwireError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
