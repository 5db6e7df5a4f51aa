"""One byte to and fro over TCP, as fast as it goes: what a request costs that waits for its answer.

    python -m bench.pingpong serve PORT              answers one connection after the other
    python -m bench.pingpong ask ADDRESS PORT COUNT  prints the median seconds of COUNT round trips, after a tenth more

Both ends are as small as Python lets them be; what they cost themselves is the same whatever is in between. Both run on
one core: on two, a round trip is what it takes to wake the other, which on a virtual machine is ten times the path.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time


def serve(port: int) -> None:
    """Never ends by itself."""
    with socket.create_server(("", port)) as server:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while connection.recv(1):
                    connection.send(b"x")


def ask(address: str, port: int, count: int) -> float:
    """Returns the median of `count` round trips, in seconds."""
    with socket.create_connection((address, port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        taken = []
        for _ in range(count + count // 10):
            began = time.perf_counter()
            connection.send(b"x")
            connection.recv(1)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[count // 10 :])


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
