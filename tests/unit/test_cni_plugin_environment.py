"""The runtime's variables: what is refused with code 4, and that all of it is named at once."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni_plugin.environment import read_environment, well_formed_container_id, well_formed_ifname
from cni_plugin.errors import CniError

Changes = Mapping[bytes, bytes | None]

GOOD = {
    b"CNI_CONTAINERID": b"c0ffee",
    b"CNI_NETNS": b"/run/netns/a",
    b"CNI_IFNAME": b"eth0",
    b"CNI_ARGS": b"K8S_POD_NAME=web",
    b"CNI_PATH": b"/opt/cni/bin",
}

ACCEPTED: dict[str, tuple[bytes, Changes]] = {
    "all that a runtime sets": (b"ADD", {}),
    "ADD without arguments and path": (b"ADD", {b"CNI_ARGS": None, b"CNI_PATH": None}),
    "CHECK": (b"CHECK", {}),
    "DEL after the namespace is gone": (b"DEL", {b"CNI_NETNS": b""}),
    "DEL without a path": (b"DEL", {b"CNI_PATH": None}),
    "GC, which concerns no container": (b"GC", {b"CNI_CONTAINERID": None, b"CNI_NETNS": None, b"CNI_IFNAME": None}),
    "STATUS needs nothing": (b"STATUS", dict.fromkeys(GOOD)),
    "a container id of every allowed kind": (b"ADD", {b"CNI_CONTAINERID": b"0aZ_.-"}),
    "an interface of the longest name": (b"ADD", {b"CNI_IFNAME": b"fifteen-letters"}),
    "an interface outside ASCII": (b"ADD", {b"CNI_IFNAME": "größe".encode()}),
}

REFUSED: dict[str, tuple[bytes, Changes, list[str]]] = {
    "ADD of nothing": (
        b"ADD",
        dict.fromkeys(GOOD),
        ["CNI_CONTAINERID and CNI_NETNS and CNI_IFNAME must be set for ADD"],
    ),
    "an empty variable is missing": (b"ADD", {b"CNI_NETNS": b""}, ["CNI_NETNS must be set"]),
    "CHECK without namespace": (b"CHECK", {b"CNI_NETNS": None}, ["CNI_NETNS must be set for CHECK"]),
    "DEL without container and interface": (
        b"DEL",
        {b"CNI_CONTAINERID": None, b"CNI_IFNAME": None},
        ["CNI_CONTAINERID and CNI_IFNAME must be set for DEL"],
    ),
    "GC without path": (b"GC", {b"CNI_PATH": None}, ["CNI_PATH must be set for GC"]),
    "everything wrong at once": (
        b"ADD",
        {b"CNI_CONTAINERID": b"../x", b"CNI_IFNAME": b"a/b", b"CNI_NETNS": None, b"CNI_ARGS": b"\xff"},
        ["CNI_NETNS must be set", "CNI_CONTAINERID '../x'", "CNI_IFNAME 'a/b'", "CNI_ARGS '\\\\xff'"],
    ),
    "a container id that leaves its folder": (b"DEL", {b"CNI_CONTAINERID": b".."}, ["CNI_CONTAINERID '..'"]),
    "a container id with a line feed at its end": (b"DEL", {b"CNI_CONTAINERID": b"a\n"}, ["CNI_CONTAINERID"]),
    "a container id outside ASCII": (b"DEL", {b"CNI_CONTAINERID": "ä".encode()}, ["CNI_CONTAINERID"]),
    "an interface too long": (b"ADD", {b"CNI_IFNAME": b"sixteen-letters-"}, ["CNI_IFNAME"]),
    "an interface that is a folder": (b"ADD", {b"CNI_IFNAME": b".."}, ["CNI_IFNAME"]),
    "an interface that is an alias": (b"ADD", {b"CNI_IFNAME": b"eth0:1"}, ["CNI_IFNAME"]),
    "an interface with white space": (b"DEL", {b"CNI_IFNAME": b"eth 0"}, ["CNI_IFNAME"]),
    "an interface that the kernel would number": (b"ADD", {b"CNI_IFNAME": b"eth%d"}, ["CNI_IFNAME 'eth%d'"]),
    "an interface with a byte that the kernel takes for white space": (
        b"DEL",
        {b"CNI_IFNAME": "à".encode()},
        ["CNI_IFNAME 'à'"],
    ),
    "a namespace that is not a path": (b"ADD", {b"CNI_NETNS": b"mine"}, ["CNI_NETNS 'mine' must be an absolute path"]),
    "a command that does not exist": (b"UPDATE", {}, ["ADD, DEL, CHECK, GC, STATUS, VERSION"]),
    "a command in small letters": (b"add", {}, ["the commands are"]),
    "a command outside UTF-8": (b"\xff", {}, ["the commands are"]),
}


def variables(command: bytes, changes: Changes) -> dict[bytes, bytes]:
    changed = {b"CNI_COMMAND": command, **GOOD, **changes}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case: str) -> None:
    command, changes = ACCEPTED[case]
    given_variables = variables(command, changes)
    environment = read_environment(given_variables)
    assert environment.command == command
    assert environment.container_id == given_variables.get(b"CNI_CONTAINERID", b"")
    assert environment.netns == given_variables.get(b"CNI_NETNS", b"")
    assert environment.ifname == given_variables.get(b"CNI_IFNAME", b"")
    assert environment.args == given_variables.get(b"CNI_ARGS", b"")
    assert environment.path == given_variables.get(b"CNI_PATH", b"")


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    command, changes, named = REFUSED[case]
    with pytest.raises(CniError) as caught:
        read_environment(variables(command, changes))
    assert caught.value.code == 4
    assert [words for words in named if words not in caught.value.details] == []


@given(st.binary(max_size=20))
def test_container_ids_are_those_of_the_specification(value: bytes) -> None:
    expected = re.fullmatch(rb"[A-Za-z0-9][A-Za-z0-9_.-]*", value) is not None
    assert well_formed_container_id(value) == expected


@given(st.one_of(st.binary(max_size=18), st.text(max_size=18).map(str.encode)))
def test_interface_names_are_those_of_the_kernel(value: bytes) -> None:
    try:
        value.decode()
    except UnicodeDecodeError:
        utf8 = False
    else:
        utf8 = True
    expected = utf8 and value not in (b".", b"..") and re.fullmatch(rb"[^/:%\s\xa0]{1,15}", value) is not None
    assert well_formed_ifname(value) == expected


@given(st.dictionaries(st.sampled_from([b"CNI_COMMAND", *GOOD]), st.binary(max_size=300)))
def test_any_environment_is_taken_or_refused_in_one_short_message(given_variables: dict[bytes, bytes]) -> None:
    refused: CniError | None = None
    try:
        read_environment(given_variables)
    except CniError as error:
        refused = error
    assert refused is None or (refused.code == 4 and len(refused.details) < 8000)
