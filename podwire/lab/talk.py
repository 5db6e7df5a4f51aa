"""Asking a lab's echo servers, from any of its namespaces: the demonstration's and the tests' client.

No process is started: the socket is opened inside the namespace and used from outside. So the client knows its own
address, and "no NAT" can be judged by comparing it with what the server saw.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import msgspec

from podwire import netns
from podwire.errors import PodwireError


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an echo server said, and what the client had as its own address. `own` and `client` are bare."""

    own: str
    own_port: int
    client: str
    client_port: int
    pod: str
    namespace: str
    node: str
    container: str
    port: int
    protocol: str

    @property
    def untranslated(self) -> bool:
        """Whether the server saw the client as the client sees itself."""
        return (self.own, self.own_port) == (self.client, self.client_port)


def ask(netns_path: Path, address: str, port: int, protocol: str = "TCP", seconds: float = 10.0) -> Answer:
    """Asks the echo server at `address`, bare, from the namespace. Raises PodwireError when there is no answer."""
    descriptor = netns.open_netns(str(netns_path))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
    try:
        with netns.inside(descriptor):
            client = socket.socket(family, kind)
    finally:
        os.close(descriptor)
    with client:
        client.settimeout(seconds)
        try:
            client.connect((address, port))
            own = client.getsockname()
            said = _over_tcp(client) if protocol == "TCP" else _over_udp(client)
        except OSError as error:
            raise PodwireError(f"{netns_path.name} → {address}:{port}/{protocol}: {error}") from error
    return Answer(own=own[0], own_port=own[1], **said)


def _over_tcp(client: socket.socket) -> dict[str, Any]:
    client.sendall(b"GET / HTTP/1.1\r\nHost: echo\r\nConnection: close\r\n\r\n")
    received = b"".join(iter(lambda: client.recv(65536), b""))
    _, _, body = received.partition(b"\r\n\r\n")
    if not body:
        raise ConnectionResetError("closed without an answer")
    return dict(json.loads(body))


def _over_udp(client: socket.socket) -> dict[str, Any]:
    client.send(b"?")
    return dict(json.loads(client.recv(65536)))
