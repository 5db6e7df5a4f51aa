"""Which interfaces chains of nft are at, as kernels say it: this one may be of those that know no wildcards."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from podwire.nfnetlink import read_interfaces
from podwire.nlattr import attribute, nested

# linux/netfilter/nf_tables.h
TABLE, NAME, HOOK, TYPE = 1, 3, 4, 7
DEV, DEVS, DEVICE_NAME, DEVICE_PREFIX = 3, 4, 1, 2
ASKED = ("pw0", "pw", "pwa1", "eth0", "eth", "lo")


def chain(*hook: bytes, kind: bytes = b"filter\0") -> bytes:
    """The attributes of a chain, base chain where it has a hook."""
    based = attribute(HOOK, b"".join(hook)) + attribute(TYPE, kind) if hook else b""
    return attribute(TABLE, b"filter\0") + attribute(NAME, b"filter\0") + based


def devices(*each: bytes) -> bytes:
    return attribute(DEVS, b"".join(each))


class Case(NamedTuple):
    """Chains, and which of the interfaces they are at."""

    chains: tuple[bytes, ...]
    at: tuple[str, ...] = ()


CASES = {
    "none": Case(()),
    "no hook": Case((chain(),)),
    "a hook of all packets": Case((chain(attribute(1, bytes(4)), attribute(2, bytes(4))),)),
    "one": Case((chain(attribute(DEV, b"eth0\0")),), ("eth0",)),
    "one, told twice": Case((chain(devices(attribute(DEVICE_NAME, b"eth0\0")), attribute(DEV, b"eth0\0")),), ("eth0",)),
    "several": Case(
        (chain(devices(attribute(DEVICE_NAME, b"eth0\0"), attribute(DEVICE_NAME, b"pw0\0"))),), ("pw0", "eth0")
    ),
    "a beginning": Case((chain(devices(attribute(DEVICE_PREFIX, b"pw\0"))),), ("pw0", "pw", "pwa1")),
    "a beginning beside a name": Case(
        (chain(devices(attribute(DEVICE_PREFIX, b"pwa\0"), attribute(DEVICE_NAME, b"eth\0"))),), ("pwa1", "eth")
    ),
    "a name without an end": Case((chain(devices(attribute(DEVICE_NAME, b"pw"))),), ("pw0", "pw", "pwa1")),
    "every one": Case((chain(devices(attribute(DEVICE_PREFIX, b"\0"))),), ASKED),
    "of several chains": Case(
        (chain(attribute(DEV, b"lo\0")), chain(), chain(devices(attribute(DEVICE_PREFIX, b"e\0")))),
        ("eth0", "eth", "lo"),
    ),
    "a name that is no text": Case((chain(attribute(DEV, b"\xff\xfe\0")), chain(attribute(DEV, b"lo\0"))), ("lo",)),
    "as a nested attribute": Case(
        (nested(HOOK, nested(DEVS, attribute(DEVICE_PREFIX, b"eth0\0"))) + attribute(TYPE, b"filter\0"),), ("eth0",)
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_chains_are_at_these_interfaces(case: Case) -> None:
    found = read_interfaces(case.chains)
    assert tuple(each for each in ASKED if each in found) == case.at
