"""What others have to do with a pod's packets, and kernels that lack what it takes: the fast path stands back.

Each story begins with connections that are fast, and somebody comes: a queue, a filter, a chain, a policy of IPsec. The
pod takes the long way within a few rounds, past what was put there, which nobody touches; and is fast again afterwards.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from podwire.lab import demo, node, process
from podwire.lab.cni import Attachment, Runtime
from podwire.lab.state import MARK, LabState
from tests.netns.busy_flows import inside
from tests.netns.containers import Container, containers, status, wait
from tests.netns.contenders import DEBIAN
from tests.netns.fast_fixtures import PATIENCE, Pod, Tcp, Udp, configure, filters, lab, pods, succeed, trio

__all__ = ["lab", "trio"]

MBIT = 1_000_000
RATE, BURST = 80 * MBIT, 4 * MBIT  # bits a second, bits
SIZE = 4 << 20
LIMITS = {"ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST}

# --- what somebody puts somewhere ---------------------------------------------------------------------------------

# Shell lines, undone by those after the bar; what status says then.
CHAIN = (
    "nft add table netdev foreign; nft add chain netdev foreign look '{ type filter hook %s device {dev} priority 0; }'"
)
PLACE = "tc qdisc add dev {dev} clsact 2>/dev/null; "  # it may have one
QUEUES = {
    "a token bucket": (
        "tc qdisc add dev {dev} root tbf rate 1gbit burst 1mb latency 50ms",
        "tc qdisc del dev {dev} root",
    ),
    "classes": ("tc qdisc add dev {dev} root handle 1: htb", "tc qdisc del dev {dev} root"),
}
LOOKERS = {
    "a filter of what comes": (
        PLACE + "tc filter add dev {dev} ingress prio 7 protocol ip u32 match u32 1 0xffffffff",
        "tc filter del dev {dev} ingress prio 7",
    ),
    "a place for filters of another kind": (
        "tc qdisc del dev {dev} clsact 2>/dev/null; tc qdisc add dev {dev} ingress",
        "tc qdisc del dev {dev} ingress",
    ),
    "an nft chain of what comes": (CHAIN % "ingress", "nft delete table netdev foreign"),
}
AT_PORTS = (
    QUEUES
    | LOOKERS
    | {
        "a filter of what is sent": (
            PLACE + "tc filter add dev {dev} egress prio 7 protocol ip u32 match u32 1 0xffffffff",
            "tc filter del dev {dev} egress prio 7",
        ),
        "an nft chain of what is sent": (CHAIN % "egress", "nft delete table netdev foreign"),
    }
)


def everything_at(lab: LabState, name: str, device: str) -> list[str]:
    """What there is of others: queues, filters and chains."""
    shown = succeed(lab, name, f"tc qdisc show dev {device}")
    qdiscs = re.findall(r"qdisc (?!clsact)\S+ .*?(?= direct_|$)", shown, re.MULTILINE)
    found = [
        line for line in filters(lab, name, device).splitlines() if "podwire" not in line and "pref 65535" not in line
    ]
    return [*qdiscs, *found, succeed(lab, name, "nft list tables netdev; nft list ruleset netdev")]


@contextmanager
def put(lab: LabState, name: str, device: str, lines: tuple[str, str]) -> Iterator[None]:
    """What somebody puts at a device of a node, there until the end, and as it was."""
    there, away = (line.replace("{dev}", device) for line in lines)
    succeed(lab, name, there)
    before = everything_at(lab, name, device)
    try:
        yield
        assert everything_at(lab, name, device) == before
    finally:
        succeed(lab, name, away)


# Of each kind one in `make test`.
QUICK = ("a token bucket", "a filter of what is sent")


@pytest.mark.parametrize(
    "lines",
    [pytest.param(each, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, each in AT_PORTS.items()],
)
def test_who_looks_at_a_port_sees_its_packets(trio: list[Pod], lines: tuple[str, str]) -> None:
    here, beside, _ = trio
    with Udp(here, beside) as flow:
        flow.until_fast()
        with put(here.lab, "node1", beside.port, lines):
            flow.until_slow()
            wait(lambda: beside.port in status(here.lab, "node1").fast_path, "the daemon to say so")
        flow.until_fast()


@pytest.mark.slow
@pytest.mark.parametrize("lines", LOOKERS.values(), ids=LOOKERS.keys())
def test_who_looks_at_the_vxlan_device_sees_what_comes(trio: list[Pod], lines: tuple[str, str]) -> None:
    here, _, there = trio
    with Udp(here, there) as flow:
        flow.until_fast()
        with put(here.lab, "node1", "pw-vxlan", lines):
            wait(
                lambda: flow.taken(partial(flow.exchange, 10))["node1", "from-node"] == 0, "what comes to be looked at"
            )
            wait(lambda: "pw-vxlan" in status(here.lab, "node1").fast_path, "the daemon to say so")
        flow.until_fast()


@pytest.mark.slow
def test_who_looks_at_the_underlay_sees_what_comes(trio: list[Pod]) -> None:
    here, _, there = trio
    demo.set_backend(here.lab, "direct")
    at_underlay = {
        "a chain": LOOKERS["an nft chain of what comes"],
        "ingress": ("tc qdisc add dev {dev} ingress", "tc qdisc del dev {dev} ingress"),
        "a filter": (LOOKERS["a filter of what comes"][0], "tc qdisc del dev {dev} clsact"),
    }
    try:
        with Udp(here, there) as flow:
            for lines in at_underlay.values():
                flow.until_fast()
                with put(here.lab, "node1", "eth0", lines):
                    wait(lambda: flow.taken(partial(flow.exchange, 10))["node1", "from-node"] == 0, "the long way in")
                    wait(lambda: "eth0" in status(here.lab, "node1").fast_path, "the daemon to say so")
            flow.until_fast()
    finally:
        demo.set_backend(here.lab, "vxlan")


def test_where_packets_may_have_to_be_encrypted_none_goes_round_it(trio: list[Pod]) -> None:
    here, beside, there = trio
    about = "src 10.244.0.0/16 dst 10.99.0.0/16 dir out"
    with Udp(here, beside) as near, Udp(here, there) as far:
        near.until_fast()
        far.until_fast()
        succeed(
            here.lab, "node1", f"ip xfrm policy add {about} tmpl src 172.31.0.11 dst 172.31.0.99 proto esp mode tunnel"
        )
        try:
            wait(lambda: not far.taken(partial(far.exchange, 10))["node1", "node"], "the long way to other nodes")
            wait(lambda: not far.taken(partial(far.exchange, 10))["node1", "from-node"], "the long way from them")
            assert "IPsec" in status(here.lab, "node1").fast_path
            near.until_fast()
            assert succeed(here.lab, "node1", "ip xfrm policy").startswith("src 10.244.0.0/16 dst 10.99.0.0/16")
        finally:
            succeed(here.lab, "node1", f"ip xfrm policy delete {about}")
        far.until_fast()


PROXY_PORT = 8999
DIVERTED = (
    "nft add table ip foreign; nft add chain ip foreign pre '{{ type filter hook prerouting priority mangle; }}'; "
    "nft add rule ip foreign pre ip saddr {client} ip daddr {server} tcp dport {port} meta mark set 7; "
    "ip route add local default dev lo table 78; ip rule add fwmark 7 lookup 78"
)
NOT_DIVERTED = "ip rule del fwmark 7 lookup 78; ip route flush table 78; nft delete table ip foreign"


def transparent() -> socket.socket:
    """Takes connections to anybody's address."""
    made = socket.socket()
    made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    made.bind(("0.0.0.0", PROXY_PORT))
    made.listen()
    return made


