"""One question about policies, answered: does this flow pass, and who decided. Pure.

    Question ──▶ Service translation, where one is asked ──▶ a Leg an endpoint and family: both sides of `judge`

Allowed means that every leg passes: of a Service with three endpoints, one of which is closed to the client, every
third connection hangs.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kube_proxy_lite.model import Address, Source, Verdict
from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.model import BlockSet, Flow, Judgement, Ruling
from podwire.explain.cluster import Cluster, NoSuchPlace, Place, PlaceKind, PortWish, Translation


class Leg(msgspec.Struct, frozen=True, kw_only=True):
    """One way that a connection may take, and what policies make of it. `name` is who is at its end."""

    flow: Flow
    name: str
    judgement: Judgement


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the flow. `trouble` is why there is no way at all, whatever policies say; empty when there is."""

    source: Place
    target: Place
    wish: PortWish
    legs: tuple[Leg, ...] = ()
    translations: tuple[Translation, ...] = ()
    trouble: str = ""

    @property
    def allowed(self) -> bool:
        """Whether every way passes, and there is one."""
        return bool(self.legs) and not self.trouble and all(leg.judgement.allowed for leg in self.legs)


def ask(cluster: Cluster, source: Place, target: Place, wish: PortWish) -> Answer:
    """The answer to one question. Raises NoSuchPlace for a port that there is not, or addresses that cannot meet."""
    if not source.addresses:
        raise NoSuchPlace(f"{source.name} has no address (yet, or any more)")
    if target.kind is PlaceKind.SERVICE:
        return _ask_service(cluster, source, target, wish)
    if not target.addresses:
        raise NoSuchPlace(f"{target.name} has no address (yet, or any more)")
    protocol, port = cluster.port_of(target, wish)
    pairs = [(own, there) for there in target.addresses if (own := source.of(there.version)) is not None]
    if not pairs:
        raise NoSuchPlace(f"{source} and {target} have no family in common")
    legs = tuple(_leg(cluster, own, there, protocol, port, target.name) for own, there in pairs)
    return Answer(source=source, target=target, wish=wish, legs=legs)


def _ask_service(cluster: Cluster, source: Place, target: Place, wish: PortWish) -> Answer:
    translations = tuple(cluster.translate_service(target, wish, source, kind_of(source)))
    legs = []
    for each in translations:
        for backend in each.decision.backends:
            own = source.of(backend.address.version)
            if own is None:
                continue
            protocol = each.plan.key.protocol if each.plan else wish.protocol or "TCP"
            owner = cluster.policies.owner(backend.address)
            name = f"{owner.namespace}/{owner.name}" if owner else str(backend.address)
            legs.append(_leg(cluster, own, backend.address, protocol, backend.port, name))
    return Answer(
        source=source,
        target=target,
        wish=wish,
        legs=tuple(legs),
        translations=translations,
        trouble=trouble_of(target, translations),
    )


def kind_of(place: Place) -> Source:
    """As what a Service sees who asks."""
    if place.on_host:
        return Source.NODE
    return Source.POD if place.kind is PlaceKind.POD else Source.EXTERNAL


def trouble_of(target: Place, translations: tuple[Translation, ...]) -> str:
    """Why a Service answers nobody, in words; empty when it does."""
    if not translations:
        return f"Service {target.name} has no address of a family that the client has, or none at all (ExternalName)"
    for each in translations:
        if each.decision.verdict is Verdict.FORWARD:
            continue
        unused = ", ".join(f"{address} {why}" for address, why in each.listed if why)
        if each.decision.verdict is Verdict.DROP:
            return f"Service {target.name} drops it: its traffic policy, or its source ranges, allow no endpoint here"
        return f"Service {target.name} has no endpoint" + (
            f" that is ready: {unused}" if unused else ": none is selected"
        )
    return ""


def _leg(cluster: Cluster, source: Address, destination: Address, protocol: str, port: int, name: str) -> Leg:
    flow = Flow(source=source, destination=destination, protocol=protocol, port=port)
    return Leg(flow=flow, name=name, judgement=judge(cluster.policies, flow, cluster.node_addresses))


