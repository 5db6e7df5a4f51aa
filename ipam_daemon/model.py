"""The daemon's vocabulary: what etcd, the journal and the kernel are about, as frozen values.

    ClusterConfig ── pools ──▶ Pool ── cut into ──▶ Block ── owned by ──▶ NodeRecord
                                                     │
                                  Attachment ◀── addresses from it

Addresses are always a tuple, and one path serves every family: an IPv4-only cluster is a tuple of one. Text forms are
canonical (`ipaddress` parses and prints them), so that two equal things have equal keys in etcd.

Everything here is pure. Times are seconds since the epoch (float) unless a name says `_ns`, which is CLOCK_BOOTTIME.
"""

from __future__ import annotations

import hashlib
import ipaddress
from abc import ABC
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:
    Address = ipaddress.IPv4Address | ipaddress.IPv6Address
    Network = ipaddress.IPv4Network | ipaddress.IPv6Network
    Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
else:  # msgspec takes one custom type a field, no union of two: at run time each is one abstract class

    class Address(ABC):  # noqa: B024
        """An address of either family."""

    class Network(ABC):  # noqa: B024
        """A network of either family."""

    class Interface(ABC):  # noqa: B024
        """An address of either family with the prefix length of its network."""

    for _family in ("IPv4", "IPv6"):
        Address.register(getattr(ipaddress, f"{_family}Address"))
        Network.register(getattr(ipaddress, f"{_family}Network"))
        Interface.register(getattr(ipaddress, f"{_family}Interface"))


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of what people write: an unknown key is an error."""


class Record(msgspec.Struct, frozen=True, rename="camel"):
    """Base of what is stored in etcd: unknown keys are passed over, so that an older daemon reads a newer one's."""


# --- the cluster ------------------------------------------------------------------------------------------------


class Pool(Value, frozen=True, kw_only=True):
    """Addresses that blocks are cut from. `cidr` is a network in canonical form; `block_size` is a prefix length, by
    default what Kubernetes cuts pod networks into: /24 and /64."""

    name: str = "default"
    cidr: Network
    block_size: int = 0

    def __post_init__(self) -> None:
        if not self.block_size:
            msgspec.structs.force_setattr(self, "block_size", BLOCK_SIZE[self.cidr.version])

    def blocks(self) -> Iterator[Network]:
        """Every block of the pool, lowest first."""
        return iter(self.cidr.subnets(new_prefix=self.block_size))

    def has(self, block: Block) -> bool:
        """Whether the block is of this pool: pools of the two families may share a name."""
        return block.pool == self.name and block.cidr.version == self.cidr.version


BLOCK_SIZE = {4: 24, 6: 64}
"""The prefix length of a block of each family, unless the pool says otherwise."""


class BackendType(StrEnum):
    """How pods of other nodes are reached."""

    VXLAN = "vxlan"  # through one VXLAN device (RFC 7348)
    DIRECT = "direct"  # by plain routes over the underlay: all nodes are on one segment
    AUTO = "auto"  # direct where the other node is on the same segment, VXLAN elsewhere


class Backend(Value, frozen=True, kw_only=True):
    """`port` is VXLAN's UDP port, `vni` its id. A cluster's backend changes while it runs (ipam_daemon/cluster.py)."""

    type: BackendType = BackendType.VXLAN
    vni: int = 1
    port: int = 4789


class ClusterConfig(Record, frozen=True, kw_only=True):
    """What holds for all nodes. The first daemon writes it to etcd; later ones must say the same of the pools, and
    follow it in the backend."""

    pools: tuple[Pool, ...] = ()
    backend: Backend = Backend()


class Block(Record, frozen=True, kw_only=True):
    """A block and its owner. `generation` is the NodeRecord generation of the owner when it claimed the block."""

    cidr: Network
    pool: str
    node: str
    node_id: str
    generation: int


class NodeRecord(Record, frozen=True, kw_only=True):
    """What a node tells its peers. `addresses` are its own on the underlay, `vtep_addresses` are in its blocks.

    `node_id` is a UUID made at the first start on a machine and kept under /var/lib: a machine that takes over the name
    of another has another. `generation` counts how often the name changed hands. `published` is when the record was
    written, in seconds since the epoch; 0 when who wrote it did not say.
    """

    name: str
    node_id: str
    generation: int = 1
    addresses: tuple[Address, ...]
    vtep_mac: str = ""
    vtep_addresses: tuple[Address, ...] = ()
    blocks: tuple[Network, ...] = ()
    version: str = ""
    published: float = 0.0


