"""What a lab looks like from outside: `podwire lab status`, as JSON for programs, as tables for people.

The JSON is an interface (DESIGN.md, section 8): fields are added, never renamed. Addresses are bare, `netns` is a
path under /run/netns, folders and sockets are paths that the machine and every node see alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

from podwire.kube.objects import SERVICE_NAME_LABEL
from podwire.lab import cluster, names, process, proxy
from podwire.lab.agent import daemon_status
from podwire.lab.api.kinds import ENDPOINT_SLICES, PODS, SERVICES
from podwire.lab.node import METRICS_PORT
from podwire.lab.state import EtcdMember, LabState, NodeState

Object = dict[str, Any]


def status(lab: LabState) -> Object:
    """The documented object. Raises PodwireError when the API server does not answer."""
    address = cluster.api_address(lab)
    client = cluster.client(lab)
    return {
        "name": lab.name,
        "api": {"url": address.url, "kubeconfig": str(lab.files.kubeconfig)},
        "etcd": list(lab.etcd_endpoints),
        "etcd_members": [member_status(lab, member) for member in lab.etcd],
        "nodes": [node_status(lab, node) for node in lab.nodes],
        "pods": [pod_status(lab, pod) for pod in client.list(PODS)],
        "services": services_status(client.list(SERVICES), client.list(ENDPOINT_SLICES)),
    }


def member_status(lab: LabState, member: EtcdMember) -> Object:
    """One of `etcd_members`. `running` is whether its process is there, not whether it serves."""
    running = process.recorded(lab.files, member.role)
    return {
        "name": member.name,
        "netns": str(lab.netns(member.part)),
        "endpoint": member.endpoint,
        "running": running is not None and running.alive,
    }


def node_status(lab: LabState, node: NodeState) -> Object:
    """One of `nodes`. `ready` and `blocks` are what its daemon says; a daemon that is down has no blocks to tell."""
    files = lab.files
    socket = files.ipamd_socket(node.name)
    said = daemon_status(socket)
    return {
        "name": node.name,
        "proxy": proxy_status(lab, node),
        "netns": str(lab.netns(node.name)),
        "addresses": list(node.addresses),
        "blocks": [block.cidr for block in said.blocks] if said else [],
        "cni_bin_dir": str(files.node_path(node.name, "/opt/cni/bin")),
        "cni_conf_dir": str(files.node_path(node.name, "/etc/cni/net.d")),
        "ipamd_socket": str(socket),
        "metrics": f"http://{names.url_host(node.addresses[0])}:{METRICS_PORT}/metrics",
        "ready": bool(said and said.ready),
    }


def proxy_status(lab: LabState, node: NodeState) -> Object:
    """The `proxy` of a node. `why` says what is wrong where it is not `healthy`; `mode` none has neither."""
    if lab.proxy == proxy.NONE:
        return {"mode": lab.proxy, "healthy": False, "why": "there is none", "health": "", "metrics": ""}
    why = proxy.why_unhealthy(lab, node)
    host = names.url_host(node.addresses[0])
    return {
        "mode": lab.proxy,
        "healthy": not why,
        "why": why,
        "health": f"http://{host}:{names.PROXY_HEALTH_PORT}/healthz",
        "metrics": f"http://{host}:{names.PROXY_METRICS_PORT}/metrics",
    }


def pod_status(lab: LabState, pod: Object) -> Object:
    """One of `pods`. A pod on no node has no namespace yet."""
    metadata, node = pod["metadata"], pod["spec"].get("nodeName", "")
    netns = lab.pod_netns(metadata["namespace"], metadata["name"])
    if pod["spec"].get("hostNetwork"):
        netns = lab.netns(node)
    said = pod.get("status", {})
    return {
        "namespace": metadata["namespace"],
        "name": metadata["name"],
        "node": node,
        "netns": str(netns) if node else "",
        "addresses": [entry["ip"] for entry in said.get("podIPs", [])],
        "phase": said.get("phase", "Pending"),
    }


def services_status(services: list[Object], slices: list[Object]) -> list[Object]:
    """The `services`, each with the endpoints that its slices list."""
    by_service: dict[tuple[str, str], list[Object]] = defaultdict(list)
    for each in slices:
        owner = (each["metadata"].get("labels") or {}).get(SERVICE_NAME_LABEL, "")
        by_service[each["metadata"]["namespace"], owner].append(each)
    return [service_status(one, by_service[one["metadata"]["namespace"], one["metadata"]["name"]]) for one in services]


def service_status(service: Object, slices: list[Object]) -> Object:
    """One of `services`."""
    spec = service.get("spec", {})
    ports = spec.get("ports") or []
    ingress = (service.get("status", {}).get("loadBalancer") or {}).get("ingress") or []
    one = spec.get("clusterIP")
    return {
        "namespace": service["metadata"]["namespace"],
        "name": service["metadata"]["name"],
        "type": spec.get("type", "ClusterIP"),
        "cluster_ips": spec.get("clusterIPs") or ([one] if one else []),
        "ports": [
            {key: port[key] for key in ("name", "protocol", "port", "targetPort", "nodePort") if key in port}
            for port in ports
        ],
        "node_ports": [port["nodePort"] for port in ports if port.get("nodePort")],
        "load_balancer": [entry.get("ip") or entry.get("hostname", "") for entry in ingress],
        "endpoints": [entry for each in slices for entry in _endpoints(each)],
    }


def _endpoints(endpoint_slice: Object) -> list[Object]:
    """The `endpoints` of a slice. What a slice does not say of an endpoint's state means that all is well."""
    keys = ("name", "port", "protocol")
    ports = [{key: port[key] for key in keys if key in port} for port in endpoint_slice.get("ports") or ()]
    found = []
    for endpoint in endpoint_slice.get("endpoints") or ():
        state, target = endpoint.get("conditions") or {}, endpoint.get("targetRef") or {}
        found.append({
            "address": (endpoint.get("addresses") or [""])[0],
            "ports": ports,
            "node": endpoint.get("nodeName", ""),
            "pod": target.get("name", "") if target.get("kind") == "Pod" else "",
            "ready": state.get("ready") is not False,
            "serving": state.get("serving", state.get("ready")) is not False,
            "terminating": bool(state.get("terminating")),
        })  # fmt: skip
    return found


