"""Addresses and MACs that are asked for by name."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipam_daemon.cni import Call, Wanted
from ipam_daemon.errors import AddressUnavailable, CniError, InvalidNetns, PortTaken, UnsupportedField
from ipam_daemon.hostports import parse
from tests.netns.hostport_fixtures import add_call, mapping
from tests.netns.node_fixtures import IDLE_28, Engine, Netns, call, engine, play, pods


async def add(it: Engine, pod: Netns, address: str = "", mac: str = "") -> dict[str, Any]:
    """An ADD that asks for an address, a MAC or both."""
    addresses = (ipaddress.ip_address(address),) if address else ()
    asking = msgspec.structs.replace(call("ADD", pod.name, pod.path), wanted=Wanted(addresses=addresses, mac=mac))
    got = json.loads(await it.attachments.add(asking))
    assert isinstance(got, dict)
    return got


def test_a_pod_has_what_it_asks_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                result = await add(it, a, "10.244.1.9", "02:00:00:00:00:09")
                assert [each["address"] for each in result["ips"]] == ["10.244.1.9/28"]
                assert result["interfaces"][1]["mac"] == "02:00:00:00:00:09"
                (eth0,) = a.json("address", "show", "dev", "eth0")
                assert eth0["address"] == "02:00:00:00:00:09"
                await add(it, b)
                assert b.pings("10.244.1.9")

    play(story)


REFUSED = {
    "10.244.1.1": "is reserved",
    "10.244.1.15": "is reserved",
    "10.244.2.9": "not of this node's 10.244.1.0/28",
    "fd00::9": "not of this node's",
    "10.244.1.3": "is in use",
}


def test_what_cannot_be_had_is_refused_and_nothing_is_taken(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                await add(it, a, "10.244.1.3")
                before = it.counts()
                for address, why in REFUSED.items():
                    with pytest.raises(AddressUnavailable, match=why):
                        await add(it, b, address)
                assert it.counts() == before
                assert "eth0" not in b.links()

    play(story)


def test_an_address_can_be_asked_for_again_when_its_wire_is_gone(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                await add(it, a, "10.244.1.9")
                await it.delete(a.name, issued_ns=0)
                with pytest.raises(AddressUnavailable, match="still being released"):
                    await add(it, b, "10.244.1.9")
                await it.reap()
                await add(it, b, "10.244.1.9")
                await it.delete(b.name)
                await it.reap()
                assert it.counts() == {**IDLE_28, "free": 11, "cooling": 1}

    play(story)


FAILURES: dict[str, Callable[[Call], tuple[Call, type[CniError]]]] = {
    "a port that is taken": lambda it: (asking(it, port_mappings=parse([mapping(8080)])), PortTaken),
    "a hostIP of a family that it has not": lambda it: (
        asking(it, port_mappings=parse([mapping(8081, host_ip="fd00::1")])),
        UnsupportedField,
    ),
    "a namespace that is gone": lambda it: (msgspec.structs.replace(it, netns="/run/netns/none"), InvalidNetns),
}


def asking(it: Call, **wishes: Any) -> Call:
    """The call with more that it asks for."""
    return msgspec.structs.replace(it, wanted=msgspec.structs.replace(it.wanted, **wishes))


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_an_add_that_fails_leaves_the_address_that_it_asks_for_where_it_was(
    tmp_path: Path, failure: Callable[[Call], tuple[Call, type[CniError]]]
) -> None:
    """It is tried again, and must not find the address with a pod that came meanwhile; a cooling one cools on."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(4) as (old, gone, fixed, other):
                await it.attachments.add(add_call("old", old, mapping(8080)))
                await add(it, gone)
                await it.delete(gone.name)
                await it.reap()
                for address in ("10.244.1.9", "10.244.1.4"):  # one that is free, one that is cooling
                    before = it.counts()
                    call, error = failure(asking(add_call("fixed", fixed), addresses=(ipaddress.ip_address(address),)))
                    with pytest.raises(error):
                        await it.attachments.add(call)
                    assert it.counts() == before
                result = await add(it, other)
                assert [each["address"] for each in result["ips"]] == ["10.244.1.5/28"]
                await add(it, fixed, "10.244.1.9")

    play(story)
