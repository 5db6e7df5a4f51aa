"""The chains of the iptables mode: a Service's own, and those that are always there. Pure.

The names are kube-proxy's, and made as it makes them, so that what operators have learnt to read stays readable:

    nat  KUBE-SERVICES ─ tree of KUBE-IP-… ┬─ ClusterIP ──────────────────────────▶ KUBE-SVC-…  (policy Cluster)
                  │                        │                                        KUBE-SVL-…  (policy Local)
                  │                        └─ other addresses ─▶ (KUBE-FW-… ─▶) KUBE-EXT-… ─▶ one of the two
                  └─ node's address ─▶ KUBE-NODEPORTS ─ tree of KUBE-PORT-… ──────▶ KUBE-EXT-…

         KUBE-SVC-…, KUBE-SVL-…   sticky clients first, then dice ─▶ KUBE-SEP-… ─▶ DNAT;  dice for many endpoints are
                                  thrown in a tree of KUBE-SPLIT-…, a sixteenth of them at a time
         KUBE-EXT-…               policy Cluster: marked, then KUBE-SVC. Local: pods, and the node marked, to KUBE-SVC,
                                  everybody else to KUBE-SVL
         KUBE-POSTROUTING         what is marked (0x4000) is masqueraded

    filter  KUBE-PROXY-FIREWALL   closed addresses: what got no translation in KUBE-FW is dropped
            KUBE-SERVICES         ClusterIPs without endpoints, refused or dropped; the rest of service CIDRs, dropped
            KUBE-EXTERNAL-SERVICES   the same for all other addresses and node ports

What has an endpoint is translated before it comes to `filter`, so it meets none of those rules.

**Chance.** The endpoints of a chain are divided by a hash of their name, not by their order, so that one more or fewer
changes the dice on its own path alone: 3 chains of 16 to 20 rules among 1,000 endpoints. Clients with affinity are
looked up endpoint by endpoint, as kube-proxy does: the kernel's `recent` keeps a list for each.

Rules are written as iptables-save prints them (1.8.4 to 1.8.11, nft and legacy), and so compare as texts. Nothing of an
object's gets into them but addresses, numbers and names that are cut to letters, digits and `-_.:/`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kube_proxy_lite.model import (
    Address,
    Backend,
    Frontend,
    FrontendKind,
    Network,
    PortPlan,
    Protocol,
    Settings,
    Source,
    Verdict,
    decide,
)
from kube_proxy_lite.render.iptables_tree import WORDS, Chains, Rules, Target, name_of
from kube_proxy_lite.render.nftables_elements import address_text
from podwire.errors import PodwireError

MARK = "0x4000/0x4000"
SPLIT_FROM = 16
"""Endpoints up to which the dice are thrown in a row."""
_FAN = 16
_BASE32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@+-]{1,15}\*?")
_UNFIT = re.compile(r"[^A-Za-z0-9_.:/-]")
_NAME_LENGTH = 160
MARK_MASQ = "-j KUBE-MARK-MASQ"
LOOPBACK: dict[int, Network] = {4: ipaddress.ip_network("127.0.0.0/8"), 6: ipaddress.ip_network("::1/128")}
_REJECT = {4: "icmp-port-unreachable", 6: "icmp6-port-unreachable"}
_MASK = {4: "255.255.255.255", 6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}


class BadInterface(PodwireError):
    """A name of pod interfaces that no interface can have."""


class Board(NamedTuple):
    """A place from which connections are dispatched: a tree that hangs below `root` in `table`."""

    table: str
    root: str
    at_node: bool = False


SERVICES = Board("nat", "KUBE-SERVICES")
NODEPORTS = Board("nat", "KUBE-NODEPORTS", at_node=True)
CLOSED = Board("filter", "KUBE-PROXY-FIREWALL")
INTERNAL = Board("filter", "KUBE-SERVICES")
EXTERNAL = Board("filter", "KUBE-EXTERNAL-SERVICES")
EXTERNAL_NODEPORTS = Board("filter", "KUBE-EXTERNAL-NODEPORTS", at_node=True)
BOARDS = (NODEPORTS, SERVICES, CLOSED, INTERNAL, EXTERNAL_NODEPORTS, EXTERNAL)

Entry = tuple[Board, int, Protocol, int]
"""A place on a board: the address as a number (-1 for the node), protocol and port."""


class Names:
    """What the chains of one plan are called."""

    def __init__(self, plan: PortPlan) -> None:
        key = plan.key
        self.service = f"{key.namespace}/{key.service}" + (f":{key.port}" if key.port else "")
        self._seed = self.service + key.protocol.lower()
        self.shown = fit(self.service)

    def chain(self, kind: str) -> str:
        """KUBE-SVC-…, KUBE-SVL-…, KUBE-EXT-… or KUBE-FW-…"""
        return name_of(f"KUBE-{kind}-", self._seed)

    def endpoint(self, backend: Backend) -> str:
        """KUBE-SEP-… of a backend."""
        return name_of("KUBE-SEP-", self._seed, place_text(backend))


def fit(name: str) -> str:
    """`name` with nothing in it that could end a comment or a line, and not too long for one."""
    return _UNFIT.sub("_", name[:_NAME_LENGTH])


def place_text(backend: Backend) -> str:
    """An endpoint as iptables and kube-proxy write it."""
    text = address_text(backend.address)
    return f"[{text}]:{backend.port}" if backend.address.version == 6 else f"{text}:{backend.port}"


# --- A Service ------------------------------------------------------------------------------------------------------


def service_chains(plan: PortPlan, settings: Settings) -> dict[str, Chains]:
    """The chains that belong to the plan alone, by table; what is referred to first."""
    names = Names(plan)
    nat: Chains = {}
    inner, outer = _split(plan.frontends)
    pools = (
        ("SVC", plan.cluster, bool(outer) or any(not each.local for each in inner)),
        ("SVL", plan.local, any(each.local for each in plan.frontends)),
    )
    used = {backend: None for _, backends, wanted in pools if wanted for backend in backends}
    endpoints = {backend: names.endpoint(backend) for backend in used}
    for backend, chain in endpoints.items():
        nat[chain] = _endpoint_rules(plan, names, backend, chain)
    for kind, backends, wanted in pools:
        if wanted and backends:
            nat |= _pool(plan, names, kind, [(endpoints[each], each) for each in backends])
    if outer and _is_forwarded(plan, outer[0], settings):
        nat[names.chain("EXT")] = _external_rules(plan, outer[0].local, names, settings)
    closed = [each for each in outer if each.source_ranges]
    if not closed:
        return {"nat": nat, "filter": {}}
    chain = names.chain("FW")
    if _is_forwarded(plan, outer[0], settings):
        nat[chain] = _allowed(closed, f"-j {names.chain('EXT')}")
    return {"nat": nat, "filter": {chain: (*_allowed(closed, "-j RETURN"), "-j DROP")}}


def entries(plan: PortPlan, settings: Settings) -> Iterator[tuple[Entry, Target]]:
    """What the plan puts on the boards."""
    names, protocol = Names(plan), plan.key.protocol
    for each in plan.frontends:
        at = -1 if each.address is None else int(each.address)
        board, refused = _boards(each)
        forward = _is_forwarded(plan, each, settings)
        if forward:
            yield (board, at, protocol, each.port), _forward_target(each, names)
        verdict = _other_verdict(plan, each, settings)
        if verdict is Verdict.REFUSE:
            # a reset, because TCP over IPv6 tries on for a second and more after an ICMP error
            how = "tcp-reset" if protocol is Protocol.TCP else _REJECT[plan.key.version]
            text = f"{names.shown} has no endpoints"
            yield (refused, at, protocol, each.port), (text, f"-j REJECT --reject-with {how}")
        elif verdict is Verdict.DROP:
            yield (refused, at, protocol, each.port), (f"{names.shown} has no local endpoints", "-j DROP")
        if each.source_ranges and each.address is not None:
            text = f"{names.shown} traffic not accepted by {names.chain('FW')}"
            yield (CLOSED, at, protocol, each.port), (text, f"-j {names.chain('FW')}")


def _split(frontends: Iterable[Frontend]) -> tuple[list[Frontend], list[Frontend]]:
    """ClusterIPs, and all others; one external traffic policy holds for all of the latter."""
    inner: list[Frontend] = []
    outer: list[Frontend] = []
    for each in frontends:
        (inner if each.kind is FrontendKind.CLUSTER_IP else outer).append(each)
    return inner, outer


def _boards(frontend: Frontend) -> tuple[Board, Board]:
    """Where the frontend is translated, and where it is refused."""
    if frontend.address is None:
        return NODEPORTS, EXTERNAL_NODEPORTS
    return SERVICES, INTERNAL if frontend.kind is FrontendKind.CLUSTER_IP else EXTERNAL


def _is_forwarded(plan: PortPlan, frontend: Frontend, settings: Settings) -> bool:
    """Whether anybody is."""
    return any(decide(plan, frontend, source, settings).verdict is Verdict.FORWARD for source in Source)


def _other_verdict(plan: PortPlan, frontend: Frontend, settings: Settings) -> Verdict:
    """What those meet who are not forwarded; never two things, since pods and the node are refused only when there is
    no endpoint at all."""
    verdicts = (decide(plan, frontend, source, settings).verdict for source in Source)
    return next((each for each in verdicts if each is not Verdict.FORWARD), Verdict.FORWARD)


def _forward_target(frontend: Frontend, names: Names) -> Target:
    if frontend.kind is FrontendKind.CLUSTER_IP:
        return f"{names.shown} cluster IP", f"-j {names.chain('SVL' if frontend.local else 'SVC')}"
    if frontend.kind is FrontendKind.NODE_PORT:
        return names.shown, f"-j {names.chain('EXT')}"
    what = "external IP" if frontend.kind is FrontendKind.EXTERNAL_IP else "loadbalancer IP"
    return f"{names.shown} {what}", f"-j {names.chain('FW' if frontend.source_ranges else 'EXT')}"


def _endpoint_rules(plan: PortPlan, names: Names, backend: Backend, chain: str) -> Rules:
    word = WORDS[plan.key.protocol]
    host = f"{address_text(backend.address)}/{backend.address.max_prefixlen}"
    recent = ""
    if plan.affinity:
        recent = f"-m recent --set --name {chain} --mask {_MASK[plan.key.version]} --rsource "
    return (
        f'-s {host} -m comment --comment "{names.shown}" {MARK_MASQ}',
        f'-p {word} -m comment --comment "{names.shown}" {recent}-m {word} '
        f"-j DNAT --to-destination {place_text(backend)}",
    )


def _pool(plan: PortPlan, names: Names, kind: str, members: list[tuple[str, Backend]]) -> Chains:
    """The chain that chooses among `members`, and those that it is divided into."""
    found: Chains = {}
    chain, word = names.chain(kind), WORDS[plan.key.protocol]
    rules = [
        f"-d {address_text(each.address)}/{each.address.max_prefixlen} -p {word} "
        f'-m comment --comment "{names.shown} cluster IP" -m {word} --dport {each.port} -j KUBE-MARK-NOT-POD'
        for each in plan.frontends
        if each.kind is FrontendKind.CLUSTER_IP and each.address and each.local == (kind == "SVL")
    ]
    if plan.affinity:
        sticky = f"--rcheck --seconds {plan.affinity} --reap"
        rules += [
            f'-m comment --comment "{names.shown} -> {place_text(backend)}" -m recent {sticky} --name {endpoint} '
            f"--mask {_MASK[plan.key.version]} --rsource -j {endpoint}"
            for endpoint, backend in members
        ]
    rules += _dice(names.shown, chain, sorted(members), 0, found)
    found[chain] = tuple(rules)
    return found


def _dice(shown: str, chain: str, members: list[tuple[str, Backend]], depth: int, found: Chains) -> list[str]:
    """Rules that choose one of `members`, all alike; chains for parts of them go to `found`."""
    if len(members) <= SPLIT_FROM:
        return [
            f'-m comment --comment "{shown} -> {place_text(backend)}" {_chance(1, len(members) - at)}-j {endpoint}'
            for at, (endpoint, backend) in enumerate(members)
        ]
    parts: dict[str, list[tuple[str, Backend]]] = {}
    for member in members:  # a chain's name ends in a hash: its letters are the dice's digits
        parts.setdefault(_digit(member[0], depth), []).append(member)
    rules, left = [], len(members)
    for digit, part in sorted(parts.items()):
        below = name_of("KUBE-SPLIT-", chain, f" {digit}")
        rules.append(f"{_chance(len(part), left)}-g {below}")
        found[below] = tuple(_dice(shown, below, part, depth + 1, found))
        left -= len(part)
    return rules


def _digit(endpoint: str, depth: int) -> str:
    """One of sixteen, from the hash that a KUBE-SEP chain's name ends in."""
    return "0123456789abcdef"[_BASE32.index(endpoint[9 + depth % 16]) % _FAN]


