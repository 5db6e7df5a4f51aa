"""Memoryless: whatever came, in whatever order, with hostile objects among it, the state is that of what is there now.

Events are drawn at random from small pools, so that Services contend for the same places, slices change owners and what
is dropped was often there. After every event the state is compared with one that is made from scratch from the objects
that are left, in another order, and with what a renderer has that knows nothing but the changes it was told.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kube_proxy_lite.model import Address, Health, PortKey, PortPlan, Settings
from kube_proxy_lite.services import Services
from podwire.kube.objects import EndpointSlice, Node, Service
from tests.unit.service_objects import HERE, address, endpoint, node, service, slice_of

Objects = dict[tuple[str, str], Service | EndpointSlice | Node]
Event = tuple[str, str, Service | EndpointSlice | Node | None]

NAMES = ("a", "b", "c", 'd"\n')
ADDRESSES = ("10.96.0.1", "10.96.0.2", "fd96::1", "127.0.0.1", "010.96.0.1", "x", "None", "2001:db8::1%e")
PORTS = st.fixed_dictionaries(
    {"port": st.sampled_from([80, 81, 0, 65536])},
    optional={
        "name": st.sampled_from(["", "http", "ht{tp"]),
        "protocol": st.sampled_from(["TCP", "UDP", "SCTP", "FOO"]),
        "nodePort": st.sampled_from([0, 30080, 30081, 99999]),
    },
)
POLICY = st.sampled_from(["", "Cluster", "Local", "local"])
SPECS = st.fixed_dictionaries(
    {
        "clusterIPs": st.lists(st.sampled_from(ADDRESSES), min_size=1, max_size=2),
        "type": st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer", "ExternalName", "?"]),
        "ports": st.lists(PORTS, max_size=2),
        "created": st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
    },
    optional={
        "externalIPs": st.lists(st.sampled_from(ADDRESSES), max_size=2),
        "status": st.lists(
            st.fixed_dictionaries(
                {"ip": st.sampled_from(ADDRESSES), "ipMode": st.sampled_from(["VIP", "Proxy", None])}
            ),
            max_size=2,
        ),
        "loadBalancerSourceRanges": st.lists(
            st.sampled_from(["172.31.0.0/16", "0.0.0.0/0", "fd31::/64", " 10.0.0.0/8", "y"]), max_size=2
        ),
        "externalTrafficPolicy": POLICY,
        "internalTrafficPolicy": POLICY,
        "healthCheckNodePort": st.sampled_from([30080, 32000]),
        "sessionAffinity": st.sampled_from(["ClientIP", "None"]),
        "labels": st.sampled_from([{}, {}, {"service.kubernetes.io/service-proxy-name": "x"}]),
    },
)
SANE = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["ClusterIP", "LoadBalancer"]),
        "clusterIPs": st.sampled_from([["10.96.0.1"], ["10.96.0.2", "fd96::1"]]),
        "ports": st.just([{"port": 80, "nodePort": 30080}]),
        "externalTrafficPolicy": st.sampled_from(["Cluster", "Local"]),
    }
)
"""Valid for sure, so that not all that is drawn is refused for one thing or another."""
WORDS = st.builds(
    " ".join,
    st.tuples(
        st.sampled_from("123"),
        st.sampled_from(["", "here"]),
        st.sampled_from(["", "", "unready", "draining", "dead", "published"]),
        st.sampled_from(["", "zone:a", "zone:b"]),
        st.sampled_from(["", "", f"node:{HERE}", "node:other"]),
    ),
)
BAD_ENDPOINTS = st.fixed_dictionaries({"addresses": st.lists(st.sampled_from(ADDRESSES), max_size=1)})
SLICE_PORTS = st.fixed_dictionaries(
    {"port": st.sampled_from([8080, 9090, 0, None])},
    optional={"name": st.sampled_from([None, "", "http"]), "protocol": st.sampled_from([None, "TCP", "UDP", "FOO"])},
)


def _slice(name: str, of: str, version: int, words: list[str], bad: list[dict[str, Any]], ports: list[Any]) -> Event:
    endpoints = [endpoint(each, version) for each in words] + bad
    return "slice", name, slice_of(name=name, of=of, version=version, endpoints=endpoints, ports=ports)


SETS = st.one_of(
    st.builds(lambda name, spec: ("service", name, service(name, **spec)), st.sampled_from(NAMES), SANE | SPECS),
    st.builds(
        _slice,
        st.sampled_from(["s", "t", "u"]),
        st.sampled_from(["a", "a", "b", *NAMES, ""]),
        st.sampled_from([4, 4, 6]),
        st.lists(WORDS, max_size=4),
        st.lists(BAD_ENDPOINTS, max_size=2),
        st.just([{"name": "", "port": 8080}]) | st.lists(SLICE_PORTS, max_size=2),
    ),
    st.builds(
        lambda zone, addresses: ("node", HERE, node(zone=zone, addresses=addresses)),
        st.sampled_from([None, "a", "b"]),
        st.lists(st.sampled_from(["172.31.0.2", "fd31::2", "10.0.0.1", "z"]), max_size=2),
    ),
)
DROPS = st.tuples(
    st.sampled_from(["service", "slice", "node"]), st.sampled_from([*NAMES, "s", "t", "u", HERE]), st.none()
)
EVENTS = st.lists(st.one_of(SETS, SETS, DROPS), min_size=1, max_size=16)


def put(state: Services, kind: str, name: str, obj: Service | EndpointSlice | Node | None) -> None:
    match obj:
        case Service():
            state.set_service(obj)
        case EndpointSlice():
            state.set_slice(obj)
        case Node():
            state.set_node(obj)
        case None:
            drops: dict[str, Callable[[], None]] = {
                "service": lambda: state.drop_service(("default", name)),
                "slice": lambda: state.drop_slice(("default", name)),
                "node": lambda: state.set_node(None),
            }
            drops[kind]()


class Renderer:
    """Knows what it was told."""

    def __init__(self) -> None:
        self.plans: dict[PortKey, PortPlan] = {}
        self.health: dict[tuple[str, str], Health] = {}
        self.cluster_ips: set[Address] = set()

    def hear(self, state: Services) -> None:
        for key, plan in state.changed().items():
            assert plan is None or plan.key == key
            if plan is None:
                self.plans.pop(key, None)
            else:
                self.plans[key] = plan
        for service_key, health in state.changed_health().items():
            if health is None:
                self.health.pop(service_key, None)
            else:
                self.health[service_key] = health
        for ip, present in state.changed_cluster_ips().items():
            (self.cluster_ips.add if present else self.cluster_ips.discard)(ip)


def everything(state: Services) -> tuple[Any, ...]:
    plans = {plan.key: plan for plan in state.plans()}
    health = {("default", name): state.health(("default", name)) for name in NAMES}
    return plans, {key: value for key, value in health.items() if value}, state.cluster_ips, state.problems()


@hypothesis_settings(max_examples=400, deadline=None)
@given(EVENTS, st.randoms(use_true_random=False), st.integers(1, 3))
def test_the_state_is_that_of_the_objects_that_are_there(
    events: list[Event], shuffler: random.Random, batch: int
) -> None:
    state, renderer, there = Services(Settings(node=HERE)), Renderer(), Objects()
    for number, (kind, name, obj) in enumerate(events):
        put(state, kind, name, obj)
        there.pop((kind, HERE if kind == "node" else name), None)
        if obj is not None:
            there[kind, name] = obj
        if number % batch:
            continue  # several events may come before anybody asks
        scratch = Services(Settings(node=HERE))
        for (each_kind, each_name), each in shuffler.sample(
            sorted(there.items(), key=lambda pair: pair[0]), len(there)
        ):
            put(scratch, each_kind, each_name, each)
        assert everything(state) == everything(scratch)
        renderer.hear(state)
        assert (renderer.plans, renderer.health, renderer.cluster_ips) == everything(state)[:3]
    check_plans(state)


def check_plans(state: Services) -> None:
    """What a renderer may rely on, whatever the objects are."""
    taken: set[tuple[Any, ...]] = set()
    for plan in state.plans():
        assert plan.frontends
        assert list(plan.frontends) == sorted(set(plan.frontends))
        for backends in (plan.cluster, plan.local):
            assert list(backends) == sorted(set(backends))
            assert all(each.address.version == plan.key.version and 0 < each.port < 65536 for each in backends)
        assert all(backend.local for backend in plan.local)
        assert not plan.local or (plan.cluster and any(frontend.local for frontend in plan.frontends))
        for frontend in plan.frontends:
            place = (plan.key.version, frontend.address, frontend.port, plan.key.protocol)
            assert place not in taken
            taken.add(place)
            assert 0 < frontend.port < 65536


@given(st.integers(0, 20), st.integers(1, 60), st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=20, deadline=None)
def test_one_endpoint_more_is_one_plan_more(others: int, endpoints: int, shuffler: random.Random) -> None:
    state = Services(Settings(node=HERE))
    for number in range(others):
        state.set_service(service(f"other-{number}", clusterIPs=[f"10.96.1.{number}"]))
    state.set_service(service())
    words = [str(number) for number in range(1, endpoints + 1)]
    state.set_slice(slice_of(*words))
    before = state.changed()
    assert len(before) == others + 1
    shuffler.shuffle(words)
    state.set_slice(slice_of(*words))
    assert state.changed() == {}
    state.set_slice(slice_of(*words, str(endpoints + 1)))
    (plan,) = state.changed().values()
    assert plan is not None
    added = set(plan.cluster) - set(before[plan.key].cluster)  # type: ignore[union-attr]
    assert [str(backend.address) for backend in added] == [address(endpoints + 1)]


def test_what_decodes_from_json_says_the_same() -> None:
    """Unknown fields, nulls, and numbers as Go writes them."""
    raw = b"""{"kind":"Service","metadata":{"name":"web","namespace":"default","x":{"y":[1]},"labels":null},
        "spec":{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10"],"externalIPs":null,"ports":[{"port":80,
        "protocol":"TCP","targetPort":"http","appProtocol":"h2c","nodePort":0}],"sessionAffinityConfig":null,
        "trafficDistribution":"PreferSameZone","unknown":true},"status":{"loadBalancer":{},"conditions":null}}"""
    one, other = Services(Settings(node=HERE)), Services(Settings(node=HERE))
    one.set_service(msgspec.json.decode(raw, type=Service))
    other.set_service(service())
    assert everything(one) == everything(other)
