"""Services at the lab's API server: what is filled in, what is given out, what is refused, what a change does."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from podwire.lab.api.errors import Invalid
from podwire.lab.api.kinds import SERVICE_CIDRS, SERVICES
from podwire.lab.api.service_addresses import NODE_PORTS, choose_address
from podwire.lab.api.store import Store

Object = dict[str, Any]
V4, V6 = "10.96.0.0/24", "fd00:10:96::/120"
HTTP = {"port": 80}


def store(*cidrs: str) -> Store:
    made = Store()
    made.create(SERVICE_CIDRS, {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": list(cidrs or (V4,))}})
    return made


def create(to: Store, name: str = "web", ports: list[Object] | None = None, **spec: Any) -> Object:
    whole = {"ports": [HTTP] if ports is None else ports, "selector": {"app": "web"}, **spec}
    return dict(to.create(SERVICES, {"metadata": {"name": name}, "spec": whole})["spec"])


def change(at: Store, name: str = "web", without: tuple[str, ...] = (), **spec: Any) -> Object:
    def changed(obj: Object) -> Object:
        obj["spec"] = {key: value for key, value in {**obj["spec"], **spec}.items() if key not in without}
        return obj

    return dict(at.modify(SERVICES, name, "default", changed)["spec"])


# --- what is filled in and given out ----------------------------------------------------------------------------


def test_a_service_that_says_little_gets_the_rest() -> None:
    spec = create(store())
    assert {key: value for key, value in spec.items() if not key.startswith("clusterIP")} == {
        "type": "ClusterIP",
        "selector": {"app": "web"},
        "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}],
        "sessionAffinity": "None",
        "internalTrafficPolicy": "Cluster",
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
    }
    assert spec["clusterIPs"] == [spec["clusterIP"]]
    assert ipaddress.ip_address(spec["clusterIP"]) in ipaddress.ip_network(V4)


def test_each_type_gets_what_it_needs() -> None:
    made = store()
    port = create(made, "port", type="NodePort")
    assert port["ports"][0]["nodePort"] in NODE_PORTS
    assert port["externalTrafficPolicy"] == "Cluster"
    balanced = create(made, "balanced", type="LoadBalancer", externalTrafficPolicy="Local")
    assert balanced["allocateLoadBalancerNodePorts"] is True
    assert len({balanced["healthCheckNodePort"], balanced["ports"][0]["nodePort"], port["ports"][0]["nodePort"]}) == 3
    bare = create(made, "bare", type="LoadBalancer", allocateLoadBalancerNodePorts=False)
    assert "nodePort" not in bare["ports"][0]
    assert create(made, "headless", clusterIP="None", ports=[])["clusterIPs"] == ["None"]
    named = create(made, "named", type="ExternalName", externalName="example.org", ports=[])
    assert "clusterIP" not in named
    sticky = create(made, "sticky", sessionAffinity="ClientIP")
    assert sticky["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 10800}}


def test_tcp_and_udp_of_a_port_share_a_node_port() -> None:
    ports = [{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}, {"name": "m", "port": 9153}]
    given = [port["nodePort"] for port in create(store(), ports=ports, type="NodePort")["ports"]]
    assert given[0] == given[1] != given[2]


@pytest.mark.parametrize(
    ("story", "cidrs", "spec", "families"),
    [
        ("one family, the cluster's first", (V6, V4), {}, ["IPv6"]),
        ("the other one, asked for", (V4, V6), {"ipFamilies": ["IPv6"]}, ["IPv6"]),
        ("both, if there are both", (V4, V6), {"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"]),
        ("both, if there is one", (V4,), {"ipFamilyPolicy": "PreferDualStack"}, ["IPv4"]),
        ("both, in the order asked for", (V4, V6),
         {"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "RequireDualStack"}, ["IPv6", "IPv4"]),
        ("the family of the address asked for", (V4, V6), {"clusterIP": "fd00:10:96::7"}, ["IPv6"]),
        ("headless, of both", (V4, V6), {"clusterIP": "None", "ipFamilyPolicy": "RequireDualStack"}, ["IPv4", "IPv6"]),
    ],
)  # fmt: skip
def test_families(story: str, cidrs: tuple[str, ...], spec: Object, families: list[str]) -> None:
    made = create(store(*cidrs), **spec)
    assert made["ipFamilies"] == families, story
    if made["clusterIP"] != "None":
        assert [f"IPv{ipaddress.ip_address(each).version}" for each in made["clusterIPs"]] == families


def test_no_two_services_share_an_address_and_a_full_range_says_so() -> None:
    made = store("10.96.0.0/28")
    addresses = {create(made, f"web{number}")["clusterIP"] for number in range(14)}
    assert len(addresses) == 14, "all but the network's and the broadcast address"
    with pytest.raises(Invalid, match="range is full"):
        create(made, "late")


def test_the_same_name_gets_the_same_address_in_every_cluster() -> None:
    assert create(store(), "web") == create(store(), "web")
    assert create(store(), "web")["clusterIP"] != create(store(), "api")["clusterIP"]


def test_who_asks_for_no_address_leaves_the_low_ones_to_those_who_do() -> None:
    network = ipaddress.ip_network("10.96.0.0/16")
    chosen = {choose_address(str(number), [network], (), "") for number in range(300)}
    assert min(map(int, chosen)) >= int(network[256])


# --- what is refused --------------------------------------------------------------------------------------------

TWO = [{"port": 80, "nodePort": 30080, "name": "a"}, {"port": 81, "nodePort": 30080, "name": "b"}]
REFUSED: dict[str, tuple[Object, str]] = {
    "an address that is taken": ({"clusterIP": "10.96.0.10"}, "spec.clusterIPs.*provided IP is already allocated"),
    "an address of nobody's": ({"clusterIP": "192.0.2.1"}, "not in the valid range. The range of valid IPs is 10.96"),
    "no address at all": ({"clusterIP": "web"}, "must be a valid IP address"),
    "a node port that is taken": ({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30000}]},
                                  r"spec.ports\[0\].nodePort.*30000: provided port is already allocated"),
    "a node port out of range": ({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}, "30000-32767"),
    "a node port twice": ({"type": "NodePort", "ports": TWO}, r"ports\[1\].nodePort: Duplicate value: 30080"),
    "a node port of a ClusterIP": ({"ports": [{"port": 80, "nodePort": 30080}]}, "Forbidden: may not be used when"),
    "a health port that is taken": ({"type": "LoadBalancer", "externalTrafficPolicy": "Local",
                                     "healthCheckNodePort": 30000}, "spec.healthCheckNodePort.*already allocated"),
    "a family that there is not": ({"ipFamilies": ["IPv6"]}, "IPv6.*not configured on this cluster"),
    "both families of one": ({"ipFamilyPolicy": "RequireDualStack"}, "not configured for dual-stack"),
    "no ports": ({"ports": []}, "spec.ports: Required value"),
    "ports without names": ({"ports": [{"port": 80}, {"port": 81}]}, r"ports\[0\].name: Required value"),
    "a port twice": ({"ports": [{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]}, "Duplicate value: TCP port 80"),
    "a port that is none": ({"ports": [{"port": 70000}]}, "must be between 1 and 65535"),
    "a protocol that is none": ({"ports": [{"port": 80, "protocol": "ICMP"}]}, "Unsupported value"),
    "a type that is none": ({"type": "Magic"}, "spec.type: Unsupported value"),
    "a policy that is none": ({"internalTrafficPolicy": "Near"}, "spec.internalTrafficPolicy: Unsupported value"),
    "an external name without one": ({"type": "ExternalName"}, "spec.externalName: Required value"),
    "an external policy inside": ({"externalTrafficPolicy": "Local"}, "only be set for externally-accessible"),
    "a patience that is none": ({"sessionAffinity": "ClientIP",
                                 "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}, "timeoutSeconds"),
}  # fmt: skip


@pytest.mark.parametrize("story", REFUSED)
def test_what_cannot_be_is_refused_with_its_field(story: str) -> None:
    made = store()
    create(made, "first", type="NodePort", clusterIP="10.96.0.10", ports=[{"port": 80, "nodePort": 30000}])
    spec, words = REFUSED[story]
    with pytest.raises(Invalid, match=words):
        create(made, **spec)
    assert made.find(SERVICES, "web", "default") is None


# --- changes ----------------------------------------------------------------------------------------------------


def test_who_does_not_say_an_address_keeps_it() -> None:
    made = store()
    asked: Object = {"clusterIP": "10.96.0.10", "healthCheckNodePort": 30001}  # not what would be chosen
    port = {"port": 80, "nodePort": 30002}
    spec = create(made, ports=[port], type="LoadBalancer", externalTrafficPolicy="Local", **asked)
    given = ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort", "ports")
    bare: list[Object] = [{"port": 80, "name": "web"}, {"port": 81, "name": "more"}]
    after = change(made, without=given[:-1], ports=bare)
    assert {key: after[key] for key in given[:-1]} == {key: spec[key] for key in given[:-1]}
    assert after["ports"][0]["nodePort"] == spec["ports"][0]["nodePort"]
    assert after["ports"][1]["nodePort"] not in (spec["ports"][0]["nodePort"], spec["healthCheckNodePort"])


def test_a_cluster_ip_does_not_change() -> None:
    made = store()
    create(made, clusterIP="10.96.0.10")
    with pytest.raises(Invalid, match="may not change once set"):
        change(made, clusterIP="10.96.0.11", clusterIPs=["10.96.0.11"])


def test_another_type_gives_up_what_it_has_no_use_for() -> None:
    made = store()
    create(made, type="LoadBalancer", externalTrafficPolicy="Local")
    at_nodes = change(made, type="NodePort")
    assert not {"healthCheckNodePort", "allocateLoadBalancerNodePorts"} & at_nodes.keys()
    inside = change(made, type="ClusterIP")
    assert "externalTrafficPolicy" not in inside
    assert "nodePort" not in inside["ports"][0]
    assert inside["clusterIP"] == at_nodes["clusterIP"]
    outside = change(made, type="ExternalName", externalName="example.org")
    assert not {"clusterIP", "clusterIPs", "ipFamilies"} & outside.keys()
    again = change(made, type="NodePort", without=("externalName",))
    assert again["ports"][0]["nodePort"] in NODE_PORTS


def test_a_second_family_comes_and_goes() -> None:
    made = store(V4, V6)
    first = create(made)
    both = change(made, ipFamilyPolicy="PreferDualStack")
    assert both["clusterIPs"][0] == first["clusterIP"]
    assert both["ipFamilies"] == ["IPv4", "IPv6"]
    assert change(made, ipFamilyPolicy="SingleStack")["clusterIPs"] == [first["clusterIP"]]


def test_what_a_deleted_service_had_is_free_again() -> None:
    made = store()
    first = create(made, type="NodePort", clusterIP="10.96.0.10", ports=[{"port": 80, "nodePort": 30000}])
    made.delete(SERVICES, "web", "default")
    again = create(made, "other", type="NodePort", clusterIP="10.96.0.10", ports=[{"port": 80, "nodePort": 30000}])
    assert again == first


def test_a_cluster_without_service_networks_gives_nothing() -> None:
    spec = create(Store())
    assert "clusterIP" not in spec
