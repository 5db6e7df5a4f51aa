"""The scenarios, in the order in which they run. To add one, write a module with a `run` and list it here."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bench.report import Report
from bench.scenarios import (
    bandwidth,
    chain,
    churn,
    elements,
    executable,
    latency,
    memory,
    outage,
    policies,
    scale,
    services,
    throughput,
)
from bench.stage import Stage


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """`run` takes the stage and how many times to measure; `name` is also its region of docs/performance.md."""

    name: str
    about: str
    run: Callable[[Stage, int], Report]
    rounds: int
    quick: int


SCENARIOS = (
    Scenario(name="executable", about="the executable alone", run=executable.run, rounds=150, quick=20),
    Scenario(name="latency", about="ADD and DEL against the reference plugins", run=latency.run, rounds=60, quick=8),
    Scenario(
        name="churn",
        about="pods without a pause, ten at once, a hundred by twenty, 2,000 calls",
        run=churn.run,
        rounds=40,
        quick=10,
    ),
    Scenario(
        name="chain",
        about="pods with a port of the node and limits, against the chain of reference plugins",
        run=chain.run,
        rounds=30,
        quick=4,
    ),
    Scenario(name="bandwidth", about="what limits let through", run=bandwidth.run, rounds=3, quick=1),
    Scenario(name="elements", about="elements of nft sets, three ways", run=elements.run, rounds=60, quick=8),
    Scenario(name="outage", about="etcd stopped and started again", run=outage.run, rounds=5, quick=1),
    Scenario(name="memory", about="the daemon's memory with 200 pods", run=memory.run, rounds=200, quick=20),
    Scenario(
        name="scale",
        about="5,000 other nodes, 250 pods, 256 nodes that claim at once",
        run=scale.run,
        rounds=5000,
        quick=500,
    ),
    Scenario(
        name="throughput",
        about="pod to pod, beside the same devices plumbed by hand",
        run=throughput.run,
        rounds=15,
        quick=1,
    ),
    Scenario(name="services", about="1 to 30,000 Services, beside rules by hand", run=services.run, rounds=40, quick=8),
    Scenario(
        name="policies",
        about="NetworkPolicy: 10 to 1,000 pods, 1 to 1,000 policies, beside a rule a pod",
        run=policies.run,
        rounds=40,
        quick=8,
    ),
)
