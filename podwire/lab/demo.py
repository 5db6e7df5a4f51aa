"""`make demo`: a lab, and stanza by stanza what it can do. Ends with `demo: OK`, or with what was not as it should be.

    up ─▶ addresses ─▶ reachability ─▶ the wire ─▶ down

Every stanza is a function of the Stage in STANZAS; a later feature adds its own. A stanza prints what it finds and
calls `stage.wrong` for what differs from what DESIGN.md says, so that one failure does not hide the next. The lab has
a name of its own and is removed at the end, whatever happens; what a killed demonstration leaves, `podwire lab down
--all` takes away.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from rich.console import Console
from rich.table import Table

from podwire.errors import PodwireError
from podwire.lab import cluster, names, process, state, status
from podwire.lab.program import plan_program
from podwire.lab.state import LabState
from podwire.lab.talk import ask

_WIDTH = 110  # of what is not a terminal
_WEB, _HOST_WEB = 80, 8080
_CAPTURE_SECONDS = 10

Object = dict[str, Any]


class Stage:
    """What a stanza has: the lab, somewhere to print, and somewhere to say what is wrong."""

    def __init__(self, lab: LabState, console: Console) -> None:
        self.lab = lab
        self.console = console
        self.failures: list[str] = []

    def title(self, text: str) -> None:
        """Begins a part."""
        self.console.print(f"\n[bold]{text}[/]", highlight=False)

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def wrong(self, what: str) -> None:
        """Something is not as it should be: the demonstration goes on, and fails in the end."""
        self.failures.append(what)

    def pod(self, name: str) -> Place:
        """A pod as a place to ask from and to."""
        found = next(p for p in cluster.pods(self.lab) if p["metadata"]["name"] == name)
        shown = status.pod_status(self.lab, found)
        return Place(name, Path(shown["netns"]), shown["addresses"][0], shown["node"])

    def node(self, name: str) -> Place:
        """A node itself as a place to ask from and to."""
        return Place(name, self.lab.netns(name), self.lab.node(name).addresses[0], name)


class Place(msgspec.Struct, frozen=True):
    """Somewhere in the lab: its network namespace, its address, its node."""

    name: str
    netns: Path
    address: str
    node: str


# --- what is shown on -------------------------------------------------------------------------------------------


def demo_pods() -> list[Object]:
    """Two pods on the first node, one on each other, and one on the network of each of the first two nodes."""
    pods = [("blue", "node1", False), ("green", "node1", False), ("red", "node2", False), ("gold", "node3", False)]
    hosts = [("host1", "node1", True), ("host2", "node2", True)]
    return [_pod(name, node, on_host) for name, node, on_host in [*pods, *hosts]]


def _pod(name: str, node: str, on_host: bool) -> Object:
    port = _HOST_WEB if on_host else _WEB
    ports = [{"containerPort": port}, {"containerPort": port, "protocol": "UDP"}]
    container = {"name": "web", "image": "echo", "ports": ports}
    spec: Object = {"nodeName": node, "hostNetwork": on_host, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def start_outside(lab: LabState) -> None:
    """An echo server on the host that is no node."""
    pod = {"metadata": {"name": "outside", "namespace": ""}, "spec": {}}
    program = plan_program(pod, {"name": "outside", "ports": [{"containerPort": _WEB}]}, ())
    process.start(lab.files, "outside", ["nsenter", f"--net={lab.netns('outside')}", "--", *program.words])


# --- stanzas ----------------------------------------------------------------------------------------------------


def show_addresses(stage: Stage) -> None:
    """Which node has which block, and which pod which address of it."""
    stage.title("Addresses")
    shown = status.status(stage.lab)
    table = _table("node", "underlay", "block", "pods")
    for node in shown["nodes"]:
        pods = [pod for pod in shown["pods"] if pod["node"] == node["name"]]
        lines = "\n".join(f"{pod['addresses'][0]:<15} {pod['name']}" for pod in pods)
        table.add_row(node["name"], ", ".join(node["addresses"]), ", ".join(node["blocks"]), lines)
    stage.console.print(table)
    addresses = [pod["addresses"][0] for pod in shown["pods"] if not pod["name"].startswith("host")]
    if len(set(addresses)) != len(addresses):
        stage.wrong(f"pods share an address: {addresses}")


class Check(msgspec.Struct, frozen=True):
    """A row of the matrix. `seen_as` is the address that the server must see; empty: the client's own, and its port.

    `answered_by` is the pod that must answer; empty: the target itself.
    """

    path: str
    source: Place
    target: Place
    address: str
    port: int
    protocol: str = "TCP"
    seen_as: str = ""
    answered_by: str = ""


def checks(stage: Stage) -> Iterator[Check]:
    """Every way from a pod, a node and a hostNetwork pod to another (DESIGN.md, section 5)."""
    blue, green, red, gold = (stage.pod(name) for name in ("blue", "green", "red", "gold"))
    host1, host2 = stage.pod("host1"), stage.pod("host2")
    node1, node2 = stage.node("node1"), stage.node("node2")
    yield Check("pod → pod, same node", blue, green, green.address, _WEB)
    yield Check("pod → pod, across nodes", blue, red, red.address, _WEB)
    yield Check("pod → pod, across nodes", gold, blue, blue.address, _WEB)
    yield Check("pod → pod, across nodes, UDP", red, gold, gold.address, _WEB, "UDP")
    yield Check("node → its pod", node1, blue, blue.address, _WEB)
    yield Check("node → pod of another node", node1, red, red.address, _WEB)
    yield Check("pod → its node", blue, node1, node1.address, _HOST_WEB, answered_by="host1")
    yield Check("pod → another node", blue, node2, node2.address, _HOST_WEB, seen_as=node1.address, answered_by="host2")
    yield Check("hostNetwork → pod, same node", host1, blue, blue.address, _WEB)
    yield Check("hostNetwork → pod, across nodes", host2, blue, blue.address, _WEB)
    yield Check("hostNetwork → hostNetwork", host1, host2, host2.address, _HOST_WEB)
    outside = Place("outside", stage.lab.netns("outside"), str(names.BEYOND_ADDRESS), "")
    yield Check("pod → outside the cluster", blue, outside, outside.address, _WEB, seen_as=node1.address)


def show_reachability(stage: Stage) -> None:
    """Who reaches whom, and whom the server sees."""
    stage.title("Reachability: whom does the server see?")
    table = _table("path", "from", "own address", "to", "server saw", "NAT", "")
    for check in checks(stage):
        try:
            answer = ask(check.source.netns, check.address, check.port, check.protocol)
        except PodwireError as error:
            table.add_row(check.path, check.source.name, "", check.target.name, "no answer", "", "[red]✗[/]")
            stage.wrong(f"{check.path}: {error}")
            continue
        good = answer.client == check.seen_as if check.seen_as else answer.untranslated
        good = good and answer.pod == (check.answered_by or check.target.name)
        nat = "no" if answer.untranslated else "masqueraded"
        mark = "[green]✓[/]" if good else "[red]✗[/]"
        table.add_row(check.path, check.source.name, answer.own, check.target.name, answer.client, nat, mark)
        if not good:
            wanted = check.seen_as or f"the client's own address {answer.own}"
            stage.wrong(f"{check.path}: {answer.pod} answered and saw {answer.client}, expected {wanted}")
    stage.console.print(table)
    stage.say("Pod to pod is never NATed. What the underlay cannot answer to (pod → another node's own address, and")
    stage.say("outside the cluster) leaves with the node's address.")


def show_wire(stage: Stage) -> None:
    """A packet from pod to pod, as the underlay sees it."""
    blue, red = stage.pod("blue"), stage.pod("red")
    node1, node2 = stage.node(blue.node), stage.node(red.node)
    stage.title(f"The wire: {blue.name} ({blue.address}) asks {red.name} ({red.address}); on the underlay that is")
    wanted = f"udp dst port 4789 and src host {node1.address} and dst host {node2.address}"
    with capture(stage.lab, node1.name, wanted) as lines:
        ask(blue.netns, red.address, _WEB)
        packet = lines()
    for line in packet:
        stage.say(f"  {line}")
    text = " ".join(packet)
    if not ("VXLAN" in text and f"{node1.address}." in text and f"{blue.address}." in text):
        stage.wrong(f"no VXLAN packet from {node1.name} with {blue.name}'s packet inside: {text or 'nothing captured'}")


@contextlib.contextmanager
def capture(lab: LabState, port: str, wanted: str) -> Iterator[Callable[[], list[str]]]:
    """Captures one packet on a port of the underlay's switch. It gives a function that waits for tcpdump's lines."""
    tcpdump_words = ["tcpdump", "-l", "-n", "-t", "-c", "1", "-i", port, wanted]
    with tempfile.TemporaryFile() as said:
        tcpdump = subprocess.Popen(
            ["nsenter", f"--net={lab.netns('underlay')}", "--", *tcpdump_words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.PIPE,
            env=process.marked_environment(lab.name),
        )
        try:
            _wait_listening(tcpdump)

            def lines() -> list[str]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tcpdump.wait(_CAPTURE_SECONDS)
                said.seek(0)
                return said.read().decode(errors="replace").splitlines()

            yield lines
        finally:
            tcpdump.kill()
            tcpdump.communicate()


def _wait_listening(tcpdump: subprocess.Popen[bytes]) -> None:
    assert tcpdump.stderr is not None
    said = b""
    deadline = time.monotonic() + _CAPTURE_SECONDS
    while b"listening on" not in said:
        if not select.select([tcpdump.stderr], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise PodwireError("tcpdump does not begin to listen")
        data = os.read(tcpdump.stderr.fileno(), 4096)
        if not data:
            raise PodwireError(f"tcpdump: {said.decode(errors='replace').strip()}")
        said += data


STANZAS: tuple[Callable[[Stage], None], ...] = (show_addresses, show_reachability, show_wire)


# --- running ----------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def perform(console: Console) -> list[str]:
    """Builds the lab, shows every stanza, removes the lab. Returns what was wrong."""
    lab = LabState(name=f"demo-{os.getpid():x}", nodes=state.plan_nodes(3))
    console.print(f"[bold]Podwire[/]: three nodes in namespaces of lab {lab.name}", highlight=False)
    stage = Stage(lab, console)
    began = time.monotonic()
    try:
        stage.lab = cluster.up(lab, lambda step: stage.say(f"  … {step}"))
        start_outside(lab)
        cluster.wait_ready(lab, cluster.apply(lab, demo_pods()))
        stage.say(f"  up with {len(demo_pods())} pods in {time.monotonic() - began:.1f} s")
        for stanza in STANZAS:
            stanza(stage)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # what is left to do is to leave nothing behind
        cluster.down(lab.name)
    return stage.failures


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Runs the demonstration. Returns 0 when everything was as it should be."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    if os.geteuid() != 0:
        console.print("demo: a lab is made of network namespaces: run this as root")
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        failures = perform(console)
    except PodwireError as error:
        failures = [str(error)]
    except KeyboardInterrupt:
        print("demo: interrupted")
        return 130
    for failure in failures:
        console.print(f"wrong: {failure}", markup=False, soft_wrap=True)
    console.print("\ndemo: FAILED" if failures else "\ndemo: OK")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