def test_what_a_mark_leads_to_a_proxy_arrives_there(trio: list[Pod]) -> None:
    """Between nodes: the connection is established and translated by nobody, and its packets are not the other pod's.
    Within the node a mark leads nowhere, and neighbours stay fast."""
    here, beside, there = trio
    about = {"client": here.addresses[4], "server": there.addresses[4], "port": PROXY_PORT}
    with Udp(here, beside) as near, Udp(here, there) as far, inside(here.lab.netns("node1"), transparent) as proxy:
        far.until_fast()
        proxy.settimeout(PATIENCE)
        succeed(here.lab, "node1", DIVERTED.format(**about))
        try:
            wait(lambda: "ask for a mark" in status(here.lab, "node1").fast_path, "the daemon to say so")
            assert not any(taken for (at, _), taken in far.taken(partial(far.exchange, 10)).items() if at == "node1")
            assert near.is_fast()
            with here.socket(4, socket.SOCK_STREAM) as client:
                client.connect((there.addresses[4], PROXY_PORT))
                with proxy.accept()[0] as server:
                    server.settimeout(PATIENCE)
                    assert server.getsockname() == (there.addresses[4], PROXY_PORT)
                    for _ in range(20):
                        for one, other in ((client, server), (server, client)):
                            one.send(b"?")
                            assert other.recv(16) == b"?"
        finally:
            succeed(here.lab, "node1", NOT_DIVERTED)
        far.until_fast()


