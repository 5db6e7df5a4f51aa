"""A side of policies on the way: what was judged, and whether the kernel of the pod's node has the same in it. Pure.

    judge ──▶ allowed or denied, by whom
    kernel ──▶ the address is a known pod's (known4) · it is sent through the class that the API's policies make
               · the peer is in the set of the rule that allows it

Of nftables it is asked element by element, of iptables by `iptables-save -t mangle` and `ipset test`.
"""

from __future__ import annotations

import re

import msgspec

from kube_proxy_lite.model import Address
from kube_proxy_lite.policy.model import Direction, Flow, Member, PolicyClass, PortedPodSet, Ruling
from kube_proxy_lite.policy.pods import PodFacts
from kube_proxy_lite.render.policy_iptables_rules import ROOT, chain_of, set_of
from kube_proxy_lite.render.policy_nftables import TABLE
from kube_proxy_lite.render.policy_sets import class_name, set_name
from podwire.explain.cluster import Cluster
from podwire.explain.hops import Ask, Finding, Hop, Reading, State, Steps, Where, fails, ok, unseen, warns
from podwire.explain.verdict import why_of

_TABLE = TABLE.split()
_PROXY = "see `podwire status` on {node}: podwire-proxy does not run there, or lags behind; its log says why"
_NFT_GOTO = re.compile(r": goto ([a-z0-9_]+)")
_SAVE = {4: "iptables-save", 6: "ip6tables-save"}
_SELF = {Direction.INGRESS: "-d", Direction.EGRESS: "-s"}


class _Subject(msgspec.Struct, frozen=True, kw_only=True):
    """The pod whose side is looked at, and on which node; `by_nft` says how policies are enforced there."""

    end: Address
    direction: Direction
    here: Where
    by_nft: bool = True

    @property
    def fix(self) -> str:
        return _PROXY.format(node=self.here.node)


def side(cluster: Cluster, flow: Flow, ruling: Ruling) -> Steps[Hop]:
    """One side of a flow; an end that is no pod has nothing to say."""
    way = ruling.direction
    end = flow.source if way is Direction.EGRESS else flow.destination
    pod = cluster.policies.owner(end)
    findings = [_judged(cluster, ruling, end, pod)]
    if pod is not None:
        found = yield from _in_kernel(cluster, flow, ruling, end, pod)
        # what is denied is denied by the policy; that the kernel is not there yet comes second
        findings += [each for each in found if each.state is not State.FAILS or ruling.allowed]
    return Hop(title=f"{way.value} policy", where=pod.node if pod else "", findings=tuple(findings))


def _judged(cluster: Cluster, ruling: Ruling, end: Address, pod: PodFacts | None) -> Finding:
    why = why_of(cluster, end, ruling)
    if ruling.allowed or pod is None:
        return ok(why)
    names = ", ".join(map(str, ruling.policies))
    other = "to" if ruling.direction is Direction.EGRESS else "from"
    fix = f"add a rule, to {names} or to another policy, that allows it {other} the other end (`podwire policy test`)"
    return fails(f"a policy denies it: {why}", fix)


def _in_kernel(cluster: Cluster, flow: Flow, ruling: Ruling, end: Address, pod: PodFacts) -> Steps[list[Finding]]:
    subject = _Subject(end=end, direction=ruling.direction, here=Where(pod.node))
    found: PolicyClass | None = cluster.policies.classes(pod).get(ruling.direction)
    tables = yield Ask(subject.here, ("nft", "list", "tables", _TABLE[0]))
    if not tables.seen:
        return [unseen("what the kernel has of it", tables)] if cluster.policies.any else []
    if _TABLE[1] not in tables.text.split():
        saved = yield Ask(subject.here, (_SAVE[end.version], "-t", "mangle"))
        if f":{ROOT} " not in saved.text:
            text = f"policies are not in effect on {pod.node}: there is neither a table {TABLE} nor a chain {ROOT}"
            return [warns(text, subject.fix, tables)] if cluster.policies.any else []
        subject = msgspec.structs.replace(subject, by_nft=False)
    unknown = yield from _unknown(subject)
    if unknown is not None:
        return [unknown]
    chain, reading = yield from _class(subject)
    return (yield from _compared(cluster, subject, flow, ruling, found, chain, reading))


