"""Every policy case by real packets: all pairs of pods, all ports, TCP and UDP, IPv4 and IPv6, on one node and two.

The oracle says what should be; the kernel decides. A case begins with what the one before has left in the kernel, as a
restarted proxy does.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.netns.policy_stage import Enforcement, PolicyStage
from tests.netns.probes import Outcome, Probe
from tests.policy_cases import CASES, NAMESPACES, PODS, PORTS, Step, address

PLACES = [(home, pod) for home in NAMESPACES for pod in PODS]


SOME = (
    "deny all, both ways",
    "pod or namespace",
    "one name, another number behind it",
    "a named port in egress, of some pods",
    "ranges that overlap",
    "an exception holds for its own block alone",
    "everybody but one",
    "both sides must agree",
    "the label of a namespace changes",
    "an address passes to another pod that other policies are about",
)
"""Cases in which every kind of set and rule is; all others of these modes are run with the slow tests."""
MODES = {"nft": tuple(CASES), "iptables-nft": SOME, "iptables-legacy": SOME[:3]}
RUNS = [
    pytest.param(mode, steps, id=f"{mode}-{name}", marks=() if name in quick else pytest.mark.slow)
    for mode, quick in MODES.items()
    for name, steps in CASES.items()
]


@pytest.fixture(scope="module")
def stages() -> Iterator[Callable[[str], PolicyStage]]:
    """The stage of a mode, made when it is first asked for."""
    made: dict[str, PolicyStage] = {}
    with contextlib.ExitStack() as stack:

        def stage_of(mode: str) -> PolicyStage:
            if mode not in made:
                made[mode] = stack.enter_context(PolicyStage(mode, f"pwpol{len(made)}"))
            return made[mode]

        yield stage_of


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


@pytest.mark.parametrize(("mode", "steps"), RUNS)
def test_packets_pass_as_the_oracle_says(
    stages: Callable[[str], PolicyStage], mode: str, steps: tuple[Step, ...]
) -> None:
    stage = stages(mode)
    enforcement = Enforcement(stage)
    for step in steps:
        enforcement.take(step)
        expected = expectations(stage, enforcement)
        outcomes = stage.prober.run(expected, expected)
        wrong = {probe: outcome for probe, outcome in outcomes.items() if outcome is not expected[probe]}
        assert wrong == {}
        assert [enforcement.drift(node) for node in ("node1", "node2")] == [(), ()]
