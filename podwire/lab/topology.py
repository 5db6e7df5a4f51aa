"""The lab's namespaces and links: planned as `ip -batch` text (pure), applied by one `ip` process per namespace.

    underlay   bridge br0 (MTU 1500, firewall hooks off: it is a switch and nothing else)
      ├─ control   eth0 172.31.0.2/24     API server, and etcd if there is one member
      ├─ etcd<n>   eth0 172.31.0.<2+n>/24 a member of three
      ├─ node<n>   eth0 172.31.0.1<n>/24  default route over outside, as over a router
      ├─ balancer  eth0 172.31.0.249/24   routes 198.51.100.64/26, load balancers' addresses, to nodes (balancing.py)
      └─ outside   eth0 172.31.0.250/24   and 198.51.100.1 beyond it, for what leaves the cluster

In a lab with IPv6 the same hosts are on fd00:172:31::/64, and 2001:db8:51::1 is beyond; without IPv4 they are there
alone. In a lab of two segments every other node is on 172.31.1.0/24 (fd00:172:31:1::/64), and outside is the router.

The outside host has no route to pods: what leaves the cluster comes back only when the node has masqueraded it.
Three nodes take about 0.1 s.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import msgspec

from podwire.errors import PodwireError
from podwire.lab import names, process
from podwire.lab.state import LabState, held

UNDERLAY_MTU = 1500


class Host(msgspec.Struct, frozen=True):
    """A namespace on the underlay: its part of the lab, and the `ip` commands to run in it once its link is there."""

    part: str
    commands: tuple[str, ...]


def plan_hosts(state: LabState) -> tuple[Host, ...]:
    """Every host on the underlay, with its addresses and routes."""
    families = state.families
    control = Host("control", _host_commands([str(names.control_address(family)) for family in families]))
    members = (Host(each.part, _host_commands([each.address])) for each in state.etcd if each.part != "control")
    routers = [str(names.outside_address(family, number)) for family in families for number in range(segments(state))]
    beyond = [f"address add {names.BEYOND_ADDRESSES[family]} dev lo" for family in families]
    balanced = [f"route add {names.BALANCED[family]} via {names.balancer_address(family)}" for family in families]
    outside = Host("outside", (*_host_commands(routers, router=True), *beyond, *balanced))
    spreaders = [str(names.balancer_address(family, n)) for family in families for n in range(segments(state))]
    # What no Service has (any more) is refused: without this it would go back to outside, round and round.
    refused = [f"route add unreachable {names.BALANCED[family]}" for family in families]
    back = [f"route add default via {names.outside_address(family)}" for family in families]
    balancer = Host("balancer", (*_host_commands(spreaders, router=True), *back, *refused))
    nodes = (Host(node.name, _host_commands(node.addresses)) for node in state.nodes)
    return (control, *members, *nodes, balancer, outside)


def segments(state: LabState) -> int:
    """How many networks of a family the nodes are on."""
    return len({names.underlay_of(node.addresses[0]) for node in state.nodes})


def _host_commands(addresses: Sequence[str], *, router: bool = False) -> tuple[str, ...]:
    """Nobody else has the addresses, so there is no wait for that to be found out; nor with the link-local one, without
    which a host finds none of its neighbours."""
    commands = ["link set lo up", "link set eth0 addrgenmode none", "link set eth0 up"]
    for address in addresses:
        network = names.underlay_of(address)
        nodad = " nodad" if network.version == 6 else ""
        commands.append(f"address add {address}/{network.prefixlen} dev eth0{nodad}")
    six = [address for address in addresses if ":" in address]
    if six:
        commands.append(f"address add {names.link_local(six[0])}/64 dev eth0 nodad")
    if not router:
        networks = [names.underlay_of(address) for address in addresses]
        gateways = [names.outside_address(n.version, names.UNDERLAYS[n.version].index(n)) for n in networks]
        commands += [f"route add default via {gateway}" for gateway in gateways]
    return tuple(commands)


def plan_underlay(lab: str, hosts: Sequence[Host]) -> tuple[str, ...]:
    """The `ip` commands that make the switch and the hosts' links. A port is called as the part that it leads to."""
    bridge = "link add br0 type bridge nf_call_iptables 0 nf_call_ip6tables 0 nf_call_arptables 0 mcast_snooping 0"
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
        run(["ip", "netns", "add", names.namespace(state.name, part)], mark=state.name)
    _batch(state.name, "underlay", plan_underlay(state.name, hosts))
    for host in hosts:
        _batch(state.name, host.part, host.commands)
    if segments(state) > 1:
        _set(state, "outside", _ROUTE)
    _set(state, "balancer", _ROUTE + _SPREAD)


# A router, which tells nobody of a shorter way: all segments are on one switch, and hosts would go round it.
_ROUTE = """\
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
for each in all eth0; do echo 0 >/proc/sys/net/ipv4/conf/$each/send_redirects; done
"""


# Connections are told apart by both addresses and both ports.
_SPREAD = """\
echo 1 >/proc/sys/net/ipv4/fib_multipath_hash_policy
echo 1 >/proc/sys/net/ipv6/fib_multipath_hash_policy
"""


def _set(state: LabState, part: str, script: str) -> None:
    run(["ip", "netns", "exec", names.namespace(state.name, part), "sh", "-c", script], mark=state.name)


def _batch(lab: str, part: str, commands: Sequence[str]) -> None:
    run(["ip", "-n", names.namespace(lab, part), "-batch", "-"], "\n".join(commands) + "\n", mark=lab)


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


def run(command: Sequence[str], stdin: str | None = None, mark: str = "") -> str:
    """Runs a command and returns what it prints. Raises PodwireError with its complaint when it fails.

    One that makes part of a lab carries its mark, and holds its lock: left over from an `up` that was killed, it is
    waited for by `down`, which finds the mark of one that has begun, but not of one that is about to.
    """
    environment = process.marked_environment(mark) if mark else None
    try:
        done = subprocess.run(
            list(command),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            pass_fds=held() if mark else (),
        )
    except FileNotFoundError as error:
        raise PodwireError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise PodwireError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
