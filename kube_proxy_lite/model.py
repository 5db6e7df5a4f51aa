"""What Services mean on this node, before anybody says it in nft, iptables or IPVS: frozen values, no I/O.

    objects (API) ──▶ services.py ──▶ PortPlan … ──▶ render/{nftables,iptables}.py ──▶ apply/ ──▶ kernel

A `PortPlan` is one port of one Service in one family. It lists its two choices of backends and its frontends: the
places at which a client may knock. What becomes of a packet is a function of three things, its frontend, where it comes
from and the settings of the proxy, and `decide` is that function: the one place that knows the matrix. A renderer says
the same in rules; its tests ask `decide`.

     source            ClusterIP              NodePort, LoadBalancer, external address
                       Cluster   Local        Cluster          Local
    pod                all       local        all, masq        all
    node               all, masq local, masq  all, masq        all, masq
    external           all, masq local, masq  all, masq        local

`all` are the backends that the policy Cluster gives, `local` those of this node. No backend: where the Service has none
at all the client is refused (REFUSE), where it has some that the policy does not allow here the packet is dropped
(DROP). Besides, a packet that comes back to the pod that sent it is masqueraded, whatever the table says (hairpin), and
a load balancer's address may be closed to all but `source_ranges`. Without a way to tell pods apart
(`Settings.detects`) everything that is not the node is external, and nothing to a ClusterIP is masqueraded;
`masquerade_all` masquerades whatever goes to a ClusterIP.

Source: Kubernetes v1.36 documentation, "Virtual IPs and Service Proxies", and kube-proxy's behaviour.
"""

from __future__ import annotations

import ipaddress
from enum import StrEnum

import msgspec

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Protocol(StrEnum):
    """The protocols of Services, as the API spells them."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class Source(StrEnum):
    """Where a packet comes from: a pod (of this node, as far as the proxy sees it), this node itself, or elsewhere."""

    POD = "pod"
    NODE = "node"
    EXTERNAL = "external"


class FrontendKind(StrEnum):
    """What sort of address a client uses."""

    CLUSTER_IP = "cluster-ip"
    NODE_PORT = "node-port"
    EXTERNAL_IP = "external-ip"
    LOAD_BALANCER = "load-balancer"


class Verdict(StrEnum):
    """What becomes of a new connection."""

    FORWARD = "forward"
    REFUSE = "refuse"
    DROP = "drop"


class PortKey(msgspec.Struct, frozen=True, order=True, gc=False, cache_hash=True):
    """One port of one Service in one family: `version` is 4 or 6; `port` is the port's name, which may be empty."""

    namespace: str
    service: str
    port: str
    protocol: Protocol
    version: int

    def __str__(self) -> str:
        name = f"{self.namespace}/{self.service}" + (f":{self.port}" if self.port else "")
        return f"{name} {self.protocol}{'/v6' if self.version == 6 else ''}"


class Backend(msgspec.Struct, frozen=True, order=True, gc=False):
    """An endpoint that connections may go to: address and port. `local` says that it is on this node."""

    address: Address
    port: int
    local: bool = False


class Frontend(msgspec.Struct, frozen=True, order=True, kw_only=True, gc=False):
    """A place at which clients knock. `address` is None for a NODE_PORT: the node's, as Settings says which.

    `local` is whether the traffic policy Local applies here: the internal one for a ClusterIP, the external one for the
    others. `source_ranges` closes a load balancer's address to all others; empty leaves it open. They are disjoint, and
    hold the address itself where they hold one of this node's: a node that has the address as its own, too, would
    otherwise be refused there.
    """

    kind: FrontendKind
    address: Address | None
    port: int
    local: bool = False
    source_ranges: tuple[Network, ...] = ()


