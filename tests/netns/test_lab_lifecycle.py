"""How labs come and go: nothing is left of them, whatever happened, and the machine's own network never changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from podwire.cli.main import main
from podwire.errors import PodwireError
from podwire.lab import cluster, names, process, state, topology
from podwire.lab.cluster import SUPERVISOR
from podwire.lab.names import LabFiles
from podwire.lab.node import daemon_role, holder_role
from podwire.lab.state import LabState
from tests.netns.lab_fixtures import PATIENCE, Pods, fresh_name, pod


@pytest.fixture
def name() -> Iterator[str]:
    """A lab's name; what a failing test leaves of the lab is removed."""
    chosen = fresh_name()
    yield chosen
    cluster.down(chosen)


def left_of(lab: str) -> list[str]:
    """Everything of the lab that is there, in words."""
    files = LabFiles(lab)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    left = [f"namespace {each}" for each in topology.namespaces(lab)]
    left += [f"process {pid}" for pid in process.marked(lab)]
    left += [f"mount {point}" for point in mounts if f"/{lab}/" in point or f"pw.{lab}." in point]
    left += [f"file {path}" for path in (files.folder, files.lock) if path.exists()]
    if not state.labs():
        left += [f"mount point {line}" for line in (names.ROOT / ".made",) if line.exists()]
    return left


def machine() -> str:
    """The machine's own links, addresses, routes, rules and nft tables, as text."""
    shown = [
        ["ip", "-o", "link"], ["ip", "-o", "address"], ["ip", "route", "show", "table", "all"], ["ip", "rule"],
        ["nft", "list", "tables"], ["sysctl", "net.ipv4.ip_forward"],
    ]  # fmt: skip
    # What the machine learnt (addresses, routes) carries the seconds for which it is good.
    lines = [" ".join(line.split()) for words in shown for line in topology.run(words).splitlines()]
    return "\n".join(line.partition(" valid_lft")[0].partition(" expires")[0] for line in lines)


def start_up(lab: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "podwire.cli.main", "lab", "up", "--name", lab, "--nodes", "2", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def in_place_of(program: str, script: str, folder: Path) -> str:
    """A PATH on which a script takes the place of a program."""
    stand_in = folder / program
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_up_and_down_leave_nothing_and_do_not_touch_the_machine(name: str) -> None:
    before = machine()
    lab = cluster.up(LabState(name=name, nodes=state.plan_nodes(2)))
    cluster.wait_ready(lab, cluster.apply(lab, [pod("a"), pod("b")]))
    during = machine()
    pids: list[int] = []

    def no_more_and_no_less() -> bool:  # a daemon's helpers, such as nft, come and go
        pids[:] = process.marked(name)
        return len(pids) == 2 + 2 + 2 + 2

    what = "etcd and supervisor, and on each node holder, daemon and pod, to be all that runs"
    process.wait_for(no_more_and_no_less, PATIENCE, what)
    assert cluster.down(name)
    assert left_of(name) == []
    process.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), PATIENCE, "no zombie to be left")
    assert during == before
    assert machine() == before
    assert not cluster.down(name), "there is nothing left to remove"


def test_down_after_the_supervisor_was_killed(name: str) -> None:
    lab = cluster.up(LabState(name=name, nodes=state.plan_nodes(1)))
    # One that has left its session and lost the lab's mark is found by its namespace.
    stray = {"name": "stray", "command": ["sh", "-c", "env -i setsid sleep 1000 & exec sleep 1000"]}
    cluster.wait_ready(lab, cluster.apply(lab, [pod("a", stray)]))
    supervisor = process.recorded(lab.files, SUPERVISOR)
    assert supervisor is not None
    supervisor.kill()
    assert supervisor.wait_gone(PATIENCE)
    inode = frozenset({lab.pod_netns("default", "a").stat().st_ino})
    # What its command starts may be there only some time after the container.
    process.wait_for(lambda: len(process.in_namespaces(inode)) == 2, PATIENCE, "both, which outlive the supervisor")
    cluster.down(name)
    assert left_of(name) == []
    assert process.in_namespaces(inode) == []


MOMENTS: list[tuple[str, Callable[[LabFiles], bool]]] = [
    ("its state is written", lambda files: files.state.exists()),
    ("a namespace is there", lambda files: bool(topology.namespaces(files.lab))),
    ("a holder runs", lambda files: process.recorded(files, holder_role("node2")) is not None),
    ("the supervisor runs", lambda files: process.recorded(files, SUPERVISOR) is not None),
    ("a daemon runs", lambda files: process.recorded(files, daemon_role("node2")) is not None),
]