# --- attachments ------------------------------------------------------------------------------------------------


class AttachmentKey(msgspec.Struct, frozen=True, order=True):
    """What identifies an attachment: CNI 1.1.0 keys a container's interface, Podwire adds the network."""

    network: str
    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.network}/{self.container_id}/{self.ifname}"


class AttachmentState(StrEnum):
    """The journal's states. An attachment that is gone has no row."""

    ADDING = "adding"  # intent is journaled; the wire may exist in part
    ATTACHED = "attached"  # committed; the runtime has, or is about to get, its result
    RELEASING = "releasing"  # DEL has answered; the link is not yet seen gone, the addresses are not yet free


class PodRef(msgspec.Struct, frozen=True, kw_only=True):
    """The pod as the runtime named it in CNI_ARGS; empty strings when it did not."""

    namespace: str = ""
    name: str = ""
    uid: str = ""


class PortMapping(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the node that leads to a port of the pod. `protocol` is "tcp", "udp" or "sctp".

    `host_ip` is the one address of the node that it is of; 0.0.0.0 and :: are all of a family, None is all.
    """

    protocol: str
    host_port: int
    container_port: int
    host_ip: Address | None = None


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a pod may receive (ingress) and send (egress): rates in bits a second, bursts in bits; 0 is no limit."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0

    def __bool__(self) -> bool:
        return bool(self.ingress_rate or self.egress_rate)


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """One interface of one container. `addresses` carry their block's prefix length, one per family; `resizing` is the
    MTU that the wire is being given (0: none), and until it is done each end has that or `mtu`."""

    key: AttachmentKey
    netns: str
    host_ifname: str
    mac: str
    mtu: int
    resizing: int = 0
    addresses: tuple[Interface, ...]
    pod: PodRef = PodRef()
    port_mappings: tuple[PortMapping, ...] = ()
    bandwidth: Bandwidth = Bandwidth()
    state: AttachmentState = AttachmentState.ADDING
    created: float
    created_ns: int


def host_mac(host_ifname: str) -> str:
    """The locally administered MAC of the host's end of a wire, made from its name, so that it need not be read back.

    Nothing is sent to it: the bridge has a MAC of its own. Its first bytes tell it from a pod's (plan.mac_of).
    """
    return ":".join(f"{byte:02x}" for byte in b"\x0a\x59" + hashlib.sha256(host_ifname.encode()).digest()[:4])


# --- text -------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def encode(value: msgspec.Struct) -> bytes:
    """JSON of a struct of this module; addresses and networks in canonical text."""
    return msgspec.json.encode(value, enc_hook=to_plain)


def decode(data: bytes, kind: type[T]) -> T:
    """The struct of type `kind` that `data` (JSON) says. Raises `msgspec.ValidationError`, naming the field."""
    return msgspec.json.decode(data, type=kind, dec_hook=from_plain)


def to_plain(value: Any) -> Any:
    """msgspec's hook for the types that it does not know: `ipaddress` values become text."""
    if isinstance(value, _IP_TYPES):
        return str(value)
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def from_plain(kind: Any, value: Any) -> Any:
    """msgspec's hook for the types that it does not know: text becomes an address, a network or an interface.

    Raises ValueError (msgspec reports it with the field's path) for text that is not one, or a network with host bits.
    """
    parse = _PARSERS.get(kind)
    if parse is None:
        raise NotImplementedError(f"cannot decode {kind}")
    if not isinstance(value, str):
        raise ValueError(f"expected text such as {_EXAMPLES[kind]!r}, got {value!r}")
    return parse(value)


_IP_TYPES = (
    ipaddress.IPv4Address,  # an interface is an address, too
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
)
_PARSERS: dict[Any, Callable[[str], Any]] = {
    Address: ipaddress.ip_address,
    Network: ipaddress.ip_network,
    Interface: ipaddress.ip_interface,
}
_EXAMPLES = {Address: "10.244.1.7", Network: "10.244.0.0/16", Interface: "10.244.1.7/24"}
