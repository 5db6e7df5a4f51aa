"""Every policy case by real packets: all pairs of pods, all ports, TCP and UDP, IPv4 and IPv6, on one node and two.

The oracle says what should be; the kernel decides. A case begins with what the one before has left in the kernel, as a
restarted proxy does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.netns.policy_stage import Enforcement, PolicyStage
from tests.netns.probes import Outcome, Probe
from tests.policy_cases import CASES, NAMESPACES, PODS, PORTS, Step, address

PLACES = [(home, pod) for home in NAMESPACES for pod in PODS]


MODES = ("nft", "iptables-nft", "iptables-legacy")


@pytest.fixture(scope="module", params=MODES)
def stage(request: pytest.FixtureRequest) -> Iterator[PolicyStage]:
    with PolicyStage(request.param) as made:
        yield made


def expectations(stage: PolicyStage, enforcement: Enforcement) -> dict[Probe, Outcome]:
    """What the oracle says of every pair of pods that are there."""
    world, expected = enforcement.world, {}
    for version, (source, destination) in itertools.product((4, 6), itertools.permutations(PLACES, 2)):
        ends = [address(*source, version), address(*destination, version)]
        if world.pod_at(ends[0]) is None or world.pod_at(ends[1]) is None:
            continue
        for protocol, port in itertools.product(("TCP", "UDP"), PORTS):
            allowed = world.allows(ends[0], ends[1], protocol, port)
            probe = Probe(stage.name(".".join(source)), ends[1], protocol, port)
            expected[probe] = Outcome.OPEN if allowed else Outcome.TIMEOUT
    return expected


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys())
def test_packets_pass_as_the_oracle_says(stage: PolicyStage, steps: tuple[Step, ...]) -> None:
    enforcement = Enforcement(stage)
    for step in steps:
        enforcement.take(step)
        expected = expectations(stage, enforcement)
        outcomes = stage.prober.run(expected, expected)
        wrong = {probe: outcome for probe, outcome in outcomes.items() if outcome is not expected[probe]}
        assert wrong == {}
        assert [enforcement.drift(node) for node in ("node1", "node2")] == [(), ()]
