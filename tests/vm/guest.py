"""Runs inside the booted kernel, with the standard library alone: loads nft scripts, sends packets, says what happened.

    python3 -IS guest.py FOLDER

FOLDER has the scripts that the host has rendered. Each answer is a line `@name: answer`; the kernel writes to the same
console. The file server shows the host's files, read-only; modules are the booted kernel's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

MODULES = (
    "bridge br_netfilter veth vxlan nf_tables nf_conntrack nft_nat nft_masq nft_reject nft_fib_inet nft_numgen sctp"
)
CLONE_NEWNET = 0x40000000
SECONDS = 10.0
libc = ctypes.CDLL(None, use_errno=True)


def main(folder: Path) -> None:
    for module in MODULES.split():
        subprocess.run(["modprobe", module], check=False, stderr=subprocess.DEVNULL)
    say("kernel", os.uname().release)
    for script in sorted(folder.glob("load-*.nft")):
        load(script)
    stage()
    services(folder / "services.nft")
    policies(folder / "policy.nft")
    say("end", "reached")


def say(name: str, answer: str) -> None:
    print(f"@{name}: {answer}", flush=True)


def run(*command: str, stdin: str | None = None) -> str:
    """What went wrong, empty for nothing."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    return " ".join((done.stderr or "failed").split()) if done.returncode else ""


def load(script: Path) -> None:
    """A script twice in an empty namespace: what it makes, and what it finds."""
    run("ip", "netns", "add", "load")
    wrong = ""
    for _ in range(2):
        wrong = wrong or run("ip", "netns", "exec", "load", "nft", "-f", str(script))
    say(script.stem, wrong or "loaded")
    run("ip", "netns", "del", "load")


def stage() -> None:
    """A node with two pods: the client 10.50.0.3, the server 10.50.0.2."""
    commands = ["netns add node", "netns add server", "netns add client", "-n node link set lo up"]
    for name, number in (("server", 2), ("client", 3)):
        subnet = "10.50.0" if name == "server" else "10.50.1"
        commands += [
            f"-n node link add {name} type veth peer name eth0 netns {name}",
            f"-n node addr add {subnet}.1/24 dev {name}",
            f"-n node link set {name} up",
            f"-n {name} addr add {subnet}.{number}/24 dev eth0",
            f"-n {name} link set eth0 up",
            f"-n {name} link set lo up",
            f"-n {name} route add default via {subnet}.1",
        ]
    commands.append("-n node route add default via 10.50.1.3")  # a node's way out, by which it asks for a ClusterIP
    wrong = [each for each in (run("ip", *command.split()) for command in commands) if each]
    wrong += [run("ip", "netns", "exec", "node", "sysctl", "-qw", "net.ipv4.ip_forward=1")]
    say("stage", "; ".join(filter(None, wrong)) or "built")
    for kind, protocol in ((socket.SOCK_STREAM, 0), (socket.SOCK_STREAM, socket.IPPROTO_SCTP), (socket.SOCK_DGRAM, 0)):
        threading.Thread(target=serve, args=("server", kind, protocol), daemon=True).start()


def inside(name: str) -> None:
    with open(f"/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), name)


def serve(name: str, kind: int, protocol: int) -> None:
    """Answers every client on port 8080 with its address. A thread of its own, since it stays in the namespace."""
    with contextlib.suppress(OSError):
        inside(name)
        listener = socket.socket(socket.AF_INET, kind, protocol)
        listener.bind(("0.0.0.0", 8080))
        if kind == socket.SOCK_STREAM:
            listener.listen()
        while True:
            if kind == socket.SOCK_STREAM:
                connection, peer = listener.accept()
                connection.sendall(peer[0].encode())
                connection.close()
            else:
                _, peer = listener.recvfrom(64)
                listener.sendto(peer[0].encode(), peer)


def ask(
    name: str, address: str, port: int, kind: int = socket.SOCK_STREAM, protocol: int = 0, wait: float = 3.0
) -> str:
    """What a client in a namespace gets: an answer, "refused" or "nothing"."""
    answers: list[str] = []

    def talk() -> None:
        inside(name)
        with socket.socket(socket.AF_INET, kind, protocol) as made:
            made.settimeout(wait)
            try:
                made.connect((address, port))
                if kind == socket.SOCK_DGRAM:
                    made.sendall(b"?")
                answers.append(made.recv(64).decode())
            except ConnectionRefusedError:
                answers.append("refused")
            except TimeoutError:
                answers.append("nothing")
            except OSError as error:
                answers.append(os.strerror(error.errno or 0))

    thread = threading.Thread(target=talk)
    thread.start()
    thread.join()
    return answers[0] if answers else "nothing at all"


def services(script: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while ask("client", "10.50.0.2", 8080) != "10.50.1.3" and time.monotonic() < deadline:
        time.sleep(0.2)
    wrong = run("ip", "netns", "exec", "node", "nft", "-f", str(script))
    say("services loaded", wrong or "yes")
    say("tcp", ask("client", "10.96.0.10", 80))
    say("udp", ask("client", "10.96.0.10", 80, socket.SOCK_DGRAM))
    say("sctp", ask("client", "10.96.0.10", 80, socket.SOCK_STREAM, socket.IPPROTO_SCTP))
    say("from the node", ask("node", "10.96.0.10", 80))
    say("no endpoints", ask("client", "10.96.0.20", 80))
    say("no endpoints, udp", ask("client", "10.96.0.20", 80, socket.SOCK_DGRAM))
    say("hairpin", ask("server", "10.96.0.10", 80))


def policies(script: Path) -> None:
    say("policy loaded", run("ip", "netns", "exec", "node", "nft", "-f", str(script)) or "yes")
    say("allowed port", ask("client", "10.50.0.2", 8080))
    say("denied port", ask("client", "10.50.0.2", 8081))
    say("denied protocol", ask("client", "10.96.0.10", 80, socket.SOCK_DGRAM))
    say("through the service", ask("client", "10.96.0.10", 80))
    say("own node", ask("node", "10.50.0.2", 8080))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
