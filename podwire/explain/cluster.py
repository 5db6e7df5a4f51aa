"""A cluster that can be asked: places by their names, Services by their addresses, policies by flows. Pure.

words ──▶ Place       NS/POD · NS/SERVICE · ADDRESS; pod/NS/NAME and svc/NS/NAME where a name is both
Place, port ──▶ Target      the flow's protocol and port, and the Service's endpoints where there is one
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from kube_proxy_lite.model import (
    Address,
    Backend,
    Decision,
    Frontend,
    FrontendKind,
    Network,
    PortPlan,
    Protocol,
    Settings,
    Source,
    Verdict,
    decide,
    is_allowed,
)
from kube_proxy_lite.policy.pods import PodFacts
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.services import Services
from podwire.errors import PodwireError
from podwire.explain.objects import Objects
from podwire.kube.objects import HEADLESS_LABEL, PROXY_NAME_LABEL, EndpointSlice, Pod, Service

Key = tuple[str, str]
EVERYWHERE: tuple[Network, ...] = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
_NAMED_AT_ONCE = 8


class NoSuchPlace(PodwireError):
    """Words that name nothing in the cluster, or two things; the message says what they may have meant."""


class PlaceKind(StrEnum):
    """What sort of thing a place is."""

    POD = "pod"
    SERVICE = "service"
    NODE = "node"
    ADDRESS = "address"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """An end of a flow. `key` is (namespace, name) of a pod or Service; `node` where it is, empty when not known.

    A pod on its node's network is one of kind POD with the node's addresses; `on_host` says so.
    """

    kind: PlaceKind
    name: str
    addresses: tuple[Address, ...] = ()
    key: Key = ("", "")
    node: str = ""
    on_host: bool = False

    def of(self, version: int) -> Address | None:
        """Its address of a family."""
        return next((each for each in self.addresses if each.version == version), None)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.addresses))
        return self.name if shown in ("", self.name) else f"{self.name} ({shown})"


class PortWish(msgspec.Struct, frozen=True, kw_only=True):
    """A port as it was asked for: its number, or its name and 0. `protocol` is empty when it was not said."""

    number: int = 0
    name: str = ""
    protocol: str = ""

    def __str__(self) -> str:
        return f"{self.name or self.number}/{self.protocol or 'TCP'}"


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """What a Service makes of a connection: which port of it was asked for at which address, and what was decided.

    `headless`: there is no address to ask; clients find the endpoints by name. `listed` are the endpoints that the
    slices have, and why each is not used, empty for those that may be.
    """

    service: Key
    address: Address | None
    port: int
    plan: PortPlan | None
    frontend: Frontend | None
    decision: Decision
    headless: bool = False
    listed: tuple[tuple[Address, str], ...] = ()


def read_port(text: str) -> PortWish:
    """A port of the command line: 80, 80/UDP, http, http/tcp. Raises PodwireError."""
    which, _, protocol = text.partition("/")
    protocol = protocol.upper()
    if protocol not in ("", *Protocol.__members__) or not which:
        raise PodwireError(f"port {text!r}: expected a number or a name, and TCP, UDP or SCTP: 80, 53/UDP, http")
    if not which.isdigit():
        return PortWish(name=which, protocol=protocol)
    if not 1 <= int(which) <= 65535:
        raise PodwireError(f"port {text!r}: expected a number from 1 to 65535")
    return PortWish(number=int(which), protocol=protocol)


class Cluster:
    """Everything that policies and Services say, as `node` sees it (empty: as no node in particular does)."""

    def __init__(self, objects: Objects, node: str = "") -> None:
        self.objects = objects
        self.policies = Policies(None)
        self.services = Services(Settings(node=node, cluster_cidrs=EVERYWHERE))
        self.node_addresses: dict[Address, str] = {}
        """Address → node, for who is a node to whom."""
        self._pods: dict[Key, Pod] = {each.key: each for each in objects.pods}
        self._services: dict[Key, Service] = {each.key: each for each in objects.services}
        self._fill()

    def _fill(self) -> None:
        objects = self.objects
        for namespace in objects.namespaces:
            self.policies.set_namespace(namespace)
        for pod in objects.pods:
            self.policies.set_pod(pod)
            if pod.spec.host_network and pod.spec.node_name:
                self._note_node(pod.spec.node_name, (each.ip for each in pod.status.pod_ips or ()))
        for policy in objects.policies:
            self.policies.set_policy(policy)
        for node in objects.nodes:
            self.services.set_node(node)
            addresses = node.status.addresses or ()
            self._note_node(node.metadata.name, (each.address for each in addresses if each.type == "InternalIP"))
        for service in objects.services:
            if PROXY_NAME_LABEL not in (service.metadata.labels or {}):
                self.services.set_service(service)
        for each in objects.slices:
            if not {PROXY_NAME_LABEL, HEADLESS_LABEL} & (each.metadata.labels or {}).keys():
                self.services.set_slice(each)

    def _note_node(self, name: str, texts: Iterable[str]) -> None:
        for text in texts:
            address = _address(text)
            if address is not None:
                self.node_addresses[address] = name

    def problems(self) -> tuple[str, ...]:
        """What could not be understood: objects left out, then policies by name, then Services."""
        policies = [
            f"NetworkPolicy {namespace}/{name}: {problem}"
            for (namespace, name), found in sorted(self.policies.problems().items())
            for problem in found
        ]
        return (*self.objects.problems, *policies, *map(str, self.services.problems()))

    # --- places

    def pods(self) -> list[PodFacts]:
        """The pods that have a part in the network, by name."""
        return sorted(self.policies.pods(), key=lambda pod: (pod.namespace, pod.name))

    def pod(self, key: Key) -> Pod | None:
        """The pod's object."""
        return self._pods.get(key)

    def service(self, key: Key) -> Service | None:
        """The Service's object."""
        return self._services.get(key)

    def slices(self, key: Key) -> list[EndpointSlice]:
        """The EndpointSlices of a Service."""
        return [each for each in self.objects.slices if each.service == key]

    def place(self, words: str, namespace: str = "default", *, source: bool = False) -> Place:
        """What `words` name; `source` when it is where a flow begins, which no Service does. Raises NoSuchPlace."""
        address = _address(words)
        if address is not None:
            return self._at(address, source=source)
        kind, key = _read_words(words, namespace)
        found = []
        if kind in ("", "pod") and key in self._pods:
            found.append(self._pod_place(self._pods[key]))
        if kind in ("", "svc") and not source and key in self._services:
            found.append(_service_place(self._services[key]))
        if len(found) > 1:
            name = "/".join(key)
            raise NoSuchPlace(f"{words}: there are a pod and a Service of that name; say pod/{name} or svc/{name}")
        if not found and kind in ("", "pod"):  # a workload stands for its first pod
            found += [
                self._pod_place(pod) for number in (0, 1) if (pod := self._pods.get((key[0], f"{key[1]}-{number}")))
            ]
        if not found:
            raise NoSuchPlace(f"{words}: there is no such pod{'' if source else ' or Service'}; {self._names(key[0])}")
        return found[0]

    def _names(self, namespace: str) -> str:
        pods = sorted(name for home, name in self._pods if home == namespace)
        if not pods:
            homes = sorted({home for home, _ in self._pods})
            return f"namespace {namespace} has none; there are pods in {', '.join(homes) or 'no namespace'}"
        rest = f" and {len(pods) - _NAMED_AT_ONCE} more" if len(pods) > _NAMED_AT_ONCE else ""
        return f"pods of {namespace}: {', '.join(pods[:_NAMED_AT_ONCE])}{rest}"

    def _at(self, address: Address, *, source: bool) -> Place:
        """Whose an address is: a pod's, a Service's, a node's, or anybody's."""
        owner = self.policies.owner(address)
        if owner is not None:
            pod = self._pods[owner.namespace, owner.name]
            return msgspec.structs.replace(self._pod_place(pod), addresses=(address,))
        for service in () if source else self._services.values():
            place = _service_place(service)
            if address in place.addresses:
                return msgspec.structs.replace(place, addresses=(address,))
        node = self.node_addresses.get(address, "")
        if node:
            return Place(kind=PlaceKind.NODE, name=node, addresses=(address,), node=node, on_host=True)
        return Place(kind=PlaceKind.ADDRESS, name=str(address), addresses=(address,))

    def _pod_place(self, pod: Pod) -> Place:
        facts = self.policies.pod(pod.key)
        texts = {each.ip for each in pod.status.pod_ips or ()} | {pod.status.pod_ip}
        own = tuple(each for text in sorted(texts) if (each := _address(text)) is not None)
        return Place(
            kind=PlaceKind.POD,
            name="/".join(pod.key),
            addresses=_v4_first(self.policies.addresses(facts) if facts else own),
            key=pod.key,
            node=pod.spec.node_name,
            on_host=pod.spec.host_network,
        )

    # --- ports and Services

    def port_of(self, place: Place, wish: PortWish) -> tuple[Protocol, int]:
        """The protocol and number that are meant at a pod or an address. Raises NoSuchPlace for a name it lacks."""
        if wish.number:
            return Protocol(wish.protocol or "TCP"), wish.number
        pod = self._pods.get(place.key) if place.kind is PlaceKind.POD else None
        containers = [] if pod is None else [*(pod.spec.containers or ()), *(pod.spec.init_containers or ())]
        named = [port for container in containers for port in container.ports or () if port.name]
        for port in named:
            if port.name == wish.name and wish.protocol in ("", port.protocol):
                return Protocol(port.protocol), port.container_port
        known = ", ".join(sorted({f"{port.name}/{port.protocol}" for port in named})) or "none"
        raise NoSuchPlace(f"{place.name} has no port named {wish}; its named ports: {known}")

    def translate(
        self, address: Address, protocol: str, port: int, client: Address, source: Source
    ) -> Translation | None:
        """What Services make of a connection to an address; None when it is no Service's."""
        for plan in self.services.plans():
            if plan.key.protocol != protocol or plan.key.version != address.version:
                continue
            for frontend in plan.frontends:
                at_node = frontend.kind is FrontendKind.NODE_PORT and address in self.node_addresses
                if frontend.port == port and (frontend.address == address or at_node):
                    return self._translation(plan, frontend, address, client, source)
        return None

    def _translation(
        self, plan: PortPlan, frontend: Frontend, address: Address, client: Address, source: Source
    ) -> Translation:
        decision = decide(plan, frontend, source, self.services.settings)
        if not is_allowed(frontend, client):
            decision = Decision(verdict=Verdict.DROP)
        key = plan.key.namespace, plan.key.service
        return Translation(
            service=key,
            address=address,
            port=frontend.port,
            plan=plan,
            frontend=frontend,
            decision=decision,
            listed=self._listed(key, address.version, decision.backends),
        )

    def translate_service(self, place: Place, wish: PortWish, client: Place, source: Source) -> list[Translation]:
        """What becomes of connections to a Service: one a family that client and Service have. By its name a Service is
        asked for at its ClusterIPs, as DNS says it; by another address of it at that. Raises NoSuchPlace."""
        service = self._services[place.key]
        ports = [
            port
            for port in service.spec.ports or ()
            if (port.name == wish.name if wish.name else port.port == wish.number)
            and wish.protocol in ("", port.protocol)
        ]
        if service.spec.cluster_ip == "None":
            number = wish.number or (ports[0].port if ports else 0)
            return self._headless(place, number, wish, client)
        if not ports:
            known = (
                ", ".join(f"{each.name or each.port}/{each.protocol}" for each in service.spec.ports or ()) or "none"
            )
            raise NoSuchPlace(f"Service {place.name} has no port {wish}; its ports: {known}")
        found = []
        cluster_ips = {_address(text) for text in service.spec.cluster_ips or (service.spec.cluster_ip,)}
        for address in [each for each in place.addresses if each in cluster_ips] or place.addresses:
            own = client.of(address.version)
            if own is not None:
                made = self.translate(address, ports[0].protocol, ports[0].port, own, source)
                if made is not None:
                    found.append(made)
        return found

    def _headless(self, place: Place, number: int, wish: PortWish, client: Place) -> list[Translation]:
        """A Service without an address: its name stands for its endpoints, and no port is translated."""
        found = []
        for version in dict.fromkeys(each.version for each in client.addresses):
            listed = self._listed(place.key, version, None)
            backends = []
            for each in self.slices(place.key):
                named = [port.port for port in each.ports or () if wish.name and port.name == wish.name and port.port]
                for address, why in listed:
                    if not why and any(str(address) in endpoint.addresses for endpoint in each.endpoints or ()):
                        backends.append(Backend(address, named[0] if named else number))
            verdict = Verdict.FORWARD if backends else Verdict.REFUSE
            if backends or listed or version == 4:
                found.append(
                    Translation(
                        service=place.key,
                        address=None,
                        port=number,
                        plan=None,
                        frontend=None,
                        decision=Decision(verdict=verdict, backends=tuple(sorted(backends))),
                        headless=True,
                        listed=listed,
                    )
                )
        return found

    def _listed(self, key: Key, version: int, used: Iterable[Backend] | None) -> tuple[tuple[Address, str], ...]:
        """The endpoints that the slices list in a family, each with why it is not used."""
        chosen = None if used is None else {each.address for each in used}
        found: dict[Address, str] = {}
        for each in self.slices(key):
            for endpoint in each.endpoints or ():
                address = _address(endpoint.addresses[0]) if endpoint.addresses else None
                if address is None or address.version != version:
                    continue
                conditions = endpoint.conditions
                why = (
                    "is terminating" if conditions.terminating else "is not ready" if conditions.ready is False else ""
                )
                if chosen is not None and address in chosen:
                    why = ""
                elif chosen is not None and not why:
                    why = "is not for this node"
                found[address] = why
        return tuple(sorted(found.items(), key=lambda item: int(item[0])))


