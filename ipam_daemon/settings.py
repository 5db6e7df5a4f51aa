"""The daemon's configuration file: YAML, camelCase keys, strict. docs/configuration.md is its reference."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import msgspec

from ipam_daemon.claims import wrong_backend
from ipam_daemon.model import Address, Backend, Network, Pool, from_plain
from ipam_daemon.plan import LEAST_MTU
from podwire.config import ConfigError, load
from podwire.etcd.options import EtcdOptions

_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")  # RFC 1123, as Kubernetes names nodes


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Everything that an operator can set. Times are in seconds, sizes in bytes."""

    node: str = ""
    node_addresses: tuple[Address, ...] = ()
    etcd: EtcdOptions
    pools: tuple[Pool, ...]
    backend: Backend = Backend()
    non_masquerade_cidrs: tuple[Network, ...] = msgspec.field(default=(), name="nonMasqueradeCIDRs")
    mtu: int = 0
    fast_path: bool = True
    fast_path_after: float = 5.0
    run_dir: str = "/run/podwire"
    state_dir: str = "/var/lib/podwire"
    network_policy: bool = False
    network_policy_timeout: float = 10.0
    http_listen: str = "127.0.0.1:9817"
    log_level: str = "info"
    max_blocks: int = 16
    block_idle: float = 60.0
    cooldown: float = 30.0
    reconcile_interval: float = 30.0

    @property
    def families(self) -> frozenset[int]:
        """The families that pods have addresses of."""
        return frozenset(pool.cidr.version for pool in self.pools)

    @property
    def socket_path(self) -> Path:
        """Where the gRPC services are."""
        return Path(self.run_dir) / "ipamd.sock"

    @property
    def queue_dir(self) -> Path:
        """Where the executable leaves the DELs that it could not deliver."""
        return Path(self.state_dir) / "del-queue"


def read(path: Path, node: str = "") -> Settings:
    """The settings in the file at `path`; `node`, when given, goes before the file's. Raises ConfigError."""
    settings = load(path, Settings, dec_hook=_decode)
    settings = msgspec.structs.replace(settings, node=node or settings.node or socket.gethostname().lower())
    wrong = _first_wrong(settings)
    if wrong:
        raise ConfigError(f"{path}: {wrong}")
    return settings


def _first_wrong(settings: Settings) -> str:
    if not _NODE_NAME.match(settings.node):
        return f"node is {settings.node!r}, expected a lower-case DNS name such as node-1"
    if not settings.pools:
        return "pools is empty, expected at least one such as {cidr: 10.244.0.0/16}"
    for number, pool in enumerate(settings.pools):
        wrong = _wrong_pool(pool, settings.pools[:number])
        if wrong:
            return f"pools[{number}].{wrong}"
    wrong = wrong_backend(settings.backend)
    if wrong:
        return wrong
    least = LEAST_MTU[max(pool.cidr.version for pool in settings.pools)]
    if settings.mtu and not least <= settings.mtu <= 65535:
        return f"mtu is {settings.mtu}, expected {least} to 65535, or 0 to follow the underlay"
    if settings.log_level not in ("debug", "info", "warning", "error"):
        return f"logLevel is {settings.log_level!r}, expected debug, info, warning or error"
    if settings.max_blocks < 1:
        return f"maxBlocks is {settings.max_blocks}, expected 1 or more"
    if not settings.block_idle >= 0:
        return f"blockIdle is {settings.block_idle}, expected seconds, 0 or more"
    if not settings.cooldown >= 0:  # NaN is neither
        return f"cooldown is {settings.cooldown}, expected seconds, 0 or more"
    if not settings.fast_path_after >= 0:
        return f"fastPathAfter is {settings.fast_path_after}, expected seconds, 0 or more"
    if not settings.network_policy_timeout > 0:
        return f"networkPolicyTimeout is {settings.network_policy_timeout}, expected seconds, more than 0"
    if not settings.reconcile_interval > 0:
        return f"reconcileInterval is {settings.reconcile_interval}, expected seconds, more than 0"
    _, colon, port = settings.http_listen.rpartition(":")
    if settings.http_listen and not (colon and port.isdigit() and int(port) <= 65535):
        return (
            f"httpListen is {settings.http_listen!r}, expected address:port such as 127.0.0.1:9817, or empty for none"
        )
    return ""


def _wrong_pool(pool: Pool, others: tuple[Pool, ...]) -> str:
    if not pool.cidr.prefixlen <= pool.block_size <= pool.cidr.max_prefixlen - 3:
        return (
            f"blockSize is {pool.block_size}, expected a prefix length from {pool.cidr.prefixlen} (the pool's) to "
            f"{pool.cidr.max_prefixlen - 3} (four addresses of every block are reserved)"
        )
    for other in others:
        if other.cidr.version == pool.cidr.version:
            if other.name == pool.name:
                return f"name is {pool.name!r}, which another pool of the family has; expected a name of its own"
            if other.cidr.overlaps(pool.cidr):
                return f"cidr is {pool.cidr}, which overlaps {other.cidr} of pool {other.name}"
            return f"cidr is {pool.cidr}: a second pool of a family is not supported yet, expected one"
    return ""


def _decode(kind: Any, value: Any) -> Any:
    return from_plain(kind, value)
