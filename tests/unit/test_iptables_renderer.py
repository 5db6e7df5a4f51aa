"""The iptables renderer: what is sent for a change, in which order, and that nothing is left or lost on the way."""

from __future__ import annotations

import copy
import ipaddress
import re
from pathlib import Path

import msgspec
import pytest

from kube_proxy_lite.apply.iptables_fake import FakeIptables
from kube_proxy_lite.model import Backend, Frontend, FrontendKind, PortKey, PortPlan, Protocol
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.iptables import IptablesRenderer, removal
from kube_proxy_lite.render.iptables_chains import Names, hooks
from kube_proxy_lite.render.iptables_listing import MARKER
from kube_proxy_lite.render.iptables_transactions import joined
from tests.unit.iptables_stage import WHOLE, Node
from tests.unit.service_cases import LOCAL, REMOTE, REMOTE_2, SETTINGS, VARIANTS, address, plan

GOLDEN = Path(__file__).parent.parent / "golden" / "services.iptables"
ONE = (FrontendKind.CLUSTER_IP,)


# --- Goldens --------------------------------------------------------------------------------------------------------


def test_all_of_it_as_it_is_made() -> None:
    """After a change that is meant, the golden file is what this test's failure shows. Chains are in no order."""
    text = "".join(each.text for each in Node(*WHOLE).sent)
    assert sorted(text.splitlines()) == sorted(GOLDEN.read_text().splitlines())
    for chain in set(re.findall(r"^-A (\S+)", text, re.MULTILINE)):
        of_chain = [
            [line for line in each.splitlines() if line.startswith(f"-A {chain} ")]
            for each in (text, GOLDEN.read_text())
        ]
        assert of_chain[0] == of_chain[1]


KUBE_PROXYS = {
    ("default/kubernetes:https", "tcp"): "KUBE-SVC-NPX46M4PTMTKRN6Y",
    ("kube-system/kube-dns:dns", "udp"): "KUBE-SVC-TCOU7JCQXEZGVUNU",
    ("kube-system/kube-dns:dns-tcp", "tcp"): "KUBE-SVC-ERIFXISQEP7F7OF4",
}


def test_chains_are_named_as_every_cluster_has_them() -> None:
    for (name, protocol), chain in KUBE_PROXYS.items():
        namespace, _, rest = name.partition("/")
        service, _, port = rest.partition(":")
        key = PortKey(namespace, service, port, Protocol(protocol.upper()), 4)
        assert Names(msgspec.structs.replace(plan(), key=key)).chain("SVC") == chain


# --- Changes --------------------------------------------------------------------------------------------------------


def sep(backend: str, made: PortPlan) -> str:
    return Names(made).endpoint(Backend(address(backend), 8080, backend.startswith("10.244.1.")))


def test_one_endpoint_more_is_its_chain_and_the_dice() -> None:
    before, after = plan(cluster=(LOCAL,), only=ONE), plan(cluster=(LOCAL, REMOTE), only=ONE)
    node = Node(before)
    service, new = Names(before).chain("SVC"), sep(REMOTE, after)
    ends = sorted((sep(LOCAL, after), new))
    to = {sep(LOCAL, after): LOCAL, new: REMOTE}
    assert node.change(after) == [
        "*nat",
        f":{new} - [0:0]",
        f":{service} - [0:0]",
        f'-A {new} -s 10.244.2.3/32 -m comment --comment "default/web" -j KUBE-MARK-MASQ',
        f'-A {new} -p tcp -m comment --comment "default/web" -m tcp -j DNAT --to-destination 10.244.2.3:8080',
        f'-A {service} -d 10.96.0.1/32 -p tcp -m comment --comment "default/web cluster IP" -m tcp --dport 80'
        " -j KUBE-MARK-NOT-POD",
        f'-A {service} -m comment --comment "default/web -> {to[ends[0]]}:8080"'
        f" -m statistic --mode random --probability 0.50000000000 -j {ends[0]}",
        f'-A {service} -m comment --comment "default/web -> {to[ends[1]]}:8080" -j {ends[1]}',
        "COMMIT",
    ]


def test_one_endpoint_fewer_is_the_dice_and_then_its_chain() -> None:
    before, after = plan(cluster=(LOCAL, REMOTE), only=ONE), plan(cluster=(LOCAL,), only=ONE)
    node = Node(before)
    sent = node.change(after)
    gone = sep(REMOTE, before)
    assert [line for line in sent if gone in line] == [f":{gone} - [0:0]", f"-X {gone}"]
    assert sent.index(f":{Names(before).chain('SVC')} - [0:0]") < sent.index(f"-X {gone}")