def _read_words(words: str, namespace: str) -> tuple[str, Key]:
    """The kind that is asked for (empty: any) and the key."""
    parts = words.split("/")
    kinds = {"pod": "pod", "pods": "pod", "po": "pod", "svc": "svc", "service": "svc", "services": "svc"}
    kind = (
        kinds[parts.pop(0)] if len(parts) > 1 and parts[0] in kinds and (len(parts) == 3 or parts[0] != "pod") else ""
    )
    if not 1 <= len(parts) <= 2 or not all(parts):
        raise NoSuchPlace(f"{words!r}: expected NAMESPACE/NAME, pod/NAMESPACE/NAME, svc/NAMESPACE/NAME or an address")
    return kind, ((namespace, parts[0]) if len(parts) == 1 else (parts[0], parts[1]))


def _service_place(service: Service) -> Place:
    spec = service.spec
    ingress = service.status.load_balancer.ingress or () if service.status.load_balancer else ()
    texts = [*(spec.cluster_ips or (spec.cluster_ip,)), *(spec.external_ips or ()), *(each.ip for each in ingress)]
    addresses = dict.fromkeys(each for text in texts if (each := _address(text)) is not None)
    return Place(kind=PlaceKind.SERVICE, name="/".join(service.key), addresses=tuple(addresses), key=service.key)


def _v4_first(addresses: Iterable[Address]) -> tuple[Address, ...]:
    return tuple(sorted(addresses, key=lambda each: (each.version, int(each))))


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