def _chance(wanted: int, of: int) -> str:
    """A match that holds in `wanted` of `of` cases, as the kernel keeps it: in parts of 2^31."""
    if wanted == of:
        return ""
    return f"-m statistic --mode random --probability {round((1 << 31) * wanted / of) / (1 << 31):.11f} "


def _external_rules(plan: PortPlan, local: bool, names: Names, settings: Settings) -> Rules:
    shown, cluster = names.shown, f"-j {names.chain('SVC')}" if plan.cluster else "-j RETURN"
    if not local:
        return (
            f'-m comment --comment "masquerade traffic for {shown} external destinations" {MARK_MASQ}',
            cluster,
        )
    rules = [
        f'{match}-m comment --comment "pod traffic for {shown} external destinations" {cluster}'
        for match in pod_matches(settings, plan.key.version)
    ]
    rules += [
        f'-m comment --comment "{verb} LOCAL traffic for {shown} external destinations" '
        f"-m addrtype --src-type LOCAL {jump}"
        for verb, jump in (("masquerade", MARK_MASQ), ("route", cluster))
    ]
    if plan.local:
        rules.append(f"-j {names.chain('SVL')}")
    return tuple(rules)


def _allowed(closed: list[Frontend], jump: str) -> Rules:
    """A rule for every network that may come in; with the address where not all have the same ones."""
    same = len({each.source_ranges for each in closed}) == 1
    rules: dict[str, None] = {}
    for each in closed:
        place = "" if same or each.address is None else f"-d {_network(each.address)} "
        for source in each.source_ranges:
            rules[f"-s {_network(source)} {place}{jump}"] = None
    return tuple(rules)


