"""Takes away what the daemon has put into the kernel of a node that is given up. For `podwire node clean`.

    no daemon runs ─▶ no pod is attached ─▶ routes ─▶ links ─▶ nft tables ─▶ journal, what outlives a reboot

A daemon that ends leaves all of it, since pods go on without one; so it is only taken away when somebody says so, and
never under a pod's feet. Only what is ours by kind and name goes; nothing does while somebody else's link is a port of
`pw0`. Sysctls stay as they are, as nobody knows what they were, and so does what says who this machine is; what
is in etcd goes with `podwire node forget`. Every step may have been done already.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ipam_daemon.bandwidth import wire_of
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.firewall import run_nft
from ipam_daemon.hostport_rules import TABLE as HOST_PORTS
from ipam_daemon.identity import take_lock
from ipam_daemon.model import Network
from ipam_daemon.netlink import NetlinkThread, naming, tolerating
from ipam_daemon.peer_messages import delete_route, unpack_network, unpack_way
from ipam_daemon.plan import BRIDGE, VXLAN, attachment_of
from ipam_daemon.ruleset import TABLE as FIREWALL
from ipam_daemon.settings import Settings
from ipam_daemon.spoofguard import TABLE as GUARD
from ipam_daemon.tc import TABLE as LIMITS
from ipam_daemon.wires import DOOMED_GROUP, Wires
from podwire.errors import PodwireError

_OUR_WIRE = re.compile(r"pw[0-9a-f]{12}\Z")
_TABLES = tuple(map(str, (GUARD, FIREWALL, HOST_PORTS, LIMITS)))
_NAMED = 5


class NodeInUse(PodwireError):
    """Pods are attached, or others use what is ours."""


def clean(settings: Settings) -> list[str]:
    """Takes it away, and says what it was. Raises NodeInUse, AlreadyRunning, PlumbingFailed, OSError; what is gone by
    then is gone."""
    run_dir = Path(settings.run_dir)
    if run_dir.is_dir():
        take_lock(run_dir)
    done = asyncio.run(_clean_kernel([pool.cidr for pool in settings.pools]))
    for path in (*run_dir.glob("journal.db*"), Path(settings.state_dir) / "held.json"):
        if path.exists():
            path.unlink()
            done.append(f"file {path}")
    return done


async def _clean_kernel(pools: list[Network]) -> list[str]:
    thread = NetlinkThread()
    try:
        await thread.run(Wires(thread).reap, ())
        await thread.run(_refuse_in_use, thread)
        done = await thread.run(_delete_routes, thread, pools)
        done += await thread.run(_delete_links, thread)
    finally:
        await thread.close()
    return done + await _delete_tables()


def _refuse_in_use(thread: NetlinkThread) -> None:
    links = list(thread.host.get_links())
    bridge = next((link["index"] for link in links if link.get("ifname") == BRIDGE), 0)
    users = []
    for link in links:
        name, alias = str(link.get("ifname")), link.get("ifalias") or ""
        ours = attachment_of(alias, name, 0, 0.0)
        if link.get("group") == DOOMED_GROUP:
            continue
        if ours is not None or _OUR_WIRE.match(name) or (bridge and link.get("master") == bridge):
            users.append(f"{name} ({ours.key})" if ours else name)
    if users:
        more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
        raise NodeInUse(
            f"{len(users)} wires are attached: {', '.join(users[:_NAMED])}{more}; move the pods away first, with the "
            "daemon running (kubectl drain), so that their DEL is done"
        )


def _delete_routes(thread: NetlinkThread, pools: list[Network]) -> list[str]:
    """Those with our protocol number into the cluster's pools. What leads to our devices goes with them."""
    done = []
    for key, way in thread.bulk.routes().items():
        network = unpack_network(key)
        if any(network.version == pool.version and network.network_address in pool for pool in pools):
            gateway, _, _ = unpack_way(way)
            (code,) = thread.bulk.carry_out([delete_route(key, way)]).values() or (0,)
            if code not in (0, errno.ESRCH):
                raise PlumbingFailed(f"deleting route {network}: {errno.errorcode.get(code, code)}")
            done.append(f"route {network} via {gateway}")
    return done


def _delete_links(thread: NetlinkThread) -> list[str]:
    done = []
    for link in _ours(list(thread.host.get_links())):
        name = str(link.get("ifname"))
        with naming(f"deleting {name}"), tolerating(errno.ENODEV):
            thread.host.link("del", index=link["index"])
        done.append(f"link {name}")
    return done


def _ours(links: Iterable[Any]) -> Iterator[Any]:
    for link in links:
        name, kind = str(link.get("ifname")), link.get(("linkinfo", "kind"))
        if (name, kind) in ((BRIDGE, "bridge"), (VXLAN, "vxlan")) or (kind == "ifb" and wire_of(name)):
            yield link


async def _delete_tables() -> list[str]:
    there = {line.removeprefix("table ").strip() for line in (await run_nft("nft", "list", "tables")).splitlines()}
    found = [table for table in _TABLES if table in there]
    if found:
        await run_nft("nft", "-f", "-", stdin="".join(f"delete table {table}\n" for table in found))
    return [f"nft table {table}" for table in found]
