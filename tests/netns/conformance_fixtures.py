"""Fixtures of the conformance tests: a lab, the contender of a row, and containers for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from uuid import uuid4

import pytest

from podwire.lab import cluster
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import Container, containers
from tests.netns.contenders import KINDS, Config, Contender, Podwire


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """Two nodes of twelve addresses each: Podwire is asked on the first, the reference on the second."""
    state = LabState(name=f"conf-{uuid4().hex[:6]}", nodes=plan_nodes(2), pod_cidr="10.244.0.0/24")
    try:
        yield cluster.up(state)
    finally:
        cluster.down(state.name)


@pytest.fixture
def it(lab: LabState, request: pytest.FixtureRequest) -> Iterator[Contender]:
    """The contender of a row; Podwire at 1.1.0 where no row says otherwise. What a test adds, it deletes again."""
    kind, version = getattr(request, "param", ("podwire", "1.1.0"))
    made, name = KINDS[kind]
    contender = made(lab, name, version)
    before = contender.held()
    yield contender
    try:
        contender.wait_held(before)
    except AssertionError:
        contender.clear()
        raise


@pytest.fixture
def box(it: Contender) -> Iterator[Container]:
    """A container that nothing was done to."""
    with containers(it.lab, it.node, "box", 1) as (made,):
        yield made


@pytest.fixture
def boxes(it: Contender) -> Iterator[list[Container]]:
    """Three of them."""
    with containers(it.lab, it.node, "box", 3) as made:
        yield made


@pytest.fixture
def podwire(it: Contender) -> Podwire:
    """The contender, where it is ours whatever happens."""
    assert isinstance(it, Podwire)
    return it


# --- what rows ask ----------------------------------------------------------------------------------------------------

OLD = ("0.3.1", "0.4.0")
CHECKED = ("0.4.0", "1.0.0", "1.1.0")
NEWEST = ("1.1.0",)
BEFORE_NEWEST = ("0.3.1", "0.4.0", "1.0.0")


def eth0(box: Container) -> Config:
    """The container's interface as the kernel has it."""
    shown = json.loads(box.run("ip", "-j", "-d", "address", "show", "dev", "eth0").stdout)
    return dict(shown[0])


def default_gateways(box: Container) -> list[str]:
    return [each["gateway"] for each in json.loads(box.run("ip", "-j", "route", "show", "default").stdout)]


def container_end(result: Config) -> Config:
    """The one interface of a result that is in the container."""
    (found,) = (each for each in result["interfaces"] if each.get("sandbox"))
    return dict(found)
