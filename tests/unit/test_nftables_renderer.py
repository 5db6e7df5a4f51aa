"""The nftables renderer: what is sent for a table, for a change, and for other settings, in which order.

The whole is a golden file. A change sends what differs and costs the same in a cluster of any size, what is referred to
comes first, and nothing that a user may name gets into a script.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import msgspec
import pytest

from kube_proxy_lite.apply.nftables_fake import FakeNft
from kube_proxy_lite.model import Backend, FrontendKind, PortPlan
from kube_proxy_lite.render.nftables_elements import address_text
from tests.unit.nftables_stage import TABLE, WHOLE, Node
from tests.unit.service_cases import LOCAL, REMOTE, REMOTE_2, SETTINGS, VARIANTS, address, plan

GOLDEN = Path(__file__).parent.parent / "golden" / "services.nft"


# --- Goldens --------------------------------------------------------------------------------------------------------


def normal(script: str) -> list[str]:
    """The lines of a script, elements one by one, without their order."""
    lines = []
    for line in script.splitlines():
        if found := re.fullmatch(r"(add element \S+ \S+ \S+) \{ (.+) \}", line):
            lines += [f"{found[1]} {{ {each} }}" for each in found[2].split(", ")]
        else:
            lines.append(line)
    return sorted(lines)


def test_all_of_it_as_it_is_made() -> None:
    """After a change that is meant, the golden file is what this test's failure shows."""
    (made,) = Node(*WHOLE).sent
    assert normal(made.script) == normal(GOLDEN.read_text())


def test_the_number_of_chains_and_sets_is_not_that_of_services() -> None:
    few, many = (Node(*(plan(f"s{n}", number=n) for n in range(1, count))) for count in (3, 200))
    assert few.table.chains.keys() == many.table.chains.keys()
    assert few.table.sets.keys() == many.table.sets.keys()


# --- Changes --------------------------------------------------------------------------------------------------------

ONE = (FrontendKind.CLUSTER_IP,)
CHANGES: dict[str, tuple[PortPlan | None, PortPlan | None, list[list[str]]]] = {
    "nothing": (plan(), plan(), []),
    "one endpoint more is a slot and a flip, to a chain that is there by then": (
        plan(cluster=(LOCAL,), only=ONE),
        plan(cluster=(LOCAL, REMOTE), only=ONE),
        [
            [
                "add chain ip podwire_proxy lb_tcp_2",
                "flush chain ip podwire_proxy lb_tcp_2",
                "add rule ip podwire_proxy lb_tcp_2 dnat ip to ip daddr . tcp dport . numgen random mod 2 map @eps_tcp",
                "add rule ip podwire_proxy lb_tcp_2 drop",
            ],
            [
                "delete element ip podwire_proxy services { 10.96.0.1 . 6 . 80 }",
                "add element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 1 : 10.244.2.3 . 8080 }",
                "add element ip podwire_proxy services { 10.96.0.1 . 6 . 80 : goto lb_tcp_2 }",
            ],
            ["delete chain ip podwire_proxy lb_tcp_1"],
        ],
    ),
    "one fewer is a flip, and then the last slot": (
        plan(cluster=(REMOTE, REMOTE_2), only=ONE),
        plan(cluster=(REMOTE_2,), only=ONE),
        [
            [
                "add chain ip podwire_proxy lb_tcp_1",
                "flush chain ip podwire_proxy lb_tcp_1",
                "add rule ip podwire_proxy lb_tcp_1 dnat ip to ip daddr . tcp dport . numgen random mod 1 map @eps_tcp",
                "add rule ip podwire_proxy lb_tcp_1 drop",
            ],
            [
                "delete element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 0 }",
                "delete element ip podwire_proxy services { 10.96.0.1 . 6 . 80 }",
                "add element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 0 : 10.244.3.3 . 8080 }",
                "add element ip podwire_proxy services { 10.96.0.1 . 6 . 80 : goto lb_tcp_1 }",
            ],
            [
                "delete element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 1 }",
                "delete chain ip podwire_proxy lb_tcp_2",
            ],
        ],
    ),
    "one for another is one slot": (
        plan(cluster=(REMOTE,), only=ONE),
        plan(cluster=(REMOTE_2,), only=ONE),
        [
            [
                "delete element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 0 }",
                "add element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 0 : 10.244.3.3 . 8080 }",
            ]
        ],
    ),
    "the last one is a verdict": (
        plan(cluster=(REMOTE,), only=ONE),
        plan(cluster=(), only=ONE),
        [
            [
                "delete element ip podwire_proxy services { 10.96.0.1 . 6 . 80 }",
                "add element ip podwire_proxy services { 10.96.0.1 . 6 . 80 : goto refuse }",
            ],
            [
                "delete element ip podwire_proxy eps_tcp { 10.96.0.1 . 80 . 0 }",
                "delete chain ip podwire_proxy lb_tcp_1",
            ],
        ],
    ),
    "a Service that goes": (
        plan(cluster=(), only=ONE),
        None,
        [
            ["delete element ip podwire_proxy services { 10.96.0.1 . 6 . 80 }"],
            ["delete element ip podwire_proxy cluster_ips { 10.96.0.1 }"],
        ],
    ),
    "ranges that become narrower": (
        plan(cluster=(), ranges=("10.0.0.0/8", "192.0.2.0/24"), only=(FrontendKind.LOAD_BALANCER,)),
        plan(cluster=(), ranges=("10.1.0.0/16", "192.0.2.0/24"), only=(FrontendKind.LOAD_BALANCER,)),
        [
            [
                "delete element ip podwire_proxy sources { 203.0.113.1 . 6 . 80 . 10.0.0.0/8 }",
                "add element ip podwire_proxy sources { 203.0.113.1 . 6 . 80 . 10.1.0.0/16 }",
            ]
        ],
    ),
}