# --- limits -------------------------------------------------------------------------------------------------------


def holds(flow: Tcp) -> None:
    """That a limit holds in both directions: what exceeds the burst takes its time."""
    for one, other in ((flow.client, flow.server), (flow.server, flow.client)):
        began = time.monotonic()
        flow.send(one, other, SIZE)
        assert time.monotonic() - began >= (8 * SIZE - BURST) / RATE


@pytest.mark.slow
def test_a_pod_with_limits_of_ours_is_never_known(trio: list[Pod]) -> None:
    here, _, _ = trio
    config = {"cniVersion": "1.1.0", "name": "podwire", "type": "podwire", "runtimeConfig": {"bandwidth": LIMITS}}
    with (
        pods(here.lab, "node1", config=config) as (limited,),
        pods(here.lab, "node1") as (later,),
        Udp(here, later) as other,
        Tcp(here, limited) as flow,
    ):
        other.until_fast()  # a pod that came after it is known
        assert not any(flow.taken(lambda: holds(flow)).values())


@contextmanager
def chained(
    lab: LabState, folder: Path, *plugins: dict[str, object]
) -> Iterator[tuple[Runtime, Attachment, Container]]:
    """A runtime of node1 whose list has Podwire and then these, and what it attaches."""
    bin_dir = lab.files.node_path("node1", "/opt/cni/bin")
    for name in ("portmap", "bandwidth"):
        if not (bin_dir / name).exists():
            (bin_dir / name).symlink_to(DEBIAN / name)
    listed = {"cniVersion": "1.0.0", "name": "chained", "plugins": [{"type": "podwire"}, *plugins]}
    folder.joinpath("10-chained.conflist").write_text(json.dumps(listed))
    mapping = [{"hostPort": 18081, "containerPort": 80, "protocol": "tcp"}]
    with containers(lab, "node1", "chained", 1) as (box,):
        about = Attachment(container_id=box.name, netns=box.netns, capabilities=(("portMappings", mapping),))
        yield Runtime(node.enter_command(lab, "node1"), bin_dir, folder, {MARK: lab.name}), about, box


BANDWIDTH: dict[str, object] = {"type": "bandwidth", **LIMITS}
PORTMAP: dict[str, object] = {"type": "portmap", "capabilities": {"portMappings": True}}
LATE = """#!/bin/sh
test "$CNI_COMMAND" = ADD || exit 0
sleep 8
exec {python} -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))'
"""
needs_reference = pytest.mark.skipif(
    not (DEBIAN / "bandwidth").exists(), reason="needs Debian's containernetworking-plugins"
)


@contextmanager
def waiting(lab: LabState, after: float) -> Iterator[None]:
    """Node1 waits for plugins that follow, as daemons do."""
    configure(lab, "node1", after)
    try:
        node.wait_daemon(lab, "node1")
        yield
    finally:
        configure(lab, "node1", 0.0)
        node.wait_daemon(lab, "node1")


