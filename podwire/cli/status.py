"""`podwire status`: what the daemon of this node says about itself, over its socket, and the proxy over HTTP."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import msgspec
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from podwire.cli.agent import add_output, add_socket, agent
from podwire.cli.proxy import ProxyState, add_proxy, ask_proxy
from podwire.v1 import agent_pb2

_SECONDS = 5.0
_REPAIRS = 5  # of those that -o json has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    add_socket(parser)
    add_proxy(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the status. Returns 0 when an ADD can succeed now, 1 otherwise. Raises TryAgain without a daemon."""
    status, attachments = _ask(arguments.socket)
    proxy = ask_proxy(arguments.proxy_metrics, arguments.proxy_health)
    if arguments.output == "json":
        plain = {
            "status": MessageToDict(status, always_print_fields_with_no_presence=True),
            "attachments": [MessageToDict(each) for each in attachments],
            "proxy": msgspec.to_builtins(proxy),
        }
        print(json.dumps(plain, indent=2))
    else:
        _print(status, attachments, proxy)
    return 0 if status.ready else 1


def _ask(socket: Path) -> tuple[agent_pb2.GetStatusResponse, list[agent_pb2.Attachment]]:
    with agent(socket) as stub:
        status = stub.GetStatus(agent_pb2.GetStatusRequest(), timeout=_SECONDS)
        listed = stub.ListAttachments(agent_pb2.ListAttachmentsRequest(), timeout=_SECONDS)
    return status, list(listed.attachments)


def _print(status: agent_pb2.GetStatusResponse, attachments: list[agent_pb2.Attachment], proxy: ProxyState) -> None:
    console = Console()
    state = "ready" if status.ready else "not ready: " + "; ".join(status.reasons)
    etcd = "connected" if status.etcd.connected else f"not connected: {status.etcd.error}"
    console.print(f"{status.node} ({', '.join(status.addresses)}), podwire {status.version}: {state}", highlight=False)
    console.print(f"etcd {etcd}; {status.peers} peers, by {status.backend}; pods get MTU {status.mtu}", highlight=False)
    console.print(f"{status.waiting_dels} DELs wait; {status.releasing_wires} wires are being deleted", highlight=False)
    if status.fast_path:
        console.print(f"fast path {status.fast_path}", highlight=False, markup=False, soft_wrap=True)
    console.print(_proxy(proxy), highlight=False, markup=False, soft_wrap=True)
    if status.obstacle:
        console.print(f"no further block: {status.obstacle}", highlight=False, markup=False)
    for note in status.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    blocks = Table("BLOCK", "POOL", "USED", "RELEASING", "COOLING", "RESERVED", "FREE", box=None)
    for block in status.blocks:
        counts = (block.used, block.releasing, block.cooling, block.reserved, block.free)
        blocks.add_row(block.cidr, block.pool, *map(str, counts))
    pods = Table("POD", "CONTAINER", "INTERFACE", "ADDRESSES", "PORTS", "LINK", "STATE", box=None)
    for each in attachments:
        pod = f"{each.pod_namespace}/{each.pod_name}" if each.pod_name else "-"
        state = agent_pb2.Attachment.State.Name(each.state).removeprefix("STATE_").lower()
        ports = " ".join(map(_port, each.port_mappings))
        pods.add_row(pod, each.container_id[:12], each.ifname, " ".join(each.addresses), ports, each.host_ifname, state)
    peers = Table("PEER", "ADDRESSES", "BLOCKS", box=None)
    for peer in status.peer_nodes:
        peers.add_row(peer.name, " ".join(peer.addresses), " ".join(peer.blocks))
    for table in (blocks, pods, peers):
        if table.row_count:
            console.print(table)
    for repair in status.repairs[-_REPAIRS:]:
        moment = datetime.datetime.fromtimestamp(repair.at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        console.print(f"repaired {moment} {repair.detail}", highlight=False, markup=False)


def _port(mapping: agent_pb2.PortMapping) -> str:
    """Such as 8080→80/tcp, or 192.0.2.1:8080→80/tcp."""
    of = f"[{mapping.host_ip}]:" if ":" in mapping.host_ip else f"{mapping.host_ip}:" if mapping.host_ip else ""
    return f"{of}{mapping.host_port}→{mapping.container_port}/{mapping.protocol}"


def _proxy(proxy: ProxyState) -> str:
    if not proxy.answers:
        return f"{proxy.problem}: {proxy.policies}"
    health = "up to date" if proxy.healthy else f"not up to date: {proxy.problem or 'it does not say why'}"
    return f"proxy {proxy.mode}: {health}; {proxy.policies}"
