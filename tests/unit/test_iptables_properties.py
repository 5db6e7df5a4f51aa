"""Properties of the iptables renderer: after whatever has happened, the kernel is as if made from scratch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kube_proxy_lite.model import Settings
from tests.unit.iptables_stage import PLANS, Node
from tests.unit.service_events import Plans, events, replay


@given(happening=events(PLANS), limit=st.sampled_from((1, 7, 1500)))
@hypothesis_settings(max_examples=60, deadline=None)
def test_after_every_event_the_kernel_is_as_from_scratch(happening: list[object], limit: int) -> None:
    node = Node(limit=limit)

    def restart(there: Plans, settings: Settings) -> None:
        assert Node(*there.values(), settings=settings, kernel=node.kernel).sent == (), "a restart changes nothing"

    for there, settings in replay(node, happening, restart):
        assert node.kernel.tables == Node(*there.values(), settings=settings).kernel.tables
    assert node.resync() == ()
