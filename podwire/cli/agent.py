"""The Agent service of the node's daemon, for the subcommands that ask it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from podwire.errors import TryAgain
from podwire.v1 import agent_pb2_grpc


def add_socket(parser: argparse.ArgumentParser) -> None:
    """The flag that says where the daemon is."""
    parser.add_argument(
        "--socket",
        type=Path,
        default=Path("/run/podwire/ipamd.sock"),
        metavar="PATH",
        help="the daemon's socket (default: %(default)s)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """The flag that says for whom the output is."""
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: %(default)s")


@contextmanager
def agent(socket: Path) -> Iterator[agent_pb2_grpc.AgentStub]:
    """The service on `socket`. A call that fails inside raises TryAgain with what the daemon, or gRPC, says."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            yield agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise TryAgain(f"the daemon on {socket} is older than this command: {error.details()}") from error
            raise TryAgain(f"no daemon answers on {socket}: {error.details()}") from error
