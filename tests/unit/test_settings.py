"""The daemon's configuration: what it takes, and that what it does not take is named with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipam_daemon import settings
from podwire.config import ConfigError

LEAST = """
node: node-1
etcd: {endpoints: ["http://127.0.0.1:2379"]}
pools: [{cidr: 10.244.0.0/16}]
"""


def read(tmp_path: Path, text: str, node: str = "") -> settings.Settings:
    path = tmp_path / "ipamd.yaml"
    path.write_text(text, encoding="utf-8")
    return settings.read(path, node)


def test_the_least_that_works(tmp_path: Path) -> None:
    got = read(tmp_path, LEAST)
    assert (got.node, str(got.pools[0].cidr), got.pools[0].block_size) == ("node-1", "10.244.0.0/16", 24)
    assert (got.backend.vni, got.backend.port) == (1, 4789)
    assert got.socket_path == Path("/run/podwire/ipamd.sock")
    assert got.queue_dir == Path("/var/lib/podwire/del-queue")


def test_everything(tmp_path: Path) -> None:
    got = read(
        tmp_path,
        """
        node: node-1
        nodeAddresses: [192.0.2.1, "2001:db8::1"]
        etcd: {endpoints: ["http://127.0.0.1:2379"]}
        pools: [{name: blue, cidr: 10.0.0.0/8, blockSize: 26}]
        backend: {type: vxlan, vni: 7, port: 8472}
        mtu: 1400
        runDir: /run/a
        stateDir: /var/lib/a
        httpListen: "[::1]:9000"
        logLevel: debug
        cooldown: 0
        reconcileInterval: 5
        """,
    )
    assert [str(each) for each in got.node_addresses] == ["192.0.2.1", "2001:db8::1"]
    assert (got.backend.vni, got.mtu, got.run_dir, got.cooldown) == (7, 1400, "/run/a", 0.0)


def test_a_pool_of_each_family_may_have_one_name(tmp_path: Path) -> None:
    text = LEAST.replace("/16}]", "/16}, {cidr: 'fd00:10:244::/56'}]\nnonMasqueradeCIDRs: [10.0.0.0/8, 'fd00::/8']")
    got = read(tmp_path, text.replace("node:", "backend: {type: auto}\nnode:"))
    assert [(pool.name, pool.block_size) for pool in got.pools] == [("default", 24), ("default", 64)]
    assert got.families == {4, 6}
    assert got.backend.type == "auto"
    assert [str(each) for each in got.non_masquerade_cidrs] == ["10.0.0.0/8", "fd00::/8"]


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, LEAST, node="node-2").node == "node-2"


def test_the_host_name_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Worker-3.Example")
    assert read(tmp_path, LEAST.replace("node: node-1", "")).node == "worker-3.example"


WRONG = {  # replaced in LEAST, by what, what the error says
    "an unknown key": ("node:", "nodde:", "nodde"),
    "an unknown key inside": ("cidr:", "cider:", r"\$.pools\[0\]"),
    "no etcd": ('etcd: {endpoints: ["http://127.0.0.1:2379"]}', "", "etcd"),
    "no pools": ("pools: [{cidr: 10.244.0.0/16}]", "", "pools"),
    "an empty list of pools": ("[{cidr: 10.244.0.0/16}]", "[]", "pools is empty, expected at least one"),
    "a pool with host bits": ("10.244.0.0/16", "10.244.0.1/16", r"host bits set.*\$.pools\[0\].cidr"),
    "a pool that is no network": ("10.244.0.0/16", "all", r"\$.pools\[0\].cidr"),
    "a pool that is a number": ("10.244.0.0/16", "10", r"expected text such as .* got 10"),
    "an IPv6 pool smaller than its blocks": (
        "10.244.0.0/16",
        "'fd00::/112'",
        "blockSize is 64, expected a prefix length from 112",
    ),
    "blocks larger than the pool": ("/16}", "/16, blockSize: 15}", "blockSize is 15, expected a prefix length from 16"),
    "blocks without room": ("/16}", "/16, blockSize: 30}", "blockSize is 30"),
    "two pools of a name": ("/16}", "/16}, {cidr: 10.9.0.0/16}", r"pools\[1\].name is 'default'"),
    "two pools that overlap": (
        "/16}",
        "/16}, {name: b, cidr: 10.244.9.0/24}",
        "overlaps 10.244.0.0/16 of pool default",
    ),
    "two IPv6 pools": (
        "/16}",
        "/16}, {cidr: 'fd00::/56'}, {name: b, cidr: 'fd01::/56'}",
        "a second pool of a family is not supported yet",
    ),
    "an MTU that IPv6 forbids": ("/16}]", "/16}, {cidr: 'fd00::/56'}]\nmtu: 1200", "mtu is 1200, expected 1280"),
    "an exemption with host bits": ("node:", "nonMasqueradeCIDRs: [10.0.0.1/8]\nnode:", r"\$.nonMasqueradeCIDRs\[0\]"),
    "two pools of a family": ("/16}", "/16}, {name: b, cidr: 10.9.0.0/16}", "a second pool of a family"),
    "a node name in capitals": ("node-1", "Node_1", "node is 'Node_1', expected a lower-case DNS name"),
    "a node name with a dot at its end": ("node-1", "node.", "node is 'node.'"),
    "a VNI of 25 bits": ("node:", "backend: {type: vxlan, vni: 16777216}\nnode:", "backend.vni is 16777216"),
    "a port of 17 bits": ("node:", "backend: {type: vxlan, port: 65536}\nnode:", "backend.port is 65536"),
    "another backend": ("node:", "backend: {type: geneve}\nnode:", "geneve"),
    "an MTU that IPv4 forbids": ("node:", "mtu: 500\nnode:", "mtu is 500, expected 576 to 65535"),
    "an unknown log level": ("node:", "logLevel: loud\nnode:", "logLevel is 'loud'"),
    "a negative cooldown": ("node:", "cooldown: -1\nnode:", "cooldown is -1"),
    "a cooldown that is no number": ("node:", "cooldown: .nan\nnode:", "cooldown is nan"),
    "no interval": ("node:", "reconcileInterval: 0\nnode:", "reconcileInterval is 0"),
    "an interval that is no number": ("node:", "reconcileInterval: .nan\nnode:", "reconcileInterval is nan"),
    "a port without address": ("node:", "httpListen: '9817'\nnode:", "httpListen is '9817'"),
    "an address without port": ("node:", "httpListen: 'localhost:'\nnode:", "httpListen is 'localhost:'"),
    "a node address that is a name": ("node:", "nodeAddresses: [localhost]\nnode:", r"\$.nodeAddresses\[0\]"),
}


@pytest.mark.parametrize(("what", "by", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(tmp_path: Path, what: str, by: str, says: str) -> None:
    assert what in LEAST
    with pytest.raises(ConfigError, match=says) as caught:
        read(tmp_path, LEAST.replace(what, by))
    assert str(caught.value).startswith(str(tmp_path / "ipamd.yaml"))
    assert "\n" not in str(caught.value)