def test_a_change_of_nothing_sends_nothing() -> None:
    node = Node(plan())
    assert node.change(plan()) == []


@pytest.mark.parametrize("endpoints", [3, 1000])
@pytest.mark.parametrize("services", [10, 2000])
def test_a_change_costs_the_same_everywhere(services: int, endpoints: int) -> None:
    """But for the paths in the trees, which are as long as a logarithm."""
    others = [
        msgspec.structs.replace(
            plan(f"s{n}", only=ONE, cluster=(REMOTE,)),
            frontends=(Frontend(kind=FrontendKind.CLUSTER_IP, address=address("10.96.1.0") + n * 17, port=80),),
        )
        for n in range(services)
    ]
    first = ipaddress.IPv4Address("10.244.4.0")
    backends = tuple(Backend(first + n, 8080) for n in range(endpoints + 1))
    full = msgspec.structs.replace(plan(only=ONE), cluster=backends)
    node = Node(full, *others)
    for other in (backends[:1] + backends[2:], backends, (*backends[1:], Backend(first + 5000, 8080))):
        sent = node.change(msgspec.structs.replace(full, cluster=other))
        assert len(sent) < 120, "two paths of three chains with sixteen rules"
    sent = node.change(plan("new", cluster=(REMOTE,), number=9, only=ONE))
    assert len(sent) < 80


def test_an_address_of_many_ports_has_a_tree_of_its_own() -> None:
    wide = [
        msgspec.structs.replace(
            plan(f"p{n}", cluster=(REMOTE,)),
            frontends=(Frontend(kind=FrontendKind.CLUSTER_IP, address=address("10.96.0.1"), port=1000 + n),),
        )
        for n in range(300)
    ]
    node = Node(*wide)
    assert max(len(rules) for rules in node.kernel.tables[4]["nat"].values()) <= 17
    for turn, each in enumerate(wide):
        node.change(gone=(each.key,))
        if turn % 50 == 0 or turn > 285:
            assert node.kernel.tables == Node(*wide[turn + 1 :]).kernel.tables


def test_pieces_are_bounded_and_what_is_referred_to_comes_first() -> None:
    """The fake refuses a rule to a chain that is not there; here, no Service is reached before all of it is."""
    node = Node(*(plan(f"s{n}", number=n) for n in range(1, 100)), limit=50)
    assert len(node.sent) > 20
    assert max(each.lines for each in node.sent) < 100, "a chain is never divided"
    kernel = FakeIptables()
    for transaction in node.sent:
        assert not kernel.tables[4]["nat"].get("KUBE-SERVICES") or "KUBE-MARK-MASQ" in kernel.tables[4]["nat"]
        kernel.commit((transaction,))
    assert kernel.tables == node.kernel.tables
    whole = FakeIptables()
    for version in (4, 6):
        made = joined(each for each in node.sent if each.version == version)
        assert made is not None
        whole.commit((made,))
    assert whole.tables == node.kernel.tables, "put together, they do the same"


def test_a_place_that_changes_hands() -> None:
    """The plans of both come in one change (claims.py), in any order."""
    loser, winner = plan("a"), plan("b", cluster=(REMOTE_2,))
    for order in ((winner, None), (None, winner)):
        node = Node(loser)
        changes = {winner.key: order[0], loser.key: order[1]} if order[0] else {loser.key: None, winner.key: winner}
        node.kernel.commit(node.renderer.update(changes, {}))
        assert node.kernel.tables == Node(winner).kernel.tables


def test_the_removal_is_all_of_it_and_nothing_more() -> None:
    node = Node(*WHOLE)
    for version, listing in node.kernel.listing().items():
        node.kernel.commit(removal(version, listing))
    assert node.kernel.tables == FakeIptables().tables
    assert [removal(version, listing) for version, listing in node.kernel.listing().items()] == [(), ()]


# --- Settings -------------------------------------------------------------------------------------------------------


def test_settings_change_what_depends_on_them() -> None:
    some = msgspec.structs.replace(SETTINGS, node_port_addresses=(ipaddress.ip_network("10.0.0.0/24"),))
    for before, old in VARIANTS.items():
        for after, new in {**VARIANTS, "node ports on some addresses": some}.items():
            node = Node(*WHOLE, settings=old)
            node.kernel.commit(node.renderer.configure(new))
            assert node.kernel.tables == Node(*WHOLE, settings=new).kernel.tables, f"{before}, then {after}"
            assert node.resync() == ()


