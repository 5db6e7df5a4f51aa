"""What the daemon of a node says, as far as these tests ask."""

from __future__ import annotations

import grpc

from podwire.lab.agent import daemon_status
from podwire.lab.state import LabState
from podwire.v1 import agent_pb2, agent_pb2_grpc

_SECONDS = 60


def attachments(lab: LabState, node: str) -> dict[str, agent_pb2.Attachment]:
    """The node's attachments by container id. Wires that were released are nobody's any more, and left out."""
    with grpc.insecure_channel(f"unix:{lab.files.ipamd_socket(node)}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.ListAttachments(agent_pb2.ListAttachmentsRequest(), timeout=_SECONDS)
    releasing = agent_pb2.Attachment.STATE_RELEASING
    return {each.container_id: each for each in answer.attachments if each.state != releasing}


def in_use(lab: LabState, node: str) -> int:
    """How many of the node's addresses are in use, or not yet seen free."""
    said = daemon_status(lab.files.ipamd_socket(node))
    assert said is not None, f"the daemon of {node} does not answer"
    return sum(block.used + block.releasing for block in said.blocks)
