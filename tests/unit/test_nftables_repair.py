"""The nftables renderer and what it finds: clients that were sent to what is gone, a restart, an upgrade, damage.

Nothing outlives it but the kernel's table: a restart that finds its own rules sends nothing, a resync brings back what
somebody took or changed, or what a transaction that failed has left.
"""

from __future__ import annotations

import copy
import re

import pytest

from kube_proxy_lite.apply.nftables_fake import FakeNft
from kube_proxy_lite.model import PortPlan
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.nftables import NftablesRenderer
from tests.unit.nftables_stage import DAMAGE, TABLE, WHOLE, Node
from tests.unit.service_cases import LOCAL, REMOTE, REMOTE_2, SETTINGS, VARIANTS, plan

OTHER_RULES = f"flush chain {TABLE} shape\nadd rule {TABLE} shape {{}}\n"
SIX = "ip6 podwire_proxy"

# --- Affinity -----------------------------------------------------------------------------------------------------

STICKY = plan(affinity=600)
GONE: dict[str, tuple[PortPlan | None, set[str]]] = {
    "the endpoint": (plan(cluster=(LOCAL,), affinity=600), {"192.0.2.8"}),
    "another endpoint": (plan(cluster=(REMOTE,), affinity=600), {"192.0.2.7"}),
    "the Service": (None, {"192.0.2.7", "192.0.2.8"}),
    "affinity": (plan(), {"192.0.2.7", "192.0.2.8"}),
    "nothing": (plan(cluster=(LOCAL, REMOTE, REMOTE_2), affinity=60), set()),
    "the way to other nodes": (plan(affinity=600, internal_local=True), {"192.0.2.8"}),
}


@pytest.mark.parametrize(("after", "forgotten"), GONE.values(), ids=GONE.keys())
@pytest.mark.parametrize("restarted", [False, True])
def test_who_was_sent_to_what_is_gone_is_forgotten(
    after: PortPlan | None, forgotten: set[str], restarted: bool
) -> None:
    node = Node(STICKY)
    clients = {"192.0.2.7": LOCAL, "192.0.2.8": REMOTE}
    entries = {f"{client} . 10.96.0.1 . 6 . 80": f"{endpoint} . 8080" for client, endpoint in clients.items()}
    node.table.sets["affinity"].update(entries)
    if restarted:
        node.renderer = NftablesRenderer(SETTINGS)
        node.renderer.update({after.key: after} if after else {}, {})
        node.resync()
    elif after:
        node.change(after)
    else:
        node.change(gone=(STICKY.key,))
    left = {key.partition(" ")[0] for key in node.table.sets["affinity"]}
    assert clients.keys() - left == forgotten
    assert node.resync() == ()


# --- Restart, drift -----------------------------------------------------------------------------------------------


def shuffled(node: Node) -> None:
    """Changes after which endpoints sit in other slots than a start would give them."""
    for backends in ((REMOTE, REMOTE_2), (LOCAL, REMOTE_2, REMOTE), (REMOTE_2, LOCAL)):
        node.change(plan(cluster=backends, external_local=True))
    node.change(plan(cluster=(LOCAL, REMOTE, REMOTE_2), external_local=True))


def test_a_restart_sends_nothing() -> None:
    node = Node(*WHOLE)
    shuffled(node)
    assert node.table.sets["eps_tcp"]["10.96.0.1 . 80 . 0"] != f"{LOCAL} . 8080", "or the slots prove nothing"
    again = NftablesRenderer(SETTINGS)
    again.update(
        {each.key: each for each in (*WHOLE, plan(cluster=(LOCAL, REMOTE, REMOTE_2), external_local=True))}, {}
    )
    assert again.resync(node.kernel.listing()) == ()


def test_a_change_before_the_first_listing_is_not_lost() -> None:
    renderer, kernel = NftablesRenderer(SETTINGS), FakeNft()
    assert renderer.update({plan().key: plan()}, {}) == ()
    assert renderer.configure(VARIANTS["pods are not told"]) == ()
    assert renderer.update({plan().key: plan(cluster=(REMOTE,))}, {}) == ()
    kernel.commit(renderer.resync(kernel.listing()))
    assert kernel.tables == Node(plan(cluster=(REMOTE,)), settings=VARIANTS["pods are not told"]).kernel.tables


@pytest.mark.parametrize("script", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_somebody_damaged_is_repaired(script: str) -> None:
    node = Node(*WHOLE)
    before = copy.deepcopy(node.kernel.tables)
    node.kernel.run(script)
    assert node.resync(), "there is something to do"
    assert node.kernel.tables == before
    assert node.resync() == ()


def test_other_rules_of_ours_leave_the_elements_where_they_are() -> None:
    """An upgrade that changes rules alone: no element in it, and chains that come and go before those that stay."""
    node = Node(*WHOLE)
    mark = node.table.chains["shape"][0]
    node.kernel.run(OTHER_RULES.format(re.sub(r"rules=\w+", "rules=before", mark)))
    sent = node.resync()
    assert [each.elements for each in sent] == [0, 0]
    assert node.table.chains["shape"] == (mark,)


@pytest.mark.parametrize("gone", ["", f"delete table {TABLE}\n", f"delete table {SIX}\n"])
def test_what_has_come_meanwhile_finds_its_chain_after_an_upgrade_too(gone: str) -> None:
    """Of both families, whose tables may be in different states: the fake kernel refuses a chain that is still empty,
    and rules that remember clients for a chain that is not there."""
    before = (plan("web", (LOCAL,)), plan("six", (LOCAL,), version=6))
    after = (plan("web", affinity=60), plan("six", version=6, affinity=60))
    node = Node(*before)
    for table in (TABLE, SIX):
        mark = node.kernel.tables[table].chains["shape"][0]
        other = OTHER_RULES.replace(TABLE, table).format(re.sub(r"rules=\w+", "rules=before", mark))
        node.kernel.run(other)
    if gone:
        node.kernel.run(gone)
    node.renderer = NftablesRenderer(SETTINGS)
    node.renderer.update({each.key: each for each in after}, {})
    node.resync()
    assert node.resync() == ()
    assert node.kernel.tables == Node(*after).kernel.tables


def test_a_transaction_that_failed_is_made_good_by_a_resync() -> None:
    node = Node(plan())
    node.kernel.run("delete element ip podwire_proxy services { 10.96.0.1 . 6 . 80 }")
    with pytest.raises(ApplyFailed):
        node.change(plan(cluster=(REMOTE,)))
    node.resync()
    assert node.kernel.tables == Node(plan(cluster=(REMOTE,))).kernel.tables