class PortPlan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One port of one Service, decided. All tuples are sorted and without repetition, so equal plans compare equal.

    There is at least one frontend. `cluster` are the backends of the policy Cluster (after hints, and those that
    terminate when there is nothing better): empty when no connection can be served anywhere. `local` are those of the
    policy Local, which a hint does not change, so that they need not be among the others; empty, too, when no frontend
    is `local`. `affinity` is for how many seconds a client stays with its backend, 1 to 86,400; 0 for no affinity.
    """

    key: PortKey
    frontends: tuple[Frontend, ...]
    cluster: tuple[Backend, ...] = ()
    local: tuple[Backend, ...] = ()
    affinity: int = 0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the proxy was told, or has found out, about its node and cluster.

    Pods are told from everybody else by `cluster_cidrs`, the networks that they have their addresses from
    (kube-proxy's detect-local modes ClusterCIDR and NodeCIDR), or by `pod_interfaces`, the interfaces that their
    packets come in by, a name or a prefix that ends in `*` (BridgeInterface, InterfaceNamePrefix); by any of them where
    there are several. `service_cidrs` are the networks of ClusterIPs: what goes to an address in them that no Service
    has is dropped. `node_port_addresses` are networks: NodePorts answer on the node's addresses in them; empty means on
    all of the node's addresses but loopback. `masquerade_all` masquerades whatever goes to a ClusterIP.
    """

    node: str
    cluster_cidrs: tuple[Network, ...] = ()
    pod_interfaces: tuple[str, ...] = ()
    service_cidrs: tuple[Network, ...] = ()
    node_port_addresses: tuple[Network, ...] = ()
    masquerade_all: bool = False

    def detects(self, version: int) -> bool:
        """Whether pods can be told from everybody else in this family."""
        return bool(self.pod_interfaces) or any(network.version == version for network in self.cluster_cidrs)

    def has_node_ports(self, address: Address) -> bool:
        """Whether NodePorts answer on this address of the node."""
        networks = [network for network in self.node_port_addresses if network.version == address.version]
        return not address.is_loopback and (not networks or any(address in network for network in networks))


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a new connection; `backends` and `masquerade` count when the verdict is FORWARD."""

    verdict: Verdict
    backends: tuple[Backend, ...] = ()
    masquerade: bool = False


def decide(plan: PortPlan, frontend: Frontend, source: Source, settings: Settings) -> Decision:
    """What becomes of a new connection from `source` to `frontend`, the hairpin and the source ranges apart."""
    internal = frontend.kind is FrontendKind.CLUSTER_IP
    detecting = settings.detects(plan.key.version)
    if source is Source.POD and not detecting:
        source = Source.EXTERNAL
    follows_local = frontend.local and (internal or source is Source.EXTERNAL)
    backends = plan.local if follows_local else plan.cluster
    if not backends:
        return Decision(verdict=Verdict.DROP if plan.cluster else Verdict.REFUSE)
    if internal:
        masquerade = settings.masquerade_all or (detecting and source is not Source.POD)
    else:
        masquerade = not frontend.local or source is Source.NODE
    return Decision(verdict=Verdict.FORWARD, backends=backends, masquerade=masquerade)


def is_allowed(frontend: Frontend, client: Address) -> bool:
    """Whether a load balancer's address is open to `client`."""
    ranges = frontend.source_ranges
    return not ranges or any(client in network for network in ranges)


class Health(msgspec.Struct, frozen=True):
    """What a load balancer may ask a node about one Service: the port to answer on, how many pods are ready here."""

    port: int
    ready: int


class Problem(msgspec.Struct, frozen=True, order=True):
    """Something in an object that cannot be, and is passed over: the rest of the object, and of the cluster, stands.

    `key` is (namespace, name); `value` is fit for a line of a log, printable and short.
    """

    kind: str
    key: tuple[str, str]
    field: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind} {'/'.join(printable(part) for part in self.key)}: {self.field} {self.value!r} {self.why}"


def printable(text: str) -> str:
    """`text` without what could break out of a line, and not too long."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:80])
    return shown if len(text) <= 80 else shown + "…"
