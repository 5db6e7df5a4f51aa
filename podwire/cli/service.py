"""`podwire service`: Services as a node's proxy sees them, and what becomes of a connection to one.

    list                     every Service, its places and its endpoints
    show NAME                what clients of each kind meet at each of its places, on this node
    trace FROM TO:PORT       the way of a connection, hop by hop; on the node, or in a lab, held against the kernel

It reads the API as the proxy does, with the proxy's configuration, and asks no daemon: it works beside a proxy that
does not run. In a lab (`--name`) it looks from any of its nodes.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from kube_proxy_lite import settings as proxy_settings
from kube_proxy_lite.model import Backend, Frontend, PortPlan, Protocol, Source, Verdict, decide
from kube_proxy_lite.settings import Mode, ProxyConfig
from podwire.cli import service_reading
from podwire.cli.agent import add_output
from podwire.cli.service_trace import KINDS, Expectation, Hop, Origin, Target, trace
from podwire.cli.service_view import Cluster, addresses_of, node_addresses
from podwire.errors import PodwireError
from podwire.kube.objects import EndpointSlice, Service
from podwire.kube.options import KubeOptions

CONFIG = Path("/etc/podwire/proxy.yaml")
_WIDTH = 200  # of what is not a terminal
_VALUE = re.compile(r"elements = \{[^}]* : ([^}]+?) \}")
Object = dict[str, Any]
Enter = Callable[[str], Sequence[str] | None]
"""The words before a command that runs on a node of that name; None when it cannot be entered from here."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where we look from: the proxy's configuration of a node, and how nodes are entered."""

    config: ProxyConfig
    enter: Enter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.add_argument("--name", default="", metavar="LAB", help="in this lab, from outside of it")
        made.add_argument("--node", default="", metavar="NODE", help="as this node sees it (default: this one)")
        made.add_argument("--config", type=Path, metavar="FILE", help=f"the proxy's configuration (default: {CONFIG})")
        made.add_argument("--kubeconfig", default="", metavar="FILE", help="how the API is reached")
        add_output(made)
        return made

    listing = verb("list", "every Service, its places and its endpoints")
    listing.add_argument("-n", "--namespace", default="", metavar="NS", help="default: all")
    show = verb("show", "what clients meet at a Service's places on this node")
    show.add_argument("service", metavar="NAME")
    show.add_argument("-n", "--namespace", default="default", metavar="NS")
    tracing = verb("trace", "what would become of a connection, hop by hop")
    tracing.add_argument("origin", metavar="FROM", help="a pod, a node, `outside`, or an address")
    tracing.add_argument("target", metavar="TO:PORT", help="an address, SERVICE, SERVICE.NAMESPACE, a pod or a node")
    tracing.add_argument("-n", "--namespace", default="default", metavar="NS", help="of names (%(default)s)")
    tracing.add_argument("-p", "--protocol", default="TCP", type=str.upper, choices=[each.value for each in Protocol])


def run(arguments: argparse.Namespace) -> int:
    """Does what the verb says. Returns its exit code. Raises PodwireError."""
    place = _in_lab(arguments) if arguments.name else _on_node(arguments)
    cluster = service_reading.read(place.config.kubernetes, place.config.rules(), place.config.mode.value)
    verbs: dict[str, Callable[[argparse.Namespace, Place, Cluster], Object]] = {
        "list": lambda given, _, all_: {"services": listed(all_, given.namespace)},
        "show": lambda given, _, all_: shown(all_, (given.namespace, given.service)),
        "trace": traced,
    }
    found = verbs[arguments.verb](arguments, place, cluster)
    if arguments.output == "json":
        print(json.dumps(found, indent=2))
    else:
        printers = {"list": _print_list, "show": _print_show, "trace": _print_trace}
        width = None if sys.stdout.isatty() else _WIDTH
        printers[arguments.verb](found, Console(soft_wrap=True, highlight=False, markup=False, width=width))
    return 1 if any(wrong for hop in found.get("hops", ()) for wrong in hop["differs"]) else 0


