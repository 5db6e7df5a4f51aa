"""The nftables renderer: what is sent for a change, in which order, and that nothing is left or lost on the way."""

from __future__ import annotations

import copy
import ipaddress
import random
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kube_proxy_lite.apply.nftables_fake import FakeNft
from kube_proxy_lite.model import Backend, FrontendKind, PortKey, PortPlan, Protocol, Settings
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.nftables_elements import address_text, settle
from kube_proxy_lite.render.nftables_listing import TableListing
from kube_proxy_lite.render.nftables_transactions import Transaction
from tests.unit.service_cases import BACKENDS, LOCAL, REMOTE, REMOTE_2, SETTINGS, VARIANTS, address, plan

GOLDEN = Path(__file__).parent.parent / "golden" / "services.nft"
TABLE = "ip podwire_proxy"


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


# --- Goldens --------------------------------------------------------------------------------------------------------

WHOLE = (
    plan("web", external_local=True, ranges=("192.0.2.0/24",)),
    plan(
        "dns", protocol=Protocol.UDP, number=2, affinity=10800, only=(FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT)
    ),
    plan("empty", cluster=(), number=3, protocol=Protocol.SCTP, only=(FrontendKind.CLUSTER_IP,)),
    plan("six", version=6, number=4, affinity=60, only=(FrontendKind.CLUSTER_IP,)),
)


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


OTHER_RULES = f"flush chain {TABLE} shape\nadd rule {TABLE} shape {{}}\n"
SIX = "ip6 podwire_proxy"


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


# --- Properties -----------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
PLANS = st.builds(
    lambda name, backends, version, protocol, internal, external, affinity, ranges: plan(
        name,
        *backends,
        version=version,
        protocol=protocol,
        number=NAMES.index(name) + 1,
        internal_local=internal,
        external_local=external,
        affinity=affinity,
        ranges=ranges,
    ),
    st.sampled_from(NAMES),
    st.one_of(
        st.sampled_from(list(BACKENDS.values())),
        st.lists(st.integers(1, 9), unique=True, max_size=8).map(
            lambda hosts: (
                tuple(f"10.244.{h % 3}.{h}" for h in hosts),
                tuple(f"10.244.1.{h}" for h in hosts if h % 3 == 1),
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
EVENTS = st.lists(
    st.one_of(
        st.lists(PLANS, min_size=1, max_size=3),  # set
        st.integers(0, 20),  # remove one
        st.sampled_from(list(VARIANTS)),  # configure
        st.none(),  # restart
    ),
    max_size=12,
)


def without_order(tables: dict[str, TableListing]) -> dict[str, object]:
    """Tables with the endpoints of a place as a set: which slot one sits in is history."""
    shown: dict[str, object] = {}
    for name, table in tables.items():
        sets: dict[str, object] = {}
        for which, items in table.sets.items():
            if which.startswith(("eps_", "np_")):
                places: dict[str, list[str]] = {}
                slots: dict[str, list[str]] = {}
                for key, endpoint in items.items():
                    place, _, slot = key.rpartition(" . ")
                    places.setdefault(place, []).append(endpoint)
                    slots.setdefault(place, []).append(slot)
                sets[which] = {place: (sorted(found), sorted(slots[place])) for place, found in places.items()}
            else:
                sets[which] = items
        shown[name] = (sets, table.chains, table.hooks)
    return shown


@given(events=EVENTS, limit=st.sampled_from((1, 7, 5000)))
@hypothesis_settings(max_examples=100, deadline=None)
def test_after_every_event_the_kernel_is_as_from_scratch(events: list[object], limit: int) -> None:
    node, settings = Node(limit=limit), SETTINGS
    plans: dict[PortKey, PortPlan] = {}
    for event in events:
        changes: dict[PortKey, PortPlan | None] = {}
        if isinstance(event, list):
            changes = {each.key: each for each in event}
        elif isinstance(event, int) and plans:
            changes = {sorted(plans)[event % len(plans)]: None}
        elif isinstance(event, str):
            settings = VARIANTS[event]
            node.kernel.commit(node.renderer.configure(settings))
        elif event is None:
            node.renderer = NftablesRenderer(settings, limit=limit)
            node.renderer.update(dict(plans), {})
            assert node.resync() == (), "a restart changes nothing"
        plans = {key: each for key, each in (plans | changes).items() if each is not None}
        node.kernel.commit(node.renderer.update(changes, {}))
        scratch = Node(*plans.values(), settings=settings)
        assert without_order(node.kernel.tables) == without_order(scratch.kernel.tables)
    assert node.resync() == ()


@given(
    wanted=st.lists(st.integers(0, 30).map(str), unique=True),
    there=st.dictionaries(st.integers(0, 30), st.integers(0, 30).map(str)),
)
def test_endpoints_settle_without_holes_and_move_little(wanted: list[str], there: dict[int, str]) -> None:
    slots = settle(wanted, there)
    assert sorted(slots) == sorted(wanted)
    kept = {endpoint for slot, endpoint in there.items() if slot < len(slots) and slots[slot] == endpoint}
    could_stay = {endpoint for slot, endpoint in there.items() if slot < len(wanted) and endpoint in wanted}
    assert kept == could_stay


def test_addresses_are_written_as_nft_prints_them() -> None:
    shown = {"::ffff:1.2.3.4": "::ffff:1.2.3.4", "::102:304": "::1.2.3.4", "2001:db8::1": "2001:db8::1", "::2": "::2"}
    assert {each: address_text(ipaddress.ip_address(each)) for each in shown} == shown


def test_slots_do_not_follow_from_the_order_of_events_alone() -> None:
    """A thousand changes later there are no more elements than at the start."""
    node, dice = Node(plan()), random.Random(1)
    hosts = [f"10.244.2.{host}" for host in range(2, 40)]
    for _ in range(300):
        node.change(plan(cluster=tuple(dice.sample(hosts, dice.randint(0, 20)))))
    node.change(plan())
    assert without_order(node.kernel.tables) == without_order(Node(plan()).kernel.tables)
