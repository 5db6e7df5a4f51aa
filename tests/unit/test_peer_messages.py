"""Messages of the bulk path, read by pyroute2: both must mean the same by them. And what becomes of the answers."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from ipam_daemon import peer_messages as messages
from ipam_daemon.peer_messages import BulkChannel
from ipam_daemon.rtnl import Message

MAC = "0a:58:0a:f4:02:02"
FAMILIES = {
    "IPv4": ("10.244.2.2", "192.0.2.2", "10.244.2.0/24", socket.AF_INET),
    "IPv6": ("fd00:2::2", "2001:db8::2", "fd00:2::/64", socket.AF_INET6),
}


def read(message: Message, kind: Any) -> Any:
    """The message as pyroute2 understands it."""
    decoded = kind(struct.pack("=IHHII", 16 + len(message.body), message.kind, message.flags, 7, 0) + message.body)
    decoded.decode()
    return decoded


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


def test_a_neighbour(family: Any) -> None:
    vtep, _, _, number = family
    packed = ipaddress.ip_address(vtep).packed
    made = read(messages.set_neighbour(7, packed, messages.pack_mac(MAC)), ndmsg)
    assert (made["header"]["type"], made["header"]["flags"]) == (28, 0x500)
    assert [made[name] for name in ("family", "ifindex", "state", "flags")] == [number, 7, 0x80, 0]
    assert (made.get("dst"), made.get("lladdr")) == (vtep, MAC)
    gone = read(messages.delete_neighbour(7, packed), ndmsg)
    assert (gone["header"]["type"], gone["family"], gone["ifindex"], gone.get("dst")) == (29, number, 7, vtep)


def test_an_fdb_entry(family: Any) -> None:
    _, underlay, _, _ = family
    made = read(messages.set_fdb(7, messages.pack_mac(MAC), ipaddress.ip_address(underlay).packed), ndmsg)
    assert (made["header"]["type"], made["header"]["flags"]) == (28, 0x500)
    assert [made[name] for name in ("family", "ifindex", "state", "flags")] == [socket.AF_BRIDGE, 7, 0x80, 2]
    assert made.get("lladdr") == MAC
    assert ipaddress.ip_address(underlay).packed in made.data
    gone = read(messages.delete_fdb(7, messages.pack_mac(MAC)), ndmsg)
    assert (gone["header"]["type"], gone["flags"], gone.get("lladdr"), gone.get("dst")) == (29, 2, MAC, None)


@pytest.mark.parametrize(("onlink", "flags"), [(True, 4), (False, 0)], ids=["by a VTEP", "by the underlay"])
def test_a_route(family: Any, onlink: bool, flags: int) -> None:
    gateway, _, cidr, number = family
    network = ipaddress.ip_network(cidr)
    key, way = messages.pack_network(network), messages.pack_way(ipaddress.ip_address(gateway), 7, onlink)
    assert messages.unpack_network(key) == network
    assert messages.unpack_way(way) == (ipaddress.ip_address(gateway), 7, onlink)
    made = read(messages.set_route(key, way), rtmsg)
    assert (made["header"]["type"], made["header"]["flags"]) == (24, 0x500)
    fields = ("family", "dst_len", "table", "proto", "scope", "type", "flags")
    assert [made[name] for name in fields] == [number, network.prefixlen, 254, 80, 0, 1, flags]
    assert [made.get(name) for name in ("dst", "gateway", "oif")] == [str(network.network_address), gateway, 7]
    gone = read(messages.delete_route(key, way), rtmsg)
    assert (gone["header"]["type"], gone["proto"], gone["scope"]) == (25, 80, 255)
    assert [gone.get(name) for name in ("dst", "oif")] == [str(network.network_address), 7]


# --- answers ----------------------------------------------------------------------------------------------------------


class Kernel:
    """The other end of a channel, which answers as a function says: (number, flags of the request) → answers."""

    def __init__(self, answers: Callable[[int, int], list[bytes]]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagrams: list[int] = []
        self._theirs = theirs
        self._answers = answers
        self.channel = BulkChannel(self)  # type: ignore[arg-type]
        self._ours = ours

    def settimeout(self, _: float) -> None: ...

    def setsockopt(self, *_: int) -> None:
        raise OSError(errno.ENOPROTOOPT, "an old kernel")

    def send(self, datagram: bytes) -> None:
        """Answers each message at once, as the kernel does."""
        at = count = 0
        while at < len(datagram):
            length, _, flags, number, _ = struct.unpack_from("=IHHII", datagram, at)
            for answer in self._answers(number, flags):
                self._theirs.send(answer)
            at, count = at + length, count + 1
        self.datagrams.append(count)

    def recv(self, size: int) -> bytes:
        """The next answer."""
        self._ours.settimeout(0)
        return self._ours.recv(size)

    def close(self) -> None:
        """Both ends."""
        self._ours.close()
        self._theirs.close()


def answer(number: int, code: int) -> bytes:
    return struct.pack("=IHHIIi", 20, 2, 0, number, 0, -code)


def acknowledged(number: int, flags: int) -> list[bytes]:
    return [answer(number, 0)] if flags & 0x4 else []


ROUTES = [
    messages.set_route(bytes((24, 10, 244, number, 0)), messages.pack_way(ipaddress.ip_address("192.0.2.1"), 1, False))
    for number in range(200)
]


def test_a_hundred_and_some_go_in_one_datagram_and_only_its_last_asks_for_an_answer() -> None:
    kernel = Kernel(acknowledged)
    assert kernel.channel.carry_out(ROUTES) == {}
    assert kernel.datagrams == [128, 72]
    assert kernel.channel.carry_out([]) == {}
    kernel.channel.close()


FAILING = {
    "the first": {0: errno.ENODEV},
    "one in the middle of the second datagram": {150: errno.EEXIST},
    "the last of a datagram": {127: errno.EINVAL},
    "the last": {199: errno.ENODEV},
    "several": {3: errno.EEXIST, 127: errno.EINVAL, 128: errno.ENODEV},
    "all": dict.fromkeys(range(200), errno.ENETDOWN),
}


@pytest.mark.parametrize("failing", FAILING.values(), ids=FAILING.keys())
def test_who_failed_is_told_by_its_place(failing: dict[int, int]) -> None:
    def refuse(number: int, flags: int) -> list[bytes]:
        code = failing.get(number - 1, 0)
        return [answer(number, code)] if code or flags & 0x4 else []

    kernel = Kernel(refuse)
    assert kernel.channel.carry_out(ROUTES) == failing
    kernel.channel.close()


def test_answers_of_an_exchange_that_was_given_up_count_for_nothing() -> None:
    late = [answer(1, errno.EPERM)]

    def refuse_late(number: int, flags: int) -> list[bytes]:
        return [*late, *acknowledged(number, flags)] if number > 1 else []

    kernel = Kernel(refuse_late)
    with pytest.raises(BlockingIOError):  # the answer does not come
        kernel.channel.carry_out(ROUTES[:1])
    assert kernel.channel.carry_out(ROUTES[:1]) == {}
    kernel.channel.close()


def neighbour(number: int, flags: int, last: int) -> bytes:
    """An answer to a dump that tells of 10.244.2.<last>."""
    body = messages.set_neighbour(7, bytes((10, 244, 2, last)), messages.pack_mac(MAC)).body
    return struct.pack("=IHHII", 16 + len(body), 28, flags, number, 0) + body


def done(number: int) -> bytes:
    return struct.pack("=IHHIIi", 20, 3, 2, number, 0, 0)


def test_a_dump_that_changed_while_it_was_read_is_read_again() -> None:
    dumps: list[int] = []

    def tell(number: int, _: int) -> list[bytes]:
        dumps.append(number)
        interrupted = 0x10 if len(dumps) == 1 else 0
        return [neighbour(number, 2 | interrupted, len(dumps)), done(number)]

    kernel = Kernel(tell)
    found = kernel.channel.neighbours(7)
    assert len(dumps) == 3  # one family twice
    assert {str(ipaddress.ip_address(key)): mac.hex(":") for key, mac in found.items()} == {
        "10.244.2.2": MAC,
        "10.244.2.3": MAC,
    }
    kernel.channel.close()


def test_a_dump_that_is_refused_is_an_error() -> None:
    kernel = Kernel(lambda number, _: [answer(number, errno.EPERM)])
    with pytest.raises(PermissionError):
        kernel.channel.routes()
    kernel.channel.close()