def test_what_is_not_about_pods_changes_the_constant_chains_alone() -> None:
    node = Node(*WHOLE)
    other = msgspec.structs.replace(SETTINGS, service_cidrs=(), masquerade_all=True)
    sent = node.renderer.configure(other)
    assert {line for each in sent for line in each.text.splitlines() if line.startswith(":")} == {
        f":{chain} - [0:0]" for chain in ("KUBE-MARK-NOT-POD", "KUBE-SERVICES")
    }


def test_balancers_are_let_in_to_ask_for_health() -> None:
    node = Node(*WHOLE)
    node.kernel.commit(node.renderer.accept_health_checks((32000, 31000)))
    for version in (4, 6):
        rules = node.chain("filter", "KUBE-NODEPORTS", version)
        assert [re.findall(r"--dport (\d+) -j ACCEPT", rule) for rule in rules] == [["31000"], ["32000"]]
    assert node.resync() == ()
    node.kernel.commit(node.renderer.accept_health_checks(()))
    assert node.kernel.tables == Node(*WHOLE).kernel.tables


def test_before_the_first_look_nothing_is_sent() -> None:
    renderer = IptablesRenderer(SETTINGS)
    assert renderer.update({plan().key: plan()}, {}) == ()
    assert renderer.configure(VARIANTS["pods are not told"]) == ()


# --- Restart, drift, others -------------------------------------------------------------------------------------------


def test_a_restart_sends_nothing() -> None:
    node = Node(*WHOLE)
    assert Node(*WHOLE, kernel=node.kernel).sent == ()


def test_a_start_that_was_cut_off_is_taken_up() -> None:
    whole = Node(*WHOLE, limit=20)
    for done in range(len(whole.sent)):
        kernel = FakeIptables()
        kernel.commit(Node(*WHOLE, limit=20).sent[:done])
        assert Node(*WHOLE, kernel=kernel).kernel.tables == whole.kernel.tables


def as_others_print(rule: str) -> str:
    """As an older or a newer iptables prints it."""
    rule = re.sub(r'-m comment --comment "([\w-]+)"', r"-m comment --comment \1", rule)
    rule = rule.replace(" --rsource", "").replace(" --reject-with icmp-port-unreachable", "")
    rule = re.sub(r"(--probability 0\.\d{8})\d+", r"\1", rule).replace(" --mask 255.255.255.255", "")
    return re.sub(r" -m (tcp|udp|sctp)(?= -j)", "", rule)


def test_a_restart_sends_nothing_where_iptables_prints_rules_otherwise() -> None:
    node = Node(*WHOLE)
    tables = node.kernel.tables[4]
    for chains in tables.values():
        for name, rules in chains.items():
            chains[name] = [as_others_print(rule) for rule in rules]
    assert tables != Node(*WHOLE).kernel.tables[4], "or this proves nothing"
    assert Node(*WHOLE, kernel=node.kernel).sent == ()


SVC = Names(WHOLE[0]).chain("SVC")
DRIFTS = {
    "a rule is gone": lambda nat: nat[SVC].pop(),
    "a rule is another": lambda nat: nat.update({SVC: [*nat[SVC][:-1], "-j RETURN"]}),
    "a rule is there twice": lambda nat: nat[SVC].append(nat[SVC][-1]),
    "rules are in another order": lambda nat: nat[SVC].reverse(),
    "a chain is empty": lambda nat: nat["KUBE-POSTROUTING"].clear(),
    "a jump is gone": lambda nat: nat["PREROUTING"].clear(),
    "a jump is there twice": lambda nat: nat["OUTPUT"].append(nat["OUTPUT"][0]),
    "everything is gone": lambda nat: (
        [nat.pop(name) for name in list(nat) if name.startswith("KUBE-")] + [nat[name].clear() for name in nat]
    ),
    "the marker is gone": lambda nat: nat.pop(MARKER),
}


@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS.keys())
def test_drift_is_repaired(drift: object) -> None:
    node = Node(*WHOLE)
    sound = copy.deepcopy(node.kernel.tables)
    drift(node.kernel.tables[4]["nat"])  # type: ignore[operator]
    assert node.kernel.tables != sound
    assert node.resync()
    assert node.kernel.tables == sound
    assert node.resync() == ()


DOCKER = {
    "PREROUTING": ["-m addrtype --dst-type LOCAL -j DOCKER"],
    "DOCKER": ["-i docker0 -j RETURN", "-p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80"],
    "KUBE-KUBELET-CANARY": [],
    "KUBE-HOSTPORT": ["-j RETURN"],
}


