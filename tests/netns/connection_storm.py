"""New TCP connections at a steady rate, and what became of each, until SIGINT. Standard library only.

connection_storm.py ADDRESS PORT RATE    prints `ready`; at the end one line of JSON a connection that did not fare
                                         well, [began, seconds, what], and one with how many there were, by who answered

Four threads take turns, so that one that waits does not hold the others up. A connection whose first packet was sent
again has lost it: the kernel counts that, and no clock is asked, which a busy machine would spoil.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import sys
import threading
import time

_TOTAL_RETRANS = 100  # the offset of tcpi_total_retrans in struct tcp_info, linux/tcp.h
_THREADS = 4
_PATIENCE = 20.0


def once(address: str, port: int) -> tuple[str, str]:
    """Who answers, and what went wrong."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(_PATIENCE)
        try:
            client.connect((address, port))
            info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            said = client.recv(256).decode().partition(" ")[0]
        except OSError as error:
            return "", str(error) or type(error).__name__
        (again,) = struct.unpack_from("I", info, _TOTAL_RETRANS)
        if not said:
            return "", "closed"
        return said, "first packet lost" if again else ""


def storm(address: str, port: int, rate: float) -> None:
    """Connections until SIGINT."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    wrong: list[tuple[float, float, str]] = []
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def work(turn: int) -> None:
        due = time.monotonic() + turn / rate
        while not stop.is_set():
            began = time.time()
            said, why = once(address, port)
            with lock:
                counts[said] = counts.get(said, 0) + 1
                if why:
                    wrong.append((began, time.time() - began, why))
            due = max(due + _THREADS / rate, time.monotonic() - 1.0)
            time.sleep(max(0.0, due - time.monotonic()))

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(_THREADS)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    for thread in threads:
        thread.join()
    for each in wrong:
        print(json.dumps(each))
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    storm(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
