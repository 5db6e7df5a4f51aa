"""`make demo`: a lab, and stanza by stanza what it can do. Ends with `demo: OK`, or with what was not as it should be.

    up ─▶ addresses ─▶ reachability ─▶ the wire ─▶ a Service ─▶ another backend ─▶ a policy ─▶ down

Every stanza is a function of the Stage in STANZAS; a later feature adds its own. A stanza prints what it finds and
calls `stage.wrong` for what differs from what DESIGN.md says, so that one failure does not hide the next. The lab has
a name of its own and is removed at the end, whatever happens; what a killed demonstration leaves, `podwire lab down
--all` takes away.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from rich.console import Console
from rich.table import Table

from podwire.errors import PodwireError
from podwire.lab import cluster, names, node, process, state, status, topology
from podwire.lab.agent import daemon_status
from podwire.lab.api.kinds import ENDPOINT_SLICES, SERVICES
from podwire.lab.demo_policy import show_policy
from podwire.lab.demo_traffic import capture, pinging
from podwire.lab.program import plan_program
from podwire.lab.state import LabState
from podwire.lab.talk import Answer, ask

_WIDTH = 120  # of what is not a terminal
POD_CIDR = "10.244.0.0/16,fd00:10:244::/56"
_WEB, _HOST_WEB = 80, 8080
_REQUESTS = 30
_SERVICE_SECONDS = 90.0

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
        return Place(name, Path(shown["netns"]), tuple(shown["addresses"]), shown["node"])

    def node(self, name: str) -> Place:
        """A node itself as a place to ask from and to."""
        return Place(name, self.lab.netns(name), self.lab.node(name).addresses, name)


class Place(msgspec.Struct, frozen=True):
    """Somewhere in the lab: its network namespace, its addresses, its node."""

    name: str
    netns: Path
    addresses: tuple[str, ...]
    node: str

    def of(self, family: int) -> str:
        """Its address of a family."""
        return next(each for each in self.addresses if (":" in each) == (family == 6))


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
    labels = {} if on_host or name == "blue" else {"app": "web"}  # blue is the client of the Service
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def demo_services() -> list[Object]:
    """The same pods behind a Service of each external traffic policy."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"web-{policy.lower()}"},
            "spec": {
                "type": "NodePort",
                "selector": {"app": "web"},
                "externalTrafficPolicy": policy,
                "ports": [{"port": _WEB}],
            },
        }
        for policy in ("Cluster", "Local")
    ]


def start_outside(lab: LabState) -> None:
    """An echo server on the host that is no node; it answers when this returns."""
    pod = {"metadata": {"name": "outside", "namespace": ""}, "spec": {}}
    program = plan_program(pod, {"name": "outside", "ports": [{"containerPort": _WEB}]}, ())
    process.start(lab.files, "outside", ["nsenter", f"--net={lab.netns('outside')}", "--", *program.words])
    here = Place("outside", lab.netns("outside"), (), "")
    for family in lab.families:
        _wait_answer(here, str(names.BEYOND_ADDRESSES[family]), "the echo server outside")


# --- stanzas ----------------------------------------------------------------------------------------------------


def show_addresses(stage: Stage) -> None:
    """Which node has which block, and which pod which address of it."""
    stage.title("Addresses")
    shown = status.status(stage.lab)
    table = _table("node", "underlay", "block", "pods")
    for each in shown["nodes"]:
        pods = [pod for pod in shown["pods"] if pod["node"] == each["name"]]
        lines = "\n".join(f"{pod['name']:<7}{' '.join(pod['addresses'])}" for pod in pods)
        table.add_row(each["name"], "\n".join(each["addresses"]), "\n".join(each["blocks"]), lines)
    stage.console.print(table)
    addresses = [each for pod in shown["pods"] if not pod["name"].startswith("host") for each in pod["addresses"]]
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
    """Every way from a pod, a node and a hostNetwork pod to another (DESIGN.md, section 5), by each family."""
    for family in stage.lab.families:
        yield from _checks(stage, family)


def _checks(stage: Stage, family: int) -> Iterator[Check]:
    blue, green, red, gold = (stage.pod(name) for name in ("blue", "green", "red", "gold"))
    host1, host2 = stage.pod("host1"), stage.pod("host2")
    node1, node2 = stage.node("node1"), stage.node("node2")

    def check(path: str, source: Place, target: Place, port: int = _WEB, **more: str) -> Check:
        return Check(path, source, target, target.of(family), port, **more)

    yield check("pod → pod, same node", blue, green)
    yield check("pod → pod, across nodes", blue, red)
    yield check("pod → pod, across nodes", gold, blue)
    yield check("pod → pod, across nodes, UDP", red, gold, protocol="UDP")
    yield check("node → its pod", node1, blue)
    yield check("node → pod of another node", node1, red)
    yield check("pod → its node", blue, node1, _HOST_WEB, answered_by="host1")
    yield check("pod → another node", blue, node2, _HOST_WEB, seen_as=node1.of(family), answered_by="host2")
    yield check("hostNetwork → pod, same node", host1, blue)
    yield check("hostNetwork → pod, across nodes", host2, blue)
    yield check("hostNetwork → hostNetwork", host1, host2, _HOST_WEB)
    beyond = str(names.BEYOND_ADDRESSES[family])
    outside = Place("outside", stage.lab.netns("outside"), (beyond,), "")
    yield check("pod → outside the cluster", blue, outside, seen_as=node1.of(family))


