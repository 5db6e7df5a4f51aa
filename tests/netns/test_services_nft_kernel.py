"""The nftables mode's table in the kernel: listed as it was sent, repaired when damaged, and nobody else's touched."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from kube_proxy_lite.apply.nftables import NftablesApplier
from kube_proxy_lite.apply.nftables_fake import FakeNft
from kube_proxy_lite.model import PortKey, PortPlan
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.nftables import NftablesRenderer, Transactions
from kube_proxy_lite.render.nftables_layout import WORDS, chain_rules, is_hook, rules
from kube_proxy_lite.render.nftables_listing import Listing
from tests.netns.node_fixtures import Netns
from tests.unit.nftables_stage import DAMAGE, WHOLE
from tests.unit.service_cases import LOCAL, REMOTE, REMOTE_2, SETTINGS, VARIANTS, plan


@pytest.fixture
def node() -> Iterator[Netns]:
    with Netns("node") as made:
        yield made


def applier_of(node: Netns) -> NftablesApplier:
    return NftablesApplier(("ip", "netns", "exec", node.name, "nft"))


def started(*plans: PortPlan, variant: str = "pods are told by their addresses") -> NftablesRenderer:
    renderer = NftablesRenderer(VARIANTS[variant])
    renderer.update({each.key: each for each in plans}, {})
    return renderer


def read(node: Netns) -> Listing:
    return asyncio.run(applier_of(node).read())


def apply(node: Netns, transactions: Transactions) -> None:
    asyncio.run(applier_of(node).apply(transactions))


STEPS: tuple[dict[PortKey, PortPlan | None], ...] = (
    {each.key: each for each in WHOLE},
    {WHOLE[0].key: plan("web", (REMOTE, REMOTE_2), (), external_local=True, ranges=("192.0.2.0/25", "10.0.0.0/8"))},
    {WHOLE[1].key: None, WHOLE[3].key: None},
    {WHOLE[0].key: plan("web", (LOCAL, REMOTE), affinity=60, ranges=("10.1.0.0/16",))},
    {WHOLE[2].key: None, WHOLE[0].key: plan("web", ())},
)


@pytest.mark.parametrize("limit", [3, 5000])
def test_the_kernel_holds_what_the_fake_holds(node: Netns, limit: int) -> None:
    """So the fake, on which most tests rely, is as strict as the kernel, and nft prints what it was sent."""
    fake, renderer = FakeNft(), NftablesRenderer(SETTINGS, limit=limit)
    steps: list[Callable[[], Transactions]] = [lambda: renderer.resync(read(node))]
    steps += [partial(renderer.update, step, {}) for step in STEPS]
    steps += [partial(renderer.configure, settings) for settings in VARIANTS.values()]
    for step in steps:
        transactions = step()
        fake.commit(transactions)
        apply(node, transactions)
        listing = read(node)
        for version, table in fake.listing().items():
            assert table is not None
            found = listing[version]
            assert found is not None
            assert found.sets == table.sets
            assert found.mark == table.mark
            assert {name: len(lines) for name, lines in found.chains.items()} == {
                name: len(lines) for name, lines in table.chains.items()
            }
        assert renderer.resync(listing) == ()


def test_rules_are_written_as_nft_prints_them(node: Netns) -> None:
    """Of nft 1.0.6; another may print them otherwise, which is why nothing but this test compares them."""
    if "v1.0.6" not in node.run("nft", "--version"):
        pytest.skip("nft is another than 1.0.6")
    for variant, settings in VARIANTS.items():
        apply(node, started(*WHOLE, variant=variant).resync(dict.fromkeys((4, 6))))
        for version, table in read(node).items():
            assert table is not None
            words = WORDS[version]
            for name, lines in rules(words, settings).items():
                assert table.chains[name] == lines[is_hook(lines) :], name
            for name in table.chains.keys() - rules(words, settings).keys() - {"shape"}:
                if not name.startswith("learn_"):  # times are printed in other units
                    assert table.chains[name] == chain_rules(words, name)
        asyncio.run(applier_of(node).remove())


def test_what_somebody_damaged_is_repaired(node: Netns) -> None:
    renderer = started(*WHOLE)
    apply(node, renderer.resync(read(node)))
    before = read(node)
    for name, script in (DAMAGE | {"everything flushed": "flush ruleset"}).items():
        node.run("nft", "-f", "-", stdin=script)
        transactions = renderer.resync(read(node))
        assert transactions, name
        apply(node, transactions)
        assert read(node) == before, name


def test_a_restart_sends_nothing(node: Netns) -> None:
    renderer = started(*WHOLE)
    apply(node, renderer.resync(read(node)))
    now = plan("web", (LOCAL, REMOTE, REMOTE_2), external_local=True)
    for each in (plan("web", (REMOTE, REMOTE_2), external_local=True), now):
        apply(node, renderer.update({each.key: each}, {}))
    assert started(*WHOLE, now).resync(read(node)) == ()
    assert started(*WHOLE).resync(read(node)), "or that would prove nothing"


def test_one_that_was_killed_while_it_started_is_taken_up(node: Netns) -> None:
    """Wherever it was: the next one does the rest, and both have done what one would have."""
    whole = NftablesRenderer(SETTINGS, limit=4)
    whole.update({each.key: each for each in WHOLE}, {})
    transactions = whole.resync(dict.fromkeys((4, 6)))
    apply(node, transactions)
    wanted = read(node)
    for done in (1, len(transactions) // 2, len(transactions) - 1):
        asyncio.run(applier_of(node).remove())
        apply(node, transactions[:done])
        again = started(*WHOLE)
        apply(node, again.resync(read(node)))
        assert read(node) == wanted


FOREIGN = """
table ip podwire { chain services { counter; }; set cluster_ips { type ipv4_addr; elements = { 10.96.0.1 }; }; }
table inet podwire_proxy { map services { type ipv4_addr : verdict; elements = { 10.96.0.1 : drop }; }; }
table ip nat { chain KUBE-SERVICES { ip daddr 10.96.0.1 counter drop; }; }
"""


def test_other_tables_are_not_touched(node: Netns) -> None:
    node.run("nft", "-f", "-", stdin=FOREIGN)
    before = node.run("nft", "list", "ruleset")
    renderer = started(*WHOLE)
    apply(node, renderer.resync(read(node)))
    for step in STEPS:
        apply(node, renderer.update(step, {}))
    asyncio.run(applier_of(node).remove())
    assert node.run("nft", "list", "ruleset") == before


def test_removing_what_is_not_there_is_fine(node: Netns) -> None:
    asyncio.run(applier_of(node).remove())
    asyncio.run(applier_of(node).remove())
    assert node.run("nft", "list", "ruleset") == ""


def test_a_name_cannot_become_a_rule(node: Netns) -> None:
    hostile = 'x"; flush ruleset; add table ip pwned; #\n'
    made = plan(hostile)
    made = msgspec.structs.replace(made, key=msgspec.structs.replace(made.key, namespace=hostile, port=hostile))
    apply(node, started(made).resync(read(node)))
    assert sorted(node.run("nft", "list", "tables").splitlines()) == [
        "table ip podwire_proxy",
        "table ip6 podwire_proxy",
    ]


def test_a_transaction_is_whole_or_nothing_and_what_came_before_it_stays(node: Netns) -> None:
    renderer = started(plan("web", (REMOTE,)))
    apply(node, renderer.resync(read(node)))
    node.run("nft", "delete", "element", "ip", "podwire_proxy", "services", "{ 10.96.0.1 . 6 . 80 }")
    wanted = read(node)
    table = wanted[4]
    assert table is not None
    sent = renderer.update({plan("web").key: plan("web")}, {})
    made = re.findall(rf"add chain {WORDS[4].table} (\w+)", sent[0].script)
    assert made, "chains come before what leads to them"
    table.chains |= {name: chain_rules(WORDS[4], name) for name in made}
    with pytest.raises(ApplyFailed, match="No such file"):
        apply(node, sent)
    assert read(node) == wanted
    apply(node, renderer.resync(read(node)))
    assert started(plan("web")).resync(read(node)) == ()


FAILING = {"nft is not installed": ("/absent/nft",), "nft says no": ("false",)}


@pytest.mark.parametrize("nft", FAILING.values(), ids=FAILING.keys())
def test_an_nft_that_does_not_work_is_an_error_that_is_tried_again(nft: tuple[str, ...]) -> None:
    with pytest.raises(ApplyFailed, match=nft[0]):
        asyncio.run(NftablesApplier(nft).read())


def test_its_own_processes_are_known(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    applier = NftablesApplier(("sh", "-c", f"echo $$ > {told}"), versions=(4,))
    asyncio.run(applier.read())
    assert applier.is_own(int(told.read_text()))
    assert not applier.is_own(os.getpid())
