"""The fast path on Debian 12's own kernel: conntrack is a module there, and there is no TCX (Linux 6.6).

One boot for all tests of this file, with a lab of two nodes in it: two to four minutes, most of it the daemons' start
on an emulated processor.
"""

from __future__ import annotations

import sys

import pytest

from tests.vm.booting import ROOT, boot

pytestmark = pytest.mark.slow
ACROSS = "intact, fast: node1/from-node node1/node node2/from-node node2/node"


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What the guest says: name → answer."""
    return boot(f"env PYTHONPATH={ROOT} {sys.executable} -m tests.vm.fast_guest", memory="2G")


def test_daemons_that_start_before_conntrack_is_loaded_have_a_fast_path(answers: dict[str, str]) -> None:
    assert answers["kernel"].startswith("6.1.")
    assert (answers["conntrack at first"], answers["fast"]) == ("not loaded", "yes")


CARRIED = {
    "pod 4": "intact, fast: node1/pod",
    "pod 6": "intact, fast: node1/pod",
    "node 4": ACROSS,
    "node 6": ACROSS,
    "direct 4": "intact, fast: node1/node node2/node",
    "direct 6": "intact, fast: node1/node node2/node",
    "locked down 4": ACROSS,
    "locked down 6": ACROSS,
}


@pytest.mark.parametrize(("name", "expected"), CARRIED.items(), ids=CARRIED.keys())
def test_connections_are_fast_and_whole(answers: dict[str, str], name: str, expected: str) -> None:
    assert answers[name] == expected


def test_the_interface_of_the_pod_counts_them(answers: dict[str, str]) -> None:
    """Before Linux 6.8 it did not, where stable kernels have not taken that over."""
    assert answers["counted"] == "by the pod"


def test_the_kernel_was_locked_down(answers: dict[str, str]) -> None:
    assert answers["locked down"] == "none integrity [confidentiality]"


TOLD = {
    "no types": "the kernel does not tell its types: /sys/kernel/btf/vmlinux: No such file or directory",
    "no filters": "on: 0 pods; pw-vxlan: the kernel has no cls_bpf, not as a module either",
    "not the last": "on: 2 pods; PORT: it has no place for filters, and TCX is of Linux 6.6",
    "direct": "on: 2 pods; eth0: what arrives takes the long way: TCX is of Linux 6.6",
    "nobody": "the kernel's BTF: Operation not permitted",
    "nobody's maps": "making eBPF maps: EPERM: Operation not permitted",
}


@pytest.mark.parametrize(("name", "expected"), TOLD.items(), ids=TOLD.keys())
def test_what_a_kernel_lacks_is_told_in_one_line(answers: dict[str, str], name: str, expected: str) -> None:
    assert answers[name] == expected


def test_what_is_lacking_is_not_tried_again_with_packets_at_stake(answers: dict[str, str]) -> None:
    """A place for filters that comes and goes drops what the device sends."""
    assert answers["no filters, ten seconds"] == "no queue came or went"
