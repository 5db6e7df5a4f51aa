"""Scripts of NetworkPolicy that change elements and nothing else, read as what is packed for the kernel. Pure.

Most changes are of this kind: a pod comes, goes or has another label, and its address enters sets and leaves others. A
pod waits for that with its start, and an `nft` process takes most of the time; the same as a message takes the kernel
next to nothing (podwire/nfnetlink.py). Everything else, ranges of addresses among it, stays text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from kube_proxy_lite.render.policy_nftables import TABLE
from podwire.nfelements import Change, Family, Table, add, concat, delete, goto

_MOST = 500  # elements; with more of them the start of a process is no matter
_LINE = re.compile(rf"(add|delete) element {TABLE} (\w+) {{ (.*) }}\Z")
_HASHED = re.compile(r"((known|isolated|self|ingress|egress)[46]|[pn]_\w+_[46])\Z")
_TABLE = Table(Family.INET, TABLE.split()[1])


def read(script: str) -> tuple[Change, ...] | None:
    """The elements that `script` adds and deletes, in its order; None when that is not all that it does."""
    changes: list[Change] = []
    for line in script.splitlines():
        found = _LINE.match(line)
        if found is None or not _HASHED.match(found[2]):
            return None
        changes += _changes(found[1], found[2], found[3])
        if len(changes) > _MOST:
            return None
    return tuple(changes)


def _changes(verb: str, name: str, listed: str) -> Iterator[Change]:
    for item in listed.split(", "):
        key, _, target = item.partition(" : ")
        if verb == "delete":
            yield delete(_TABLE, name, _key(key))
        else:
            yield add(_TABLE, name, _key(key), goto(target.removeprefix("goto ")) if target else None)


def _key(text: str) -> bytes:
    """An address, alone or with a port or another address."""
    address, _, second = text.partition(" . ")
    packed = ipaddress.ip_address(address).packed
    if not second:
        return packed
    return concat(packed, int(second).to_bytes(2, "big") if second.isdigit() else ipaddress.ip_address(second).packed)
