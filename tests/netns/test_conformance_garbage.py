"""Garbage from a runtime: the specification's error code in one line of standard output, and nothing has changed.

Everything that a call could change is compared before and after: journal, counts of addresses, DEL queue, links,
addresses, routes and firewall of the node, and the namespaces of two containers, of which one is attached.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipam_daemon.identity import boottime_ns
from podwire.lab import process
from podwire.v1 import cni_pb2, cni_pb2_grpc
from tests.netns.conformance_fixtures import lab
from tests.netns.containers import Container, containers
from tests.netns.contenders import PATIENCE, VERSIONS, Config, Podwire, Said, everything, inside, settle

__all__ = ["lab"]

Environment = dict[str, str | bytes | None]


@dataclass(frozen=True)
class Stage:
    """A node with an attached container, and one that nothing was done to."""

    it: Podwire
    attached: Container
    result: Config
    box: Container
    odd: Path
    held: set[str]

    def seen(self) -> list[object]:
        """All that must stay as it is."""
        return [everything(self.it), inside(self.attached), inside(self.box)]

    def fill(self, text: str) -> str:
        """A path of the table, with what is only known now."""
        own = f"/run/netns/{self.it.lab.netns(self.it.node).name}"
        return text.replace("ODD", str(self.odd)).replace("NODE", own)


@pytest.fixture(scope="module")
def stage(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    it = Podwire(lab, "node1", "1.1.0")
    odd = tmp_path_factory.mktemp("odd")
    os.mkfifo(odd / "fifo")
    (odd / "file").write_text("not a namespace")
    (odd / "empty").touch()
    (odd / "loop").symlink_to(odd / "loop")
    (odd / "dangling").symlink_to(odd / "nowhere")
    with containers(lab, "node1", "bin", 2) as (attached, box):
        result = it.add(attached)
        settle(attached)
        process.wait_for(lambda: bridge_is_up(it), PATIENCE, "the kernel to say that the bridge is up")
        yield Stage(it, attached, result, box, odd, it.held())
        it.delete(attached)
        it.wait_held(set())


def bridge_is_up(it: Podwire) -> bool:
    """Whether all of it has followed the first wire: the kernel takes up to a second to tell."""
    shown = it.on_node("sh", "-c", "ip -br link show dev pw0; ip -6 -br address show dev pw0; ip route show dev pw0")
    return shown.split()[1] == "UP" and "fe80:" in shown and "linkdown" not in shown


def refused(said: Said, code: int) -> str:
    """Checks the form of an error, and returns its words."""
    assert said.exit_code == 1, said
    assert said.stderr == b""
    assert said.stdout.endswith(b"\n")
    assert said.stdout.count(b"\n") == 1
    assert {"cniVersion", "code", "msg"} <= said.body.keys() <= {"cniVersion", "code", "msg", "details"}
    assert said.body["cniVersion"] in VERSIONS
    assert said.body["msg"]
    assert said.error == code, said
    return f"{said.body['msg']} {said.body.get('details', '')}"


# --- the environment ----------------------------------------------------------------------------------------------

ENVIRONMENTS: dict[str, tuple[str | bytes, Environment, int]] = {
    "an unknown command": ("UPDATE", {}, 4),
    "a command in small letters": ("add", {}, 4),
    "a command that is no text": (b"\xff\xfe", {}, 4),
    "ADD of nothing": ("ADD", dict.fromkeys(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")), 4),
    "DEL of nothing": ("DEL", dict.fromkeys(("CNI_CONTAINERID", "CNI_IFNAME")), 4),
    "CHECK without namespace": ("CHECK", {"CNI_NETNS": None}, 4),
    "GC without path": ("GC", {"CNI_PATH": None}, 4),
    "a container id that is a path": ("ADD", {"CNI_CONTAINERID": "../../etc"}, 4),
    "a container id that begins with '-'": ("ADD", {"CNI_CONTAINERID": "-rf"}, 4),
    "a container id with a line feed": ("ADD", {"CNI_CONTAINERID": "a\nb"}, 4),
    "a container id that is no text": ("DEL", {"CNI_CONTAINERID": b"\xff"}, 4),
    "a container id of other letters": ("ADD", {"CNI_CONTAINERID": "café"}, 4),
    "an interface that is a folder": ("ADD", {"CNI_IFNAME": ".."}, 4),
    "an interface that is a path": ("ADD", {"CNI_IFNAME": "a/b"}, 4),
    "an interface that is an alias": ("ADD", {"CNI_IFNAME": "eth0:1"}, 4),
    "an interface of 16 bytes": ("ADD", {"CNI_IFNAME": "e" * 16}, 4),
    "an interface of 14 letters and 16 bytes": ("ADD", {"CNI_IFNAME": "e" * 12 + "éé"}, 4),
    "an interface with white space": ("DEL", {"CNI_IFNAME": "eth 0"}, 4),
    "an interface that the kernel would number": ("ADD", {"CNI_IFNAME": "eth%d"}, 4),
    "an interface with a byte that the kernel takes for a space": ("ADD", {"CNI_IFNAME": "à"}, 4),
    "an interface that is no text": ("ADD", {"CNI_IFNAME": b"\xff"}, 4),
    "arguments that are no pairs": ("ADD", {"CNI_ARGS": "IgnoreUnknown"}, 4),
    "arguments that nobody knows": ("ADD", {"CNI_ARGS": "COLOUR=blue"}, 4),
    "arguments that are no text": ("ADD", {"CNI_ARGS": b"IP=\xff"}, 4),
    "an address that is none": ("ADD", {"CNI_ARGS": "IP=web"}, 4),
    "two addresses of a family": ("ADD", {"CNI_ARGS": "IP=10.244.0.5,10.244.0.6"}, 4),
    "a MAC that is none": ("ADD", {"CNI_ARGS": "MAC=blue"}, 4),
    "an address of the whole world": ("ADD", {"CNI_ARGS": "IP=192.0.2.7"}, 104),
}


@pytest.mark.parametrize(("command", "changes", "code"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_an_ill_formed_environment(stage: Stage, command: str | bytes, changes: Environment, code: int) -> None:
    before = stage.seen()
    refused(stage.it.call("ADD", stage.box, environment={"CNI_COMMAND": command, **changes}), code)
    assert stage.seen() == before


def test_all_that_is_missing_is_named_at_once(stage: Stage) -> None:
    words = refused(stage.it.call("ADD", environment={"CNI_IFNAME": "a/b"}), 4)
    assert all(name in words for name in ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"))


NAMESPACES: dict[str, tuple[str | bytes, int]] = {
    "nothing there": ("/run/netns/nothing", 8),
    "a file": ("ODD/file", 8),
    "the mount point of a deleted one": ("ODD/empty", 8),
    "a pipe that nobody writes to": ("ODD/fifo", 8),
    "a folder": ("ODD", 8),
    "a link to itself": ("ODD/loop", 8),
    "a link to nothing": ("ODD/dangling", 8),
    "a device": ("/dev/zero", 8),
    "a namespace of another kind": ("/proc/1/ns/mnt", 8),
    "the node's own": ("NODE", 8),
    "the node's own, by the process": ("/proc/self/ns/net", 8),
    "a file as a folder": ("ODD/file/x", 8),
    "longer than a path may be": ("/" + "x" * 5000, 8),
    "longer than that": ("/" + "x/" * 50_000, 8),
    "a relative path": ("run/netns/x", 4),
    "no text": (b"/run/netns/\xff", 4),
}


@pytest.mark.parametrize("command", ["ADD", "CHECK"])
@pytest.mark.parametrize(("path", "code"), NAMESPACES.values(), ids=NAMESPACES.keys())
def test_a_namespace_that_is_none(stage: Stage, path: str | bytes, code: int, command: str) -> None:
    before = stage.seen()
    environment: Environment = {"CNI_NETNS": stage.fill(path) if isinstance(path, str) else path}
    if command == "ADD":
        refused(stage.it.call("ADD", stage.box, environment=environment), code)
    else:  # of the container that is attached: what CHECK finds of it is a difference
        config = stage.it.config(prevResult=stage.result)
        refused(stage.it.call("CHECK", stage.attached, config, environment), 103 if code == 8 else code)
    assert stage.seen() == before


# --- standard input -----------------------------------------------------------------------------------------------

GOOD: Config = {"cniVersion": "1.1.0", "name": "conformance", "type": "podwire"}


def with_keys(**more: Any) -> bytes:
    return json.dumps({**GOOD, **more}).encode()


STDINS: dict[str, tuple[str, bytes, int]] = {
    "nothing": ("ADD", b"", 6),
    "white space": ("ADD", b" \n\t ", 6),
    "random bytes": ("ADD", bytes(range(256)), 6),
    "a program": ("ADD", b"\x7fELF" + b"\0" * 4000, 6),
    "half of a configuration": ("ADD", with_keys()[:-5], 6),
    "two configurations": ("ADD", with_keys() * 2, 6),
    "a byte order mark": ("ADD", b"\xef\xbb\xbf" + with_keys(), 6),
    "UTF-16": ("ADD", with_keys().decode().encode("utf-16"), 6),
    "text that is no UTF-8": ("ADD", with_keys(name="X").replace(b"X", b"\xff"), 6),
    "a number that JSON has not": ("ADD", with_keys(mtu=0).replace(b"0}", b"NaN}"), 6),
    "too deep": ("ADD", b'{"x":' + b"[" * 200_000, 6),
    "too deep, and whole": ("ADD", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 6),
    "1 MB of anything": ("ADD", b"\xff" + os.urandom(1 << 20), 6),
    "1 MB of braces": ("DEL", b"{" * (1 << 20), 6),
    "1 MB of text": ("STATUS", b'"' + b"x" * (1 << 20), 6),
    "more than is read": ("ADD", b" " * (17 << 20), 6),
    "a list": ("ADD", b"[]", 7),
    "a number": ("DEL", b"1", 7),
    "null": ("STATUS", b"null", 7),
    "no name": ("ADD", json.dumps({"cniVersion": "1.1.0"}).encode(), 7),
    "no name in a DEL": ("DEL", json.dumps({"cniVersion": "1.1.0"}).encode(), 7),
    "an empty name": ("ADD", with_keys(name=""), 7),
    "a name that is a path": ("ADD", with_keys(name="../x"), 7),
    "a name that is null": ("GC", with_keys(name=None), 7),
    "a version that is a number": ("ADD", with_keys(cniVersion=1.1), 7),
    "no version, which says 0.2.0": ("ADD", json.dumps({"name": "conformance"}).encode(), 1),
    "a version of old": ("ADD", with_keys(cniVersion="0.2.0"), 1),
    "a version of tomorrow": ("DEL", with_keys(cniVersion="2.0.0"), 1),
    "a version with a blank": ("ADD", with_keys(cniVersion="1.0.0 "), 1),
    "an empty version": ("STATUS", with_keys(cniVersion=""), 1),
    "a previous result in an ADD": ("ADD", with_keys(prevResult={"cniVersion": "1.1.0"}), 2),
    "a previous result that is none": ("CHECK", with_keys(prevResult=[1]), 7),
    "no previous result": ("CHECK", with_keys(), 7),
    "a previous result of nothing": ("CHECK", with_keys(prevResult={}), 103),
    "dns that is text": ("ADD", with_keys(dns="1.1.1.1"), 7),
    "addresses that are text": ("ADD", with_keys(runtimeConfig={"ips": "10.244.0.5"}), 7),
    "an address that is text": ("ADD", with_keys(args={"cni": {"ips": ["web"]}}), 7),
    "two addresses of one family": ("ADD", with_keys(runtimeConfig={"ips": ["10.244.0.5", "10.244.0.6"]}), 7),
    "a multicast MAC": ("ADD", with_keys(runtimeConfig={"mac": "01:00:5e:00:00:01"}), 7),
    "an address that another has": ("ADD", with_keys(runtimeConfig={"ips": ["ATTACHED"]}), 104),
    "an address of the far side": ("ADD", with_keys(runtimeConfig={"ips": ["2001:db8::1"]}), 104),
    "attachments that are text": ("GC", with_keys(**{"cni.dev/valid-attachments": "none"}), 7),
    "attachments without interface": ("GC", with_keys(**{"cni.dev/valid-attachments": [{"containerID": "a"}]}), 7),
}


@pytest.mark.parametrize(("command", "stdin", "code"), STDINS.values(), ids=STDINS.keys())
def test_an_ill_formed_configuration(stage: Stage, command: str, stdin: bytes, code: int) -> None:
    before = stage.seen()
    stdin = stdin.replace(b"ATTACHED", stage.result["ips"][0]["address"].split("/")[0].encode())
    about = stage.attached if command in ("CHECK", "DEL") else stage.box
    refused(stage.it.call(command, about, stdin), code)
    assert stage.seen() == before


def test_an_error_speaks_the_version_of_its_configuration(stage: Stage) -> None:
    for version in VERSIONS:
        for environment in ({"CNI_IFNAME": "a/b"}, {"CNI_NETNS": "/nothing"}):
            said = stage.it.call("ADD", stage.box, {**GOOD, "cniVersion": version}, environment)
            assert said.body["cniVersion"] == version


def test_what_is_odd_and_well_formed_works(stage: Stage) -> None:
    it, box = stage.it, stage.box
    large = it.config(unknown="x" * (1 << 20), name="A_b-c.9" * 30)
    odd = {"CNI_CONTAINERID": "c" * 4000, "CNI_IFNAME": "größe☃"}
    result = it.add(box, large, **odd)
    assert result["interfaces"][1]["name"] == "größe☃"
    assert it.call("CHECK", box, {**large, "prevResult": result}, dict(odd)).exit_code == 0
    it.delete(box, large, **odd)
    it.wait_held(stage.held)


# --- anything at all ----------------------------------------------------------------------------------------------

words = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
some_ips = st.lists(st.sampled_from(["10.244.0.250", "10.244.0.3/24", "fd00::1", "x"]), max_size=2)
wishes = st.fixed_dictionaries(
    {}, optional={"ips": some_ips | json_values, "mac": st.sampled_from(["02:00:00:00:00:01", "ff"]) | json_values}
)
configs = st.fixed_dictionaries(
    {"name": st.just("fuzz") | json_values, "cniVersion": st.sampled_from(VERSIONS) | json_values},
    optional={
        "dns": json_values,
        "prevResult": st.fixed_dictionaries({}, optional={"ips": json_values, "interfaces": json_values}),
        "runtimeConfig": wishes | json_values,
        "args": st.fixed_dictionaries({"cni": wishes}) | json_values,
        "cni.dev/valid-attachments": json_values,
    },
)
good = st.just(json.dumps({**GOOD, "name": "fuzz"}).encode())
stdins = good | st.binary(max_size=64) | configs.map(lambda plain: json.dumps(plain).encode())
arguments = words | st.lists(
    st.sampled_from(
        ["IgnoreUnknown=1", "K8S_POD_NAME=a", "X=1", "IP=10.244.0.251", "IP=1", "MAC=02:00:00:00:00:02", "="]
    )
).map(";".join)
BOUNDED = settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
COMMANDS = ("ADD", "CHECK", "DEL", "GC", "STATUS")


def test_no_request_makes_the_daemon_stumble(stage: Stage) -> None:
    """Through gRPC, so that what the executable would refuse comes in as well."""
    before = stage.seen()
    with grpc.insecure_channel(f"unix:{stage.it.lab.files.ipamd_socket('node1')}") as channel:
        stub = cni_pb2_grpc.CNIStub(channel)  # type: ignore[no-untyped-call]

        def ask(**fields: Any) -> tuple[int, dict[str, Any]]:
            answer = stub.Call(
                cni_pb2.CallRequest(api_min=1, api_max=1, issued_at=boottime_ns(), **fields), timeout=PATIENCE
            )
            return int(answer.exit_code), json.loads(answer.stdout) if answer.stdout else {}

        @BOUNDED
        @given(
            command=st.sampled_from(COMMANDS) | words,
            container_id=st.just("fuzz") | words,
            netns=st.just(stage.box.netns) | st.just(stage.box.netns + "\0") | words,
            ifname=st.just("eth0") | words,
            args=arguments,
            stdin=stdins,
        )
        def story(command: str, container_id: str, netns: str, ifname: str, args: str, stdin: bytes) -> None:
            fields = {"container_id": container_id, "netns": netns, "ifname": ifname, "args": args, "stdin": stdin}
            code, body = ask(command=command, **fields)
            assert code in (0, 1)
            assert not code or (body["msg"] and body["code"] not in (0, 5, 999)), body
            if command == "ADD" and not code:
                assert ask(command="DEL", **fields)[0] == 0

        story()
    stage.it.wait_held(stage.held)
    assert stage.seen() == before


def test_no_environment_makes_the_executable_stumble(stage: Stage) -> None:
    before = stage.seen()
    raw = st.binary(max_size=20).map(lambda value: value.replace(b"\0", b""))

    @BOUNDED
    @given(
        command=st.sampled_from([each.encode() for each in (*COMMANDS, "VERSION")]) | raw,
        container_id=st.just(b"fuzz") | raw,
        netns=st.just(stage.box.netns.encode()) | raw,
        ifname=st.just(b"eth0") | raw,
        args=arguments.map(lambda text: text.replace("\0", "").encode()) | raw,
        stdin=stdins,
    )
    def story(command: bytes, container_id: bytes, netns: bytes, ifname: bytes, args: bytes, stdin: bytes) -> None:
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
        }
        said = stage.it.call("", None, stdin, environment)
        assert said.exit_code in (0, 1)
        assert said.stdout.count(b"\n") <= 1
        assert not said.exit_code or said.error not in (0, 5, 999), said
        if command == b"ADD" and not said.exit_code:
            assert stage.it.call("", None, stdin, {**environment, "CNI_COMMAND": "DEL"}).exit_code == 0

    story()
    stage.it.wait_held(stage.held)
    assert stage.seen() == before
