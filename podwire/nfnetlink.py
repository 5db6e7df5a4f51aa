"""Elements of nft sets and maps, packed by hand: what changes with every pod and must not cost a process each time.

An `nft` process takes 2–8 ms for one element, nearly all of it its own start and its listing of what is there. The same
element as a message takes the kernel 0.02 ms. So tables, chains and rules are text, which is legible and rarely sent
(ipam_daemon/firewall.py); elements on the path of an ADD or DEL, and their reading back, come through here.

    nfelements.add(), delete() ──▶ commit() ──▶ begin · NEWSETELEM, DELSETELEM … · end ──▶ all of it, or nothing

A batch is a transaction. To add what is there already is fine (NLM_F_CREATE without NLM_F_EXCL), and so is to delete
what is not: the kernel refuses that (it knows NFT_MSG_DESTROYSETELEM from 6.3 on only), and the batch is sent again
without it. Changes that follow one another and are of one set share a message; after a refusal they are sent one by
one, so that an error names the element. What a batch holds is limited by the socket's send buffer alone, which is
raised to 4 MB, some 40,000 elements; more is split.

The kernel handles a batch before send() returns, hence nobody waits for its answer.

Source: linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h, netlink(7); net/netfilter/nfnetlink.c for what is
answered when. Integers of nf_tables are in network order, those of netlink's headers in host order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count

import msgspec

from podwire.nfelements import Change, Family, Table, Verdict
from podwire.nlattr import attribute, attributes, message, messages, nested

# netlink
_NETLINK_NETFILTER, _SOL_NETLINK, _CAP_ACK = 12, 270, 10
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP_INTERRUPTED, _DUMP, _CREATE = 0x1, 0x4, 0x10, 0x300, 0x400
_ERRNO = struct.Struct("=i")
_TIMEVAL = struct.Struct("@ll")

# nfnetlink
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_BATCH_BEGIN, _BATCH_END, _NFTABLES = 0x10, 0x11, 10
_GETCHAIN, _GETRULE, _NEWSETELEM, _GETSETELEM, _DELSETELEM, _GETOBJ = (
    (_NFTABLES << 8) + number for number in (4, 7, 12, 13, 14, 19)
)

# attributes of nf_tables
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _LIST_ELEM = 1, 2, 3, 1
_ELEM_KEY, _ELEM_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE, _HOOK_DEV, _HOOK_DEVS = 1, 3, 4, 5, 7, 3, 4
_DEVICE_PREFIX = 2
_FILTERS = attribute(_CHAIN_TYPE, b"filter\0")  # a chain at an interface's own hook has this type
_RULE_TABLE, _RULE_CHAIN, _RULE_USERDATA, _UDATA_COMMENT = 1, 2, 7, 0
_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_DATA, _OBJ_COUNTER, _COUNTER_PACKETS = 1, 2, 3, 4, 1, 2
_U32, _U64, _I32 = struct.Struct("!I"), struct.Struct("!Q"), struct.Struct("!i")

_BUFFER = 1 << 16
_QUEUE = 1 << 22
_GROUP = 60_000  # bytes: an attribute's length has 16 bits
_TIMEOUT = 5  # seconds; a listing is answered at once, so only a bug waits
_DUMPS = 10  # a listing is asked for again when something changed meanwhile
_LOOKS = 3  # the same for one that need not be of one moment


class Step(msgspec.Struct, frozen=True):
    """A message of a batch: its type, its flags but for those of every request, and its body."""

    kind: int
    flags: int
    body: bytes


class ElementRefused(OSError):
    """The kernel refused a transaction. `errno` and `change` are of the first change that it would not make; ENOENT
    says that its table, set or chain is not there, EEXIST or EBUSY that the map has other data under this key."""

    def __init__(self, number: int, change: Change | None) -> None:
        super().__init__(number, os.strerror(number), str(change or "nft transaction"))
        self.change = change


class Interfaces(msgspec.Struct, frozen=True):
    """Interfaces by name, and all those whose names begin so (`"pw*"`, Linux 6.16)."""

    names: frozenset[str] = frozenset()
    beginnings: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.names or name.startswith(tuple(self.beginnings))


# --- the socket -----------------------------------------------------------------------------------------------------


class Nftables:
    """A NETLINK_NETFILTER socket, which belongs to the namespace that it was opened in. Not for several threads."""

    def __init__(self) -> None:
        """Opens the socket in the namespace of this thread."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):  # limits: nothing is allocated until it is used
            self._socket.setsockopt(socket.SOL_SOCKET, option, _QUEUE)
        # The kernel's own timeout: Python's would wait with MSG_DONTWAIT, too.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(_TIMEOUT, 0))
        self._socket.bind((0, 0))
        self._sequence = count(1)

    @property
    def port(self) -> int:
        """The number by which the kernel tells others that a change was made here (nlmsg_pid of its events)."""
        return int(self._socket.getsockname()[0])

    def commit(self, changes: Iterable[Change], limit: int = _QUEUE) -> None:
        """Makes all changes or none, in their order. More than `limit` bytes, for which the send buffer has no room,
        are several transactions.

        Raises ElementRefused; what was not there to be deleted is no error.
        """
        batch: list[Change] = []
        size = 0
        for change in changes:
            needed = _size(change)
            if batch and size + needed > limit:
                self._commit(batch)
                batch, size = [], 0
            batch.append(change)
            size += needed
        if batch:
            self._commit(batch)

    def _commit(self, changes: list[Change]) -> None:
        groups: list[list[Change]] = list(_grouped(changes))
        while groups:
            refused = self._send(groups)
            if not refused:
                return
            if any(len(group) > 1 for group in groups):
                groups = [[change] for group in groups for change in group]
                continue
            for number, place in refused:
                change = groups[place][0] if place is not None else None
                if change is None or change.adds or number != errno.ENOENT:
                    raise ElementRefused(number, change)
            absent = {place for _, place in refused}
            groups = [group for place, group in enumerate(groups) if place not in absent]

    def _send(self, groups: Sequence[Sequence[Change]]) -> list[tuple[int, int | None]]:
        """Sends a batch of one message a group. Returns errno and place of each group that was refused; the place is
        None when it was the batch itself."""
        return self._send_batch(
            [
                Step(_NEWSETELEM if group[0].adds else _DELSETELEM, _CREATE if group[0].adds else 0, _elements(group))
                for group in groups
            ]
        )

    def carry_out(self, table: Table, steps: Sequence[Step]) -> None:
        """Makes all steps, which are about a table, or none. Raises OSError."""
        framed = _GENERIC.pack(table.family, 0, 0)
        if steps:
            for number, _ in self._send_batch([Step(each.kind, each.flags, framed + each.body) for each in steps]):
                raise OSError(number, os.strerror(number), str(table))

    def _send_batch(self, steps: Sequence[Step]) -> list[tuple[int, int | None]]:
        begin = next(self._sequence)
        places = {next(self._sequence): place for place in range(len(steps))}
        end = next(self._sequence)
        batch = _GENERIC.pack(0, 0, _NFTABLES)
        parts = [message(_BATCH_BEGIN, _REQUEST, begin, batch)]
        for number, place in places.items():
            step = steps[place]
            acknowledged = _ACK if place == len(steps) - 1 else 0
            parts.append(message(step.kind, _REQUEST | step.flags | acknowledged, number, step.body))
        parts.append(message(_BATCH_END, _REQUEST, end, batch))
        self._socket.send(b"".join(parts))
        return self._answers(places, {begin, end})

    def _answers(self, places: Mapping[int, int], frame: set[int]) -> list[tuple[int, int | None]]:
        refused: list[tuple[int, int | None]] = []
        answered = False
        while True:
            try:
                datagram = self._socket.recv(_BUFFER, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            for kind, _, sequence, body in messages(datagram):
                if kind != _ERROR or not (sequence in places or sequence in frame):
                    continue
                answered = True
                number = -_ERRNO.unpack_from(body)[0]
                if number:
                    refused.append((number, places.get(sequence)))
        if not answered:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO), "nft transaction without an answer")
        return refused

    # --- reading back

    def elements(self, table: Table, name: str) -> dict[bytes, bytes | Verdict | None] | None:
        """Key → data of every element of a set or map; None when there is none of this name."""
        wanted = attribute(_LIST_TABLE, _text(table.name)) + attribute(_LIST_SET, _text(name))
        try:
            bodies = self._dump(_GETSETELEM, table, wanted)
        except FileNotFoundError:
            return None
        found: dict[bytes, bytes | Verdict | None] = {}
        for body in bodies:
            for _, element in attributes(_nested_one(body, _LIST_ELEMENTS)):
                fields = dict(attributes(element))
                key = dict(attributes(fields[_ELEM_KEY]))[_DATA_VALUE]
                found[key] = _read_data(fields.get(_ELEM_DATA))
        return found

    def rules(self, table: Table) -> list[tuple[str, str]]:
        """Chain and comment of every rule of a table, in order; empty when there is no table."""
        wanted = attribute(_RULE_TABLE, _text(table.name))
        found = []
        for body in self._dump(_GETRULE, table, wanted):
            fields = dict(attributes(body))
            if _string(fields.get(_RULE_TABLE, b"")) == table.name:
                found.append((_string(fields[_RULE_CHAIN]), _comment(fields.get(_RULE_USERDATA, b""))))
        return found

    def chains(self, table: Table) -> dict[str, bool | None]:
        """The names of a table's chains, and for base chains whether their policy is to accept."""
        found: dict[str, bool | None] = {}
        for body in self._dump(_GETCHAIN, table, b""):
            fields = dict(attributes(body))
            if _string(fields[_CHAIN_TABLE]) == table.name:
                policy = fields.get(_CHAIN_POLICY)
                found[_string(fields[_CHAIN_NAME])] = None if policy is None else any(policy)
        return found

    def devices(self, family: Family) -> Interfaces:
        """The interfaces that have chains of a family (netdev, inet) at hooks of their own.

        Where something changes all the time, that is what several looks have seen together: it never fails for that.
        5,000 other chains of the family take it 3 ms.
        """
        seen: list[bytes] = []
        for _ in range(_LOOKS):
            bodies, is_whole = self._dump_once(_GETCHAIN, Table(family, ""), b"")
            if is_whole:
                seen = bodies
                break
            seen += bodies
        return read_interfaces(seen)

    def counters(self, table: Table) -> dict[str, int]:
        """Packets that each named counter of a table has counted; empty when there is no table."""
        wanted = attribute(_OBJ_TABLE, _text(table.name)) + attribute(_OBJ_TYPE, _U32.pack(_OBJ_COUNTER))
        found = {}
        for body in self._dump(_GETOBJ, table, wanted):
            fields = dict(attributes(body))
            if _string(fields[_OBJ_TABLE]) == table.name:
                values = dict(attributes(fields[_OBJ_DATA]))
                found[_string(fields[_OBJ_NAME])] = int(_U64.unpack(values[_COUNTER_PACKETS])[0])
        return found

    def _dump(self, kind: int, table: Table, wanted: bytes) -> list[bytes]:
        for _ in range(_DUMPS):
            bodies, is_whole = self._dump_once(kind, table, wanted)
            if is_whole:
                return bodies
        raise OSError(errno.EINTR, os.strerror(errno.EINTR), f"listing {table}")

    def _dump_once(self, kind: int, table: Table, wanted: bytes) -> tuple[list[bytes], bool]:
        """The attributes of every answer; whether nothing changed meanwhile."""
        number = next(self._sequence)
        self._socket.send(message(kind, _REQUEST | _DUMP, number, _GENERIC.pack(table.family, 0, 0) + wanted))
        bodies: list[bytes] = []
        interrupted = False
        while True:
            for answer, flags, sequence, body in messages(self._socket.recv(_BUFFER)):
                if sequence != number:
                    continue
                interrupted = interrupted or bool(flags & _DUMP_INTERRUPTED)
                if answer == _DONE:
                    return bodies, not interrupted
                if answer == _ERROR:
                    failed = -_ERRNO.unpack_from(body)[0]
                    raise OSError(failed, os.strerror(failed), f"listing {table}")
                bodies.append(body[_GENERIC.size :])

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


