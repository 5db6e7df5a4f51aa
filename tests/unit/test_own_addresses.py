"""A node's own addresses as they come and go: which it says it has, when it looks again, and what it tells of it."""

from __future__ import annotations

import ipaddress

import pytest

from ipam_daemon.model import Address
from ipam_daemon.underlay import OwnAddresses, Standing

GRACE = 5.0
A, B, SIX, OTHER_SIX = "192.0.2.1", "192.0.2.7", "2001:db8::1", "2001:db8:1::1"

# When, what interfaces have, from which of these the world is reached → the node's addresses, when it looks again,
# and of which addresses it says something.
Moment = tuple[float, str, str, str, float | None, str]

FOUND: dict[str, list[Moment]] = {
    "both at once": [(0, f"{A} {SIX}", f"{A} {SIX}", f"{A} {SIX}", None, "")],
    "the second family comes later, before the first": [
        (0, f"{SIX}", f"{SIX}", SIX, None, ""),
        (9, f"{SIX} {A}", f"{A} {SIX}", f"{A} {SIX}", None, ""),
    ],
    "another place than the default route's is none": [
        (0, A, A, A, None, ""),
        (9, f"{A} {B}", B, A, None, ""),
    ],
    "another lease": [
        (0, f"{A} {SIX}", f"{A} {SIX}", f"{A} {SIX}", None, ""),
        (10, f"{B} {SIX}", f"{B} {SIX}", f"{A} {SIX}", 15, ""),
        (14.9, f"{B} {SIX}", f"{B} {SIX}", f"{A} {SIX}", 15, ""),
        (15, f"{B} {SIX}", f"{B} {SIX}", f"{B} {SIX}", None, f"{A} {B}"),
    ],
    "another prefix keeps its place": [
        (0, f"{A} {SIX}", f"{A} {SIX}", f"{A} {SIX}", None, ""),
        (10, f"{A} {OTHER_SIX}", f"{A} {OTHER_SIX}", f"{A} {SIX}", 15, ""),
        (16, f"{A} {OTHER_SIX}", f"{A} {OTHER_SIX}", f"{A} {OTHER_SIX}", None, f"{SIX} {OTHER_SIX}"),
    ],
    "a link that flaps": [
        (0, A, A, A, None, ""),
        (10, B, B, A, 15, ""),
        (14, f"{A} {B}", B, A, None, ""),
        (16, B, B, A, 21, ""),
    ],
    "nothing better is found, until it is": [
        (0, f"{A} {SIX}", f"{A} {SIX}", f"{A} {SIX}", None, ""),
        (10, A, A, f"{A} {SIX}", 15, ""),
        (15, A, A, f"{A} {SIX}", None, SIX),
        (45, A, A, f"{A} {SIX}", None, ""),
        (75, f"{A} {OTHER_SIX}", f"{A} {OTHER_SIX}", f"{A} {OTHER_SIX}", None, f"{SIX} {OTHER_SIX}"),
    ],
    "it comes back, and goes again": [
        (0, A, A, A, None, ""),
        (10, "", "", A, 15, ""),
        (15, "", "", A, None, A),
        (20, A, A, A, None, ""),
        (30, "", "", A, 35, ""),
        (35, "", "", A, None, A),
    ],
    "one after the other": [
        (0, f"{A} {SIX}", f"{A} {SIX}", f"{A} {SIX}", None, ""),
        (10, f"{SIX} {B}", f"{SIX} {B}", f"{A} {SIX}", 15, ""),
        (13, f"{OTHER_SIX} {B}", f"{OTHER_SIX} {B}", f"{A} {SIX}", 15, ""),
        (15, f"{OTHER_SIX} {B}", f"{OTHER_SIX} {B}", f"{B} {SIX}", 18, f"{A} {B}"),
        (18, f"{OTHER_SIX} {B}", f"{OTHER_SIX} {B}", f"{B} {OTHER_SIX}", None, f"{SIX} {OTHER_SIX}"),
    ],
}
CONFIGURED: dict[str, list[Moment]] = {
    "nothing takes their place": [
        (0, f"{A} {SIX}", "", f"{A} {SIX}", None, ""),
        (10, f"{A} {OTHER_SIX}", "", f"{A} {SIX}", 15, ""),
        (15, f"{A} {OTHER_SIX}", "", f"{A} {SIX}", None, SIX),
        (45, f"{A} {OTHER_SIX}", "", f"{A} {SIX}", None, ""),
    ],
    "one comes a little after the daemon": [
        (0, A, "", f"{A} {SIX}", 5, ""),
        (3, f"{A} {SIX}", "", f"{A} {SIX}", None, ""),
    ],
}


def parsed(text: str) -> tuple[Address, ...]:
    return tuple(ipaddress.ip_address(each) for each in text.split())


def play(own: OwnAddresses, moments: list[Moment]) -> None:
    for now, held, outward, wanted, due, told in moments:
        words = own.follow(Standing(held=frozenset(parsed(held)), outward=parsed(outward)), now)
        assert own.addresses == parsed(wanted), now
        assert own.due == due, now
        assert len(words) == bool(told), words
        for each in told.split():
            assert each in words[0]


def test_what_is_lacking_is_said_as_long_as_it_is() -> None:
    own = OwnAddresses(parsed(f"{A} {SIX}"), {4, 6}, GRACE)
    for now, held, lacks in ((0, A, ""), (5, A, SIX), (50, A, SIX), (51, f"{A} {SIX}", ""), (52, A, "")):
        own.follow(Standing(held=frozenset(parsed(held))), now)
        assert len(own.lacks) == bool(lacks), now
        assert all(f" {lacks}," in words for words in own.lacks)


@pytest.mark.parametrize("moments", FOUND.values(), ids=FOUND.keys())
def test_addresses_that_a_node_found_are_followed(moments: list[Moment]) -> None:
    own = OwnAddresses((), {4, 6}, GRACE)
    assert own.searches
    play(own, moments)


@pytest.mark.parametrize("moments", CONFIGURED.values(), ids=CONFIGURED.keys())
def test_addresses_that_a_node_was_told_are_its_own(moments: list[Moment]) -> None:
    own = OwnAddresses(parsed(f"{A} {SIX}"), {4, 6}, GRACE)
    assert not own.searches
    play(own, moments)


def test_a_family_that_pods_lack_is_not_looked_for_later() -> None:
    own = OwnAddresses((), {4}, GRACE)
    play(own, [(0, A, A, A, None, ""), (9, f"{A} {SIX}", f"{A} {SIX}", A, None, "")])
