"""Runs inside the booted kernel, with the checkout's own environment: a lab of two nodes, and what of it is fast.

    python -m tests.vm.fast_guest

    kernel without types, without conntrack, without tc's eBPF filters ─▶ each is told, what comes later is found
    lab with real daemons ─▶ connections on a node, across VXLAN, across plain routes ─▶ data and counters
    the kernel locked down ─▶ programs are loaded anew, and connections are fast
    nobody's rights ─▶ told

Modules are loaded when the kernel asks for them, as on a node: the daemons begin without conntrack.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipam_daemon.errors import CniError
from ipam_daemon.fastpath import FastPath, Unsupported, read_conntrack
from podwire.lab import cluster, demo, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import CONFIG, Container, add, containers, know_each_other, on_node, status, wait

PODS = "10.244.0.0/16,fd00:10:244::/56"
WAYS = re.compile(r'^podwire_fast_path_packets_total\{way="([a-z-]+)"\} ([0-9.e+]+)$', re.MULTILINE)
ASKED = Path("/proc/sys/kernel/modprobe")
FEWER = Path("/tmp/fewer-modules")
LAST = {**CONFIG, "last": True}  # as the installed one: no plugin follows
PORT = 8000
# Echoes, TCP and UDP, on all addresses.
SERVER = f"""
import socket, threading
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind(("::", {PORT}))
def datagrams():
    while True:
        udp.sendto(*udp.recvfrom(2000))
threading.Thread(target=datagrams, daemon=True).start()
listener = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    made, _ = listener.accept()
    while said := made.recv(65536):
        made.sendall(said)
    made.close()
"""
# Half a megabyte there and back, and forty datagrams; prints what of it came back as it was.
CLIENT = f"""
import os, socket, sys, threading
data = os.urandom(1 << 19)
made = socket.create_connection((sys.argv[1], {PORT}), 120)
sending = threading.Thread(target=made.sendall, args=(data,))
sending.start()
back = b""
while len(back) < len(data):
    back += made.recv(65536) or sys.exit("cut off")
sending.join()
made.close()
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
udp = socket.socket(family, socket.SOCK_DGRAM)
udp.settimeout(60)
udp.connect((sys.argv[1], {PORT}))
answers = []
for number in range(40):
    udp.send(b"%d" % number)
    answers.append(udp.recv(2000) == b"%d" % number)
print("intact" if back == data and all(answers) else "changed")
"""


def main() -> None:
    say("kernel", os.uname().release)
    for module in ("bridge", "br_netfilter"):  # which no node has without somebody who asks for them
        subprocess.run(["modprobe", module], check=False)
    be_patient()
    say("conntrack at first", "loaded" if is_loaded("nf_conntrack") else "not loaded")
    with hidden("/sys/kernel/btf"):
        say("no types", obstacle())
    with lacking("cls_bpf"):
        lab = cluster.up(LabState(name="fast", nodes=plan_nodes(2, PODS), pod_cidr=PODS, proxy="none"))
        know_each_other(lab)
        wait(lambda: not any("started" in state(lab, each.name) for each in lab.nodes), "a look at the kernel")
        say("no filters", state(lab, "node1"))
        seen = on_node(lab, "node1", "timeout", "10", "tc", "monitor").stdout
        say("no filters, ten seconds", "queues came or went" if "qdisc" in seen else "no queue came or went")
    subprocess.run(["modprobe", "cls_bpf"], check=True)
    with containers(lab, "node1", "here", 3) as (client, near, young), containers(lab, "node2", "there", 1) as (far,):
        story(lab, client, near, far)
        add(young)
        wait(lambda: "pw" in state(lab, "node1"), "the port of a pod that plugins may follow")
        say("not the last", re.sub("pw[0-9a-f]+", "PORT", state(lab, "node1")))
    say("nobody", as_nobody(obstacle))
    say("nobody's maps", as_nobody(maps_obstacle))
    say("end", "reached")


def story(lab: LabState, client: Container, near: Container, far: Container) -> None:
    """Connections from a pod of node1 to one there and one on node2."""
    add(client, LAST)
    addresses = {where: addresses_of(add(box, LAST).body) for where, box in (("pod", near), ("node", far))}
    for box in (near, far):
        box.start("/usr/bin/python3", "-IS", "-c", SERVER)
    wait(lambda: (state(lab, "node1"), state(lab, "node2")) == ("on: 2 pods", "on: 1 pods"), "a fast path")
    say("fast", "yes")
    for where, found in addresses.items():
        for version, address in found.items():
            say(f"{where} {version}", carried(lab, client, address))
    say("counted", "by the pod" if received(far) > 1 << 20 else "not by the pod")
    demo.set_backend(lab, "direct")
    wait(lambda: "eth0" in state(lab, "node1") and "eth0" in state(lab, "node2"), "the refusal of a link")
    say("direct", state(lab, "node1"))
    for version, address in addresses["node"].items():
        say(f"direct {version}", carried(lab, client, address))
    say("locked down", lock_down())
    demo.set_backend(lab, "vxlan")
    wait(lambda: state(lab, "node1") == "on: 2 pods" and state(lab, "node2") == "on: 1 pods", "programs anew")
    for version, address in addresses["node"].items():
        say(f"locked down {version}", carried(lab, client, address))


def say(name: str, answer: str) -> None:
    print(f"@{name}: {' '.join(answer.split())}", flush=True)


def be_patient() -> None:
    """Waits end when something holds; that it takes long is the processor's fault."""
    waits = process.wait_for

    def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
        waits(condition, 20 * seconds, what)

    process.wait_for = wait_for


