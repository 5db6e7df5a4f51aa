"""The proxy's configuration: YAML, camelCase keys, strict; flags go before it. docs/configuration.md lists it."""

from __future__ import annotations

import ipaddress
import re
import socket
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from kube_proxy_lite.model import Network, Settings
from podwire.config import ConfigError, load
from podwire.kube.options import KubeOptions

_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")  # RFC 1123, as Kubernetes names nodes
_INTERFACE = re.compile(r"[^\s/:%*]{1,15}\*?\Z")


class Mode(StrEnum):
    """How Services come into the kernel; `none` leaves them to somebody else."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    NONE = "none"


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Everything that an operator can set. Times are in seconds."""

    node: str = ""
    mode: Mode = Mode.NFTABLES
    kubernetes: KubeOptions = KubeOptions()
    manifests: str = ""
    cluster_cidrs: tuple[str, ...] = msgspec.field(default=(), name="clusterCIDRs")
    pod_interfaces: tuple[str, ...] = ()
    node_port_addresses: tuple[str, ...] = ()
    masquerade_all: bool = False
    network_policy: bool = True
    cut_connections: bool = True
    daemon_socket: str = "/run/podwire/ipamd.sock"
    sync_period: float = 30.0
    min_sync_period: float = 0.0
    health_listen: str = "0.0.0.0:10256"
    metrics_listen: str = "127.0.0.1:10249"
    log_level: str = "info"

    def rules(self) -> Settings:
        """What the renderers are to know of it. The texts have been checked."""
        return Settings(
            node=self.node,
            cluster_cidrs=networks(self.cluster_cidrs),
            pod_interfaces=self.pod_interfaces,
            node_port_addresses=networks(self.node_port_addresses),
            masquerade_all=self.masquerade_all,
        )


def read(path: Path | None, **flags: Any) -> ProxyConfig:
    """The configuration in the file at `path`, if any, with those of `flags` that are not None in place of its own.

    Raises ConfigError.
    """
    config = load(path, ProxyConfig) if path else ProxyConfig()
    config = msgspec.structs.replace(config, **{name: value for name, value in flags.items() if value is not None})
    config = msgspec.structs.replace(config, node=config.node or socket.gethostname().lower())
    wrong = _first_wrong(config)
    if wrong:
        raise ConfigError(f"{path}: {wrong}" if path else wrong)
    return config


def networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    """Networks from their text. Raises ValueError."""
    return tuple(ipaddress.ip_network(text) for text in texts)


def _first_wrong(config: ProxyConfig) -> str:
    if not _NODE_NAME.match(config.node):
        return f"node is {config.node!r}, expected a lower-case DNS name such as node-1"
    for name, texts in (("clusterCIDRs", config.cluster_cidrs), ("nodePortAddresses", config.node_port_addresses)):
        for text in texts:
            try:
                ipaddress.ip_network(text)
            except ValueError:
                return f"{name} has {text!r}, expected a network without host bits such as 10.244.0.0/16"
    for interface in config.pod_interfaces:
        if not _INTERFACE.match(interface):
            return f"podInterfaces has {interface!r}, expected a name such as pw0, or a beginning such as veth*"
    if config.manifests and (config.kubernetes.kubeconfig or config.kubernetes.servers):
        return f"manifests is {config.manifests!r} and kubernetes is given, expected one of the two"
    if not config.sync_period > 0:
        return f"syncPeriod is {config.sync_period}, expected seconds, more than 0"
    if not 0 <= config.min_sync_period <= config.sync_period:
        return f"minSyncPeriod is {config.min_sync_period}, expected seconds from 0 to syncPeriod"
    if config.log_level not in ("debug", "info", "warning", "error"):
        return f"logLevel is {config.log_level!r}, expected debug, info, warning or error"
    for name, listen in (("healthListen", config.health_listen), ("metricsListen", config.metrics_listen)):
        _, colon, port = listen.rpartition(":")
        if listen and not (colon and port.isdigit() and int(port) <= 65535):
            return f"{name} is {listen!r}, expected address:port such as 127.0.0.1:10249, or empty for none"
    return ""