def _on_node(arguments: argparse.Namespace) -> Place:
    path = arguments.config or (CONFIG if CONFIG.exists() else None)
    kubernetes = KubeOptions(kubeconfig=arguments.kubeconfig) if arguments.kubeconfig else None
    config = proxy_settings.read(path, node=arguments.node or None, kubernetes=kubernetes)
    own = proxy_settings.read(path).node
    return Place(config=config, enter=lambda node: () if node == own else None)


def _in_lab(arguments: argparse.Namespace) -> Place:
    from podwire.lab import node, proxy, state

    lab = state.load(arguments.name)
    seen_from = lab.node(arguments.node or lab.nodes[0].name).name
    wanted = proxy.proxy_config(lab, lab.node(seen_from)) | {"kubernetes": {"kubeconfig": str(lab.files.kubeconfig)}}
    config = msgspec.convert(wanted, ProxyConfig)
    return Place(config=config, enter=lambda name: node.enter_command(lab, name))


# --- list -------------------------------------------------------------------------------------------------------


def listed(cluster: Cluster, namespace: str = "") -> list[Object]:
    """Every Service, for JSON."""
    problems = cluster.seen_by(cluster.settings.node).problems()
    return [
        _row(service, [each for each in cluster.slices if each.service == service.key])
        | {"problems": [str(each) for each in problems if each.key == service.key]}
        for service in cluster.services
        if namespace in ("", service.key[0])
    ]


def _row(service: Service, slices: Iterable[EndpointSlice]) -> Object:
    spec = service.spec
    states = [(each.conditions.ready, each.conditions.terminating, each.conditions.serving)
              for part in slices for each in part.endpoints or ()]  # fmt: skip
    ready = sum(state[0] is not False for state in states)
    draining = sum(state[0] is False and bool(state[1]) and state[2] is not False for state in states)
    return {
        "namespace": service.key[0],
        "name": service.key[1],
        "type": spec.type,
        "cluster_ips": list(spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])),
        "ports": [_port(port.port, port.node_port, port.protocol) for port in spec.ports or ()],
        "load_balancer": [each.ip or each.hostname for each in service.status.load_balancer.ingress or ()],
        "endpoints": {"ready": ready, "draining": draining, "not_ready": len(states) - ready - draining},
    }


def _port(port: int, node_port: int, protocol: str) -> str:
    return f"{port}:{node_port}/{protocol}" if node_port else f"{port}/{protocol}"


def _print_list(found: Object, console: Console) -> None:
    table = Table("NAMESPACE", "NAME", "TYPE", "CLUSTER-IPS", "LOAD-BALANCER", "PORTS", "ENDPOINTS", box=None)
    for row in found["services"]:
        counts = ", ".join(f"{n} {word.replace('_', ' ')}" for word, n in row["endpoints"].items() if n) or "none"
        texts = [" ".join(row[key]) or "-" for key in ("cluster_ips", "load_balancer", "ports")]
        table.add_row(row["namespace"], row["name"], row["type"], *texts, counts)
    console.print(table)
    for row in found["services"]:
        for problem in row["problems"]:
            console.print(problem)


# --- show -------------------------------------------------------------------------------------------------------


def shown(cluster: Cluster, key: tuple[str, str]) -> Object:
    """One Service as the node sees it, for JSON: by port its places with what each kind of client meets there."""
    service, seen = cluster.service(key), cluster.seen_by(cluster.settings.node)
    health = seen.health(key)
    slices = [each for each in cluster.slices if each.service == key]
    return _row(service, slices) | {
        "node": cluster.settings.node,
        "zone": seen.zone,
        "internal_traffic_policy": service.spec.internal_traffic_policy or "Cluster",
        "external_traffic_policy": service.spec.external_traffic_policy or "Cluster",
        "plans": [_plan(cluster, plan) for plan in sorted(seen.plans_of(key), key=lambda plan: plan.key)],
        "health": {"port": health.port, "ready": health.ready} if health else None,
        "problems": [str(each) for each in seen.problems() if each.key == key],
    }