@pytest.mark.parametrize(("before", "after", "scripts"), CHANGES.values(), ids=CHANGES.keys())
def test_only_what_differs_is_sent(before: PortPlan, after: PortPlan | None, scripts: list[list[str]]) -> None:
    node = Node(before)
    sent = node.change(after) if after else node.change(gone=(before.key,))
    assert [script.splitlines() for script in sent] == scripts


@pytest.mark.parametrize("endpoints", [3, 1000])
@pytest.mark.parametrize("services", [10, 2000])
def test_one_endpoint_costs_the_same_everywhere(services: int, endpoints: int) -> None:
    others = [plan(f"s{n}", number=n, only=ONE, version=6) for n in range(2, services)]
    first = ipaddress.ip_address("10.244.4.0")
    backends = tuple(Backend(first + n, 8080) for n in range(endpoints + 1))
    full = msgspec.structs.replace(plan(only=ONE), cluster=backends)
    node = Node(full, *others)
    fewer = msgspec.structs.replace(full, cluster=backends[:1] + backends[2:])
    node.change(fewer)
    assert sum(each.elements for each in node.sent) == 3
    node.change(full)
    assert sum(each.elements for each in node.sent) == 2
    other = msgspec.structs.replace(full, cluster=(*backends[1:], Backend(first + 5000, 8080)))
    node.change(other)
    assert sum(each.elements for each in node.sent) == 1


def test_pieces_are_bounded_and_what_is_referred_to_comes_first() -> None:
    """The fake kernel refuses a verdict whose chain is not there; here, no Service is there before its endpoints."""
    node = Node(*(plan(f"s{n}", number=n) for n in range(1, 100)), limit=50)
    assert max(each.elements for each in node.sent) == 50
    kernel = FakeNft()
    for transaction in node.sent:
        kernel.commit((transaction,))
        table = kernel.tables[TABLE]
        for key, verdict in table.sets["services"].items():
            host, _, port = key.split(" . ")
            slots = int(verdict.rpartition("_")[2])
            assert all(f"{host} . {port} . {slot}" in table.sets["eps_tcp"] for slot in range(slots))
    assert kernel.tables == node.kernel.tables


