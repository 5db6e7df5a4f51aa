"""Whether an interface is there: yes, no, or not to be known."""

from __future__ import annotations

import resource
import socket

import pytest

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.netlink import index_of


def test_an_interface_has_its_index() -> None:
    assert index_of("lo") == socket.if_nametoindex("lo")


@pytest.mark.parametrize("name", ["nobody0", "", "lo" + 14 * "x", "lö"])
def test_what_is_not_there_has_none(name: str) -> None:
    assert index_of(name) == 0


def test_without_a_file_descriptor_an_interface_does_not_look_gone() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(PlumbingFailed, match="lo cannot be known: Too many open files"):
            index_of("lo")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
