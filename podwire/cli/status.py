"""`podwire status`: what the daemon of this node says about itself, over its socket."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from podwire.errors import TryAgain
from podwire.v1 import agent_pb2, agent_pb2_grpc

_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument(
        "--socket",
        type=Path,
        default=Path("/run/podwire/ipamd.sock"),
        help="the daemon's socket (default: %(default)s)",
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Prints the status. Returns 0 when an ADD can succeed now, 1 otherwise. Raises TryAgain without a daemon."""
    status, attachments = _ask(arguments.socket)
    if arguments.output == "json":
        plain = {
            "status": MessageToDict(status, always_print_fields_with_no_presence=True),
            "attachments": [MessageToDict(each) for each in attachments],
        }
        print(json.dumps(plain, indent=2))
    else:
        _print(status, attachments)
    return 0 if status.ready else 1


def _ask(socket: Path) -> tuple[agent_pb2.GetStatusResponse, list[agent_pb2.Attachment]]:
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        agent = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        try:
            status = agent.GetStatus(agent_pb2.GetStatusRequest(), timeout=_SECONDS)
            listed = agent.ListAttachments(agent_pb2.ListAttachmentsRequest(), timeout=_SECONDS)
        except grpc.RpcError as error:
            raise TryAgain(f"no daemon answers on {socket}: {error.details()}") from error
    return status, list(listed.attachments)


def _print(status: agent_pb2.GetStatusResponse, attachments: list[agent_pb2.Attachment]) -> None:
    console = Console()
    state = "ready" if status.ready else "not ready: " + "; ".join(status.reasons)
    etcd = "connected" if status.etcd.connected else f"not connected: {status.etcd.error}"
    console.print(f"{status.node} ({', '.join(status.addresses)}), podwire {status.version}: {state}", highlight=False)
    console.print(f"etcd {etcd}; {status.peers} peers; pods get MTU {status.mtu}", highlight=False)
    blocks = Table("BLOCK", "POOL", "USED", "RELEASING", "COOLING", "RESERVED", "FREE", box=None)
    for block in status.blocks:
        counts = (block.used, block.releasing, block.cooling, block.reserved, block.free)
        blocks.add_row(block.cidr, block.pool, *map(str, counts))
    pods = Table("POD", "CONTAINER", "INTERFACE", "ADDRESSES", "LINK", "STATE", box=None)
    for each in attachments:
        pod = f"{each.pod_namespace}/{each.pod_name}" if each.pod_name else "-"
        state = agent_pb2.Attachment.State.Name(each.state).removeprefix("STATE_").lower()
        pods.add_row(pod, each.container_id[:12], each.ifname, " ".join(each.addresses), each.host_ifname, state)
    console.print(blocks)
    console.print(pods)