def _compared(
    cluster: Cluster,
    subject: _Subject,
    flow: Flow,
    ruling: Ruling,
    found: PolicyClass | None,
    chain: str,
    reading: Reading,
) -> Steps[list[Finding]]:
    """The class that the kernel has for an address beside the one that policies make."""
    node, end = subject.here.node, subject.end
    wanted = "" if found is None else class_name(found) if subject.by_nft else chain_of(class_name(found))
    if chain == wanted:
        findings = [ok(f"the kernel sends it through {chain}" if chain else "the kernel does not filter it", reading)]
        if found is not None and ruling.rule is not None:
            findings += yield from _member(cluster, subject, found, flow, ruling)
        return findings
    if wanted and not chain:
        text = (
            f"the kernel of {node} does not isolate {end} for {subject.direction}, and policies do: nothing is denied"
        )
        return [warns(text, subject.fix, reading)]
    if chain and not wanted:
        text = f"the kernel of {node} still isolates {end} by {chain}, and no policy does any more"
        return [fails(text, subject.fix, reading)]
    return [warns(f"the kernel of {node} has {chain} for {end}, where policies make {wanted}", subject.fix, reading)]


def _class(subject: _Subject) -> Steps[tuple[str, Reading]]:
    """The chain that the kernel sends the address through; empty when it does not filter it."""
    end, way = subject.end, subject.direction
    if subject.by_nft:
        reading = yield _element(subject, f"{way.value}{end.version}", end)
        match = _NFT_GOTO.search(reading.text)
        return (match[1] if match else ""), reading
    reading = yield Ask(subject.here, (_SAVE[end.version], "-t", "mangle"))
    place, target = (
        f"{_SELF[way]} {end}/{end.max_prefixlen} ",
        f"-g {chain_of('eg_' if way is Direction.EGRESS else 'in_')}",
    )
    for line in reading.text.splitlines():
        if place in line and target in line:
            return line.rpartition("-g ")[2].strip(), reading
    return "", reading


def _unknown(subject: _Subject) -> Steps[Finding | None]:
    """Whether the address is closed because nobody knows its pod; None when it is not."""
    known = yield _element(subject, f"known{subject.end.version}", subject.end)
    if known.well:
        return None
    local = yield _element(subject, f"local{subject.end.version}", subject.end)
    if not local.well:
        return None
    text = f"{subject.end} is closed: the proxy of {subject.here.node} knows no pod with it yet, and drops its packets"
    return fails(text, subject.fix, known)


def _member(
    cluster: Cluster, subject: _Subject, found: PolicyClass, flow: Flow, ruling: Ruling
) -> Steps[list[Finding]]:
    """The rule that allows it has the peer in its set."""
    peer = flow.source if found.direction is Direction.INGRESS else flow.destination
    for rule in found.rules:
        member: Member = (peer, flow.port) if isinstance(rule.peers, PortedPodSet) else peer
        if rule.origin != ruling.rule or rule.peers is None or not cluster.policies.has(rule.peers, member):
            continue
        name = set_name(rule.peers, peer.version)
        reading = yield _element(subject, name, member, flow.protocol)
        if reading.well:
            return [ok(f"{peer} is in the rule's set {name}", reading)]
        text = f"{peer} is not in set {name} of the rule that allows it: the kernel drops it"
        return [fails(text, subject.fix, reading)]
    return []


def _element(subject: _Subject, name: str, member: Member, protocol: str = "") -> Ask:
    """Asks whether a set or map has a member."""
    if subject.by_nft:
        key = f"{member[0]} . {member[1]}" if isinstance(member, tuple) else str(member)
        return Ask(subject.here, ("nft", "get", "element", *_TABLE, name, f"{{ {key} }}"))
    key = f"{member[0]},{protocol.lower()}:{member[1]}" if isinstance(member, tuple) else str(member)
    return Ask(subject.here, ("ipset", "test", set_of(name), key))
