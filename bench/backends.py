"""Every pod of a cluster, as a client of its Services meets it: each address answers, and says which one it is.

    python -m bench.backends PORT

It says the address that it was reached at, and closes. One process for all addresses, which the namespace that it runs
in holds as a whole network (ip route add local).
"""

from __future__ import annotations

import contextlib
import socket
import sys

_BACKLOG = 4096


def _serve(port: int) -> None:
    with socket.create_server(("0.0.0.0", port), backlog=_BACKLOG) as listener:
        print("serving", flush=True)
        while True:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                client.send(client.getsockname()[0].encode())


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