def judge(check: Check) -> tuple[Answer | None, str]:
    """The answer, and what is wrong about it; empty when all is well."""
    try:
        answer = ask(check.source.netns, check.address, check.port, check.protocol)
    except PodwireError as error:
        return None, f"{check.path}: {error}"
    good = answer.client == check.seen_as if check.seen_as else answer.untranslated
    if good and answer.pod == (check.answered_by or check.target.name):
        return answer, ""
    wanted = check.seen_as or f"the client's own address {answer.own}"
    return answer, f"{check.path}: {answer.pod} answered and saw {answer.client}, expected {wanted}"


def show_reachability(stage: Stage) -> None:
    """Who reaches whom, and whom the server sees."""
    stage.title("Reachability: whom does the server see?")
    table = _table("path", "from", "own address", "to", "server saw", "NAT", "")
    for check in checks(stage):
        answer, wrong = judge(check)
        mark = "[red]✗[/]" if wrong else "[green]✓[/]"
        if wrong:
            stage.wrong(wrong)
        if answer is None:
            table.add_row(check.path, check.source.name, "", check.target.name, "no answer", "", mark)
            continue
        nat = "no" if answer.untranslated else "masqueraded"
        table.add_row(check.path, check.source.name, answer.own, check.target.name, answer.client, nat, mark)
    stage.console.print(table)
    stage.say("Pod to pod is never NATed. What the underlay cannot answer to (pod → another node's own address, and")
    stage.say("outside the cluster) leaves with the node's address.")


def show_wire(stage: Stage) -> None:
    """A packet from pod to pod, as the underlay sees it."""
    blue, red = stage.pod("blue"), stage.pod("red")
    node1 = stage.node(blue.node).of(4)
    stage.title(f"The wire: {blue.name} ({blue.of(4)}) asks {red.name} ({red.of(4)}); on the underlay that is")
    # tcpdump has no words for what is inside: after UDP, VXLAN and Ethernet come protocol, source and destination
    source, target = (int(ipaddress.ip_address(each.of(4))) for each in (blue, red))
    inside = f"udp[39] = 6 and udp[42:4] = {source} and udp[46:4] = {target}"
    text = _packet(stage, f"udp dst port 4789 and src host {node1} and {inside}", blue, red)
    if not ("VXLAN" in text and f"{node1}." in text and f"{blue.of(4)}." in text):
        stage.wrong(f"no VXLAN packet from {blue.node} with {blue.name}'s packet inside: {text or 'nothing captured'}")


def _packet(stage: Stage, wanted: str, source: Place, target: Place) -> str:
    """What tcpdump says of one packet at the source's node while the source asks the target."""
    with capture(stage.lab, source.node, wanted) as lines:
        ask(source.netns, target.of(4), _WEB)
        packet = lines()
    for line in packet:
        stage.say(f"  {line}")
    return " ".join(packet)


def show_service(stage: Stage) -> None:
    """A Service: its endpoints, where a pod's requests go, and whom pods see when somebody outside asks."""
    api = cluster.client(stage.lab)
    cluster.apply(stage.lab, demo_services())
    specs = {policy: api.get(SERVICES, f"web-{policy.lower()}", "default")["spec"] for policy in ("Cluster", "Local")}
    blue, address = stage.pod("blue"), specs["Cluster"]["clusterIP"]
    for spec in specs.values():
        _wait_answer(blue, spec["clusterIP"], f"the Service {spec['clusterIP']}")
    slices = api.list(ENDPOINT_SLICES, labels="kubernetes.io/service-name=web-cluster")
    ready = [one for each in slices for one in each["endpoints"] if one["conditions"]["ready"]]
    stage.title(f"A Service: {address}:{_WEB} has {len(ready)} endpoints; blue sends it {_REQUESTS} requests")
    answers = _requests(stage, blue, address, _WEB)
    table = _table("endpoint", "node", "address", "requests", "saw the client as")
    for one in ready:
        name = one["targetRef"]["name"]
        got = [answer for answer in answers if answer.pod == name]
        seen = ", ".join(sorted({answer.client for answer in got}))
        table.add_row(name, one["nodeName"], one["addresses"][0], f"{len(got):>2} {'▪' * len(got)}", seen)
    stage.console.print(table)
    if len(ready) != 3 or not {answer.pod for answer in answers} <= {one["targetRef"]["name"] for one in ready}:
        stage.wrong(f"a Service of green, red and gold has the endpoints {ready}")
    if not all(answer.untranslated for answer in answers):
        stage.wrong("a pod's own address was lost on the way to a ClusterIP")
    _show_policies(stage, {policy: spec["ports"][0]["nodePort"] for policy, spec in specs.items()})


