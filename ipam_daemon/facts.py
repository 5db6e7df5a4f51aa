"""What each source says about this node, as values: what an audit (ipam_daemon/audit.py) compares. Pure.

    etcd       Registered   blocks of all nodes, this node's record, who holds its name
    journal    Journaled    attachments, wires on the way out, blocks
    kernel     Kernel       links, entries towards the other nodes, our nft tables, sysctls
    runtime    Runtime      whether an attachment's namespace is there, and what is not right inside
    daemon     the rest     what it is, what it wants, what it is at, which addresses its allocator does not hand out

No source is asked about another, and none is believed more than the others: that is for who reads the differences.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ipam_daemon.hostports import TableState
from ipam_daemon.model import Address, Attachment, AttachmentKey, Block, Interface, Network, NodeRecord
from ipam_daemon.plan import NodePlan, PeersPlan
from ipam_daemon.ruleset import FirewallState
from ipam_daemon.spoofguard import GuardState


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link of the node's namespace. `master` is a name, `doomed` says that it is in the group of wires to delete.

    `tunnel` is "VNI PORT LOCAL" of a VXLAN device; `filtered` says that a bridge hands its packets to the firewall,
    `connected` which networks the kernel's own routes over our bridge lead to.
    """

    name: str
    kind: str = ""
    mac: str = ""
    mtu: int = 0
    up: bool = True
    master: str = ""
    doomed: bool = False
    alias: str = ""
    tunnel: str = ""
    filtered: bool = False
    addresses: frozenset[Interface] = frozenset()
    connected: frozenset[Network] = frozenset()


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """The node's namespace, read back. `links` and `sysctls` are by name."""

    links: Mapping[str, Link] = {}
    peers: PeersPlan = PeersPlan(neighbours={}, fdb={}, routes={})
    firewall: FirewallState = FirewallState(chains="", elements={})
    sysctls: Mapping[str, str] = {}
    guard: GuardState = GuardState()
    host_ports: TableState = TableState(whole=False)
    limits: Mapping[str, tuple[str, ...]] = {}
    """What is not right of the queues of a limited wire, in words, by the name of its end on the node."""


class Journaled(msgspec.Struct, frozen=True, kw_only=True):
    """The journal; `releasing` are the wires on the way out, by name, with their addresses."""

    attachments: tuple[Attachment, ...] = ()
    releasing: Mapping[str, tuple[Interface, ...]] = {}
    blocks: tuple[Block, ...] = ()


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """etcd: `blocks` of every node, this node's `record`, and the machine that holds its name (empty: none)."""

    blocks: tuple[Block, ...] = ()
    record: NodeRecord | None = None
    live: str = ""


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """A pod sandbox as the container runtime tells of it. `pod` is "namespace/name"; `own_network` is False when it is
    the node's, and is asked only of those that are ready and have no attachment."""

    id: str
    ready: bool
    pod: str = ""
    own_network: bool = True


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """By the name of the host's end of the wire. `gone`: why the attachment's path leads to no namespace; `changed`:
    what is not as ADD left it inside. Attachments that were rebuilt from the kernel have no path, and are in neither.
    """

    gone: Mapping[str, str] = {}
    changed: Mapping[str, tuple[str, ...]] = {}
    sandboxes: tuple[Sandbox, ...] | None = None
    """None when nobody asked the runtime."""
    error: str = ""
    """Why it gave no answer."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known at one moment. `now` is in seconds since the epoch."""

    now: float
    record: NodeRecord
    """What this node is, as its daemon would tell its peers."""
    plan: NodePlan | None
    """What the daemon brought the kernel to; None before the first time."""
    waiting_for: str = ""
    """Why there is no plan yet."""
    journal: Journaled
    kernel: Kernel
    runtime: Runtime = Runtime()
    etcd: Registered | None
    """None when it did not answer."""
    etcd_error: str = ""
    held: frozenset[Address]
    """The addresses that the allocator counts as used or releasing."""
    sysctls: Mapping[str, str] = {}
    """The sysctls that the daemon sets, with their values."""
    in_flight: frozenset[AttachmentKey] = frozenset()
    """The attachments that a call is working on."""
    waiting_dels: tuple[str, ...] = ()
    """Files of the queue; those that nobody could read are `unreadable_dels`."""
    unreadable_dels: tuple[str, ...] = ()

    def is_stranded(self, row: Attachment) -> bool:
        """Whether an address of the row is in no block of this node. Before the first block is known none is."""
        cidrs = self.record.blocks
        return bool(cidrs) and any(each.network not in cidrs for each in row.addresses)
