"""A node whose underlay gives it other addresses while its daemon runs: another lease, prefix, a link that flaps.

The daemon of node2 was not told its addresses, and so follows them; its peers follow what it publishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from uuid import uuid4

import pytest
import yaml

from podwire.lab import cluster, demo, names, node
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import containers, know_each_other, nothing_is_held, on_node, status, wait
from tests.netns.test_backends import addresses_of, answers, link

POD_CIDR = "10.244.0.0/16,fd00:10:244::/56"
FORMER = ("172.31.0.12", "fd00:172:31::c")
LATER = ("172.31.0.112", "fd00:172:31::70")
MISSED = f"no interface of this node has the node address {FORMER[0]}"


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """Two nodes on one segment; node2 finds its addresses, and looks at nothing again without a reason."""
    nodes = plan_nodes(2, POD_CIDR)
    assert nodes[1].addresses == FORMER
    state = LabState(name=f"lease-{uuid4().hex[:6]}", nodes=nodes, pod_cidr=POD_CIDR, backend="auto")
    try:
        lab = cluster.up(state)
        restart(lab, nodeAddresses=None, reconcileInterval=3600)
        yield know_each_other(lab)
    finally:
        cluster.down(state.name)


def restart(lab: LabState, **settings: object) -> None:
    """The daemon of node2 with other settings, None for the default."""
    node.stop_daemon(lab, "node2")
    file = lab.files.node_path("node2", "/etc/podwire") / "ipamd.yaml"
    wanted = yaml.safe_load(file.read_text()) | settings
    file.write_text(yaml.safe_dump({key: value for key, value in wanted.items() if value is not None}))
    node.start_daemon(lab, "node2")
    node.wait_daemon(lab, "node2")


def change(lab: LabState, *commands: str) -> None:
    """What `ip` does on node2's interface. Default routes, which may go with an address, are there again at once."""
    words = [f"ip address {command} dev eth0" for command in commands]
    words += [f"ip route replace default via {names.outside_address(family)}" for family in (4, 6)]
    done = on_node(lab, "node2", "sh", "-ec", "; ".join(words))
    assert done.returncode == 0, done.stderr


def with_length(address: str) -> str:
    return f"{address}/{names.underlay_of(address).prefixlen}"


def adding(address: str) -> str:
    return f"add {with_length(address)}" + (" nodad" if ":" in address else "")


def removing(address: str) -> str:
    return f"del {with_length(address)}"


def published(lab: LabState) -> tuple[str, ...]:
    """The addresses of node2 as node1 knows them."""
    (peer,) = status(lab, "node1").peer_nodes
    return tuple(peer.addresses)


def log_of(lab: LabState) -> str:
    return lab.files.log(node.daemon_role("node2")).read_text()


@contextlib.contextmanager
def pods(lab: LabState) -> Iterator[Callable[[], bool]]:
    """A pod on each node, and whether each reaches the other in both families."""
    with containers(lab, "node1", "here", 1) as (here,), containers(lab, "node2", "there", 1) as (there,):
        try:
            to = {box: addresses_of(other.call("ADD").body) for box, other in ((here, there), (there, here))}
            yield lambda: all(answers(box, address) for box, found in to.items() for address in found.values())
        finally:
            deleted = [box.call("DEL").code for box in (here, there)]
        assert deleted == [0, 0]
    for name in ("node1", "node2"):
        wait(partial(nothing_is_held, lab, name), f"{name} to be empty")


def test_a_restart_says_each_address_once(lab: LabState) -> None:
    restart(lab)
    assert tuple(status(lab, "node2").addresses) == FORMER
    know_each_other(lab)
    assert published(lab) == FORMER


@pytest.mark.slow
def test_other_addresses_are_followed_when_the_former_are_gone_for_good(lab: LabState) -> None:
    """First they come back before that. Over VXLAN and directly, in both families."""
    with pods(lab) as talk:
        wait(talk, "the pods to reach each other")
        seen = log_of(lab).count(MISSED)
        change(lab, *map(removing, FORMER), *map(adding, LATER))
        wait(lambda: log_of(lab).count(MISSED) > seen + 1, "the daemon to miss its address, and to look again")
        change(lab, *map(adding, FORMER))
        wait(talk, "the pods to reach each other as before")
        demo.set_backend(lab, "direct")  # all of it was planned anew, and by its former addresses
        demo.set_backend(lab, "auto")
        assert (tuple(status(lab, "node2").addresses), published(lab)) == (FORMER, FORMER)

        change(lab, removing(FORMER[1]))
        wait(lambda: published(lab) == (FORMER[0], LATER[1]), "the peer to hear of node2's other prefix")
        wait(talk, "the pods to reach each other by it")
        change(lab, removing(FORMER[0]))
        wait(lambda: published(lab) == LATER, "the peer to hear of node2's other lease")
        wait(talk, "the pods to reach each other by them")
        demo.set_backend(lab, "vxlan")
        wait(talk, "the pods to reach each other by VXLAN")
        for name, end in (("node1", names.node_address(1)), ("node2", LATER[0])):
            assert link(lab, name, "pw-vxlan")["linkinfo"]["info_data"]["local"] == str(end)
        assert FORMER[0] not in on_node(lab, "node1", "bridge", "fdb", "show", "dev", "pw-vxlan").stdout

        on_node(lab, "node2", "ip", "address", *removing(LATER[1]).split(), "dev", "eth0")
        wait(lambda: LATER[1] in "".join(status(lab, "node2").notes), "status to say which has no successor")
        assert published(lab) == LATER