# --- packing --------------------------------------------------------------------------------------------------------


def _grouped(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """Changes that follow one another and are of one kind and one set, as far as one message holds them."""
    group: list[Change] = []
    size = 0
    for change in changes:
        needed = _size(change)
        last = group[-1] if group else None
        if last and (
            (change.adds, change.set, change.table) != (last.adds, last.set, last.table) or size + needed > _GROUP
        ):
            yield group
            group, size = [], 0
        group.append(change)
        size += needed
    if group:
        yield group


def _size(change: Change) -> int:
    """An upper bound of the bytes that a change takes, its own message included."""
    data = change.data if isinstance(change.data, bytes) else b"" if change.data is None else change.data.chain.encode()
    return 104 + len(change.set) + len(change.table.name) + len(change.key) + len(data)


def _elements(group: Sequence[Change]) -> bytes:
    first = group[0]
    packed = b"".join(nested(_LIST_ELEM, _element(change)) for change in group)
    return (
        _GENERIC.pack(first.table.family, 0, 0)
        + attribute(_LIST_TABLE, _text(first.table.name))
        + attribute(_LIST_SET, _text(first.set))
        + nested(_LIST_ELEMENTS, packed)
    )


def _element(change: Change) -> bytes:
    key = nested(_ELEM_KEY, attribute(_DATA_VALUE, change.key))
    if change.data is None:
        return key
    return key + nested(_ELEM_DATA, _data(change.data))


def _data(data: bytes | Verdict) -> bytes:
    if isinstance(data, bytes):
        return attribute(_DATA_VALUE, data)
    chain = attribute(_VERDICT_CHAIN, _text(data.chain)) if data.chain else b""
    return nested(_DATA_VERDICT, attribute(_VERDICT_CODE, _I32.pack(data.code)) + chain)


def _text(name: str) -> bytes:
    return name.encode() + b"\0"


# --- unpacking ------------------------------------------------------------------------------------------------------


def _nested_one(payload: bytes, wanted: int) -> bytes:
    return next((found for kind, found in attributes(payload) if kind == wanted), b"")


def read_interfaces(chains: Iterable[bytes]) -> Interfaces:
    """Those at whose hooks chains are, of the attributes of each. A beginning is an attribute of its own, or, in Linux
    6.16, a name without an end."""
    names, beginnings = set[str](), set[str]()
    for chain in chains:
        if _FILTERS not in chain:
            continue
        hook = dict(attributes(_nested_one(chain, _CHAIN_HOOK)))
        one = ((_HOOK_DEV, hook[_HOOK_DEV]),) if _HOOK_DEV in hook else ()
        for kind, name in (*one, *attributes(hook.get(_HOOK_DEVS, b""))):
            begins = (kind == _DEVICE_PREFIX) or not name.endswith(b"\0")
            (beginnings if begins else names).add(os.fsdecode(name.rstrip(b"\0")))
    return Interfaces(frozenset(names), frozenset(beginnings))


def _read_data(payload: bytes | None) -> bytes | Verdict | None:
    if payload is None:
        return None
    fields = dict(attributes(payload))
    if _DATA_VALUE in fields:
        return fields[_DATA_VALUE]
    verdict = dict(attributes(fields[_DATA_VERDICT]))
    return Verdict(_I32.unpack(verdict[_VERDICT_CODE])[0], _string(verdict.get(_VERDICT_CHAIN, b"")))


def _comment(userdata: bytes) -> str:
    """The comment among what nft notes on a rule: type, length, value, one byte each for the first two."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == _UDATA_COMMENT:
            return _string(userdata[at + 2 : at + 2 + length])
        at += 2 + length
    return ""


def _string(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode()
