"""Several networks on a node, several interfaces of a container: right, or refused in so many words, never mixed up.

An attachment is (network, container id, interface). Runtimes hand results around, and name containers as they like: the
key alone says what a DEL, CHECK or GC is about.
"""

from __future__ import annotations

from podwire.lab import node
from tests.netns.conformance_fixtures import box, boxes, it, lab
from tests.netns.containers import Container
from tests.netns.contenders import Config, Contender, inside, settle

__all__ = ["box", "boxes", "it", "lab"]


def works(box: Container, result: Config) -> bool:
    """Whether the container still has what its ADD said, and it carries packets."""
    ip = result["ips"][0]
    shown = box.run("ip", "-br", "address", "show", "dev", result["interfaces"][1]["name"]).stdout
    return ip["address"] in shown and box.run("ping", "-n", "-c1", "-W2", ip["gateway"]).returncode == 0


def gc(it: Contender, network: str, *keep: Container, ifname: str = "eth0") -> None:
    kept = [{"containerID": each.name, "ifname": ifname} for each in keep]
    said = it.call("GC", config=it.config(**{"name": network, "cni.dev/valid-attachments": kept}))
    assert said.exit_code == 0, said


# --- two networks -------------------------------------------------------------------------------------------------


def test_two_networks_of_a_node_have_attachments_of_their_own(it: Contender, boxes: list[Container]) -> None:
    first, second, third = boxes
    results = [it.add(first), it.add(second, it.config(name="second")), it.add(third, it.config(name="second"))]
    assert len({each["ips"][0]["address"] for each in results}) == 3
    gc(it, "second", third)
    assert [works(*pair) for pair in zip(boxes, results, strict=True)] == [True, False, True]
    gc(it, "conformance")
    assert [works(*pair) for pair in zip(boxes, results, strict=True)] == [False, False, True]
    it.delete(third)
    assert works(third, results[2]), "the other network has nothing of this container"
    it.delete(third, it.config(name="second"))


def test_one_container_id_in_two_networks_is_two_attachments(it: Contender, boxes: list[Container]) -> None:
    first, second, _ = boxes
    name = {"CNI_CONTAINERID": "one-and-the-same"}
    mine, theirs = it.add(first, it.config(), **name), it.add(second, it.config(name="second"), **name)
    it.delete(first, it.config(), **name)
    assert works(second, theirs)
    assert not works(first, mine)
    said = it.call("CHECK", second, it.config(prevResult=mine), name)
    assert said.error == 103, "it is attached in the other network"
    assert it.call("CHECK", second, it.config(name="second", prevResult=theirs), name).exit_code == 0
    it.delete(second, it.config(name="second"), **name)


def test_a_second_network_for_one_interface_is_refused(it: Contender, box: Container) -> None:
    result = it.add(box)
    settle(box)
    before = (it.held(), inside(box))
    assert it.call("ADD", box, it.config(name="second")).error == 101
    assert (it.held(), inside(box)) == before
    it.delete(box, it.config(name="second"))
    assert (it.held(), inside(box)) == before
    assert works(box, result)
    it.delete(box)


# --- two interfaces -----------------------------------------------------------------------------------------------


def test_a_second_interface_is_refused_and_the_first_stays(it: Contender, box: Container) -> None:
    result = it.add(box)
    settle(box)
    before = (it.held(), inside(box))
    said = it.call("ADD", box, ifname="eth1")
    assert said.error == 101
    assert "has a default route already" in said.body["msg"]
    assert (it.held(), inside(box)) == before
    it.delete(box, ifname="eth1")
    assert (it.held(), inside(box)) == before
    assert works(box, result)
    it.delete(box)


def test_interfaces_of_one_container_id_are_kept_apart(it: Contender, boxes: list[Container]) -> None:
    first, second, _ = boxes
    name = {"CNI_CONTAINERID": "one-and-the-same"}
    zero = it.add(first, it.config(), **name)
    one = it.call("ADD", second, it.config(), name, ifname="eth1").body
    assert it.call("CHECK", first, it.config(prevResult=one), name).error == 103
    it.delete(first, it.config(prevResult=one), **name)
    assert [works(first, zero), works(second, one)] == [False, True]
    it.delete(second, it.config(prevResult=zero), ifname="eth1", **name)


def test_an_interface_of_another_name_follows_at_once(it: Contender, box: Container) -> None:
    """The default route of the first is there until its wire has gone."""
    it.add(box)
    it.delete(box)
    result = it.call("ADD", box, ifname="eth1").body
    assert works(box, result)
    it.delete(box, ifname="eth1")


def test_gc_knows_interfaces_by_their_names(it: Contender, boxes: list[Container]) -> None:
    first, second, _ = boxes
    results = [it.add(first), it.call("ADD", second, ifname="eth1").body]
    gc(it, "conformance", first, second)  # of the second, another interface is valid
    assert [works(first, results[0]), works(second, results[1])] == [True, False]
    it.delete(first)


# --- results and namespaces of others -----------------------------------------------------------------------------


def test_the_result_of_another_container_is_not_believed(it: Contender, boxes: list[Container]) -> None:
    first, second, _ = boxes
    mine, theirs = it.add(first), it.add(second)
    assert it.check(first, theirs).error == 103
    it.delete(first, it.config(prevResult=theirs))
    assert works(second, theirs)
    assert not works(first, mine)
    it.delete(second)


def test_the_namespace_of_another_container_is_not_this_ones(it: Contender, boxes: list[Container]) -> None:
    first, second, _ = boxes
    mine, theirs = it.add(first), it.add(second)
    said = it.call("CHECK", first, it.config(prevResult=mine), {"CNI_NETNS": second.netns})
    assert said.error == 103
    assert it.call("ADD", first, environment={"CNI_CONTAINERID": "a-new-one"}).error == 101
    it.delete(first, it.config(), CNI_NETNS=second.netns)
    assert [works(first, mine), works(second, theirs)] == [False, True]
    it.delete(second)


# --- the daemon is away -------------------------------------------------------------------------------------------


def test_what_is_said_while_the_daemon_is_away(it: Contender, box: Container) -> None:
    result = it.add(box)
    queue = it.lab.files.node_path(it.node, "/var/lib/podwire") / "del-queue"
    node.kill_daemon(it.lab, it.node)
    try:
        assert it.call("STATUS").error == 50
        for command in ("ADD", "GC"):
            assert it.call(command, box).error == 11
        assert it.check(box, result).error == 11
        assert it.call("VERSION").exit_code == 0
        assert it.call("DEL", box, environment={"CNI_IFNAME": "a/b"}).error == 4
        assert list(queue.iterdir()) == [], "what could never be done is not queued"
        it.delete(box)
        assert len(list(queue.iterdir())) == 1
    finally:
        node.start_daemon(it.lab, it.node)
        node.wait_daemon(it.lab, it.node)