def _network(network: Network | Address) -> str:
    if isinstance(network, Address):
        return f"{address_text(network)}/{network.max_prefixlen}"
    return f"{address_text(network.network_address)}/{network.prefixlen}"


# --- What is always there ---------------------------------------------------------------------------------------------


def pod_matches(settings: Settings, version: int) -> list[str]:
    """Matches of which a packet from a pod has at least one. Raises BadInterface."""
    found = [f"-s {_network(network)} " for network in settings.cluster_cidrs if network.version == version]
    for name in settings.pod_interfaces:
        if not _INTERFACE.fullmatch(name) or name.endswith("+"):
            raise BadInterface(f"{name!r} is no name of an interface, nor a prefix that ends in *")
        found.append(f"-i {name.removesuffix('*')}{'+' if name.endswith('*') else ''} ")
    return found


def shared_chains(settings: Settings, version: int, health_ports: Iterable[int] = ()) -> dict[str, Chains]:
    """The chains that every Service uses, by table; `health_ports` are let in. Raises BadInterface."""
    pods = pod_matches(settings, version)
    if settings.masquerade_all:
        not_pod: Rules = (MARK_MASQ,)
    else:
        not_pod = (*(f"{match}-j RETURN" for match in pods), MARK_MASQ) if pods else ()
    return {
        "nat": {
            "KUBE-MARK-MASQ": (f"-j MARK --set-xmark {MARK}",),
            "KUBE-MARK-NOT-POD": not_pod,
            "KUBE-POSTROUTING": (
                f"-m mark ! --mark {MARK} -j RETURN",
                "-j MARK --set-xmark 0x4000/0x0",
                '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
            ),
        },
        "filter": {
            "KUBE-NODEPORTS": tuple(
                f'-p tcp -m comment --comment "health check node port" -m tcp --dport {port} -j ACCEPT'
                for port in sorted(health_ports)
            ),
            "KUBE-FORWARD": (
                "-m conntrack --ctstate INVALID -j DROP",
                f'-m comment --comment "kubernetes forwarding rules" -m mark --mark {MARK} -j ACCEPT',
                '-m comment --comment "kubernetes forwarding conntrack rule" '
                "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ),
        },
    }


def root_tail(board: Board, settings: Settings, version: int, has_nodeports: bool) -> Rules:
    """What follows in a root chain after the way into its tree."""
    if board in (SERVICES, EXTERNAL):
        if not has_nodeports:
            return ()
        below = NODEPORTS if board is SERVICES else EXTERNAL_NODEPORTS
        text = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
        return tuple(
            f'{match}-m comment --comment "{text}" -m addrtype --dst-type LOCAL -j {below.root}'
            for match in _node_matches(settings, version)
        )
    if board is INTERNAL:
        return tuple(
            f'-d {_network(network)} -m comment --comment "no such service" -j DROP'
            for network in settings.service_cidrs
            if network.version == version
        )
    return ()


def _node_matches(settings: Settings, version: int) -> list[str]:
    """Matches of the node's addresses that NodePorts answer on, given that they are the node's."""
    loopback = LOOPBACK[version]
    wanted: list[Network] = [network for network in settings.node_port_addresses if network.version == version]
    if not wanted or any(network.prefixlen == 0 for network in wanted):
        return [f"! -d {_network(loopback)} "]
    return [f"-d {_network(part)} " for network in wanted for part in _without(network, loopback)]


def _without(network: Network, other: Network) -> list[Network]:
    """What is in `network` and not in `other`."""
    if network.supernet_of(other):  # type: ignore[arg-type]
        return sorted(network.address_exclude(other))  # type: ignore[arg-type]
    return [] if network.overlaps(other) else [network]


def hooks() -> dict[tuple[str, str], Rules]:
    """(table, chain of the kernel's) → our jumps there, in order."""
    new = "-m conntrack --ctstate NEW "

    def jump(chain: str, words: str, match: str = "") -> str:
        return f'{match}-m comment --comment "kubernetes {words}" -j {chain}'

    firewall = jump(CLOSED.root, "load balancer firewall", new)
    services = jump(INTERNAL.root, "service portals", new)
    external = jump(EXTERNAL.root, "externally-visible service portals", new)
    return {
        ("nat", "PREROUTING"): (jump(SERVICES.root, "service portals"),),
        ("nat", "OUTPUT"): (jump(SERVICES.root, "service portals"),),
        ("nat", "POSTROUTING"): (jump("KUBE-POSTROUTING", "postrouting rules"),),
        ("filter", "INPUT"): (firewall, jump("KUBE-NODEPORTS", "health check service ports"), external),
        ("filter", "FORWARD"): (firewall, jump("KUBE-FORWARD", "forwarding rules"), services, external),
        ("filter", "OUTPUT"): (firewall, services, external),
    }
