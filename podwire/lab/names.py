"""What a lab's parts are called and where they are, from the lab's name alone. Pure.

Namespaces are named `pw.<lab>.<part>` with dots between, and a lab's name has no dot: so one prefix finds all of a
lab, and no lab's prefix is another's. Everything that a lab writes is under `/run/podwire-lab/<lab>/`, which every
node's mount namespace sees at the same path; what programs keep at fixed paths (NODE_FOLDERS) is there once per node
and bind-mounted in place.

The underlay is the same private subnet in every lab, since labs cannot see each other.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from pathlib import Path

from podwire.errors import PodwireError

ROOT = Path("/run/podwire-lab")
NETNS_FOLDER = Path("/run/netns")

UNDERLAY = ipaddress.IPv4Network("172.31.0.0/24")
CONTROL_ADDRESS = UNDERLAY[2]
ETCD_ADDRESSES = (UNDERLAY[3], UNDERLAY[4], UNDERLAY[5])  # of the members of a cluster; a single one is in `control`
OUTSIDE_ADDRESS = UNDERLAY[250]
# What lies beyond the underlay, as the internet does: nodes reach it by their default route, over the outside host.
BEYOND_ADDRESS = ipaddress.IPv4Address("198.51.100.1")
MAX_NODES = 99
API_PORT = 6443
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
    """The network namespace of a part: a node's name, `underlay`, `control`, `outside`, or `etcd<n>` of several."""
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


def node_address(number: int) -> ipaddress.IPv4Address:
    """The underlay address of the node with this number, the first being 1."""
    return UNDERLAY[10 + number]


class LabFiles:
    """Where a lab's files are. A node's fixed path is `node_path(node, path)` on the machine and in every namespace."""

    def __init__(self, lab: str, root: Path = ROOT) -> None:
        self.lab = lab
        self.root = root
        self.folder = root / lab
        self.state = self.folder / "state.json"
        self.api = self.folder / "api.json"
        self.kubeconfig = self.folder / "kubeconfig"
        self.processes = self.folder / "processes"
        self.logs = self.folder / "logs"
        self.etcd = self.folder / "etcd"
        self.lock = root / f"{lab}.lock"

    def log(self, role: str) -> Path:
        """The log of a process, by its role: `supervisor`, `etcd`, `ipamd-node1`."""
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
