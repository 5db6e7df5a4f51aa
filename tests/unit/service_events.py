"""What may happen to a renderer of Services, in any order: plans come, change and go, settings change, it restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from kube_proxy_lite.model import PortKey, PortPlan, Protocol, Settings
from tests.unit.service_cases import BACKENDS, SETTINGS, VARIANTS, plan

Plans = dict[PortKey, PortPlan]


def plans(names: Sequence[str], hosts: st.SearchStrategy[list[int]]) -> st.SearchStrategy[PortPlan]:
    """Plans of these Services, with endpoints at the cases' or at these `hosts`, of which a third are local."""
    return st.builds(
        lambda name, backends, version, protocol, internal, external, affinity, ranges: plan(
            name,
            *backends,
            version=version,
            protocol=protocol,
            number=names.index(name) + 1,
            internal_local=internal,
            external_local=external,
            affinity=affinity,
            ranges=ranges,
        ),
        st.sampled_from(names),
        st.one_of(
            st.sampled_from(list(BACKENDS.values())),
            hosts.map(
                lambda found: (
                    tuple(f"10.244.{h % 3}.{h}" for h in found),
                    tuple(f"10.244.1.{h}" for h in found if h % 3 == 1),
                )
            ),
        ),
        st.sampled_from((4, 6)),
        st.sampled_from(list(Protocol)),
        st.booleans(),
        st.booleans(),
        st.sampled_from((0, 60, 10800)),
        st.sampled_from(((), ("10.0.0.0/8",), ("10.0.0.0/16", "192.0.2.0/24"))),
    )


def events(of: st.SearchStrategy[PortPlan]) -> st.SearchStrategy[list[object]]:
    """What happens, one after another."""
    return st.lists(
        st.one_of(
            st.lists(of, min_size=1, max_size=3),  # set
            st.integers(0, 20),  # remove one
            st.sampled_from(list(VARIANTS)),  # configure
            st.none(),  # restart
        ),
        max_size=12,
    )


def replay(
    node: Any, happening: Sequence[object], restart: Callable[[Plans, Settings], None]
) -> Iterator[tuple[Plans, Settings]]:
    """Lets it happen to a node (a renderer and its kernel). Yields what there should be after each event."""
    there, settings = Plans(), SETTINGS
    for event in happening:
        changes: dict[PortKey, PortPlan | None] = {}
        if isinstance(event, list):
            changes = {each.key: each for each in event}
        elif isinstance(event, int) and there:
            changes = {sorted(there)[event % len(there)]: None}
        elif isinstance(event, str):
            settings = VARIANTS[event]
            node.kernel.commit(node.renderer.configure(settings))
        elif event is None:
            restart(there, settings)
        there = {key: each for key, each in (there | changes).items() if each is not None}
        node.kernel.commit(node.renderer.update(changes, {}))
        yield there, settings