def _show_policies(stage: Stage, node_ports: dict[str, int]) -> None:
    outside = Place("outside", stage.lab.netns("outside"), (), "")
    stage.say("")
    table = _table("externalTrafficPolicy", "outside asks", "answered", "they saw the client as", "")
    for policy, port in node_ports.items():
        node1 = stage.node("node1")
        answers = _requests(stage, outside, node1.of(4), port)
        counts = Counter(answer.pod for answer in answers)
        seen, own = {answer.client for answer in answers}, {answer.own for answer in answers}
        kept = seen == own and set(counts) == {"green"}
        good = kept if policy == "Local" else bool(seen) and not seen & own
        if not good:
            stage.wrong(f"externalTrafficPolicy {policy}: {dict(counts)} answered and saw {seen}, the client is {own}")
        told = ", ".join(f"{pod} {count}" for pod, count in sorted(counts.items()))
        mark = "[green]✓[/]" if good else "[red]✗[/]"
        table.add_row(policy, f"node1, {node1.of(4)}:{port}", told, ", ".join(sorted(seen)), mark)
    stage.console.print(table)
    stage.say(
        "Cluster spreads over all nodes, so node1 puts an address of its own in the client's place. Local stays on"
    )
    stage.say("the node that was asked, and keeps the client's.")


def _wait_answer(source: Place, address: str, what: str) -> None:
    """Waits until somebody answers there: the server was started, the Service made, a moment ago."""

    def answers() -> bool:
        with contextlib.suppress(PodwireError):
            return bool(ask(source.netns, address, _WEB, seconds=0.5).pod)
        return False

    process.wait_for(answers, _SERVICE_SECONDS, f"{what} to answer")


def _requests(stage: Stage, source: Place, address: str, port: int) -> list[Answer]:
    """The answers to _REQUESTS requests; the first that gets none is wrong."""
    answers: list[Answer] = []
    try:
        answers += [ask(source.netns, address, port) for _ in range(_REQUESTS)]
    except PodwireError as error:
        stage.wrong(str(error))
    return answers


def show_backend(stage: Stage) -> None:
    """Plain routes instead of VXLAN, while a pod is pinging."""
    blue, red = stage.pod("blue"), stage.pod("red")
    stage.title("Another backend, while blue pings red a hundred times a second by both families")
    with contextlib.ExitStack() as stack:
        pings = [stack.enter_context(pinging(blue.netns, red.of(family))) for family in stage.lab.families]
        for backend in ("direct", "auto"):
            stage.say(f"  podwire cluster set --backend {backend}")
            set_backend(stage.lab, backend)
            text = _packet(stage, f"tcp and src host {blue.of(4)} and dst host {red.of(4)}", blue, red)
            if f"{blue.of(4)}." not in text or "VXLAN" in text:
                stage.wrong(f"{backend}: {blue.name}'s packet is not on the underlay: {text or 'nothing captured'}")
        for lost in pings:
            sent, answered = lost()
            stage.say(f"  {sent} pings, {answered} answered")
            if answered < sent:
                stage.wrong(f"{sent - answered} of {sent} pings were lost while the backend changed")


def set_backend(lab: LabState, backend: str, seconds: float = 90.0) -> None:
    """Changes the lab's backend, and waits until every node has it in its routes. Raises PodwireError."""
    command = [*node.enter_command(lab, lab.nodes[0].name), *node.PYTHON, "-m", "podwire.cli.main", "cluster", "set"]
    config = lab.files.node_path(lab.nodes[0].name, "/etc/podwire") / "ipamd.yaml"
    topology.run([*command, "--backend", backend, "--config", str(config)])
    for each in lab.nodes:
        process.wait_for(partial(_has, lab, each.name, backend), seconds, f"{each.name} to be {backend}")


def _has(lab: LabState, name: str, backend: str) -> bool:
    said = daemon_status(lab.files.ipamd_socket(name))
    return said is not None and said.ready and said.backend == backend


STANZAS: tuple[Callable[[Stage], None], ...] = (
    show_addresses, show_reachability, show_wire, show_service, show_backend, show_policy,
)  # fmt: skip


# --- running ----------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def perform(console: Console) -> list[str]:
    """Builds the lab, shows every stanza, removes the lab. Returns what was wrong."""
    lab = LabState(
        name=f"demo-{os.getpid():x}", nodes=state.plan_nodes(3, POD_CIDR), pod_cidr=POD_CIDR, proxy="nftables"
    )
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
