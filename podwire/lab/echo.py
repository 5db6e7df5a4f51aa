"""What a lab's container is when it names no program of this machine: a server that says who asked.

    TCP   HTTP/1.1, any method, any path, keep-alive;   UDP   any datagram
    both  {"pod","namespace","node","container","client","client_port","port","protocol"}

Started as `python -IS echo.py JSON`, with {"pod", "namespace", "node", "container", "ports": [[protocol, number], …]}
and `ready`, a descriptor that it writes to and closes once it listens. The standard library's small modules alone: 12
ms to start, 11 MB. One thread, epoll. It listens on `::` for both families, and shows an IPv4 client in plain form. A
datagram is answered from the address that it was sent to (a node has several).
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys

_LARGEST_REQUEST = 1 << 20
_PKTINFO = getattr(socket, "IPV6_RECVPKTINFO", 49)


def plain(address: str) -> str:
    """An IPv4-mapped address in IPv4's own form, without a scope."""
    bare = address.partition("%")[0]
    return bare[7:] if bare.startswith("::ffff:") and "." in bare else bare


def listen(protocol: str, port: int) -> socket.socket:
    """A non-blocking socket on every address, IPv4 alone on a machine without IPv6."""
    kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
    try:
        server = socket.socket(socket.AF_INET6, kind)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if protocol == "UDP":
            server.setsockopt(socket.IPPROTO_IPV6, _PKTINFO, 1)
        anywhere = "::"
    except OSError:
        server = socket.socket(socket.AF_INET, kind)
        anywhere = "0.0.0.0"
    if protocol == "TCP":
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((anywhere, port))
    if protocol == "TCP":
        server.listen(1024)
    server.setblocking(False)
    return server


class Echo:
    """The event loop: listening sockets, and per connection what has come in of a request."""

    def __init__(self, who: dict[str, object], ports: list[tuple[str, int]]) -> None:
        self.who = who
        self.poll = select.epoll()
        self.servers: dict[int, tuple[socket.socket, str, int]] = {}
        self.connections: dict[int, tuple[socket.socket, bytearray, bytes]] = {}
        for protocol, port in ports:
            server = listen(protocol, port)
            self.servers[server.fileno()] = (server, protocol, port)
            self.poll.register(server, select.EPOLLIN)

    def answer(self, client: tuple[object, ...], port: int, protocol: str) -> bytes:
        """The JSON for a client's socket address, with a newline for people."""
        seen = {"client": plain(str(client[0])), "client_port": client[1], "port": port, "protocol": protocol}
        return json.dumps(self.who | seen).encode() + b"\n"

    def run(self) -> None:
        """Serves until the process is ended."""
        while True:
            for descriptor, _ in self.poll.poll():
                if descriptor in self.servers:
                    server, protocol, port = self.servers[descriptor]
                    (self.accept if protocol == "TCP" else self.datagram)(server, port)
                else:
                    self.receive(descriptor)

    def accept(self, server: socket.socket, port: int) -> None:
        """Takes one connection."""
        try:
            connection, client = server.accept()
        except OSError:  # the client has gone again
            return
        connection.setblocking(True)
        connection.settimeout(5)  # for a client that does not read its answer
        self.connections[connection.fileno()] = (connection, bytearray(), self.answer(client, port, "TCP"))
        self.poll.register(connection, select.EPOLLIN)

    def datagram(self, server: socket.socket, port: int) -> None:
        """Answers one datagram, from the address that it was sent to."""
        try:
            _, ancillary, _, client = server.recvmsg(65535, 256)
            kept = [item for item in ancillary if item[0] == socket.IPPROTO_IPV6]
            server.sendmsg([self.answer(client, port, "UDP")], kept, 0, client)
        except OSError:  # nobody there to answer to
            return

    def receive(self, descriptor: int) -> None:
        """Reads what has come on a connection and answers the requests that are whole."""
        connection, request, answer = self.connections[descriptor]
        try:
            data = connection.recv(65536)
            request += data
            stay = bool(data) and len(request) < _LARGEST_REQUEST
            while stay and (size := whole_request(request)):
                keep = keeps_alive(bytes(request[:size]))
                del request[:size]
                connection.sendall(response(answer, keep))
                stay = keep
        except OSError:
            stay = False
        if not stay:
            self.poll.unregister(connection)
            connection.close()
            del self.connections[descriptor]


def whole_request(data: bytearray) -> int:
    """The size in bytes of the first request with its body; 0 while it is not whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return 0
    length = 0
    for line in bytes(data[:end]).split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            length = int(value)
    size = end + 4 + length
    return size if len(data) >= size else 0


def keeps_alive(request: bytes) -> bool:
    """Whether the connection stays open: HTTP/1.1 that does not say otherwise, with a body whose length is said."""
    head = request.split(b"\r\n\r\n", 1)[0].lower()
    first = head.split(b"\r\n", 1)[0]
    return first.endswith(b"http/1.1") and b"connection: close" not in head and b"transfer-encoding:" not in head


def response(body: bytes, keep: bool) -> bytes:
    """A whole HTTP response."""
    connection = b"keep-alive" if keep else b"close"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n"
    return head % (len(body), connection) + body


def main() -> None:
    """Serves what the one argument says."""
    config = json.loads(sys.argv[1])
    ports, ready = config.pop("ports"), config.pop("ready", None)
    echo = Echo(config, ports)
    if ready is not None:
        os.write(ready, b"\n")
        os.close(ready)
    echo.run()


if __name__ == "__main__":
    main()