# --- for people and programs --------------------------------------------------------------------------------------


def describe(cluster: Cluster, answer: Answer) -> list[str]:
    """The answer as lines. Legs that say the same are said once."""
    verdict = "allowed" if answer.allowed else "denied"
    lines = [f"{verdict}  {answer.wish} from {answer.source} to {answer.target}"]
    if answer.trouble:
        lines.append(f"  {answer.trouble}")
    for each in answer.translations:
        shown = ", ".join(f"{backend.address}:{backend.port}" for backend in each.decision.backends) or "nobody"
        lines.append(f"  Service  {each.address or 'headless'} port {each.port} is {shown}")
    told: dict[tuple[str, ...], list[Leg]] = {}
    for leg in answer.legs:
        told.setdefault(tuple(_said(cluster, leg)), []).append(leg)
    for said, legs in told.items():
        if len(told) > 1 or answer.translations:
            ends = ", ".join(f"{leg.name} {leg.flow.destination} port {leg.flow.port}" for leg in legs)
            lines.append(f"  to {ends}")
        lines += [f"    {each}" if answer.translations or len(told) > 1 else f"  {each}" for each in said]
    lines += [f"  note: {each}" for each in cluster.problems()]
    ends_of_legs = {end for leg in answer.legs for end in (leg.flow.source, leg.flow.destination)}
    if cluster.objects.invented & ends_of_legs and any(isinstance(fact, BlockSet) for fact in cluster.policies.state()):
        lines.append(
            "  note: pods without an address in the manifests were given one, which counts where an ipBlock does"
        )
    return lines


def _said(cluster: Cluster, leg: Leg) -> list[str]:
    sides = ((leg.flow.source, leg.judgement.egress), (leg.flow.destination, leg.judgement.ingress))
    return [
        f"{side.direction.value:<7}  {'allowed' if side.allowed else 'denied '}  {why_of(cluster, end, side)}"
        for end, side in sides
    ]


def why_of(cluster: Cluster, end: Address, side: Ruling) -> str:
    """Why a side says what it says; an end that is no pod has no policies."""
    if cluster.policies.owner(end) is None and side.allowed:
        node = cluster.node_addresses.get(end)
        return (
            f"{end} is node {node}, which no policy isolates" if node else f"{end} is no pod, so no policy isolates it"
        )
    return side.why


def plain(cluster: Cluster, answer: Answer) -> dict[str, Any]:
    """The answer as JSON has it; the keys are stable."""
    return {
        "allowed": answer.allowed,
        "from": plain_place(answer.source),
        "to": plain_place(answer.target),
        "port": str(answer.wish),
        "trouble": answer.trouble,
        "services": [
            {
                "service": "/".join(each.service),
                "address": str(each.address) if each.address else "",
                "port": each.port,
                "verdict": each.decision.verdict.value,
                "masquerade": each.decision.masquerade,
                "endpoints": [f"{_host(one.address)}:{one.port}" for one in each.decision.backends],
            }
            for each in answer.translations
        ],
        "flows": [
            {
                "source": str(leg.flow.source),
                "destination": str(leg.flow.destination),
                "protocol": str(leg.flow.protocol),
                "port": leg.flow.port,
                "name": leg.name,
                "allowed": leg.judgement.allowed,
                "egress": plain_ruling(leg.judgement.egress),
                "ingress": plain_ruling(leg.judgement.ingress),
            }
            for leg in answer.legs
        ],
        "problems": list(cluster.problems()),
    }


def plain_place(place: Place) -> dict[str, Any]:
    """An end as JSON has it."""
    return {"kind": place.kind.value, "name": place.name, "addresses": [str(each) for each in place.addresses]}


def plain_ruling(ruling: Ruling) -> dict[str, Any]:
    """One side as JSON has it; `rule` counts from 1."""
    rule = ruling.rule
    return {
        "allowed": ruling.allowed,
        "why": ruling.why,
        "rule": None if rule is None else {"policy": str(rule), "number": rule.index + 1},
        "policies": [str(each) for each in ruling.policies],
    }


def _host(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
