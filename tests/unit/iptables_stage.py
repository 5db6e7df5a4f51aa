"""The iptables renderer beside a kernel that is a fake, and plans for both."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from kube_proxy_lite.apply.iptables_fake import FakeIptables
from kube_proxy_lite.model import Frontend, FrontendKind, PortKey, PortPlan, Protocol, Settings
from kube_proxy_lite.render.iptables import IptablesRenderer
from kube_proxy_lite.render.iptables_transactions import Transaction
from tests.unit.service_cases import SETTINGS, address, plan
from tests.unit.service_events import plans


class Node:
    """A renderer and its kernel."""

    def __init__(
        self,
        *plans: PortPlan,
        settings: Settings = SETTINGS,
        limit: int = 1500,
        kernel: FakeIptables | None = None,
    ) -> None:
        self.kernel = kernel or FakeIptables()
        self.renderer = IptablesRenderer(settings, limit=limit)
        self.renderer.update({each.key: each for each in plans}, {})
        self.sent: tuple[Transaction, ...] = ()
        self.resync()

    def change(self, *plans: PortPlan, gone: tuple[PortKey, ...] = ()) -> list[str]:
        """The lines that are sent for a change, carried out."""
        self.sent = self.renderer.update({each.key: each for each in plans} | dict.fromkeys(gone), {})
        self.kernel.commit(self.sent)
        return [line for each in self.sent for line in each.text.splitlines()]

    def resync(self) -> tuple[Transaction, ...]:
        self.sent = self.renderer.resync(self.kernel.listing())
        self.kernel.commit(self.sent)
        return self.sent

    def chain(self, table: str, name: str, version: int = 4) -> list[str]:
        return self.kernel.tables[version][table][name]


WHOLE = (
    plan("web", external_local=True, ranges=("192.0.2.0/24",)),
    plan(
        "dns", protocol=Protocol.UDP, number=2, affinity=10800, only=(FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT)
    ),
    plan("empty", cluster=(), number=3, protocol=Protocol.SCTP),
    plan("six", version=6, number=4, only=(FrontendKind.CLUSTER_IP,)),
)
"""One of each."""
NAMES = ("a", "b", "c", "d", "e")


def of_many_ports(made: PortPlan, ports: int) -> PortPlan:
    """The plan with so many more places, near to each other and to others'."""
    version = made.key.version
    number = NAMES.index(made.key.service)
    base = address("10.96.4.0", version)
    more = tuple(
        Frontend(kind=FrontendKind.CLUSTER_IP, address=base + (n % 7) * 16 + n, port=100 * (number + 1) + n)
        for n in range(ports)
    )
    return msgspec.structs.replace(made, frontends=(*made.frontends, *more))


PLANS = st.builds(
    of_many_ports,
    plans(NAMES, st.lists(st.integers(10, 70), unique=True, max_size=40)),
    st.sampled_from((0, 0, 3, 9, 30)),
)
