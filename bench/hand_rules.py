"""Rules as others lay them out, by hand: what Services and policies cost with a chain or a rule for each. Pure.

`chains`: Services in nftables with a chain per Service and one per endpoint, found by a verdict map, as kube-proxy has
them in its nftables mode. `flat`: Services in iptables as kube-proxy has them there, one list of all Services.
`linear`: policies in nftables as a list of pods that each packet passes, with a chain per pod and one per policy, as
agents have them that write a rule per pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bench.objects import PODS, PORT, TARGET_PORT, cluster_ip, pod_address

TABLE = "ip hand"
Endpoints = Sequence[int]

# --- Services, a chain each in nftables -------------------------------------------------------------------------------


def chains(services: Sequence[Endpoints]) -> str:
    """A script for nft that loads Services with these endpoints, numbered from 0."""
    lines = [
        f"add table {TABLE}",
        f"add map {TABLE} service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}",
        f"add chain {TABLE} mark-for-masquerade",
        f"add rule {TABLE} mark-for-masquerade mark set mark or 0x4000",
        f"add chain {TABLE} services",
        f"add rule {TABLE} services ip daddr . meta l4proto . th dport vmap @service-ips",
        f"add chain {TABLE} prerouting {{ type nat hook prerouting priority dstnat; }}",
        f"add rule {TABLE} prerouting jump services",
        f"add chain {TABLE} postrouting {{ type nat hook postrouting priority srcnat; }}",
        f"add rule {TABLE} postrouting mark and 0x4000 != 0 masquerade fully-random",
    ]
    for number, endpoints in enumerate(services):
        lines += (f"add chain {TABLE} {_endpoint(number, each)}" for each in endpoints)
        lines += (f"add chain {TABLE} {_service(number)}", *_service_rules(number, endpoints))
        for each in endpoints:
            lines += _endpoint_rules(number, each)
    elements = (f"{cluster_ip(number)} . tcp . {PORT} : goto {_service(number)}" for number in range(len(services)))
    lines += (f"add element {TABLE} service-ips {{ {', '.join(elements)} }}",)
    return "\n".join(lines) + "\n"


def chains_changed(number: int, before: Endpoints, now: Endpoints) -> str:
    """A script that gives a Service other endpoints."""
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    lines = [f"add chain {TABLE} {_endpoint(number, each)}" for each in new]
    for each in new:
        lines += _endpoint_rules(number, each)
    lines += [f"flush chain {TABLE} {_service(number)}", *_service_rules(number, now)]
    for each in gone:
        lines += (
            f"{verb} chain {TABLE} {_endpoint(number, each)}" for verb in ("flush", "delete")
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _service(number: int) -> str:
    return f"service-{number:05}"


def _endpoint(number: int, pod: int) -> str:
    return f"endpoint-{number:05}-{pod}"


def _service_rules(number: int, endpoints: Endpoints) -> Iterator[str]:
    yield (
        f"add rule {TABLE} {_service(number)} ip daddr {cluster_ip(number)} tcp dport {PORT} "
        f"ip saddr != {PODS} jump mark-for-masquerade"
    )
    targets = ", ".join(f"{place} : goto {_endpoint(number, each)}" for place, each in enumerate(endpoints))
    yield f"add rule {TABLE} {_service(number)} numgen random mod {len(endpoints)} vmap {{ {targets} }}"


def _endpoint_rules(number: int, pod: int) -> Iterator[str]:
    chain, address = _endpoint(number, pod), pod_address(pod)
    yield f"add rule {TABLE} {chain} ip saddr {address} jump mark-for-masquerade"
    yield f"add rule {TABLE} {chain} meta l4proto tcp dnat to {address}:{TARGET_PORT}"


# --- Services, a list in iptables -------------------------------------------------------------------------------------


def flat(services: Sequence[Endpoints]) -> str:
    """Input for iptables-restore that loads Services with these endpoints."""
    names = [name for number, each in enumerate(services) for name in (_svc(number), *_seps(number, each))]
    lines = [f":{name} - [0:0]" for name in ("KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-POSTROUTING", *names)]
    lines += (
        "-A PREROUTING -j KUBE-SERVICES",
        "-A OUTPUT -j KUBE-SERVICES",
        "-A POSTROUTING -j KUBE-POSTROUTING",
        "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
        "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
    )
    for number, endpoints in enumerate(services):
        lines.append(f"-A KUBE-SERVICES -d {cluster_ip(number)}/32 -p tcp -m tcp --dport {PORT} -j {_svc(number)}")
        lines += _flat_rules(number, endpoints)
    return _restored(lines)


def flat_changed(number: int, before: Endpoints, now: Endpoints) -> str:
    """The same for other endpoints of a Service."""
    gone = [_sep(number, each) for each in before if each not in now]
    names = (_svc(number), *_seps(number, now), *gone)
    rules = _flat_rules(number, now)
    return _restored([*(f":{name} - [0:0]" for name in names), *rules, *(f"-X {name}" for name in gone)])


def _restored(lines: Iterable[str]) -> str:
    return "\n".join(("*nat", *lines, "COMMIT\n"))


def _svc(number: int) -> str:
    return f"KUBE-SVC-{number:016}"


def _sep(number: int, pod: int) -> str:
    return f"KUBE-SEP-{number:05}{pod:011}"


def _seps(number: int, endpoints: Endpoints) -> list[str]:
    return [_sep(number, each) for each in endpoints]


def _flat_rules(number: int, endpoints: Endpoints) -> Iterator[str]:
    service, count = _svc(number), len(endpoints)
    yield (
        f"-A {service} ! -s {PODS} -d {cluster_ip(number)}/32 -p tcp -m tcp --dport {PORT} -j KUBE-MARK-MASQ"
    )  # fmt: skip
    for place, pod in enumerate(endpoints):
        left = count - place
        chance = f" -m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
        yield f"-A {service}{chance} -j {_sep(number, pod)}"
    for pod in endpoints:
        sep, address = _sep(number, pod), pod_address(pod)
        yield f"-A {sep} -s {address}/32 -j KUBE-MARK-MASQ"
        yield f"-A {sep} -p tcp -m tcp -j DNAT --to-destination {address}:{TARGET_PORT}"


# --- policies, a list of pods in nftables -----------------------------------------------------------------------------


def linear(pods: int, policies_of: Sequence[Sequence[int]], peers: Sequence[Sequence[str]]) -> str:
    """A script for nft: local pod `n` has the policies `policies_of[n]`; policy `m` lets `peers[m]` in."""
    lines = [
        f"add table {TABLE}",
        f"add chain {TABLE} forward {{ type filter hook forward priority 0; }}",
        f"add rule {TABLE} forward ct state established,related accept",
    ]
    for number, addresses in enumerate(peers):
        members = f" elements = {{ {', '.join(addresses)} }};" if addresses else ""
        lines += (
            f"add set {TABLE} peers-{number} {{ type ipv4_addr;{members} }}",
            f"add chain {TABLE} policy-{number}",
            f"add rule {TABLE} policy-{number} ip saddr @peers-{number} tcp dport {TARGET_PORT} accept",
            f"add rule {TABLE} policy-{number} ip saddr @peers-{number} udp dport {TARGET_PORT} accept",
        )
    for pod in range(pods):
        lines += (
            f"add chain {TABLE} pod-{pod}",
            *(f"add rule {TABLE} pod-{pod} jump policy-{number}" for number in policies_of[pod]),
            f"add rule {TABLE} pod-{pod} drop",
            f"add rule {TABLE} forward ip daddr {pod_address(pod)} jump pod-{pod}",
        )
    return "\n".join(lines) + "\n"


def linear_changed(policy: int, address: str, *, there: bool) -> str:
    """A script that takes a peer into a policy's set, or out of it."""
    return f"{'add' if there else 'delete'} element {TABLE} peers-{policy} {{ {address} }}\n"
