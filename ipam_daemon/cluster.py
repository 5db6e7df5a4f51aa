"""The cluster's configuration in etcd, and its one part that changes while the cluster runs: the backend.

    podwire cluster set ──▶ /podwire/v1/config ──watch──▶ every daemon ──▶ its own plan, at its own moment

There is no moment at which all nodes change together, and none is needed. Every node takes packets of pods by VXLAN and
by the underlay whatever its backend (ipam_daemon/plan.py), and sends by what it has last heard; so a node that hears of
the change later, or has no etcd for an hour, is reached all the same. An MTU that shrinks does so before a route of
that node needs it. VNI and port are different: two nodes that say otherwise do not hear each other, and pods of
different nodes lose what is sent between the first daemon's change and the last's, some tens of milliseconds.

The write is a transaction on what was read. Keys that this version does not know are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ipam_daemon.claims import ConfigMissing, wrong_backend
from ipam_daemon.model import Backend, ClusterConfig, decode, from_plain
from ipam_daemon.node_list import decoded
from ipam_daemon.registry import ROOT
from podwire.config import ConfigError
from podwire.errors import TryAgain
from podwire.etcd import EtcdSession
from podwire.etcd.records import Item, Put, unchanged

_ATTEMPTS = 5


async def read_config(session: EtcdSession, root: str = ROOT) -> ClusterConfig:
    """What holds. Raises ConfigMissing, RecordDamaged, EtcdUnavailable."""
    return decoded(await _item(session, root), ClusterConfig)


async def change_backend(session: EtcdSession, wanted: Mapping[str, Any], root: str = ROOT) -> tuple[Backend, Backend]:
    """Sets the keys of the backend that are `wanted` ("type", "vni", "port"). Returns what held before and what holds.

    Raises ConfigError for what no backend can be, ConfigMissing, RecordDamaged, EtcdUnavailable, TryAgain.
    """
    for _ in range(_ATTEMPTS):
        item = await _item(session, root)
        before = decoded(item, ClusterConfig).backend
        plain = msgspec.json.decode(item.value)
        plain["backend"] = {**plain.get("backend", {}), **wanted}
        after = _checked(plain["backend"])
        if after == before:
            return before, after
        value = msgspec.json.encode(plain)
        decode(value, ClusterConfig)
        if (await session.txn([unchanged(item.key, item.mod_revision)], [Put(item.key, value)])).succeeded:
            return before, after
    raise TryAgain(f"somebody else changes {root}config all the time; nothing was done")


def _checked(plain: Mapping[str, Any]) -> Backend:
    try:
        backend = msgspec.convert(plain, Backend, dec_hook=from_plain)
    except msgspec.ValidationError as error:
        raise ConfigError(f"backend: {error}") from error
    wrong = wrong_backend(backend)
    if wrong:
        raise ConfigError(wrong)
    return backend


async def _item(session: EtcdSession, root: str) -> Item:
    item = await session.get(f"{root}config")
    if item is None:
        raise ConfigMissing(f"etcd has no configuration of the cluster at {root}config: the first daemon writes it")
    return item
