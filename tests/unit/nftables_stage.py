"""A node in nftables mode for the renderer's tests: the renderer, a fake kernel that it sends to, and what both know.

`WHOLE` has everything that a table can have: both families, all protocols, affinity, ranges, a Service without
endpoints. `DAMAGE` is what somebody may do to it, as scripts for nft, for the fake kernel as for a real one.
"""

from __future__ import annotations

from kube_proxy_lite.apply.nftables_fake import FakeNft
from kube_proxy_lite.model import FrontendKind, PortKey, PortPlan, Protocol, Settings
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_listing import TableListing
from kube_proxy_lite.render.nftables_transactions import Transaction
from tests.unit.service_cases import SETTINGS, plan

TABLE = "ip podwire_proxy"

WHOLE = (
    plan("web", external_local=True, ranges=("192.0.2.0/24",)),
    plan(
        "dns", protocol=Protocol.UDP, number=2, affinity=10800, only=(FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT)
    ),
    plan("empty", cluster=(), number=3, protocol=Protocol.SCTP, only=(FrontendKind.CLUSTER_IP,)),
    plan("six", version=6, number=4, affinity=60, only=(FrontendKind.CLUSTER_IP,)),
)

DAMAGE = {
    "the table deleted": "delete table ip podwire_proxy",
    "a chain flushed": "flush chain ip podwire_proxy prerouting",
    "a chain of endpoints flushed": "flush chain ip podwire_proxy lb_tcp_2",
    "a rule of somebody else": "add rule ip podwire_proxy masquerading drop",
    "an element deleted": "delete element ip podwire_proxy services { 10.96.0.1 . 6 . 80 }",
    "a slot deleted": "delete element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 1 }",
    "a slot of somebody else": "add element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 7 : 192.0.2.1 . 80 }",
    "a source of somebody else": "add element ip podwire_proxy sources { 203.0.113.1 . 6 . 80 . 198.51.100.0/24 }",
    "another verdict": (
        "delete element ip podwire_proxy nodeports { 6 . 30001 }\n"
        "add element ip podwire_proxy nodeports { 6 . 30001 : drop }"
    ),
    "the version before": (
        "flush chain ip podwire_proxy shape\n"
        'add rule ip podwire_proxy shape counter comment "sets=0 rules=0"\n'
        "flush chain ip podwire_proxy lb_tcp_2"
    ),
    "a chain that remembers flushed": "flush chain ip6 podwire_proxy learn_60",
    "a chain that is not needed": "add chain ip podwire_proxy np_udp_77",
}


class Node:
    """A renderer and its kernel."""

    def __init__(self, *plans: PortPlan, settings: Settings = SETTINGS, limit: int = 5000) -> None:
        self.kernel = FakeNft()
        self.renderer = NftablesRenderer(settings, limit=limit)
        self.renderer.update({each.key: each for each in plans}, {})
        self.sent = self.renderer.resync(self.kernel.listing())
        self.kernel.commit(self.sent)

    def change(self, *plans: PortPlan, gone: tuple[PortKey, ...] = ()) -> list[str]:
        """The scripts that are sent for a change, carried out."""
        self.sent = self.renderer.update({each.key: each for each in plans} | dict.fromkeys(gone), {})
        self.kernel.commit(self.sent)
        return [each.script for each in self.sent]

    def resync(self) -> tuple[Transaction, ...]:
        self.sent = self.renderer.resync(self.kernel.listing())
        self.kernel.commit(self.sent)
        return self.sent

    @property
    def table(self) -> TableListing:
        return self.kernel.tables[TABLE]
