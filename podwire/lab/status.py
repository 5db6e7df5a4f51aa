"""What a lab looks like from outside: `podwire lab status`, as JSON for programs, as tables for people.

The JSON is an interface (DESIGN.md, section 8): fields are added, never renamed. Addresses are bare, `netns` is a
path under /run/netns, folders and sockets are paths that the machine and every node see alike.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from podwire.lab import cluster, names, process
from podwire.lab.agent import daemon_status
from podwire.lab.api.kinds import PODS, SERVICES
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
        "services": [service_status(service) for service in client.list(SERVICES)],
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
        "netns": str(lab.netns(node.name)),
        "addresses": list(node.addresses),
        "blocks": [block.cidr for block in said.blocks] if said else [],
        "cni_bin_dir": str(files.node_path(node.name, "/opt/cni/bin")),
        "cni_conf_dir": str(files.node_path(node.name, "/etc/cni/net.d")),
        "ipamd_socket": str(socket),
        "metrics": f"http://{names.url_host(node.addresses[0])}:{METRICS_PORT}/metrics",
        "ready": bool(said and said.ready),
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


def service_status(service: Object) -> Object:
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
            {key: port[key] for key in ("name", "protocol", "port", "targetPort") if key in port} for port in ports
        ],
        "node_ports": [port["nodePort"] for port in ports if port.get("nodePort")],
        "load_balancer": [entry.get("ip") or entry.get("hostname", "") for entry in ingress],
        "endpoints": [],
    }


def show(shown: Object, console: Console) -> None:
    """Prints a status for people."""
    console.print(f"lab [bold]{shown['name']}[/]   kubeconfig {shown['api']['kubeconfig']}", highlight=False)
    _table(console, "etcd", shown["etcd_members"], ("name", "running", "endpoint", "netns"))
    _table(console, "nodes", shown["nodes"], ("name", "ready", "addresses", "blocks", "netns"))
    _table(console, "pods", shown["pods"], ("namespace", "name", "node", "phase", "addresses"))
    _table(console, "services", shown["services"], ("namespace", "name", "type", "cluster_ips", "node_ports"))


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
