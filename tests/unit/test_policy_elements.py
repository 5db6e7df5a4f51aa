"""Scripts that are sent as messages: which are, and what is in them."""

from __future__ import annotations

import ipaddress

import pytest

from kube_proxy_lite.render.policy_elements import read
from podwire.nfelements import Change, Family, Table, add, concat, delete, goto

TABLE = Table(Family.INET, "podwire_policy")
ONE, SIX = (ipaddress.ip_address(text).packed for text in ("10.244.0.10", "fd00:10:244::a"))

READ: dict[str, tuple[str, tuple[Change, ...] | None]] = {
    "an address is known": (
        "add element inet podwire_policy known4 { 10.244.0.10 }\n",
        (add(TABLE, "known4", ONE),),
    ),
    "several at once, IPv6 too": (
        "delete element inet podwire_policy known6 { fd00:10:244::a }\n"
        "add element inet podwire_policy isolated4 { 10.244.0.10, 10.244.0.11 }\n",
        (
            delete(TABLE, "known6", SIX),
            add(TABLE, "isolated4", ONE),
            add(TABLE, "isolated4", ipaddress.ip_address("10.244.0.11").packed),
        ),
    ),
    "a pod gets another class": (
        "delete element inet podwire_policy ingress4 { 10.244.0.10 }\n"
        "add element inet podwire_policy ingress4 { 10.244.0.10 : goto in_0123456789abcdef }\n",
        (delete(TABLE, "ingress4", ONE), add(TABLE, "ingress4", ONE, goto("in_0123456789abcdef"))),
    ),
    "a named port": (
        "add element inet podwire_policy n_0123456789abcdef_4 { 10.244.0.10 . 8080 }\n",
        (add(TABLE, "n_0123456789abcdef_4", concat(ONE, b"\x1f\x90")),),
    ),
    "a range of addresses goes to nft": ("add element inet podwire_policy local4 { 10.244.0.0/24 }\n", None),
    "a policy's block goes to nft": ("add element inet podwire_policy b_0123456789abcdef_4 { 10.0.0.1 }\n", None),
    "a new set goes to nft, and what is in it": (
        "add set inet podwire_policy p_0_4 { type ipv4_addr; }\nadd element inet podwire_policy p_0_4 { 10.0.0.1 }\n",
        None,
    ),
    "a chain goes to nft": ("flush chain inet podwire_policy in_0\ndelete chain inet podwire_policy in_0\n", None),
    "another table goes to nft": ("add element inet other known4 { 10.244.0.10 }\n", None),
    "very many go to nft": (
        f"add element inet podwire_policy known4 {{ {', '.join(f'10.0.{n // 250}.{n % 250}' for n in range(501))} }}\n",
        None,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_script_is_read_or_left_to_nft(name: str) -> None:
    script, expected = READ[name]
    assert read(script) == expected