def test_nobody_is_refused_while_it_starts() -> None:
    """A client of a Service that is to come waits a second and tries again; one that is refused gives up."""
    node = Node(*(plan(f"s{n}", number=n) for n in range(1, 100)), limit=50)
    kernel = FakeNft()
    for transaction in node.sent[:-1]:
        kernel.commit((transaction,))
        assert kernel.tables[TABLE].chains["unknown"] == ()
    kernel.commit(node.sent[-1:])
    assert len(kernel.tables[TABLE].chains["unknown"]) == 2


def test_an_address_of_two_ports_is_known_until_both_are_gone() -> None:
    web = plan(only=ONE)
    tls = msgspec.structs.replace(
        web,
        key=msgspec.structs.replace(web.key, port="tls"),
        frontends=(msgspec.structs.replace(web.frontends[0], port=443),),
    )
    node = Node(web, tls)
    node.change(gone=(web.key,))
    assert node.table.sets["cluster_ips"] == {"10.96.0.1": ""}
    node.change(gone=(tls.key,))
    assert node.table.sets["cluster_ips"] == {}


def test_a_cluster_ip_without_any_port_is_known_too() -> None:
    node = Node()
    node.kernel.commit(node.renderer.update({}, {address("10.96.0.9"): True}))
    assert node.table.sets["cluster_ips"] == {"10.96.0.9": ""}
    assert node.resync() == ()
    node.kernel.commit(node.renderer.update({}, {address("10.96.0.9"): False}))
    assert node.table.sets["cluster_ips"] == {}


def test_a_place_that_changes_hands() -> None:
    """The plans of both come in one change (claims.py), in any order."""
    loser, winner = plan("a"), plan("b", cluster=(REMOTE_2,))
    node = Node(loser)
    node.change(winner, gone=(loser.key,))
    assert node.kernel.tables == Node(winner).kernel.tables


# --- Settings ---------------------------------------------------------------------------------------------------


def test_settings_change_rules_and_sets_and_leave_the_elements() -> None:
    for before, old in VARIANTS.items():
        for after, new in VARIANTS.items():
            node = Node(*WHOLE, settings=old)
            node.kernel.commit(node.renderer.configure(new))
            assert node.kernel.tables == Node(*WHOLE, settings=new).kernel.tables, f"{before}, then {after}"
            assert node.resync() == ()


def test_an_address_of_the_node_is_one_element() -> None:
    some = msgspec.structs.replace(SETTINGS, node_port_addresses=(ipaddress.ip_network("10.0.0.1/32"),))
    more = msgspec.structs.replace(
        SETTINGS, node_port_addresses=tuple(map(ipaddress.ip_network, ("10.0.0.1/32", "10.0.1.1/32")))
    )
    node = Node(plan(), settings=some)
    (sent,) = node.renderer.configure(more)
    assert sent.script == "add element ip podwire_proxy node_addresses { 10.0.1.1 }\n"


# --- Names ----------------------------------------------------------------------------------------------------------


def test_no_name_gets_into_the_rules() -> None:
    hostile = 'x"; flush ruleset; add table ip pwned; #\n'
    made = plan(hostile)
    node = Node(msgspec.structs.replace(made, key=msgspec.structs.replace(made.key, namespace=hostile, port=hostile)))
    assert not [each for each in node.sent if "pwned" in each.script or "ruleset" in each.script]


def test_nothing_of_others_is_named() -> None:
    node = Node(*WHOLE)
    for script in (each.script for each in node.sent):
        for line in script.splitlines():
            assert re.match(r"(add|flush|delete) (table|set|map|chain|rule|element) ip6? podwire_proxy\b", line)


def test_addresses_are_written_as_nft_prints_them() -> None:
    shown = {"::ffff:1.2.3.4": "::ffff:1.2.3.4", "::102:304": "::1.2.3.4", "2001:db8::1": "2001:db8::1", "::2": "::2"}
    assert {each: address_text(ipaddress.ip_address(each)) for each in shown} == shown