def test_rules_of_others_stay() -> None:
    kernel = FakeIptables()
    nat = kernel.tables[4]["nat"]
    nat.update(copy.deepcopy(DOCKER))
    node = Node(*WHOLE, kernel=kernel)
    nat = kernel.tables[4]["nat"]
    assert nat["PREROUTING"][1:] == DOCKER["PREROUTING"], "our jump comes first"
    for turn in (lambda: node.resync(), lambda: node.change(gone=(WHOLE[0].key,)), lambda: node.change(WHOLE[0])):
        turn()
        nat = kernel.tables[4]["nat"]
        assert {name: nat[name] for name in list(DOCKER)[1:]} == {name: DOCKER[name] for name in list(DOCKER)[1:]}
    for version, listing in kernel.listing().items():
        kernel.commit(removal(version, listing))
    left = {name: rules for name, rules in kernel.tables[4]["nat"].items() if rules or name.startswith("KUBE")}
    assert left == DOCKER


KUBE_PROXY = f"""*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:{SVC} - [0:0]
:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/web cluster IP" -m tcp --dport 80 -j {SVC}
-A KUBE-SERVICES -d 10.96.0.99/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA
-A {SVC} -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.244.2.3:8080
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
COMMIT
"""


def test_what_a_kube_proxy_has_left_is_replaced() -> None:
    kernel = FakeIptables()
    kernel.restore(4, KUBE_PROXY)
    node = Node(*WHOLE, kernel=kernel)
    assert kernel.tables == Node(*WHOLE).kernel.tables
    assert node.resync() == ()


def test_what_is_not_ours_is_not_removed() -> None:
    """A kube-proxy that is running, while another mode of ours cleans up."""
    kernel = FakeIptables()
    kernel.restore(4, KUBE_PROXY)
    assert removal(4, kernel.listing()[4]) == ()


def test_a_chain_that_somebody_else_leads_to_is_emptied() -> None:
    """It cannot be deleted, and must not stop the rest."""
    node = Node(plan(cluster=(LOCAL, REMOTE)), plan("other", number=2))
    nat = node.kernel.tables[4]["nat"]
    nat["MINE"] = [f"-j {sep(REMOTE, plan())}"]
    with pytest.raises(ApplyFailed):
        node.change(plan(cluster=(LOCAL,)), gone=(plan("other").key,))
    node.resync()
    nat = node.kernel.tables[4]["nat"]
    assert nat[sep(REMOTE, plan())] == []
    assert nat["MINE"]
    assert node.resync() == ()
    assert Names(plan("other")).chain("SVC") not in nat


def test_jumps_come_in_order_in_front_of_others() -> None:
    kernel = FakeIptables()
    kernel.tables[4]["filter"]["FORWARD"] = ["-j DOCKER-USER"]
    kernel.tables[4]["filter"]["DOCKER-USER"] = []
    Node(*WHOLE, kernel=kernel)
    assert kernel.tables[4]["filter"]["FORWARD"] == [*hooks()["filter", "FORWARD"], "-j DOCKER-USER"]


# --- Names that mean harm -------------------------------------------------------------------------------------------

HOSTILE = (
    'x" -j ACCEPT\n-A INPUT -j ACCEPT\n#',
    "line\nCOMMIT\n*filter\n:INPUT DROP [0:0]",
    "back\\slash ' quote \" `$(reboot)`",
    "ä" * 253,
    "a" * 253,
    "\x00\x1b[31m",
    "-j DROP",
)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_name_gets_into_the_text_but_as_a_comment(hostile: str) -> None:
    made = plan(cluster=(), external_local=True)
    for each in (made, plan(external_local=True, ranges=("10.0.0.0/8",), affinity=5)):
        key = msgspec.structs.replace(each.key, namespace=hostile, service=hostile, port=hostile)
        node = Node(msgspec.structs.replace(each, key=key))
        for line in (line for sent in node.sent for line in sent.text.splitlines()):
            without = re.sub(r' -m comment --comment "[\w ./:;>-]{1,250}"', "", line)
            assert re.fullmatch(r"\*\w+|COMMIT|:KUBE-[\w-]+ - \[0:0\]|-[AI] [\w-]+ [\w ./:!,-]+", without, re.ASCII), (
                line
            )
            assert "ACCEPT" not in without or "KUBE-FORWARD" in without
        assert node.resync() == ()