# --- what a kernel lacks ----------------------------------------------------------------------------------------


def is_loaded(module: str) -> bool:
    return any(line.startswith(f"{module} ") for line in Path("/proc/modules").read_text().splitlines())


@contextmanager
def hidden(folder: str) -> Iterator[None]:
    """Nothing is in the folder."""
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def lacking(module: str) -> Iterator[None]:
    """The kernel gets all modules that it asks for but this one."""
    before = ASKED.read_text()
    FEWER.write_text(f'#!/bin/sh\ncase "$*" in *{module}*) exit 1 ;; esac\nexec {before.strip()} "$@"\n')
    FEWER.chmod(0o755)
    ASKED.write_text(str(FEWER))
    try:
        yield
    finally:
        ASKED.write_text(before)


def lock_down() -> str:
    """The strictest that a kernel knows of; what it says of itself then."""
    path = Path("/sys/kernel/security/lockdown")
    if not path.exists():
        subprocess.run(["mount", "-t", "securityfs", "none", "/sys/kernel/security"], check=True)
    path.write_text("confidentiality")
    return path.read_text()


def obstacle() -> str:
    """Why there is no fast path, as far as the kernel's types are concerned."""
    try:
        read_conntrack()
    except Unsupported as error:
        return str(error)
    return "none"


def maps_obstacle() -> str:
    """The same of the maps."""
    thread: Any = None
    conntrack: Any = None
    try:
        FastPath(thread, conntrack, ())
    except CniError as error:
        return str(error)
    return "none"


def as_nobody(ask: Callable[[], str]) -> str:
    """What a process without rights is told."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setuid(65534)
        os.write(writing, ask().encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, encoding="utf-8") as answer:
        return answer.read()


# --- the lab ----------------------------------------------------------------------------------------------------


def state(lab: LabState, node: str) -> str:
    return status(lab, node).fast_path


def addresses_of(result: Mapping[str, Any]) -> dict[int, str]:
    found = [each["address"].split("/")[0] for each in result["ips"]]
    return {6 if ":" in each else 4: each for each in found}


def counts(lab: LabState) -> dict[str, float]:
    """Packets by node and way."""
    found: dict[str, float] = {}
    for node in lab.nodes:
        page = on_node(lab, node.name, "curl", "-s", "-m", "60", f"http://{node.addresses[0]}:9817/metrics").stdout
        found |= {f"{node.name}/{way}": float(number) for way, number in WAYS.findall(page)}
    return found


def received(box: Container) -> int:
    """Bytes, as the interface of the pod counts them."""
    (link,) = json.loads(box.run("ip", "-j", "-s", "link", "show", "dev", "eth0").stdout)
    return int(link["stats64"]["rx"]["bytes"])


def carried(lab: LabState, client: Container, address: str) -> str:
    """What a connection brought back, and the ways that at least twenty packets of it took."""
    before, said = counts(lab), list[subprocess.CompletedProcess[str]]()

    def talk() -> bool:
        said.append(client.run("/usr/bin/python3", "-IS", "-c", CLIENT, address))
        return "refused" not in said[-1].stderr  # the server has not begun yet

    wait(talk, "a server")
    after, last = counts(lab), said[-1]
    fast = sorted(way for way, number in after.items() if number - before[way] >= 20)
    return f"{last.stdout.strip() or last.stderr.strip()[-200:]}, fast: {' '.join(fast)}"


if __name__ == "__main__":
    main()
