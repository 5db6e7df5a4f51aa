"""A Service on the way: what was decided of the connection, and whether the kernel of the client's node has it. Pure.

    place  address . protocol . port ──▶ services: goto lb_tcp_N ──▶ eps_tcp: the N endpoints, a slot each
    back to the client itself ──▶ hairpin; from a node, or by a place of the node ──▶ masquerades, cluster_ips

Of the iptables mode it is read whether chains lead from PREROUTING to the place, and from there to every endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from kube_proxy_lite.model import Address, FrontendKind, PortPlan, Protocol, Verdict
from kube_proxy_lite.render.nftables_elements import address_text, endpoint_text, place_text, slot_maps
from kube_proxy_lite.render.nftables_layout import NAME, WORDS
from podwire.explain.cluster import Cluster, Translation
from podwire.explain.hops import Ask, Finding, Hop, Reading, Steps, Where, fails, ok, unseen

_SLOTS = 16
"""So many endpoints are asked for singly."""
_PROXY = "see `podwire status` on {node}: podwire-proxy does not run there, or lags behind; its log says why"
_GOTO = re.compile(r": (?:goto|jump) ([a-z0-9_]+)|: (drop)")


def service(cluster: Cluster, node: str, made: Translation, client: Address) -> Steps[Hop]:
    """The hop of a Service: what should become of the connection, then what the kernel makes of it."""
    findings = list(_decided(cluster, made, client))
    if not made.headless and not any(each.state.value == "fails" for each in findings):
        findings += yield from _in_kernel(node, made, client)
    return Hop(title=f"Service {'/'.join(made.service)}", where=node, findings=tuple(findings))


def _decided(cluster: Cluster, made: Translation, client: Address) -> Iterator[Finding]:
    name = "/".join(made.service)
    backends = made.decision.backends
    if made.decision.verdict is not Verdict.FORWARD:
        yield _unserved(cluster, made)
        return
    shown = ", ".join(f"{each.address}:{each.port}" for each in backends[:8])
    rest = f" and {len(backends) - 8} more" if len(backends) > 8 else ""
    if made.headless:
        yield ok(f"{name} is headless: its name is {shown}{rest}, and no packet is translated")
        return
    masquerade = "masqueraded as the node" if made.decision.masquerade else "the server sees the client's own address"
    yield ok(f"{made.address} port {made.port} goes to {shown}{rest}; {masquerade}")
    for address, why in made.listed:
        if why:
            yield ok(f"endpoint {address} {why}, and gets nothing")
    if any(each.address == client for each in backends):
        yield ok(f"a connection that comes back to {client} itself is masqueraded (hairpin)")


def _unserved(cluster: Cluster, made: Translation) -> Finding:
    name = "/".join(made.service)
    unused = ", ".join(f"{address} {why}" for address, why in made.listed if why)
    if made.decision.verdict is Verdict.DROP:
        kind = made.frontend.kind.value if made.frontend else "its"
        text = f"Service {name} drops it: the traffic policy or the source ranges of its {kind} leave no endpoint here"
        return fails(text, "internalTrafficPolicy or externalTrafficPolicy Local needs an endpoint on this node")
    if unused:
        return fails(
            f"Service {name} has no endpoint that is ready, and refuses connections: {unused}",
            "look why those pods are not ready: their readiness probe, their log",
        )
    found = cluster.service(made.service)
    selector = (found.spec.selector or {}) if found else {}
    labels = ", ".join(f"{key}={value}" for key, value in selector.items()) or "nothing"
    return fails(
        f"Service {name} has no endpoint, and refuses connections: it selects {labels}, and no such pod has an address",
        "correct the Service's selector, or start pods that it selects",
    )


# --- the kernel ---------------------------------------------------------------------------------------------------


def _in_kernel(node: str, made: Translation, client: Address) -> Steps[list[Finding]]:
    plan, frontend = made.plan, made.frontend
    assert plan is not None
    assert frontend is not None
    table = WORDS[plan.key.version].table.split()
    at_node = frontend.kind is FrontendKind.NODE_PORT

    def element(name: str, key: str) -> Ask:
        return Ask(Where(node), ("nft", "get", "element", *table, name, f"{{ {key} }}"))

    reading = yield element("nodeports" if at_node else "services", place_text(frontend, plan))
    if not reading.seen:
        return [unseen("what the kernel has of the Service", reading)]
    if not reading.well:
        tables = yield Ask(Where(node), ("nft", "list", "tables", table[0]))
        if NAME not in tables.text:
            return [(yield from _by_iptables(node, made, plan.key.protocol))]
        text = f"the kernel of {node} does not know {made.address} port {made.port}"
        return [fails(text, _PROXY.format(node=node), reading)]
    findings = [_verdict(node, made, reading)]
    if findings[0].state.value != "fails":
        findings.append((yield from _endpoints(node, made, plan, element)))
    findings += yield from _masquerade(node, made, client, element)
    return findings


def _verdict(node: str, made: Translation, reading: Reading) -> Finding:
    found = _GOTO.search(reading.text)
    chain = (found[1] or found[2]) if found else "nothing"
    count = len(made.decision.backends)
    if re.search(rf"_{count}(_sticky)?$", chain) is None:
        text = f"the kernel of {node} sends it to {chain}, and the Service has {count} endpoints"
        return fails(text, _PROXY.format(node=node), reading)
    return ok(f"the kernel sends it to chain {chain}", reading)


def _endpoints(node: str, made: Translation, plan: PortPlan, element: Callable[[str, str], Ask]) -> Steps[Finding]:
    """The endpoints that the kernel has are those of the Service."""
    assert made.frontend is not None
    backends = made.decision.backends
    follows_local = made.frontend.local and backends == plan.local
    name, key = slot_maps(made.frontend, plan)[follows_local]
    found, reading = [], Reading()
    for slot in range(min(len(backends), _SLOTS)):
        reading = yield element(name, f"{key} . {slot}")
        value = re.search(rf"\. {slot} : ([^ ]+ \. [0-9]+)", reading.text)
        found.append(value[1] if value else "nobody")
    right = {endpoint_text(each) for each in backends}
    wrong = [each for each in found if each not in right]
    if wrong:
        text = f"the kernel of {node} has {', '.join(wrong)} among the endpoints, and the Service does not"
        return fails(text, _PROXY.format(node=node), reading)
    return ok(f"its endpoints there are {', '.join(each.replace(' . ', ':') for each in found)}", reading)


def _masquerade(
    node: str, made: Translation, client: Address, element: Callable[[str, str], Ask]
) -> Steps[list[Finding]]:
    """What must be masqueraded has its element and its rule."""
    assert made.frontend is not None
    assert made.plan is not None
    loops = any(each.address == client for each in made.decision.backends)
    wanted: list[tuple[str, str]] = []
    if loops:
        wanted.append(("hairpin", f"{address_text(client)} . {address_text(client)}"))
    if made.decision.masquerade and made.frontend.kind is FrontendKind.CLUSTER_IP:
        wanted.append(("cluster_ips", address_text(made.frontend.address or client)))
    elif made.decision.masquerade:
        at_node = made.frontend.kind is FrontendKind.NODE_PORT
        wanted.append(("nodeport_masquerades" if at_node else "masquerades", place_text(made.frontend, made.plan)))
    findings = []
    for name, key in wanted:
        reading = yield element(name, key)
        if not reading.well:
            text = f"the connection is not masqueraded: {key} is not in @{name}, and the answer goes past {node}"
            findings.append(fails(text, _PROXY.format(node=node), reading))
    if wanted and not findings:
        findings.append((yield from _masquerade_rule(node, WORDS[made.plan.key.version].table.split())))
    return findings


def _masquerade_rule(node: str, table: list[str]) -> Steps[Finding]:
    reading = yield Ask(Where(node), ("nft", "list", "chain", *table, "postrouting"))
    if "goto masquerading" not in reading.text:
        text = f"the rule that masquerades is missing in {' '.join(table)} of {node}: the answer goes past the node"
        return fails(text, _PROXY.format(node=node), reading)
    return ok("it is masqueraded in postrouting", reading)


def _by_iptables(node: str, made: Translation, protocol: Protocol) -> Steps[Finding]:
    assert made.address is not None
    save = "iptables-save" if made.address.version == 4 else "ip6tables-save"
    reading = yield Ask(Where(node), (save, "-t", "nat"))
    chains = _chains(reading.text)
    if not reading.well or "KUBE-SERVICES" not in chains:
        text = f"the kernel of {node} has no rules for Services"
        return fails(text, _PROXY.format(node=node), reading)
    address, port = f"-d {made.address}/{made.address.max_prefixlen} ", f"--dport {made.port} "
    is_node_port = made.frontend is not None and made.frontend.kind is FrontendKind.NODE_PORT
    at_node = set(_reached(chains, ["KUBE-NODEPORTS"] if is_node_port else []))
    places = [
        line
        for name in _reached(chains, ["PREROUTING"])
        for line in chains[name]
        if port in line and f"-p {protocol.lower()} " in line and (address in line or name in at_node)
        if not _target(line).startswith("KUBE-MARK-")
    ]
    if not places:
        text = f"no rule of {node} that packets of pods meet names {made.address} {protocol} {made.port}"
        return fails(text, _PROXY.format(node=node), reading)
    ends = [line for name in _reached(chains, map(_target, places)) for line in chains[name]]
    missing = [
        f"{each.address}:{each.port}"
        for each in made.decision.backends
        if not any(line.endswith(f"--to-destination {_bracketed(each.address)}:{each.port}") for line in ends)
    ]
    if missing:
        text = f"the rules of {node} for it do not lead to {', '.join(missing)}"
        return fails(text, _PROXY.format(node=node), reading)
    return ok(f"iptables: chain {_target(places[0])}, and there is a rule to each endpoint", reading)


def _chains(text: str) -> dict[str, list[str]]:
    """Chain → its rules, of what iptables-save prints."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith(":"):
            found.setdefault(line[1:].split()[0], [])
        elif line.startswith("-A "):
            found.setdefault(line.split()[1], []).append(line)
    return found


def _target(line: str) -> str:
    """The chain that a rule sends to, or the verdict."""
    match = re.search(r" -[jg] (\S+)", line)
    return match[1] if match else ""


def _reached(chains: dict[str, list[str]], first: Iterable[str]) -> list[str]:
    """The chains that packets may come to from the first ones on, these among them."""
    found: dict[str, None] = {}
    ahead = [name for name in first if name in chains]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found[name] = None
            ahead += [target for target in map(_target, chains[name]) if target in chains]
    return list(found)


def _bracketed(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