def _plan(cluster: Cluster, plan: PortPlan) -> Object:
    def backends(chosen: Sequence[Backend]) -> list[Object]:
        return [
            {"address": str(one.address), "port": one.port, "here": one.local, "is": cluster.place_of(one.address)}
            for one in chosen
        ]

    return {
        "port": str(plan.key),
        "affinity": plan.affinity,
        "cluster": backends(plan.cluster),
        "local": backends(plan.local),
        "frontends": [_frontend(cluster, plan, frontend) for frontend in plan.frontends],
    }


def _frontend(cluster: Cluster, plan: PortPlan, frontend: Frontend) -> Object:
    address = "*" if frontend.address is None else str(frontend.address)
    place = {"kind": KINDS[frontend.kind], "address": address, "port": frontend.port}
    sources = {source.value: _meets(cluster, plan, frontend, source) for source in Source}
    return place | {"source_ranges": [str(each) for each in frontend.source_ranges]} | sources


def _meets(cluster: Cluster, plan: PortPlan, frontend: Frontend, source: Source) -> str:
    decision = decide(plan, frontend, source, cluster.settings)
    if decision.verdict is not Verdict.FORWARD:
        return "refused" if decision.verdict is Verdict.REFUSE else "dropped"
    whose = "local " if decision.backends == plan.local != plan.cluster else ""
    return f"{len(decision.backends)} {whose}{'masqueraded' if decision.masquerade else 'as it is'}"


def _print_show(found: Object, console: Console) -> None:
    console.print(f"{found['namespace']}/{found['name']}   {found['type']}   as {found['node']} sees it"
                  f"{' in zone ' + found['zone'] if found['zone'] else ''}")  # fmt: skip
    console.print(f"policies: internal {found['internal_traffic_policy']}, external {found['external_traffic_policy']}")
    if found["health"]:
        console.print(f"health check on port {found['health']['port']}: {found['health']['ready']} ready here")
    if not found["plans"]:
        console.print("nothing for a proxy to do: it is headless, an ExternalName, or without a usable port")
    for plan in found["plans"]:
        kept = f"   a client keeps its endpoint for {plan['affinity']} s" if plan["affinity"] else ""
        console.print(f"\n{plan['port']}{kept}")
        table = Table("PLACE", "", "FROM PODS", "FROM THIS NODE", "FROM OUTSIDE", "OPEN TO", box=None)
        for one in plan["frontends"]:
            at = f"[{one['address']}]:{one['port']}" if ":" in one["address"] else f"{one['address']}:{one['port']}"
            ranges = " ".join(one["source_ranges"]) or "all"
            table.add_row(at, one["kind"], one["pod"], one["node"], one["external"], ranges)
        console.print(table)
        local = {(one["address"], one["port"]) for one in plan["local"]}
        for one in plan["cluster"]:
            mark = "  here" if (one["address"], one["port"]) in local or one["here"] else ""
            console.print(f"  → {one['address']} port {one['port']}   {one['is']}{mark}")
        only = [one for one in plan["local"] if one not in plan["cluster"]]
        for one in only:
            console.print(f"  → {one['address']} port {one['port']}   {one['is']}  here, for the policy Local alone")
        if not plan["cluster"]:
            console.print("  no endpoints")
    for problem in found["problems"]:
        console.print(f"problem: {problem}")


# --- trace ------------------------------------------------------------------------------------------------------


def traced(arguments: argparse.Namespace, place: Place, cluster: Cluster) -> Object:
    """The way of a connection, for JSON; `kernel` is what the node's kernel says of a hop, where it can be read."""
    target = find_target(cluster, arguments.target, arguments.namespace, Protocol(arguments.protocol))
    origin = find_origin(cluster, arguments.origin, arguments.namespace, target)
    hops = [_told(hop, place) for hop in trace(cluster, origin, target)]
    return {"from": f"{origin.name} ({origin.address})", "to": str(target), "hops": hops}


