"""What a lab's parts are called and where they are, from the lab's name alone. Pure.

Namespaces are named `pw.<lab>.<part>` with dots between, and a lab's name has no dot: so one prefix finds all of a
lab, and no lab's prefix is another's. Everything that a lab writes is under `/run/podwire-lab/<lab>/`, which every
node's mount namespace sees at the same path; what programs keep at fixed paths (NODE_FOLDERS) is there once per node
and bind-mounted in place.

The underlay is the same private networks in every lab, since labs cannot see each other: one of each family for
everything, and a second of each for every other node of a lab of two segments, with a router between.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from pathlib import Path

from podwire.errors import PodwireError

ROOT = Path("/run/podwire-lab")
NETNS_FOLDER = Path("/run/netns")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNDERLAYS: dict[int, tuple[Network, ...]] = {  # family → segments
    4: (ipaddress.ip_network("172.31.0.0/24"), ipaddress.ip_network("172.31.1.0/24")),
    6: (ipaddress.ip_network("fd00:172:31::/64"), ipaddress.ip_network("fd00:172:31:1::/64")),
}
MAX_SEGMENTS = 2
_CONTROL, _ETCD, _FIRST_NODE, _BALANCER, _OUTSIDE = (
    2,
    2,
    10,
    249,
    250,
)  # hosts of a network; members and nodes are counted from 1
# What lies beyond the underlay, as the internet does: nodes reach it by their default route, over the outside host.
BEYOND_ADDRESSES: dict[int, Address] = {
    4: ipaddress.ip_address("198.51.100.1"),
    6: ipaddress.ip_address("2001:db8:51::1"),
}
BEYOND_ADDRESS = BEYOND_ADDRESSES[4]
# Services get their addresses of the first, load balancers theirs of the second.
SERVICE_CIDRS: dict[int, Network] = {
    4: ipaddress.ip_network("10.96.0.0/16"),
    6: ipaddress.ip_network("fd00:10:96::/108"),
}
BALANCED: dict[int, Network] = {
    4: ipaddress.ip_network("198.51.100.64/26"),
    6: ipaddress.ip_network("2001:db8:51::1:0/112"),
}
MAX_NODES = 99
API_PORT = 6443
PROXY_HEALTH_PORT, PROXY_METRICS_PORT = 10256, 10249
ETCD_PORT = 2379

# What libcni, container runtimes and Podwire keep at fixed paths: each node has its own.
NODE_FOLDERS = (
    "/etc/cni/net.d",
    "/opt/cni/bin",
    "/var/lib/cni",
    "/var/lib/podwire",
    "/run/podwire",
    "/etc/podwire",
    "/var/lib/containerd",
    "/run/containerd",
)

_LAB_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,19}")
_LONGEST_FILE_NAME = 255


def check_lab_name(name: str) -> str:
    """Returns `name` when it can name a lab. Raises PodwireError when not."""
    if not _LAB_NAME.fullmatch(name):
        raise PodwireError(f"lab name {name!r}: use 1 to 20 lower-case letters, digits and '-', the first not '-'")
    return name


def namespace_prefix(lab: str) -> str:
    """What the names of all network namespaces of a lab, and of no other lab, begin with."""
    return f"pw.{lab}."


def namespace(lab: str, part: str) -> str:
    """The network namespace of a part: a node's name, `underlay`, `control`, `outside`, `balancer`, or `etcd<n>`."""
    return f"{namespace_prefix(lab)}{part}"


def pod_namespace(lab: str, pod_namespace: str, pod: str) -> str:
    """The network namespace of a pod; a name too long for a file is cut and ends in a digest of the whole."""
    name = namespace(lab, f"pod.{pod_namespace}.{pod}")
    if len(name) <= _LONGEST_FILE_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: _LONGEST_FILE_NAME - len(digest) - 1]}.{digest}"


def netns_path(name: str) -> Path:
    """Where a named network namespace can be opened."""
    return NETNS_FOLDER / name


def node_name(number: int) -> str:
    """The name of the node with this number, the first being 1."""
    return f"node{number}"


def node_address(number: int, family: int = 4, segment: int = 0) -> Address:
    """The underlay address of the node with this number, the first being 1."""
    return UNDERLAYS[family][segment][_FIRST_NODE + number]


def control_address(family: int = 4) -> Address:
    """Where the API server is, and etcd if it has one member."""
    return UNDERLAYS[family][0][_CONTROL]


def etcd_address(number: int, family: int = 4) -> Address:
    """Where a member of an etcd of several is, the first being 1."""
    return UNDERLAYS[family][0][_ETCD + number]


def outside_address(family: int = 4, segment: int = 0) -> Address:
    """The host that is no node, which is the router of each segment."""
    return UNDERLAYS[family][segment][_OUTSIDE]


def balancer_address(family: int = 4, segment: int = 0) -> Address:
    """The host that spreads what comes for a load balancer's address over the nodes."""
    return UNDERLAYS[family][segment][_BALANCER]


def underlay_of(address: str) -> Network:
    """The network of the underlay that an address is on."""
    found = ipaddress.ip_address(address)
    return next(network for network in UNDERLAYS[found.version] if found in network)


def link_local(address: str) -> Address:
    """A link-local address that no other host of the underlay has."""
    segment = UNDERLAYS[6].index(underlay_of(address))
    return ipaddress.IPv6Address("fe80::") + (segment << 16) + int(ipaddress.ip_address(address)) % (1 << 16)


def url_host(address: str) -> str:
    """An address as it is written in a URL."""
    return f"[{address}]" if ":" in address else address


class LabFiles:
    """Where a lab's files are. A node's fixed path is `node_path(node, path)` on the machine and in every namespace."""

    def __init__(self, lab: str, root: Path = ROOT) -> None:
        self.lab = lab
        self.root = root
        self.folder = root / lab
        self.state = self.folder / "state.json"
        self.api = self.folder / "api.json"
        self.kubeconfig = self.folder / "kubeconfig"
        self.node_kubeconfig = self.folder / "node-kubeconfig"  # with the API's address on the underlay
        self.processes = self.folder / "processes"
        self.logs = self.folder / "logs"
        self.etcd = self.folder / "etcd"
        self.lock = root / f"{lab}.lock"

    def log(self, role: str) -> Path:
        """The log of a process, by its role: `supervisor`, `etcd`, `ipamd-node1`, `proxy-node1`."""
        return self.logs / f"{role}.log"

    def node_folder(self, node: str) -> Path:
        """All of a node's own files."""
        return self.folder / "nodes" / node

    def node_path(self, node: str, path: str) -> Path:
        """Where the node's own version of a fixed path such as /etc/cni/net.d is."""
        return self.node_folder(node) / path.lstrip("/")

    def ipamd_socket(self, node: str) -> Path:
        """The socket of the node's daemon."""
        return self.node_path(node, "/run/podwire") / "ipamd.sock"

    def pod_folder(self, pod_namespace: str, pod: str) -> Path:
        """What a pod's containers write."""
        return self.folder / "pods" / f"{pod_namespace}.{pod}"
