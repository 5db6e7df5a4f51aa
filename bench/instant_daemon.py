"""A daemon that answers every call at once: what is left of a call then is the executable and gRPC.

    python -m bench.instant_daemon SOCKET

A process of its own, as the real one is, so that the one that measures does nothing beside it.
"""

from __future__ import annotations

import asyncio
import sys

import grpc

from podwire.v1 import cni_pb2, cni_pb2_grpc

RESULT = b'{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.244.1.7/24","interface":0}]}'


class Instant(cni_pb2_grpc.CNIServicer):
    """Answers everything at once."""

    async def Call(  # noqa: N802 (the proto's name)
        self, request: cni_pb2.CallRequest, _context: grpc.aio.ServicerContext
    ) -> cni_pb2.CallResponse:
        return cni_pb2.CallResponse(api=request.api_max, stdout=RESULT)


async def _serve(path: str) -> None:
    server = grpc.aio.server()
    cni_pb2_grpc.add_CNIServicer_to_server(Instant(), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
