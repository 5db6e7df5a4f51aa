"""CHECK, GC, STATUS and VERSION of the CNI specification as a table, as tests/netns/test_conformance.py has ADD."""

from __future__ import annotations

import json

import pytest

from tests.netns.conformance_fixtures import BEFORE_NEWEST, CHECKED, NEWEST, box, boxes, it, lab
from tests.netns.containers import Container
from tests.netns.contenders import Config, Contender, Podwire, rows

__all__ = ["box", "boxes", "it", "lab"]


# --- CHECK --------------------------------------------------------------------------------------------------------


@rows(CHECKED)
def test_check_finds_nothing_wrong(it: Contender, box: Container) -> None:
    result = it.add(box)
    said = it.check(box, result)
    assert (said.exit_code, said.stdout) == (0, b"")
    it.delete(box)


DAMAGE: dict[str, tuple[str, str, str]] = {  # where, `ip …`, why the reference does not see it
    "the address is gone": ("pod", "address flush dev eth0", ""),
    "the default route is gone": ("pod", "route delete default", ""),
    "the MAC is another": ("pod", "link set eth0 address 02:00:00:00:00:01", ""),
    "the interface is gone": ("pod", "link delete eth0", ""),
    "the interface is down": ("pod", "link set eth0 down", ""),
    "the host's end is gone": ("node", "link delete HOST", ""),
    "the host's end is down": ("node", "link set HOST down", "looks at the route alone, which stays"),
    "the host's end left the bridge": ("node", "link set HOST nomaster", "does not look at the port"),
}


@pytest.mark.parametrize(("where", "words", "unseen"), DAMAGE.values(), ids=DAMAGE.keys())
@rows(CHECKED, ends_first=True)
def test_check_sees_what_was_taken_apart(it: Contender, box: Container, where: str, words: str, unseen: str) -> None:
    if it.kind == "reference" and unseen:
        pytest.skip(f"the reference {unseen}")
    result = it.add(box)
    damage = words.replace("HOST", it.host_end(result)["name"]).split()
    if where == "pod":
        assert box.run("ip", *damage).returncode == 0
    else:
        it.on_node("ip", *damage)
    said = it.check(box, result)
    assert said.error != 0
    if it.kind == "podwire":
        assert said.error == 103
    it.delete(box)


@rows(CHECKED)
def test_check_lets_later_plugins_add_to_the_result(it: Contender, box: Container) -> None:
    result = it.add(box)
    box.run("sh", "-c", "ip link add more type bridge; ip address add 192.0.2.1/24 dev more; ip link set more up")
    box.run("ip", "route", "add", "198.51.100.0/24", "dev", "more")
    result["interfaces"].append({"name": "more", "mac": "", "sandbox": box.netns})
    said = it.check(box, result)
    assert said.exit_code == 0, said
    it.delete(box)


@rows(CHECKED)
def test_check_of_a_mac_that_a_later_plugin_set(it: Contender, box: Container) -> None:
    """The reference takes what the result says. A pod of ours sends with the MAC of its ADD alone: it is cut off."""
    result = it.add(box)
    box.run("ip", "link", "set", "eth0", "address", "02:00:00:00:00:77")
    assert it.check(box, result).error != 0
    container = next(each for each in result["interfaces"] if each.get("sandbox"))
    container["mac"] = "02:00:00:00:00:77"
    said = it.check(box, result)
    if isinstance(it, Podwire):
        assert (said.error, "is dropped, since it is bound to the MAC" in said.body["msg"]) == (103, True)
    else:
        assert said.exit_code == 0, said
    it.delete(box)


@rows(CHECKED)
def test_check_needs_the_result_of_the_add(it: Contender, box: Container) -> None:
    it.add(box)
    assert it.call("CHECK", box).error != 0
    it.delete(box)


@rows(CHECKED)
def test_check_of_a_container_that_was_deleted_fails(it: Contender, box: Container) -> None:
    result = it.add(box)
    it.delete(box)
    assert it.check(box, result).error != 0


@rows(("0.3.1",))
def test_check_came_with_0_4_0(it: Contender, box: Container) -> None:
    result = it.add(box)
    assert it.check(box, result).error == 1
    it.delete(box)


# --- GC, STATUS, VERSION ------------------------------------------------------------------------------------------

NO_GC = "no reference plugin of that version knows GC or STATUS"


@rows(NEWEST, not_by_reference=NO_GC)
def test_gc_takes_what_the_runtime_does_not_list(it: Contender, boxes: list[Container]) -> None:
    kept, old, lost = boxes
    gateway = it.add(kept)["ips"][0]["gateway"]
    for each in (old, lost):
        it.add(each)
    before = it.held()
    assert it.call("GC").exit_code == 0, "a list that is absent says nothing"
    assert it.call("GC", config=it.config(**{"cni.dev/valid-attachments": None})).exit_code == 0
    assert it.held() == before
    keep = [{"containerID": each.name, "ifname": "eth0"} for each in (kept, old)]
    assert it.call("GC", config=it.config(**{"cni.dev/valid-attachments": keep})).exit_code == 0
    assert len(it.reserved()) == 2
    assert it.call("GC", config=it.config(**{"cni.dev/attachments": keep[:1]})).exit_code == 0, "libcni's older name"
    (left,) = it.reserved()
    assert f"/{kept.name}/" in left
    assert kept.run("ping", "-n", "-c1", "-W2", gateway).returncode == 0
    assert it.call("GC", config=it.config(**{"cni.dev/valid-attachments": []})).exit_code == 0
    it.wait_held(set())
    for each in (lost, kept):
        it.delete(each)


@rows(NEWEST, not_by_reference=NO_GC)
def test_gc_keeps_to_its_own_network(it: Contender, box: Container) -> None:
    it.add(box)
    before = it.held()
    nothing: Config = {"cni.dev/valid-attachments": []}
    assert it.call("GC", config={**it.config(**nothing), "name": "another"}).exit_code == 0
    assert it.held() == before
    it.delete(box)


@rows(NEWEST, not_by_reference=NO_GC)
def test_gc_tells_interfaces_of_a_container_apart(it: Contender, box: Container) -> None:
    it.add(box)
    other: Config = {"cni.dev/valid-attachments": [{"containerID": box.name, "ifname": "eth1"}]}
    assert it.call("GC", config=it.config(**other)).exit_code == 0
    it.wait_held(set())
    it.delete(box)


@rows(NEWEST, not_by_reference=NO_GC)
def test_status_of_a_node_that_can_add_says_nothing(it: Contender) -> None:
    said = it.call("STATUS")
    assert (said.exit_code, said.stdout) == (0, b"")


@pytest.mark.parametrize("command", ["GC", "STATUS"])
@rows(BEFORE_NEWEST, not_by_reference=NO_GC)
def test_gc_and_status_came_with_1_1_0(it: Contender, box: Container, command: str) -> None:
    it.add(box)
    before = it.held()
    said = it.call(command, config=it.config(**{"cni.dev/valid-attachments": []}))
    assert (said.error, said.body["cniVersion"]) == (1, it.version)
    assert it.held() == before
    it.delete(box)


@rows()
def test_version_says_what_is_spoken_whatever_it_is_told(it: Contender) -> None:
    for stdin in (b"", b"\xff", json.dumps({"cniVersion": it.version}).encode()):
        said = it.call("VERSION", config=stdin, environment={"CNI_PATH": None})
        assert said.exit_code == 0
        assert {"0.3.1", "0.4.0", "1.0.0"} <= set(said.body["supportedVersions"])
        assert said.body["cniVersion"] in said.body["supportedVersions"]
