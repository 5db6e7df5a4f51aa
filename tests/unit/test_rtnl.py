"""Messages packed by hand, read by pyroute2: both must mean the same by them."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from ipam_daemon import rtnl
from ipam_daemon.links import get_link
from ipam_daemon.rtnl import Channel, End, Message


def read(message: Message, kind: Any) -> Any:
    """The message as pyroute2 understands it."""
    decoded = kind(struct.pack("=IHHII", 16 + len(message.body), message.kind, message.flags, 7, 0) + message.body)
    decoded.decode()
    return decoded


def test_a_pair_is_made_up_in_its_bridge_and_its_peer_elsewhere() -> None:
    host, peer = (
        End(ifname="pw1", mac="0a:59:00:00:00:01", mtu=1450),
        End(ifname="eth0", mac="0a:58:0a:f4:01:07", mtu=1400),
    )
    link = read(rtnl.make_pair(host, 9, peer, 11), ifinfmsg)
    assert (link["header"]["type"], link["header"]["flags"]) == (16, 0x600)
    assert (link["flags"], link["change"]) == (1, 1)
    assert [link.get(name) for name in ("ifname", "address", "mtu", "master")] == ["pw1", host.mac, 1450, 9]
    assert link.get(("linkinfo", "kind")) == "veth"
    theirs = link.get(("linkinfo", "data")).get_attr("VETH_INFO_PEER")
    assert [theirs.get(name) for name in ("ifname", "address", "mtu", "net_ns_fd")] == ["eth0", peer.mac, 1400, 11]


def test_a_port_is_named_and_sends_back() -> None:
    link = read(rtnl.set_port(5, "podwire a/b/c", 0xFFFD), ifinfmsg)
    assert (link["index"], link["change"]) == (5, 0)
    assert link.get("ifalias") == "podwire a/b/c"
    info = link.get("linkinfo")
    assert info.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge"
    port = info.get_attr("IFLA_INFO_SLAVE_DATA")
    assert (port.get_attr("IFLA_BRPORT_MODE"), port.get_attr("IFLA_BRPORT_GROUP_FWD_MASK")) == (1, 0xFFFD)
    assert read(rtnl.set_port(5, "", 0), ifinfmsg).get("ifalias") is None


def test_the_bridge_is_told_who_is_behind_a_port() -> None:
    entry = read(rtnl.set_port_mac(5, "0a:58:0a:f4:01:07"), ndmsg)
    assert (entry["family"], entry["ifindex"], entry["state"], entry["flags"]) == (socket.AF_BRIDGE, 5, 0x40, 0x04)
    assert entry.get("lladdr") == "0a:58:0a:f4:01:07"


def test_links_are_raised_and_lowered() -> None:
    up, down = read(rtnl.raise_link(3), ifinfmsg), read(rtnl.lower_link(3, 0x70770DED), ifinfmsg)
    assert (up["index"], up["flags"], up["change"]) == (3, 1, 1)
    assert (down["index"], down["flags"], down["change"]) == (3, 0, 1)
    assert (down.get("master"), down.get("group")) == (0, 0x70770DED)


@pytest.mark.parametrize(
    ("text", "family", "flags"), [("10.244.1.7/24", socket.AF_INET, None), ("fd00::7/64", socket.AF_INET6, 2)]
)
def test_an_address(text: str, family: int, flags: int | None) -> None:
    interface = ipaddress.ip_interface(text)
    message = read(rtnl.add_address(4, interface), ifaddrmsg)
    assert (message["family"], message["prefixlen"], message["index"], message["scope"]) == (
        family,
        interface.network.prefixlen,
        4,
        0,
    )
    assert message.get("address") == message.get("local") == str(interface.ip)
    assert message.get("flags_ex", message.get_attr("IFA_FLAGS")) == flags


@pytest.mark.parametrize("gateway", ["10.244.1.1", "fd00::1"])
def test_a_default_route(gateway: str) -> None:
    message = read(rtnl.add_default_route(4, ipaddress.ip_address(gateway)), rtmsg)
    assert (message["dst_len"], message["table"], message["proto"], message["scope"], message["type"]) == (
        0,
        254,
        4,
        0,
        1,
    )
    assert (message.get("gateway"), message.get("oif")) == (gateway, 4)


def answer(number: int, code: int) -> bytes:
    return struct.pack("=IHHIIi", 20, 2, 0, number, 0, -code)


def test_an_exchange_waits_for_every_answer_and_tells_the_first_failure() -> None:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel = Channel(ours)
    with kernel:
        kernel.send(answer(1, 0) + answer(2, errno.EEXIST))
        kernel.send(answer(99, errno.EPERM))  # of an exchange that was given up
        kernel.send(answer(3, errno.ENODEV))
        with pytest.raises(FileExistsError) as caught:
            channel.exchange([rtnl.raise_link(1), get_link(2), rtnl.raise_link(3)])
        assert caught.value.filename == "link"
        sent = kernel.recv(4096)
        assert [struct.unpack_from("=IHHII", sent, at)[3] for at in (0, 32)] == [1, 2]
        kernel.send(struct.pack("=IHHII", 20, 16, 0, 4, 0) + b"body")
        kernel.send(answer(4, 0))
        assert channel.exchange([get_link(2)]) == [b"body"]
    channel.close()
