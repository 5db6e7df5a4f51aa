"""podwire-proxy's configuration: what is taken, and the one line that says what is wrong."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml

from kube_proxy_lite import settings
from kube_proxy_lite.proxy import settings_now
from kube_proxy_lite.services import Services
from kube_proxy_lite.settings import Mode, ProxyConfig
from podwire.config import ConfigError
from tests.unit.service_objects import node, service_cidr

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a key that does not exist": ({"clusterCidr": "10.0.0.0/8"}, "unknown field `clusterCidr`"),
    "a mode": ({"mode": "ipvs"}, "Invalid enum value 'ipvs' - at `$.mode`"),
    "a type": ({"syncPeriod": "soon"}, "Expected `float`, got `str` - at `$.syncPeriod`"),
    "a node": ({"node": "Node_1"}, "node is 'Node_1', expected a lower-case DNS name such as node-1"),
    "a network with host bits": (
        {"clusterCIDRs": ["10.244.0.1/16"]},
        "clusterCIDRs has '10.244.0.1/16', expected a network without host bits such as 10.244.0.0/16",
    ),
    "primary, and others": (
        {"nodePortAddresses": ["primary", "10.0.0.0/24"]},
        "nodePortAddresses has 'primary', expected a network without host bits such as 10.0.0.0/24, or primary alone",
    ),
    "an interface": (
        {"podInterfaces": ['veth" accept']},
        "podInterfaces has 'veth\" accept', expected a name such as pw0, or a beginning such as veth*",
    ),
    "an API and manifests": (
        {"manifests": "/m", "kubernetes": {"kubeconfig": "/k"}},
        "manifests is '/m' and kubernetes is given, expected one of the two",
    ),
    "a server": ({"kubernetes": {"servers": ["10.0.0.1"]}}, "servers"),
    "a socket": ({"daemonSocket": "ipamd.sock"}, "daemonSocket is 'ipamd.sock', expected a path from the root"),
    "no time": ({"syncPeriod": 0}, "syncPeriod is 0.0, expected seconds, more than 0 and at most 86400"),
    "for ever": ({"syncPeriod": float("inf")}, "syncPeriod is inf, expected seconds, more than 0 and at most 86400"),
    "no number": ({"syncPeriod": float("nan")}, "syncPeriod is nan, expected seconds, more than 0 and at most 86400"),
    "an interval longer than the period": (
        {"syncPeriod": 10, "minSyncPeriod": 11},
        "minSyncPeriod is 11.0, expected seconds from 0 to syncPeriod",
    ),
    "a limit": ({"conntrack": {"maxPerCore": -1}}, "conntrack.maxPerCore is -1, expected 0 to 2147483647"),
    "a level": ({"logLevel": "loud"}, "logLevel is 'loud', expected debug, info, warning or error"),
}
REFUSED |= {
    f"listening on {text}": (
        {"healthListen": text},
        f"healthListen is {text!r}, expected address:port such as 127.0.0.1:10249, or empty for none",
    )
    for text in ("10256", "localhost:10256", "0.0.0.0:0", "0.0.0.0:70000", "::1:80", "[10.0.0.1]:80", "1.2.3:80", "a:b")
}


def read(tmp_path: Path, content: dict[str, Any], **flags: Any) -> ProxyConfig:
    file = tmp_path / "proxy.yaml"
    file.write_text(yaml.safe_dump(content))
    return settings.read(file, **flags)


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_named_with_its_value_and_what_would_be_right(
    tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, content)
    text = str(refused.value)
    assert text.startswith(f"{tmp_path}/proxy.yaml: ")
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize("listen", ["", ":10256", "0.0.0.0:10256", "[::]:10256", "[::1]:1"])
def test_addresses_to_listen_on(tmp_path: Path, listen: str) -> None:
    assert read(tmp_path, {"healthListen": listen}).health_listen == listen


def test_nothing_said_is_all_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, {}, node="a")
    assert found == ProxyConfig(node="a")
    assert found.mode is Mode.NFTABLES


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    content = {"node": "b", "mode": "none", "kubernetes": {"kubeconfig": "/k", "servers": ["https://10.0.0.1:6443"]}}
    found = read(tmp_path, content, node="a", mode=Mode.IPTABLES, cluster_cidrs=("10.0.0.0/8",))
    assert (found.node, found.mode, found.cluster_cidrs) == ("a", Mode.IPTABLES, ("10.0.0.0/8",))
    other = read(tmp_path, content, kubeconfig="/other").kubernetes
    assert (other.kubeconfig, other.servers) == ("/other", ("https://10.0.0.1:6443",))
    folder = read(tmp_path, content, manifests="/m")
    assert (folder.manifests, folder.kubernetes.kubeconfig) == ("/m", "")
    assert read(tmp_path, {"manifests": "/m"}, kubeconfig="/k").manifests == ""


def now(services: Services, **config: Any) -> tuple[list[str], list[str]]:
    """Which networks are pods', and where NodePorts answer."""
    made = ProxyConfig(node="node-a", **config)
    found = settings_now(made, made.rules(), services)
    return [str(each) for each in found.cluster_cidrs], [str(each) for each in found.node_port_addresses]


def test_the_nodes_object_says_what_is_left_to_it() -> None:
    state = Services(ProxyConfig(node="node-a").rules())
    state.set_service_cidr(service_cidr("kubernetes", "10.96.0.0/16"))
    follows: dict[str, Any] = {"node_cidrs": True, "node_port_addresses": ("primary",)}
    assert now(state, **follows) == ([], ["0.0.0.0/32", "::/128"]), "nothing known is nowhere"
    state.set_node(node(addresses=["10.0.0.1"], cidrs=["10.244.1.0/24", "fd00::/64"]))
    assert now(state, **follows) == (["10.244.1.0/24", "fd00::/64"], ["10.0.0.1/32", "::/128"])
    assert now(state) == ([], []), "it was not left to it"
    assert now(state, cluster_cidrs=("10.0.0.0/8",), node_cidrs=True)[0] == ["10.0.0.0/8", "10.244.1.0/24", "fd00::/64"]
    made = ProxyConfig(node="node-a")
    assert settings_now(made, made.rules(), state).service_cidrs == (ipaddress.ip_network("10.96.0.0/16"),)
