"""CNI in and out: what the runtime sends becomes a call or an error with its code, what was done becomes its JSON."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipam_daemon import cni
from ipam_daemon.cni import Call, NetworkConfig
from ipam_daemon.errors import CniError, Exhausted, PlumbingFailed, TryAgainLater
from ipam_daemon.model import Attachment, AttachmentKey, PodRef, host_mac
from podwire.errors import PodwireError, TryAgain

CONFIG: dict[str, Any] = {"cniVersion": "1.1.0", "name": "podnet", "type": "podwire"}


def parse(config: Any = CONFIG, **environment: Any) -> Call:
    """A well-formed ADD, but for what is given. `config` is bytes as they are, or anything that JSON can say."""
    chosen: dict[str, Any] = {
        "command": "ADD",
        "container_id": "c1",
        "netns": "/run/netns/c1",
        "ifname": "eth0",
        "args": "",
        "issued_ns": 7,
        **environment,
    }
    return cni.parse(**chosen, stdin=config if isinstance(config, bytes) else json.dumps(config).encode())


def with_keys(**more: Any) -> dict[str, Any]:
    return {**CONFIG, **{name.replace("__", "/").replace("_", "-"): value for name, value in more.items()}}


def test_an_add_as_a_runtime_sends_it() -> None:
    call = parse(
        with_keys(capabilities={"portMappings": True}, dns={"nameservers": ["10.96.0.10"], "search": ["a.b"]}),
        args="IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=u1;K8S_POD_INFRA_CONTAINER_ID=c1;X=1",
    )
    assert call.key == AttachmentKey("podnet", "c1", "eth0")
    assert call.pod == PodRef(namespace="default", name="web-0", uid="u1")
    assert call.config.dns == cni.Dns(nameservers=("10.96.0.10",), search=("a.b",))
    assert (call.netns, call.issued_ns) == ("/run/netns/c1", 7)


WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no command": ({"command": ""}, 4, "CNI_COMMAND"),
    "an unknown command": ({"command": "add"}, 4, "CNI_COMMAND is 'add'"),
    "no container id": ({"container_id": ""}, 4, "CNI_CONTAINERID"),
    "a container id that is a path": ({"container_id": "../c1"}, 4, "CNI_CONTAINERID is '../c1'"),
    "a container id with a newline at its end": ({"container_id": "c1\n"}, 4, "CNI_CONTAINERID"),
    "no interface name": ({"ifname": ""}, 4, "CNI_IFNAME"),
    "an interface name of 16 bytes": ({"ifname": "e" * 16}, 4, "CNI_IFNAME"),
    "an interface name of 15 letters and 16 bytes": ({"ifname": "e" * 14 + "é"}, 4, "CNI_IFNAME"),
    "an interface name that is a folder": ({"ifname": ".."}, 4, "CNI_IFNAME"),
    "an interface name with a slash": ({"ifname": "a/b"}, 4, "CNI_IFNAME"),
    "an interface name with a colon": ({"ifname": "eth0:1"}, 4, "CNI_IFNAME"),
    "an interface name with a blank": ({"ifname": "a b"}, 4, "CNI_IFNAME"),
    "an interface name with a NUL": ({"ifname": "eth0\0"}, 4, "CNI_IFNAME"),
    "an interface name with a byte that the kernel takes for a blank": ({"ifname": "à"}, 4, "CNI_IFNAME"),
    "an interface name that the kernel would complete": ({"ifname": "eth%d"}, 4, "CNI_IFNAME"),
    "no namespace": ({"netns": ""}, 4, "CNI_NETNS"),
    "all of them at once": (
        {"netns": "", "ifname": "", "container_id": ""},
        4,
        "CNI_CONTAINERID.*CNI_IFNAME.*CNI_NETNS",
    ),
    "arguments that are no pairs": ({"args": "IgnoreUnknown"}, 4, "KEY=VALUE"),
    "an unknown argument": ({"args": "COLOUR=blue"}, 4, "unknown keys COLOUR"),
    "a name asked for as an address": ({"args": "IP=web"}, 4, "IP of CNI_ARGS asks for 'web'"),
    "two addresses of a family": ({"args": "IP=10.244.1.9,10.244.1.10"}, 4, "at most one address of a family"),
    "a multicast MAC": ({"args": "IgnoreUnknown=true;MAC=01:00:00:00:00:01"}, 4, "MAC of CNI_ARGS asks for '01:00"),
    "no MAC at all": ({"config": with_keys(runtimeConfig={"mac": "none"})}, 7, "runtimeConfig.mac asks for 'none'"),
    "the zero MAC": ({"config": with_keys(args={"cni": {"mac": "00:00:00:00:00:00"}})}, 7, "args.cni.mac"),
    "addresses that are no list": ({"config": with_keys(runtimeConfig={"ips": "10.244.1.9"})}, 7, "runtimeConfig.ips"),
    "a previous result in an ADD": ({"config": with_keys(prevResult={})}, 2, "prevResult"),
    "nothing on standard input": ({"config": b""}, 6, "standard input"),
    "half of a configuration": ({"config": b'{"name":'}, 6, "standard input"),
    "no text at all": ({"config": b"\xff\xfe"}, 6, "standard input"),
    "a nesting that nobody means": ({"config": b'{"x":' + b"[" * 100_000}, 6, "standard input"),
    "a list": ({"config": []}, 7, "Expected `object`"),
    "no network name": ({"config": {"cniVersion": "1.1.0"}}, 7, "name"),
    "a network name that is a number": ({"config": with_keys(name=7)}, 7, r"\$.name"),
    "a network name that is a path": ({"config": with_keys(name="../x")}, 7, "name is '../x'"),
    "servers that are no list": ({"config": with_keys(dns={"nameservers": "1.1.1.1"})}, 7, r"\$.dns.nameservers"),
    "no version, which says 0.2.0": (
        {"config": {"name": "podnet"}},
        1,
        "'0.2.0', expected one of 0.3.1, 0.4.0, 1.0.0, 1.1.0",
    ),
    "a version of tomorrow": ({"config": with_keys(cniVersion="2.0.0")}, 1, "'2.0.0'"),
    "CHECK in 0.3.1": (
        {"command": "CHECK", "config": with_keys(cniVersion="0.3.1")},
        1,
        "CHECK needs cniVersion 0.4.0",
    ),
    "GC in 1.0.0": ({"command": "GC", "config": with_keys(cniVersion="1.0.0")}, 1, "GC needs cniVersion 1.1.0"),
    "STATUS in 1.0.0": ({"command": "STATUS", "config": with_keys(cniVersion="1.0.0")}, 1, "STATUS needs"),
}


@pytest.mark.parametrize(("given_", "code", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(given_: dict[str, Any], code: int, says: str) -> None:
    with pytest.raises(CniError, match=says) as caught:
        parse(**given_)
    assert caught.value.code == code


FINE: dict[str, dict[str, Any]] = {
    "an interface name of 15 bytes": {"ifname": "e" * 15},
    "an interface name of 15 bytes in 14 letters": {"ifname": "e" * 13 + "é"},
    "a container id as containerd makes them": {"container_id": "0a" * 32},
    "a container id with all that is allowed": {"container_id": "A_b-c.9"},
    "unknown arguments, tolerated": {"args": "IgnoreUnknown=1;COLOUR=blue"},
    "an argument with an equals sign": {"args": "K8S_POD_NAME=a=b"},
    "arguments with empty places": {"args": ";K8S_POD_NAME=web;"},
    "unknown keys of others": {"config": with_keys(runtimeConfig={"x": 1}, ipMasq=True)},
    "a previous result in a DEL": {
        "command": "DEL",
        "config": with_keys(prevResult={"ips": [{"address": "10.0.0.3/24"}]}),
    },
    "a DEL without a namespace": {"command": "DEL", "netns": ""},
    "a DEL with arguments that an ADD would refuse": {"command": "DEL", "args": "IP=10.244.1.9;COLOUR=blue;nonsense"},
    "a DEL whose ADD was refused for what it asked": {
        "command": "DEL",
        "config": with_keys(runtimeConfig={"ips": 5, "mac": []}, args="blue", dns=7, prevResult={"ips": [{}]}),
    },
    "nothing, said by null": {
        "config": with_keys(dns=None, prevResult=None, runtimeConfig=None, args={"cni": None}),
    },
    "nothing of what DNS has, said by null": {
        "config": with_keys(dns={"nameservers": None, "domain": None, "search": None, "options": None}),
    },
    "nothing of a previous result, said by null": {
        "command": "CHECK",
        "config": with_keys(prevResult={"ips": None, "interfaces": None, "dns": None}),
    },
    "an interface without a MAC, said by null": {
        "command": "CHECK",
        "config": with_keys(prevResult={"interfaces": [{"name": "eth0", "mac": None, "sandbox": None}]}),
    },
    "nothing of a port mapping's address, said by null": {
        "config": with_keys(
            runtimeConfig={"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": None, "hostIP": None}]}
        ),
    },
    "nothing wished, said by null": {
        "config": with_keys(runtimeConfig={"ips": None, "mac": None}, args={"cni": {"ips": None}}),
    },
    "a GC without container": {"command": "GC", "container_id": "", "ifname": "", "netns": ""},
    "a STATUS without container": {"command": "STATUS", "container_id": "", "ifname": "", "netns": ""},
    "0.3.1": {"config": with_keys(cniVersion="0.3.1")},
}


@pytest.mark.parametrize("given_", FINE.values(), ids=FINE.keys())
def test_what_is_fine_is_taken(given_: dict[str, Any]) -> None:
    assert parse(**given_).command == given_.get("command", "ADD")


ASKED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "CNI_ARGS": ({"args": "IP=10.244.1.9"}, "", ("10.244.1.9",)),
    "one of each family": ({"args": "IP=10.244.1.9,fd00::9/64"}, "", ("10.244.1.9", "fd00::9")),
    "args.cni before CNI_ARGS": (
        {"args": "IP=10.244.1.9;MAC=02:00:00:00:00:01", "config": with_keys(args={"cni": {"ips": ["10.244.1.8/16"]}})},
        "02:00:00:00:00:01",
        ("10.244.1.8",),
    ),
    "runtimeConfig before both": (
        {
            "args": "IP=10.244.1.9;MAC=02:00:00:00:00:01",
            "config": with_keys(
                args={"cni": {"ips": ["10.244.1.8"], "mac": "02:00:00:00:00:02"}},
                runtimeConfig={"ips": ["10.244.1.7"], "mac": "02:00:00:00:00:0A"},
            ),
        },
        "02:00:00:00:00:0a",
        ("10.244.1.7",),
    ),
    "nothing": ({}, "", ()),
}


@pytest.mark.parametrize(("given_", "mac", "addresses"), ASKED.values(), ids=ASKED.keys())
def test_what_is_asked_for_by_name(given_: dict[str, Any], mac: str, addresses: tuple[str, ...]) -> None:
    wanted = parse(**given_).wanted
    assert (wanted.mac, tuple(map(str, wanted.addresses))) == (mac, addresses)


def test_a_gc_of_an_older_library_says_what_to_keep() -> None:
    config = {**CONFIG, "cni.dev/attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    call = parse(config, command="GC")
    assert call.config.valid_attachments is None
    assert [each.container_id for each in call.config.attachments or ()] == ["c1"]


def test_a_gc_says_what_to_keep() -> None:
    call = parse(with_keys(cni_dev__valid_attachments=None), command="GC")
    assert call.config.valid_attachments is None
    config = {**CONFIG, "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    (kept,) = parse(config, command="GC").config.valid_attachments or ()
    assert (kept.container_id, kept.ifname) == ("c1", "eth0")


# --- results ------------------------------------------------------------------------------------------------------

ATTACHMENT = Attachment(
    key=AttachmentKey("podnet", "c1", "eth0"),
    netns="/run/netns/c1",
    host_ifname="pw0123456789ab",
    mac="0a:58:0a:f4:01:03",
    mtu=1450,
    addresses=(ipaddress.ip_interface("10.244.1.3/24"), ipaddress.ip_interface("fd00::3/120")),
    created=1.0,
    created_ns=7,
)
GATEWAYS = {
    ipaddress.ip_network("10.244.1.0/24"): ipaddress.ip_address("10.244.1.1"),
    ipaddress.ip_network("fd00::/120"): ipaddress.ip_address("fd00::1"),
}


def result(version: str, **more: Any) -> dict[str, Any]:
    text = cni.result(ATTACHMENT, GATEWAYS, parse(with_keys(cniVersion=version, **more)).config)
    assert text.count(b"\n") == 1
    assert text.endswith(b"\n")
    got = json.loads(text)
    assert isinstance(got, dict)
    return got


@pytest.mark.parametrize("version", cni.VERSIONS)
def test_a_result_in_the_shape_of_its_version(version: str) -> None:
    old, newest = version in ("0.3.1", "0.4.0"), version == "1.1.0"
    mtu = {"mtu": 1450} if newest else {}
    four, six = ({"version": "4"}, {"version": "6"}) if old else ({}, {})
    assert result(version) == {
        "cniVersion": version,
        "interfaces": [
            {"name": "pw0123456789ab", "mac": host_mac("pw0123456789ab"), **mtu},
            {"name": "eth0", "mac": "0a:58:0a:f4:01:03", "sandbox": "/run/netns/c1", **mtu},
        ],
        "ips": [
            {**four, "interface": 1, "address": "10.244.1.3/24", "gateway": "10.244.1.1"},
            {**six, "interface": 1, "address": "fd00::3/120", "gateway": "fd00::1"},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.244.1.1"}, {"dst": "::/0", "gw": "fd00::1"}],
    }


def test_dns_is_handed_back_as_it_came() -> None:
    dns = {"nameservers": ["10.96.0.10"], "domain": "cluster.local", "search": ["a", "b"], "options": ["ndots:5"]}
    assert result("1.0.0", dns=dns)["dns"] == dns
    for nothing in ({}, {"nameservers": None, "search": None}):
        assert "dns" not in result("1.0.0", dns=nothing)


def test_a_result_can_come_back_as_the_previous_one() -> None:
    for version in cni.VERSIONS[1:]:
        call = parse(with_keys(cniVersion=version, prevResult=result(version)), command="CHECK")
        assert call.config.previous is not None
        assert [each.address for each in call.config.previous.ips] == ["10.244.1.3/24", "fd00::3/120"]
        assert [each.name for each in call.config.previous.interfaces] == ["pw0123456789ab", "eth0"]


# --- errors -------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[BaseException, int]] = {
    "of the table": (Exhausted("pool default: nothing is free"), 100),
    "that goes away by itself": (TryAgainLater("no block yet"), 11),
    "that goes away by itself, of another package": (TryAgain("etcd"), 11),
    "that nobody has foreseen": (KeyError("x"), 999),
    "of the project's root": (PodwireError("something"), 999),
    "without words": (RuntimeError(), 999),
}


@pytest.mark.parametrize(("failure", "code"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_has_its_code_and_words(failure: BaseException, code: int) -> None:
    said = json.loads(cni.error(failure, "1.0.0"))
    assert (said["cniVersion"], said["code"]) == ("1.0.0", code)
    assert said["msg"]


def test_an_error_with_details() -> None:
    assert json.loads(cni.error(PlumbingFailed("what", details="why"), "1.1.0"))["details"] == "why"


VERSION_OF = {
    "as the configuration says": (b'{"cniVersion": "0.4.0"}', "0.4.0"),
    "ours, when it says one that we do not speak": (b'{"cniVersion": "9.9.9"}', "1.1.0"),
    "ours, when it says no version at all": (b'{"cniVersion": ["0.4.0"]}', "1.1.0"),
    "ours, when it is no object": (b"[]", "1.1.0"),
    "ours, when it is no JSON": (b"\xff", "1.1.0"),
}


@pytest.mark.parametrize(("stdin", "expected"), VERSION_OF.values(), ids=VERSION_OF.keys())
def test_the_version_of_an_error(stdin: bytes, expected: str) -> None:
    assert cni.version_of(stdin) == expected


# --- anything at all ----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
configs = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("podnet") | json_values,
        "cniVersion": st.sampled_from(cni.VERSIONS) | json_values,
        "dns": json_values,
        "prevResult": st.fixed_dictionaries({}, optional={"ips": json_values, "interfaces": json_values}) | json_values,
        "cni.dev/valid-attachments": json_values,
    },
)
stdins = st.binary(max_size=64) | configs.map(lambda plain: json.dumps(plain).encode())
names = st.text(max_size=20)


def is_one_line_that_says(text: bytes, code: int) -> None:
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    said = json.loads(text)
    assert said["code"] == code
    assert said["msg"]
    assert said["cniVersion"] in cni.VERSIONS


@given(
    command=st.sampled_from([*cni.COMMANDS, "VERSION", ""]) | names,
    container_id=st.just("c1") | names,
    netns=st.just("/run/netns/c1") | names,
    ifname=st.just("eth0") | names,
    args=names | st.lists(st.sampled_from(["IgnoreUnknown=1", "K8S_POD_NAME=a", "X=1", "IP=1", "="])).map(";".join),
    stdin=stdins,
)
@example(command="ADD", container_id="c1", netns="n", ifname="eth0", args="\u2028=\n", stdin=b'{"name":"\\u2028\\n"}')
def test_anything_at_all_is_a_call_or_an_error_in_one_line(
    command: str, container_id: str, netns: str, ifname: str, args: str, stdin: bytes
) -> None:
    try:
        call = cni.parse(
            command=command,
            container_id=container_id,
            netns=netns,
            ifname=ifname,
            args=args,
            stdin=stdin,
            issued_ns=1,
        )
    except CniError as failure:
        is_one_line_that_says(cni.error(failure, cni.version_of(stdin)), failure.code)
    else:
        assert isinstance(call.config, NetworkConfig)
        assert call.command in cni.COMMANDS
