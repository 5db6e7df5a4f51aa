"""What NetworkPolicies mean, worked out the slow way: every policy, every rule, every peer, for one packet.

It reads the manifests themselves, as plain dicts, and shares no code with what it judges. The words of
networking.k8s.io/v1 are followed literally, one function a sentence; nothing is indexed, compiled or remembered.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

Manifest = dict[str, Any]


class World:
    """The objects of a cluster, by kind and (namespace, name)."""

    def __init__(self, objects: Iterable[Manifest] = ()) -> None:
        self.objects: dict[tuple[str, str, str], Manifest] = {}
        for each in objects:
            self.put(each)

    def put(self, manifest: Manifest) -> None:
        meta = manifest["metadata"]
        self.objects[manifest["kind"], meta.get("namespace", ""), meta["name"]] = manifest

    def remove(self, kind: str, namespace: str, name: str) -> None:
        self.objects.pop((kind, namespace, name), None)

    def of_kind(self, kind: str) -> list[Manifest]:
        return [each for (found, _, _), each in self.objects.items() if found == kind]

    def pod_at(self, address: str) -> Manifest | None:
        """The pod that has an address: of several that say so, the one created last."""
        claiming = [pod for pod in self.of_kind("Pod") if _takes_part(pod) and address in _addresses(pod)]
        claiming.sort(key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"].get("uid", "")))
        return claiming[-1] if claiming else None

    def namespace_labels(self, name: str) -> dict[str, str] | None:
        found = self.objects.get(("Namespace", "", name))
        return None if found is None else found["metadata"].get("labels") or {}

    def allows(self, source: str, destination: str, protocol: str, port: int) -> bool:
        """Whether a new connection between two addresses passes."""
        if source == destination:
            return True
        sender, receiver = self.pod_at(source), self.pod_at(destination)
        out = sender is None or self._lets(sender, "Egress", destination, receiver, receiver, protocol, port)
        return out and (receiver is None or self._lets(receiver, "Ingress", source, sender, receiver, protocol, port))

    def _lets(
        self,
        subject: Manifest,
        kind: str,
        address: str,
        peer: Manifest | None,
        named: Manifest | None,
        protocol: str,
        port: int,
    ) -> bool:
        """One side: `named` is the pod whose containers say what a port's name means."""
        isolating = [policy for policy in self.of_kind("NetworkPolicy") if _isolates(policy, subject, kind)]
        if not isolating:
            return True
        for policy in isolating:
            for rule in policy["spec"].get(kind.lower()) or ():
                peers, ports = rule.get("from" if kind == "Ingress" else "to") or (None,), rule.get("ports")
                home = policy["metadata"]["namespace"]
                for each in peers:
                    # A port's name is a pod's; where addresses are meant there is no pod to ask for it.
                    names = None if kind == "Egress" and each and each.get("ipBlock") else named
                    if (each is None or self._is_peer(each, home, address, peer)) and (
                        not ports or any(_is_port(item, names, protocol, port) for item in ports)
                    ):
                        return True
        return False

    def _is_peer(self, item: Manifest, home: str, address: str, pod: Manifest | None) -> bool:
        block = item.get("ipBlock")
        if block is not None:
            there = ipaddress.ip_address(address)
            return there in ipaddress.ip_network(block["cidr"]) and not any(
                there in ipaddress.ip_network(each) for each in block.get("except") or ()
            )
        if pod is None:
            return False
        namespace = pod["metadata"]["namespace"]
        if item.get("namespaceSelector") is None:
            right_namespace = namespace == home
        else:
            labels = self.namespace_labels(namespace)
            right_namespace = labels is not None and _selects(item["namespaceSelector"], labels)
        return right_namespace and _selects(item.get("podSelector") or {}, pod["metadata"].get("labels") or {})


def _takes_part(pod: Manifest) -> bool:
    ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return not ended and not pod.get("spec", {}).get("hostNetwork")


def _addresses(pod: Manifest) -> list[str]:
    return [each["ip"] for each in pod.get("status", {}).get("podIPs") or ()]


def _isolates(policy: Manifest, pod: Manifest, kind: str) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    return (
        kind in types
        and policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
        and _selects(spec.get("podSelector") or {}, pod["metadata"].get("labels") or {})
    )


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions") or ():
        there, value = each["key"] in labels, labels.get(each["key"])
        holds = {
            "In": there and value in (each.get("values") or ()),
            "NotIn": not there or value not in (each.get("values") or ()),
            "Exists": there,
            "DoesNotExist": not there,
        }[each["operator"]]
        if not holds:
            return False
    return True


def _is_port(item: Manifest, named: Manifest | None, protocol: str, port: int) -> bool:
    if item.get("protocol", "TCP") != protocol:
        return False
    wanted = item.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, int):
        return bool(wanted <= port <= item.get("endPort", wanted))
    containers = (named or {}).get("spec", {}).get("containers") or ()
    return any(
        each.get("name") == wanted and each.get("protocol", "TCP") == protocol and each["containerPort"] == port
        for container in containers
        for each in container.get("ports") or ()
    )
