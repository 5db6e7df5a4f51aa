"""What a node's daemon says about itself, asked on its socket, which the machine sees at the same path as the node."""

from __future__ import annotations

from pathlib import Path

import grpc

from podwire.v1 import agent_pb2, agent_pb2_grpc

_SECONDS = 20.0


def daemon_status(socket: Path, seconds: float = _SECONDS) -> agent_pb2.GetStatusResponse | None:
    """The status of the daemon behind the socket; None when none answers. One that has ended is known at once."""
    if not socket.exists():
        return None
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        try:
            answer: agent_pb2.GetStatusResponse = stub.GetStatus(agent_pb2.GetStatusRequest(), timeout=seconds)
        except grpc.RpcError:
            return None
    return answer
