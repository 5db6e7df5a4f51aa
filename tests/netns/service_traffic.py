"""The ends of Services' connections, run in namespaces that a test has made. Standard library only.

serve ADDRESS… PORT    answers over TCP and UDP on each address: `<address> <client's address>`
ask                    reads requests as lines of JSON, answers each with a line: what became of some connections
load ADDRESS PORT      one connection after the other until SIGINT; prints how many, and what failed
sctp-send, sctp-take   one SCTP INIT, crafted, for a kernel without SCTP sockets
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import sys
import threading
import time

TIMEOUT = 0.5
"""Seconds after which a connection that nobody refused counts as dropped; on the way there is no latency."""
PATIENCE = 60.0
LOST = "lost"
_TOTAL_RETRANS = 100  # the offset of tcpi_total_retrans in struct tcp_info, linux/tcp.h


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def serve(addresses: list[str], port: int) -> None:
    for address in addresses:
        listener = socket.create_server((address, port), family=family_of(address), backlog=512)
        datagrams = socket.socket(family_of(address), socket.SOCK_DGRAM)
        datagrams.bind((address, port))
        threading.Thread(target=_accept, args=(listener, address), daemon=True).start()
        threading.Thread(target=_echo, args=(datagrams, address), daemon=True).start()
    print("ready", flush=True)
    signal.pause()


def _accept(listener: socket.socket, address: str) -> None:
    while True:
        connection, peer = listener.accept()
        with connection:
            connection.sendall(f"{address} {peer[0]}".encode())


def _echo(datagrams: socket.socket, address: str) -> None:
    while True:
        _, peer = datagrams.recvfrom(64)
        datagrams.sendto(f"{address} {peer[0]}".encode(), peer)


def was_repeated(client: socket.socket) -> bool:
    """Whether a packet of a TCP connection was sent again. Asked of the kernel: a busy machine is slow, and loses
    nothing."""
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOTAL_RETRANS + 4)
    return bool(struct.unpack_from("I", info, _TOTAL_RETRANS)[0])


def connect(protocol: str, address: str, port: int, timeout: float = TIMEOUT, *, at_once: bool = False) -> str:
    """What the server says, or `refuse`, or `drop`; LOST if it has to be `at_once`, and the first packet was not
    answered."""
    kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
    with socket.socket(family_of(address), kind) as client:
        client.settimeout(timeout)
        try:
            client.connect((address, port))
            if protocol == "UDP":
                client.send(b"?")
            said = client.recv(256).decode() or "closed"
            return LOST if at_once and was_repeated(client) else said
        except TimeoutError:
            return "drop"
        except ConnectionRefusedError:
            return "refuse"
        except PermissionError:
            return "refuse"  # what sendto() says of a packet of the node itself that was rejected
        except OSError as error:
            return str(error)


def ask() -> None:
    """`expected` is what may be seen; asking ends when all of it was seen, something else was, or after `times`."""
    for line in sys.stdin:
        request = json.loads(line)
        seen: dict[str, None] = {}
        for _ in range(request["times"]):
            got = connect(request["protocol"], request["address"], request["port"])
            if got == "drop" and got not in request["expected"]:  # or the machine is busy
                got = connect(request["protocol"], request["address"], request["port"], PATIENCE)
            seen[got] = None
            server = got.partition(" ")[0]
            if server not in request["expected"] or {s.partition(" ")[0] for s in seen} == set(request["expected"]):
                break
        print(json.dumps(list(seen)), flush=True)


def load(address: str, port: int) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    counts: dict[str, int] = {}
    print("ready", flush=True)
    while not stop.is_set():
        began = time.monotonic()
        got = connect("TCP", address, port, PATIENCE, at_once=True)
        what = got if got.startswith("[") else got.partition(" ")[0]  # an error in full, of an answer who gave it
        counts[what] = counts.get(what, 0) + 1
        time.sleep(max(0.0, 0.002 - (time.monotonic() - began)))
    print(json.dumps(counts), flush=True)


# --- SCTP (RFC 9260) ------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sctp_init(source_port: int, port: int) -> bytes:
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 0x1234, 65536, 1, 1, 0x5678)
    header = struct.pack("!HHI", source_port, port, 0)
    checksum = struct.pack("<I", crc32c(header + bytes(4) + chunk))
    return header + checksum + chunk


def sctp_send(address: str, port: int) -> None:
    with socket.socket(family_of(address), socket.SOCK_RAW, socket.IPPROTO_SCTP) as raw:
        raw.sendto(sctp_init(40000, port), (address, 0))


def sctp_take(version: str) -> None:
    family = socket.AF_INET6 if version == "6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_SCTP) as raw:
        raw.settimeout(PATIENCE)
        print("ready", flush=True)
        packet, peer = raw.recvfrom(2048)
        payload = packet if version == "6" else packet[(packet[0] & 15) * 4 :]
        _, port, _ = struct.unpack_from("!HHI", payload)
        (checksum,) = struct.unpack_from("<I", payload, 8)
        valid = checksum == crc32c(payload[:8] + bytes(4) + payload[12:])
        print(json.dumps({"from": peer[0], "port": port, "valid": valid}), flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "serve":
        serve(rest[:-1], int(rest[-1]))
    elif what == "ask":
        ask()
    elif what == "load":
        load(rest[0], int(rest[1]))
    elif what == "sctp-send":
        sctp_send(rest[0], int(rest[1]))
    elif what == "sctp-take":
        sctp_take(rest[0])
