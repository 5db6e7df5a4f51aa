"""The proxy's configuration: YAML, camelCase keys, strict; flags go before it. docs/configuration.md lists it."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from kube_proxy_lite.model import Network, Settings
from podwire.config import ConfigError, load
from podwire.kube.options import KubeOptions

_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")  # RFC 1123, as Kubernetes names nodes
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@+-]{1,15}\*?\Z")
_LISTEN = re.compile(r"(?:\[(?P<v6>[^\[\]%]+)\]|(?P<v4>[0-9.]*)):(?P<port>[0-9]{1,5})\Z")
_DAY = 86_400
_MOST = 2**31 - 1
PRIMARY = "primary"
"""In place of networks: the addresses of the node's own object."""


class Mode(StrEnum):
    """How Services come into the kernel; `none` leaves them to somebody else."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    NONE = "none"


class ConntrackOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Limits of the kernel's connection tracking; 0 leaves what the node has. Times are in whole seconds."""

    max_per_core: int = 0
    min: int = 0
    tcp_established_timeout: int = 0
    tcp_close_wait_timeout: int = 0
    udp_timeout: int = 0
    udp_stream_timeout: int = 0
    tcp_be_liberal: bool = False


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Everything that an operator can set. Times are in seconds."""

    node: str = ""
    mode: Mode = Mode.NFTABLES
    kubernetes: KubeOptions = KubeOptions()
    manifests: str = ""
    cluster_cidrs: tuple[str, ...] = msgspec.field(default=(), name="clusterCIDRs")
    node_cidrs: bool = msgspec.field(default=False, name="nodeCIDRs")
    pod_interfaces: tuple[str, ...] = ()
    node_port_addresses: tuple[str, ...] = ()
    masquerade_all: bool = False
    conntrack: ConntrackOptions = ConntrackOptions()
    network_policy: bool = True
    cut_connections: bool = True
    daemon_socket: str = "/run/podwire/ipamd.sock"
    sync_period: float = 30.0
    min_sync_period: float = 0.0
    health_listen: str = "0.0.0.0:10256"
    metrics_listen: str = "127.0.0.1:10249"
    log_level: str = "info"

    @property
    def node_ports_primary(self) -> bool:
        """Whether NodePorts answer on the addresses alone that the node's object names."""
        return self.node_port_addresses == (PRIMARY,)

    def rules(self) -> Settings:
        """What the renderers are to know of it. The texts have been checked."""
        return Settings(
            node=self.node,
            cluster_cidrs=networks(self.cluster_cidrs),
            pod_interfaces=self.pod_interfaces,
            node_port_addresses=() if self.node_ports_primary else networks(self.node_port_addresses),
            masquerade_all=self.masquerade_all,
        )


def read(path: Path | None, kubeconfig: str | None = None, **flags: Any) -> ProxyConfig:
    """The configuration in the file at `path`, if any, with those of `flags` that are not None in place of its own.
    `kubeconfig` takes the place of the file's, or of its manifests; manifests that are a flag that of `kubernetes`.

    Raises ConfigError.
    """
    config = load(path, ProxyConfig) if path else ProxyConfig()
    if kubeconfig is not None:
        kubernetes = msgspec.structs.replace(config.kubernetes, kubeconfig=kubeconfig)
        flags = {**flags, "kubernetes": kubernetes, "manifests": ""}
    elif flags.get("manifests") is not None:
        flags = {**flags, "kubernetes": KubeOptions()}
    config = msgspec.structs.replace(config, **{name: value for name, value in flags.items() if value is not None})
    config = msgspec.structs.replace(config, node=config.node or socket.gethostname().lower())
    wrong = next(_wrong(config), "")
    if wrong:
        raise ConfigError(f"{path}: {wrong}" if path else wrong)
    return config


def networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    """Networks from their text. Raises ValueError."""
    return tuple(ipaddress.ip_network(text) for text in texts)


def _wrong(config: ProxyConfig) -> Iterator[str]:
    if not _NODE_NAME.match(config.node):
        yield f"node is {config.node!r}, expected a lower-case DNS name such as node-1"
    yield from _wrong_networks(
        "clusterCIDRs", config.cluster_cidrs, "a network without host bits such as 10.244.0.0/16"
    )
    if not config.node_ports_primary:
        expected = f"a network without host bits such as 10.0.0.0/24, or {PRIMARY} alone"
        yield from _wrong_networks("nodePortAddresses", config.node_port_addresses, expected)
    for interface in config.pod_interfaces:
        if not _INTERFACE.match(interface):
            yield f"podInterfaces has {interface!r}, expected a name such as pw0, or a beginning such as veth*"
    if config.manifests and (config.kubernetes.kubeconfig or config.kubernetes.servers):
        yield f"manifests is {config.manifests!r} and kubernetes is given, expected one of the two"
    if not Path(config.daemon_socket).is_absolute():
        yield f"daemonSocket is {config.daemon_socket!r}, expected a path from the root"
    if not 0 < config.sync_period <= _DAY:
        yield f"syncPeriod is {config.sync_period}, expected seconds, more than 0 and at most {_DAY}"
    if not 0 <= config.min_sync_period <= config.sync_period:
        yield f"minSyncPeriod is {config.min_sync_period}, expected seconds from 0 to syncPeriod"
    for name, number in msgspec.to_builtins(config.conntrack).items():
        if not 0 <= number <= _MOST:
            yield f"conntrack.{name} is {number}, expected 0 to {_MOST}"
    if config.log_level not in ("debug", "info", "warning", "error"):
        yield f"logLevel is {config.log_level!r}, expected debug, info, warning or error"
    for name, listen in (("healthListen", config.health_listen), ("metricsListen", config.metrics_listen)):
        if listen and not _is_listen(listen):
            yield f"{name} is {listen!r}, expected address:port such as 127.0.0.1:10249, or empty for none"


def _wrong_networks(name: str, texts: tuple[str, ...], expected: str) -> Iterator[str]:
    for text in texts:
        try:
            ipaddress.ip_network(text)
        except ValueError:
            yield f"{name} has {text!r}, expected {expected}"


def _is_listen(text: str) -> bool:
    found = _LISTEN.match(text)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        return False
    try:
        version = ipaddress.ip_address(found["v6"] or found["v4"] or "::").version
    except ValueError:
        return False
    return version == (4 if found["v4"] else 6)
