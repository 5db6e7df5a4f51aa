"""Fixtures of the conformance tests: a lab, the contender of a row, and containers for it."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from podwire.lab import cluster
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import Container, containers
from tests.netns.contenders import KINDS, Contender, Podwire


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
