"""The other nodes of a large cluster, as far as one node can tell: records in its etcd, and routes in its kernel.

    python -m bench.crowd ENDPOINT fill COUNT           COUNT records and their blocks are written
    python -m bench.crowd ENDPOINT programmed COUNT     waits until so many routes have been added
    python -m bench.crowd ENDPOINT join COUNT ROUNDS    ROUNDS more nodes join and leave again, one by one
    python -m bench.crowd ENDPOINT claim COUNT          COUNT daemons' worth of registries enter and claim at once

A process of its own inside the node's namespace, where etcd is, which answers with one line of JSON. Its times are of
CLOCK_MONOTONIC, which all processes of the machine share. When a route is there the kernel says (RTNLGRP_IPV4_ROUTE),
so looking costs the daemon nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing
from typing import Any

from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import Block, ClusterConfig, Network, NodeRecord, Pool, encode
from ipam_daemon.plan import plan_record
from ipam_daemon.registry import ROOT
from podwire.etcd import EtcdSession
from podwire.etcd.options import EtcdOptions
from podwire.etcd.records import Put

POOL = Pool(cidr=ipaddress.ip_network("10.0.0.0/9"))
_UNDERLAY = ipaddress.ip_address("172.16.0.0")
_OPERATIONS = 100  # in a transaction; etcd takes 128
_PATIENCE = 60.0  # seconds
_RECEIVE = 64 << 20  # bytes: events of 5,000 routes, each counted with what it takes in the kernel
_SO_RCVBUFFORCE = 33
_ROUTE_GROUP = 0x40  # RTMGRP_IPV4_ROUTE
_NEWROUTE, _DELROUTE, _RTA_DST = 24, 25, 1
_HEADER, _ROUTE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBBBBBBBI"), struct.Struct("=HH")


def record(number: int) -> NodeRecord:
    """The record of the node with this number, from 0."""
    name = f"worker-{number:05}.crowd.example"
    address = ipaddress.ip_address(int(_UNDERLAY) + number)
    return plan_record(name, f"6f1c8a52-7d0e-4c35-9b57-{number:012x}", 1, (address,), [_block(name, number)], "0.1.0")


def _block(name: str, number: int) -> Block:
    base = int(POOL.cidr.network_address) + (number << (32 - POOL.block_size))
    cidr = ipaddress.ip_network((base, POOL.block_size))
    return Block(cidr=cidr, pool=POOL.name, node=name, node_id=f"6f1c8a52-7d0e-4c35-9b57-{number:012x}", generation=1)


def puts(number: int) -> tuple[Put, Put]:
    """What a node leaves in etcd for good: its record and its block."""
    one = record(number)
    block = _block(one.name, number)
    return Put(f"{ROOT}nodes/{one.name}", encode(one)), Put(f"{ROOT}blocks/{block.cidr}", encode(block))


# --- what is done -----------------------------------------------------------------------------------------------------


async def fill(etcd: EtcdSession, count: int) -> dict[str, Any]:
    """Writes the records and blocks of nodes 0 to `count` - 1. Tells how many bytes a node takes, keys included."""
    written = [put for number in range(count) for put in puts(number)]
    for start in range(0, len(written), _OPERATIONS):
        await etcd.txn([], written[start : start + _OPERATIONS])
    return {"bytes": sum(len(put.key) + len(put.value) for put in written) / count}


async def programmed(_: EtcdSession, count: int) -> dict[str, Any]:
    """Waits until `count` routes have been added. Tells when the last one was."""
    with closing(_monitor()) as monitor:
        print(json.dumps({"watching": True}), flush=True)
        there: set[Network] = set()
        loop = asyncio.get_running_loop()
        while len(there) < count:
            there |= {cidr for kind, cidr in _events(await loop.sock_recv(monitor, 1 << 16)) if kind == _NEWROUTE}
        return {"at": time.monotonic()}


async def join(etcd: EtcdSession, count: int, rounds: int) -> dict[str, Any]:
    """Writes one record after another, and deletes it again. Tells seconds until the route was there, and gone."""
    joined, left = [], []
    loop = asyncio.get_running_loop()

    async def until(kind: int, cidr: Network) -> float:
        while (kind, cidr) not in set(_events(await loop.sock_recv(monitor, 1 << 16))):
            pass
        return time.monotonic()

    with closing(_monitor()) as monitor:
        for number in range(count, count + rounds):
            put, _ = puts(number)
            (cidr,) = record(number).blocks
            began = time.monotonic()
            await etcd.put(put.key, put.value)
            joined.append(await until(_NEWROUTE, cidr) - began)
            began = time.monotonic()
            await etcd.delete(put.key)
            left.append(await until(_DELROUTE, cidr) - began)
    return {"joined": joined, "left": left}


async def claim(etcd: EtcdSession, endpoint: str, count: int) -> dict[str, Any]:
    """So many nodes enter, claim a block and publish, all at once. Tells how long that took, and how many blocks."""
    root = f"{ROOT}claim/"
    config = ClusterConfig(pools=(POOL,))
    async with AsyncExitStack() as stack:
        registries = []
        for _ in range(count):
            session = await stack.enter_async_context(EtcdSession(EtcdOptions(endpoints=(endpoint,))))
            registries.append(EtcdRegistry(session, root=root))
            stack.push_async_callback(registries[-1].leave)
            await session.status()  # connected: what is measured is the claims

        async def one(number: int, registry: EtcdRegistry) -> Network:
            name, node_id = f"worker-{number:05}", f"id-{number}"
            await registry.agree(config)
            entry = await registry.enter(name, node_id)
            block = await registry.claim_block(POOL, name, node_id, entry.generation)
            address = ipaddress.ip_address(int(_UNDERLAY) + number)
            await registry.publish(plan_record(name, node_id, entry.generation, (address,), [block], "0.1.0"))
            return block.cidr

        began = time.monotonic()
        blocks = await asyncio.gather(*(one(number, registry) for number, registry in enumerate(registries)))
        took = time.monotonic() - began
    await etcd.delete(root, prefix=True)
    return {"seconds": took, "blocks": len(set(blocks))}


# --- the kernel's word ------------------------------------------------------------------------------------------------


def _monitor() -> socket.socket:
    monitor = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    monitor.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE)
    monitor.bind((0, _ROUTE_GROUP))
    monitor.setblocking(False)
    return monitor


def _events(datagram: bytes) -> Iterator[tuple[int, Network]]:
    """Message type and destination of the routes that a datagram tells of."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, at)
        body, end = at + _HEADER.size, at + length
        prefix, place = _ROUTE.unpack_from(datagram, body)[1], body + _ROUTE.size
        while place + _ATTRIBUTE.size <= end:
            size, attribute = _ATTRIBUTE.unpack_from(datagram, place)
            if attribute == _RTA_DST:
                yield kind, ipaddress.ip_network((datagram[place + 4 : place + size], prefix))
            place += (max(size, 4) + 3) & ~3
        at += (max(length, _HEADER.size) + 3) & ~3


async def _main(endpoint: str, what: str, *numbers: int) -> None:
    acts: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "fill": fill,
        "programmed": programmed,
        "join": join,
        "claim": lambda etcd, count: claim(etcd, endpoint, count),
    }
    async with EtcdSession(EtcdOptions(endpoints=(endpoint,))) as etcd:
        print(json.dumps(await asyncio.wait_for(acts[what](etcd, *numbers), _PATIENCE)), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
