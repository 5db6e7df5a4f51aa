"""DEL of the CNI specification as a table, as tests/netns/test_conformance.py has ADD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from podwire.lab import topology
from tests.netns.conformance_fixtures import box, boxes, it, lab
from tests.netns.containers import Container
from tests.netns.contenders import Config, Contender, rows

__all__ = ["box", "boxes", "it", "lab"]


Deletion = Callable[[Contender, Container, Config], None]


def with_result(it: Contender, box: Container, result: Config) -> None:
    it.delete(box, it.config(prevResult=result))


def without_result(it: Contender, box: Container, _: Config) -> None:
    it.delete(box)


def twice(it: Contender, box: Container, result: Config) -> None:
    it.delete(box, it.config(prevResult=result))
    it.delete(box, it.config(prevResult=result))


def after_the_interface(it: Contender, box: Container, result: Config) -> None:
    assert box.run("ip", "link", "delete", "eth0").returncode == 0
    it.delete(box, it.config(prevResult=result))


def without_path(it: Contender, box: Container, _: Config) -> None:
    it.delete(box, CNI_PATH="" if it.kind == "podwire" else str(it.executable().parent))


DELETIONS: dict[str, Deletion] = {
    "with the result of the ADD": with_result,
    "without it": without_result,
    "twice": twice,
    "after the interface went": after_the_interface,
    "without CNI_PATH": without_path,
}


@pytest.mark.parametrize("way", DELETIONS.values(), ids=DELETIONS.keys())
@rows(ends_first=True)
def test_del_takes_everything_away(it: Contender, box: Container, way: Deletion) -> None:
    result = it.add(box)
    way(it, box, result)
    assert it.reserved() == set()
    assert box.links() == {"lo"} or it.kind == "podwire"  # ours goes in the background, with the wire dead
    it.wait_held(set())
    assert box.links() == {"lo"}


@rows()
def test_del_of_what_never_was_succeeds(it: Contender, box: Container) -> None:
    it.delete(box)
    it.delete(box, CNI_CONTAINERID="nobody-knows-this-one")


NETNS_LOST: dict[str, dict[str, str]] = {
    "not told": {"CNI_NETNS": ""},
    "a path that is gone": {"CNI_NETNS": "/run/netns/gone"},
    "a mount point that was left": {"CNI_NETNS": "/etc/hostname"},
}


@pytest.mark.parametrize("environment", NETNS_LOST.values(), ids=NETNS_LOST.keys())
@rows(ends_first=True)
def test_del_frees_the_address_without_the_namespace(
    it: Contender, box: Container, environment: dict[str, str]
) -> None:
    if it.kind == "reference" and environment["CNI_NETNS"] == "/etc/hostname":
        pytest.skip("the reference fails when the path is there and is no namespace")
    it.add(box)
    it.delete(box, **environment)
    assert it.reserved() == set()
    if it.kind == "reference":  # its wire lives until the namespace dies
        box.run("ip", "link", "delete", "eth0")


@rows()
def test_del_after_the_namespace_died(it: Contender, box: Container) -> None:
    result = it.add(box)
    topology.delete_namespaces([Path(box.netns).name])
    it.delete(box, it.config(prevResult=result))
    assert it.reserved() == set()


@rows(not_by_reference="leaves the wire of a namespace that it is not told of")
def test_del_cuts_the_wire_without_the_namespace(it: Contender, box: Container) -> None:
    name = it.host_end(it.add(box))["name"]
    it.delete(box, CNI_NETNS="")
    assert name not in it.on_node("ip", "-br", "link", "show", "master", it.bridge)
    it.wait_held(set())
    assert box.links() == {"lo"}