def show(shown: Object, console: Console) -> None:
    """Prints a status for people."""
    console.print(f"lab [bold]{shown['name']}[/]   kubeconfig {shown['api']['kubeconfig']}", highlight=False)
    _table(console, "etcd", shown["etcd_members"], ("name", "running", "endpoint", "netns"))
    nodes = [node | {"proxy": _proxy_words(node["proxy"])} for node in shown["nodes"]]
    _table(console, "nodes", nodes, ("name", "ready", "proxy", "addresses", "blocks", "netns"))
    _table(console, "pods", shown["pods"], ("namespace", "name", "node", "phase", "addresses"))
    services = [
        one | {"ports": [port_words(port) for port in one["ports"]], "endpoints": endpoints_words(one["endpoints"])}
        for one in shown["services"]
    ]
    columns = ("namespace", "name", "type", "cluster_ips", "load_balancer", "ports", "endpoints")
    _table(console, "services", services, columns)


def _proxy_words(said: Object) -> str:
    if said["mode"] == proxy.NONE:
        return "-"
    return str(said["mode"] if said["healthy"] else f"{said['mode']}: {said['why']}")


def port_words(port: Object) -> str:
    """A port, its node port, and where it leads: `80:30080→http/TCP`."""
    leads = "" if port.get("targetPort", port["port"]) == port["port"] else f"→{port['targetPort']}"
    at_node = f":{port['nodePort']}" if port.get("nodePort") else ""
    return f"{port['port']}{at_node}{leads}/{port.get('protocol', 'TCP')}"


def endpoints_words(endpoints: list[Object]) -> str:
    """How many there are, and in which state: `3 ready, 1 not ready`."""
    counts = Counter(
        "ready" if one["ready"] else "draining" if one["terminating"] and one["serving"] else "not ready"
        for one in endpoints
    )
    return ", ".join(f"{counts[word]} {word}" for word in ("ready", "draining", "not ready") if counts[word]) or "none"


def _table(console: Console, title: str, rows: list[Object], columns: tuple[str, ...]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_text(row[column]) for column in columns))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
