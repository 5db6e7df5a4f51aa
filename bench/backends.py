"""Every pod of a cluster, as a client of its Services meets it: each address answers, and says which one it is.

    python -m bench.backends PORT

Over TCP it says the address that it was reached at and closes; over UDP it answers a datagram with the same. One
process for all addresses, which the namespace that it runs in holds as a whole network (ip route add local).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys

_IP_PKTINFO = 8
_BACKLOG = 4096
_AT_ONCE = 64


def _serve(port: int) -> None:
    listener, datagrams = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    datagrams.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    for each in (listener, datagrams):
        each.bind(("0.0.0.0", port))
        each.setblocking(False)
    listener.listen(_BACKLOG)
    print("serving", flush=True)
    while True:
        for ready in select.select((listener, datagrams), (), ())[0]:
            with contextlib.suppress(BlockingIOError):
                for _ in range(_AT_ONCE):
                    _answer(ready) if ready is datagrams else _greet(listener)


def _greet(listener: socket.socket) -> None:
    client, _ = listener.accept()
    with client, contextlib.suppress(OSError):
        client.send(client.getsockname()[0].encode())


def _answer(datagrams: socket.socket) -> None:
    _, ancillary, _, client = datagrams.recvmsg(64, socket.CMSG_SPACE(12))
    reached = ancillary[0][2][8:12]
    info = struct.pack("=I4s4s", 0, reached, reached)  # the answer leaves from where the question went to
    with contextlib.suppress(OSError):
        datagrams.sendmsg([socket.inet_ntoa(reached).encode()], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, client)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