def attached_limits_hold(trio: list[Pod], folder: Path, *plugins: dict[str, object]) -> None:
    here = trio[0]
    with waiting(here.lab, 5.0), chained(here.lab, folder, *plugins) as (runtime, about, box):
        result = asyncio.run(runtime.add(about))
        try:
            with pods(here.lab, "node1") as (later,), Udp(here, later) as other:
                other.until_fast()  # a pod that came after it is known
                with Tcp(here, Pod(box, result)) as flow:
                    assert not any(flow.taken(lambda: holds(flow)).values())
        finally:
            asyncio.run(runtime.delete(about, result))
    assert "ifb" not in succeed(here.lab, "node1", "ip -br link show type ifb")


@needs_reference
def test_limits_of_a_plugin_that_follows_hold(trio: list[Pod], tmp_path: Path) -> None:
    attached_limits_hold(trio, tmp_path, BANDWIDTH, PORTMAP)


@needs_reference
@pytest.mark.slow
def test_limits_of_a_plugin_that_follows_late_hold(trio: list[Pod], tmp_path: Path) -> None:
    """The one between takes longer than a pod has to be old to be known."""
    late = trio[0].lab.files.node_path("node1", "/opt/cni/bin") / "late"
    late.write_text(LATE.format(python=node.PYTHON[0]))
    late.chmod(0o755)
    attached_limits_hold(trio, tmp_path, {"type": "late"}, BANDWIDTH)


# --- a kernel that cannot -----------------------------------------------------------------------------------------

REFUSED = """
import sys
from ipam_daemon import fastpath, main
fastpath.render = lambda *_: bytes([0x95, 0, 0, 0, 0, 0, 0, 0])  # returns what was never set
sys.argv[0] = "podwire-ipamd"
sys.exit(main.main())
"""


@contextmanager
def without_btf(lab: LabState) -> Iterator[None]:
    """Node1's daemon begins on a kernel that does not tell its types."""
    node.stop_daemon(lab, "node1")
    succeed(lab, "node1", "mount -t tmpfs none /sys/kernel/btf")
    try:
        node.start_daemon(lab, "node1")
        yield
    finally:
        succeed(lab, "node1", "umount /sys/kernel/btf")


@contextmanager
def with_refused_program(lab: LabState) -> Iterator[None]:
    """Node1's daemon begins with programs that the kernel does not take."""
    node.stop_daemon(lab, "node1")
    config = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
    command = [*node.enter_command(lab, "node1"), *node.PYTHON, "-c", REFUSED, "--config", str(config)]
    process.start(lab.files, node.daemon_role("node1"), command)
    yield


UNABLE = [
    pytest.param(without_btf, "off: .*/sys/kernel/btf/vmlinux", id="it tells no types", marks=pytest.mark.slow),
    pytest.param(with_refused_program, "off: .*R0 !read_ok", id="it refuses the program"),
]


@pytest.mark.parametrize(("begins", "says"), UNABLE)
def test_a_kernel_that_cannot_has_pods_that_talk(trio: list[Pod], begins: object, says: str) -> None:
    here, _, there = trio
    assert callable(begins)
    lab = here.lab
    try:
        with begins(lab):
            node.wait_daemon(lab, "node1")
            wait(lambda: re.match(says, status(lab, "node1").fast_path) is not None, "the daemon to say why")
            with pods(lab, "node1") as (fresh,):
                for family in (4, 6):
                    for target in (here, there):
                        with Tcp(fresh, target, family) as flow:
                            flow.carry(1 << 20)
                            assert flow.taken(partial(flow.exchange, 10))["node1", "pod"] == 0
    finally:
        node.stop_daemon(lab, "node1")
        node.start_daemon(lab, "node1")
        node.wait_daemon(lab, "node1")
    with Udp(here, there) as again:
        again.until_fast()