@pytest.mark.parametrize(("how", "cleans_up"), [(signal.SIGKILL, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
@pytest.mark.parametrize("moment", [pytest.param(reached, id=text) for text, reached in MOMENTS])
def test_up_that_is_ended_in_the_middle(
    name: str, tmp_path: Path, moment: Callable[[LabFiles], bool], how: signal.Signals, cleans_up: bool
) -> None:
    files = LabFiles(name)
    up = start_up(name, PATH=in_place_of("etcd", "exec sleep 1000", tmp_path))  # so it is in the middle until the end
    process.wait_for(lambda: moment(files), PATIENCE, "the moment")
    up.send_signal(how)
    up.communicate(timeout=300)
    assert up.returncode == (130 if cleans_up else -signal.SIGKILL)
    if cleans_up:
        assert left_of(name) == []
    else:
        assert left_of(name) != []
        with pytest.raises(PodwireError, match=f"was not completed; `podwire lab down --name {name}` removes it"):
            cluster.up(LabState(name=name, nodes=state.plan_nodes(1)))
        cluster.down(name)
        assert left_of(name) == []


def test_labs_side_by_side_do_not_see_each_other(name: str) -> None:
    other = f"{name}x"  # a name that begins with the first one's
    labs = [cluster.up(LabState(name=each, nodes=state.plan_nodes(1))) for each in (name, other)]
    try:
        with Pods(labs[0], [pod("same")]) as first, Pods(labs[1], [pod("same"), pod("more")]) as second:
            assert first.ask("same", "127.0.0.1").pod == "same"
            assert first.address("same") in (second.address("same"), second.address("more")), "the same addresses twice"
            assert len(cluster.pods(labs[0])) == 1
            cluster.down(name)
            assert left_of(name) == []
            assert second.ask("same", second.address("more")).pod == "more"
            labs[0] = cluster.up(LabState(name=name, nodes=state.plan_nodes(1)))
    finally:
        cluster.down(other)
    assert left_of(other) == []


def test_up_of_a_lab_that_is_there_names_the_way_out(name: str) -> None:
    cluster.up(LabState(name=name, nodes=state.plan_nodes(1)))
    again = start_up(name)
    _, said = again.communicate(timeout=300)
    assert (again.returncode, said) == (
        1,
        f"podwire lab: lab {name} exists; `podwire lab down --name {name}` removes it\n",
    )
    assert cluster.is_complete(name), "the lab itself is unharmed"


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        pytest.param("etcd", "etcd has ended", id="etcd ends at once"),
        pytest.param("ip", "ip netns add", id="a namespace cannot be made"),
    ],
)
def test_up_that_fails_says_why_and_leaves_nothing(name: str, tmp_path: Path, break_it: str, complaint: str) -> None:
    up = start_up(name, PATH=in_place_of(break_it, "echo 'no luck today' >&2; exit 1", tmp_path))
    _, said = up.communicate(timeout=300)
    assert up.returncode == 1
    assert complaint in said
    assert "no luck today" in said
    assert "Traceback" not in said
    assert left_of(name) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--backend", "geneve"], "--backend geneve: expected one of vxlan, direct, auto"),
        (["--proxy", "ipvs"], "--proxy ipvs is not there yet; expected one of nftables, iptables, none"),
        (["--proxy", "magic"], "--proxy magic: expected one of nftables, iptables, none"),
        (["--service-cidr", "fd00:10:96::/108"], "pods have no IPv6"),
        (["--service-cidr", "10.244.128.0/20"], "overlaps --pod-cidr 10.244.0.0/16"),
        (["--kube-apiserver", "/bin/true"], "--kube-apiserver /bin/true is not there yet"),
        (["--pod-cidr", "10.244.0.1/16"], "has host bits set"),
        (["--pod-cidr", "10.0.0.0/16,10.9.0.0/16"], "expected at most one network of each family"),
        (["--pod-cidr", "fd00:172::/32"], "overlaps the lab's underlay, fd00:172:31::/64"),
        (["--segments", "3"], "a lab has 1 to 2 segments, not 3"),
        (["--pod-cidr", "172.31.0.0/16"], "overlaps the lab's underlay"),
        (["--nodes", "0"], "a lab has 1 to 99 nodes, not 0"),
        (["--name", "Big_Lab"], "lab name 'Big_Lab'"),
        (["-f", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_up_refuses_in_one_line_what_it_cannot_do(
    name: str, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)  # a process of its own would cost most of a second
    try:
        assert main(["lab", "up", "--name", name, "--nodes", "2", *words]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert left_of(name) == []