def find_target(cluster: Cluster, text: str, namespace: str, protocol: Protocol) -> Target:
    """What TO:PORT means. Raises PodwireError."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = ipaddress.ip_address(host)
    except ValueError:
        address = None
    service = None if address else _find_service(cluster, host, namespace)
    if service is not None:
        named = {each.name: each.port for each in service.spec.ports or ()}
        first = (service.spec.cluster_ips or (service.spec.cluster_ip,))[0]
        if first in ("", "None"):
            raise PodwireError(f"Service {'/'.join(service.key)} has no ClusterIP: name one of its pods instead")
        address, port = ipaddress.ip_address(first), str(named.get(port, port))
    elif address is None:
        address = _address_of(cluster, host, namespace, None)
    if not host or not port.isdigit():
        raise PodwireError(f"{text!r}: expected an address or a name, a colon, and a port, such as web:80")
    return Target(address=address, port=int(port), protocol=protocol)


def _find_service(cluster: Cluster, name: str, namespace: str) -> Service | None:
    first, _, rest = name.partition(".")
    key = (rest.removesuffix(".svc.cluster.local").removesuffix(".svc") or namespace, first)
    return next((service for service in cluster.services if service.key == key), None)


def find_origin(cluster: Cluster, text: str, namespace: str, target: Target) -> Origin:
    """Who FROM is. Raises PodwireError."""
    version = target.address.version
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        if text == "outside":
            other = {4: "192.0.2.1", 6: "2001:db8::1"}
            return Origin(name="outside", source=Source.EXTERNAL, address=ipaddress.ip_address(other[version]))
        address = _address_of(cluster, text, namespace, version)
    pod, node = cluster.pod_at(address), cluster.node_at(address)
    if pod is not None:
        return Origin(name=f"pod {'/'.join(pod.key)}", source=Source.POD, address=address, node=pod.spec.node_name)
    source = Source.NODE if node else Source.EXTERNAL
    return Origin(name=node or "outside", source=source, address=address, node=node)


def _address_of(cluster: Cluster, name: str, namespace: str, version: int | None) -> Any:
    """The address of a pod (`name` or `namespace/name`) or node, of a family if one is said."""
    space, _, last = name.rpartition("/")
    found = [each for pod in cluster.pods if pod.key == (space or namespace, last) for each in addresses_of(pod)]
    found += [each for node in cluster.nodes if node.metadata.name == name for each in node_addresses(node)]
    for address in found:
        if version in (None, address.version):
            return address
    raise PodwireError(f"{name!r} is no address, and no pod (of namespace {space or namespace}) or node that has one")


def _told(hop: Hop, place: Place) -> Object:
    """A hop for JSON, with what the kernel holds where it can be asked."""
    kernel: list[str] = []
    differs: list[str] = []
    enter = place.enter(hop.at) if hop.expects and place.config.mode is Mode.NFTABLES else None
    if enter is not None:
        for expected in hop.expects:
            value = _element(enter, expected)
            kernel.append(f"{expected.table} {expected.map} {{ {expected.key} : {value or 'nothing'} }}")
            if value != expected.value:
                differs.append(f"{expected.map} should say {expected.value}, and says {value or 'nothing'}")
        held = sorted(_element(enter, expected) for expected in hop.slots)
        if held != sorted(expected.value for expected in hop.slots):
            differs.append(f"the endpoints in the kernel are others: {', '.join(each or 'nothing' for each in held)}")
    return {"at": hop.at, "what": hop.what, "endpoints": list(hop.more), "kernel": kernel, "differs": differs}


def _element(enter: Sequence[str], expected: Expectation) -> str:
    """What the kernel's map says for a key, as the renderer writes it; empty when it has no such element."""
    words = [*enter, "nft", "get", "element", *expected.table.split(), expected.map, f"{{ {expected.key} }}"]
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    found = _VALUE.search(said.stdout)  # one element was asked for, so the last colon is before its value
    return found[1].strip() if found and not said.returncode else ""


def _print_trace(found: Object, console: Console) -> None:
    console.print(f"{found['from']} → {found['to']}")
    for hop in found["hops"]:
        console.print(f"  {hop['at']}: {hop['what']}")
        for each in hop["endpoints"]:
            console.print(f"      → {each}")
        for each in hop["kernel"]:
            console.print(f"      kernel: {each}")
        for each in hop["differs"]:
            console.print(f"      DIFFERS: {each}")
