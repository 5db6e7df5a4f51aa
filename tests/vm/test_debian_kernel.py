"""Our rules on Debian 12's own kernel: every nft shape loads, Services translate (SCTP by real sockets), policies hold.

One boot under QEMU's software emulation, some 15 s on a quiet machine, for all tests of this file.
"""

from __future__ import annotations

import ipaddress
import shutil
from collections.abc import Iterator, Mapping

import msgspec
import pytest

from ipam_daemon import hostport_rules, spoofguard
from ipam_daemon.model import Attachment, AttachmentKey
from ipam_daemon.plan import FirewallPlan
from ipam_daemon.ruleset import FirewallState, render
from kube_proxy_lite.model import Backend, Frontend, FrontendKind, PortKey, PortPlan, Protocol, Settings
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.render.nftables import NftablesRenderer
from kube_proxy_lite.render.policy_nftables import PolicyRenderer
from podwire.kube import objects
from tests.policy_cases import BASE, CASES, namespace, policy
from tests.unit.test_policy_evaluator import put
from tests.vm.booting import ROOT, boot

pytestmark = pytest.mark.slow
SERVER, CLIENT = ipaddress.ip_address("10.50.0.2"), "10.50.1.3"


def firewall() -> str:
    """The daemon's table, for both families."""
    return render(
        FirewallPlan(
            local_blocks=frozenset(map(ipaddress.ip_network, ("10.244.1.0/24", "fd00:10:244:1::/64"))),
            unmasqueraded=frozenset(map(ipaddress.ip_network, ("10.244.0.0/16", "fd00:10:244::/48", "224.0.0.0/4"))),
            vteps=frozenset(map(ipaddress.ip_address, ("172.31.0.12", "fd00:172:31::12"))),
            vxlan_port=4789,
        ),
        FirewallState(chains="", elements={}),
    )


def guard() -> str:
    """The spoof guard with a pod of both families."""
    pod = Attachment(
        key=AttachmentKey("podwire", "a", "eth0"),
        netns="",
        host_ifname="pw0123456789ab",
        mac="0a:58:0a:f4:01:07",
        mtu=1450,
        addresses=(ipaddress.ip_interface("10.244.1.7/24"), ipaddress.ip_interface("fd00:10:244:1::7/64")),
        created=0.0,
        created_ns=0,
    )
    return spoofguard.render(spoofguard.elements(pod))


def services(*plans: PortPlan, cidr: str = "10.50.0.0/16") -> str:
    """The tables of Services."""
    settings = Settings(node="node", cluster_cidrs=(ipaddress.ip_network(cidr),))
    renderer = NftablesRenderer(settings)
    renderer.update({plan.key: plan for plan in plans}, {})
    return "".join(each.script for each in renderer.resync({4: None, 6: None}))


def plan(name: str, protocol: Protocol, cluster_ip: str, *backends: str, affinity: int = 0) -> PortPlan:
    """A port 80 that leads to ports 8080."""
    address = ipaddress.ip_address(cluster_ip)
    return PortPlan(
        key=PortKey("default", name, "", protocol, address.version),
        frontends=(Frontend(kind=FrontendKind.CLUSTER_IP, address=address, port=80),),
        cluster=tuple(Backend(ipaddress.ip_address(each), 8080, local=True) for each in backends),
        affinity=affinity,
    )


def every_case() -> str:
    """The policies of every case together, in a table that holds a class for each."""
    policies = Policies(None)
    for manifest in BASE:
        put(policies, manifest)
    for number, steps in enumerate(CASES.values()):
        for manifest in steps[0].put:
            if manifest["kind"] == "NetworkPolicy":
                put(policies, {**manifest, "metadata": {**manifest["metadata"], "name": f"p{number}"}})
    return policy_script(policies)


def one_policy() -> str:
    """A policy that lets the port 8080 over TCP in to the server."""
    policies = Policies(None)
    put(policies, namespace("x"))
    put(policies, policy("x/p", ingress=[{"ports": [{"protocol": "TCP", "port": 8080}]}]))
    server = msgspec.convert(
        {"metadata": {"name": "server", "namespace": "x", "uid": "u"}, "status": {"podIPs": [{"ip": str(SERVER)}]}},
        objects.Pod,
    )
    policies.set_pod(server)
    return policy_script(policies)


def policy_script(policies: Policies) -> str:
    renderer = PolicyRenderer()
    renderer.update(policies.drain(), frozenset())
    return "".join(renderer.resync(None))


def scripts() -> Mapping[str, str]:
    """File name → script. Those named load-… are loaded alone."""
    protocols = [plan(each.value.lower(), each, "10.96.0.10", str(SERVER)) for each in Protocol]
    both = [plan("web", Protocol.TCP, "10.96.0.30", "10.50.0.2", "10.50.0.4", affinity=600),
            plan("web", Protocol.TCP, "fd00:10:96::30", "fd00:50::2", "fd00:50::4")]  # fmt: skip
    empty = [plan("gone", each, "10.96.0.20") for each in (Protocol.TCP, Protocol.UDP)]
    return {
        "load-firewall.nft": firewall(),
        "load-guard.nft": guard(),
        "load-hostports.nft": hostport_rules.render(),
        "load-services.nft": services(*protocols, *both, *empty),
        "load-policies.nft": every_case(),
        "services.nft": services(*protocols, *empty),
        "policy.nft": one_policy(),
    }


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, str]]:
    """What the guest says: name → answer."""
    folder = ROOT / "build" / "vm" / "scripts"
    folder.mkdir()
    try:
        for name, text in scripts().items():
            (folder / name).write_text(text)
        yield boot(f"/usr/bin/python3 -IS {ROOT / 'tests' / 'vm' / 'guest.py'} {folder}")
    finally:
        shutil.rmtree(folder)


def test_it_is_another_kernel(answers: dict[str, str]) -> None:
    assert answers["kernel"].startswith("6.1.")


@pytest.mark.parametrize("name", ["firewall", "guard", "hostports", "services", "policies"])
def test_every_shape_loads_into_an_empty_kernel_and_over_itself(answers: dict[str, str], name: str) -> None:
    assert answers[f"load-{name}"] == "loaded"


SERVICES = {
    "tcp": CLIENT,
    "udp": CLIENT,
    "sctp": CLIENT,
    "no endpoints": "refused",
    "no endpoints, udp": "refused",
    "hairpin": "10.50.0.1",
}


@pytest.mark.parametrize(("name", "expected"), SERVICES.items(), ids=SERVICES.keys())
def test_services_lead_to_their_endpoints(answers: dict[str, str], name: str, expected: str) -> None:
    assert (answers["stage"], answers["services loaded"]) == ("built", "yes")
    assert answers[name] == expected


def test_the_node_reaches_services_too(answers: dict[str, str]) -> None:
    assert answers["from the node"] == "10.50.1.1"


POLICIES = {
    "allowed port": CLIENT,
    "denied port": "nothing",
    "denied protocol": "nothing",
    "through the service": CLIENT,
    "own node": "10.50.0.1",
}


@pytest.mark.parametrize(("name", "expected"), POLICIES.items(), ids=POLICIES.keys())
def test_policies_hold(answers: dict[str, str], name: str, expected: str) -> None:
    assert answers["policy loaded"] == "yes"
    assert answers[name] == expected
