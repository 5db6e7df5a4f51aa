"""Entering a namespace: checked first, left again whatever happens, and never pinned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipam_daemon.netlink import container
from podwire.netns import NetnsError, NetnsGone, inside, netlink_socket, open_netns
from tests.netns.node_fixtures import Netns


def own() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def pod() -> Iterator[Netns]:
    with Netns("pod") as made:
        yield made


def test_the_thread_is_inside_and_then_back(pod: Netns) -> None:
    before = own()
    fd = open_netns(pod.path)
    with inside(fd):
        assert own() == os.stat(pod.path).st_ino != before
    assert own() == before
    os.close(fd)


def test_the_thread_is_back_after_a_failure(pod: Netns) -> None:
    before, open_before = own(), descriptors()
    fd = open_netns(pod.path)
    with pytest.raises(KeyError), inside(fd):
        raise KeyError("inside")
    os.close(fd)
    assert own() == before
    assert descriptors() <= open_before


def test_a_socket_belongs_to_where_it_was_opened(pod: Netns) -> None:
    pod.ip("link", "add", "eth0", "type", "veth", "peer", "name", "other")
    fd = open_netns(pod.path)
    with container(fd, "eth0") as (route, index):
        assert own() != os.stat(pod.path).st_ino, "everything else is done from outside"
        assert {each.get("ifname") for each in route.get_links()} == {"lo", "eth0", "other"}
        assert route.get_links(index)[0].get("ifname") == "eth0"
    with container(fd, "absent") as (_, index):
        assert index == 0
    os.close(fd)


def test_nothing_stays_open(pod: Netns) -> None:
    before = descriptors()
    for _ in range(3):
        fd = open_netns(pod.path)
        with container(fd, "lo") as (route, _):
            route.get_links()
        os.close(fd)
    assert descriptors() <= before


def test_a_deleted_namespace_ends_although_it_was_entered(pod: Netns) -> None:
    """Its link to the outside goes with it, as it would not while a socket pinned the namespace."""
    with Netns("outside") as outside:
        pod.ip("link", "add", "eth0", "type", "veth", "peer", "name", "wire", "netns", outside.name)
        fd = open_netns(pod.path)
        with container(fd, "eth0") as (route, _):
            route.get_links()
        os.close(fd)
        pod.delete()
        while outside.links():
            pass


def test_a_netlink_socket_is_a_datagram_one() -> None:
    with netlink_socket() as made:
        assert made.type & 0xF == 2


def test_a_deleted_namespace_is_gone(pod: Netns) -> None:
    pod.delete()
    with pytest.raises(NetnsGone, match="no network namespace"):
        open_netns(pod.path)


def test_what_a_deleted_namespace_leaves_behind_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "cni-1").touch()
    with pytest.raises(NetnsError, match="empty mount point"):
        open_netns(str(tmp_path / "cni-1"))


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(NetnsError, match="cannot be opened"):
        open_netns(str(tmp_path / "loop"))


def test_a_link_to_a_namespace_is_followed(tmp_path: Path, pod: Netns) -> None:
    (tmp_path / "link").symlink_to(pod.path)
    os.close(open_netns(str(tmp_path / "link")))


@pytest.mark.parametrize("path", ["/proc/self/ns/net", "/proc/thread-self/ns/net"])
def test_our_own_is_refused(path: str) -> None:
    before = descriptors()
    with pytest.raises(NetnsError, match="own network namespace"):
        open_netns(path)
    assert descriptors() <= before
