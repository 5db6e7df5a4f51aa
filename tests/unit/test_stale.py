"""Which connections lead to nowhere: cases of a Service, a change, and connections to its places."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection

import msgspec
import pytest

from kube_proxy_lite.model import Address, FrontendKind, PortKey, PortPlan, Protocol, Settings
from kube_proxy_lite.stale import Connection, StaleConnections
from tests.unit.service_cases import LOCAL, LOCAL_2, REMOTE, address, backend, plan

UDP, TCP, SCTP = Protocol.UDP, Protocol.TCP, Protocol.SCTP
OWN = frozenset(int(address(each, version)) for each in ("10.0.0.1", "10.0.1.1") for version in (4, 6))
CIDRS = (ipaddress.ip_network("10.96.0.0/16"),)
GONE = "10.244.9.9"
VIRTUAL = ("10.96.0.1", 80)
NODE_PORT = ("10.0.0.1", 30001)


def connection(
    to: tuple[str, int],
    endpoint: str = "",
    protocol: Protocol = UDP,
    port: int = 8080,
    answered: bool = True,
    version: int = 4,
) -> Connection:
    """A client's connection to a place; without an endpoint it was not translated."""
    host, number = to
    there, there_port = (endpoint, port) if endpoint else to
    return Connection(
        version=version,
        protocol=protocol.value,
        source=1,
        destination=int(address(host, version)),
        port=number,
        endpoint=int(address(there, version)),
        endpoint_port=there_port,
        handle=b"",
        answered=answered,
    )


def judged(
    before: PortPlan | None,
    now: PortPlan | None,
    *connections: Connection,
    listed: Collection[str] = (),
    serving: Collection[str] = (),
    everything: bool = False,
) -> list[Connection]:
    """What is stale after `before` has become `now`; `listed` endpoints are in slices, `serving` of them serve."""
    state = StaleConnections()
    if before is not None:
        state.take(None, before)
    if not everything:
        state.begin()
    state.take(before, now)

    def endpoints(_: PortKey, only_serving: bool) -> list[tuple[Address, int]]:
        return [(address(each), 8080) for each in (serving if only_serving else [*listed, *serving])]

    return state.stale(connections, state.begin(), OWN, endpoints, CIDRS)


def of(protocol: Protocol, *hosts: str, **rest: object) -> PortPlan:
    return plan(cluster=hosts, local=(), protocol=protocol, **rest)  # type: ignore[arg-type]


ALL = (UDP, TCP, SCTP)
# name: before, now, connection, is it stale; a plan is made of the protocol and hosts
CASES: dict[str, tuple[Callable[[Protocol], PortPlan | None], Callable[[Protocol], PortPlan | None],
                       Callable[[Protocol], Connection], Collection[Protocol]]] = {
    "the endpoint is gone": (
        lambda p: of(p, LOCAL, GONE), lambda p: of(p, LOCAL), lambda p: connection(VIRTUAL, GONE, p), {UDP}),
    "by the node port, the endpoint is gone": (
        lambda p: of(p, LOCAL, GONE), lambda p: of(p, LOCAL), lambda p: connection(NODE_PORT, GONE, p), {UDP}),
    "the endpoint is there": (
        lambda p: of(p, LOCAL, GONE), lambda p: of(p, LOCAL), lambda p: connection(VIRTUAL, LOCAL, p), ()),
    "the last endpoint is gone": (
        lambda p: of(p, GONE), lambda p: of(p), lambda p: connection(VIRTUAL, GONE, p), {UDP}),
    "to another port of the endpoint": (
        lambda p: of(p, LOCAL, GONE), lambda p: of(p, LOCAL), lambda p: connection(VIRTUAL, LOCAL, p, 9090), {UDP}),
    "the Service is gone": (
        lambda p: of(p, LOCAL), lambda _: None, lambda p: connection(VIRTUAL, LOCAL, p), {UDP}),
    "the Service is gone, and this was not translated": (
        lambda p: of(p, LOCAL), lambda _: None, lambda p: connection(VIRTUAL, "", p), ()),
    "it was there before the Service, and nobody answered": (
        lambda _: None, lambda p: of(p, LOCAL), lambda p: connection(VIRTUAL, "", p, answered=False), ALL),
    "it was there before the Service, and somebody answers": (
        lambda _: None, lambda p: of(p, LOCAL), lambda p: connection(VIRTUAL, "", p), {UDP}),
    "it was there before there was an endpoint": (
        lambda p: of(p), lambda p: of(p, LOCAL), lambda p: connection(VIRTUAL, "", p, answered=False), ALL),
    "the Service has no endpoint, and this was not translated": (
        lambda _: None, lambda p: of(p), lambda p: connection(VIRTUAL, "", p, answered=False), ()),
    "an endpoint has come": (
        lambda p: of(p, LOCAL), lambda p: of(p, LOCAL, REMOTE), lambda p: connection(VIRTUAL, GONE, p), ()),
    "the node port has gone": (
        lambda p: of(p, LOCAL), lambda p: of(p, LOCAL, only=(FrontendKind.CLUSTER_IP,)),
        lambda p: connection(NODE_PORT, LOCAL, p), {UDP}),
    "the node port has come": (
        lambda p: of(p, LOCAL, only=(FrontendKind.CLUSTER_IP,)), lambda p: of(p, LOCAL),
        lambda p: connection(NODE_PORT, "", p, answered=False), ALL),
    "to the node port's number elsewhere": (
        lambda p: of(p, LOCAL), lambda _: None, lambda p: connection(("192.0.2.9", 30001), LOCAL, p), ()),
    "to another Service": (
        lambda p: of(p, LOCAL), lambda p: of(p), lambda p: connection(("10.96.0.2", 80), LOCAL, p), ()),
}  # fmt: skip


@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize(("before", "now", "asked", "stale"), CASES.values(), ids=CASES.keys())
def test_after_a_change(
    before: Callable[[Protocol], PortPlan | None],
    now: Callable[[Protocol], PortPlan | None],
    asked: Callable[[Protocol], Connection],
    stale: Collection[Protocol],
    protocol: Protocol,
) -> None:
    one = asked(protocol)
    found = judged(before(protocol), now(protocol), one)
    assert found == ([one] if protocol in stale else [])


def test_another_protocol_on_the_same_port_is_another_place() -> None:
    assert judged(of(UDP, GONE), of(UDP), connection(VIRTUAL, GONE, TCP)) == []


@pytest.mark.parametrize("protocol", [TCP, SCTP])
def test_others_than_udp_are_looked_at_when_the_slices_lose_an_endpoint(protocol: Protocol) -> None:
    """While it terminates it is listed, and what goes on there is left alone."""
    made = of(protocol, LOCAL)
    state = StaleConnections()
    state.take(None, made)
    state.begin()
    state.doubt(made)
    known = (
        connection(VIRTUAL, LOCAL, protocol),
        connection(VIRTUAL, LOCAL_2, protocol),
        connection(VIRTUAL, GONE, protocol),
    )
    elsewhere = connection(VIRTUAL, LOCAL_2, protocol, port=9090)
    found = state.stale((*known, elsewhere), state.begin(), OWN, lambda _key, _serving: [(address(LOCAL_2), 8080)])
    assert found == [known[2]], "and another port of an endpoint that is there is no reason"


def test_udp_stays_with_who_serves_though_new_clients_do_not_go_there() -> None:
    draining, dead = connection(VIRTUAL, LOCAL_2), connection(VIRTUAL, REMOTE)
    found = judged(of(UDP, LOCAL_2, REMOTE), of(UDP, LOCAL), draining, dead, serving=(LOCAL, LOCAL_2), listed=(REMOTE,))
    assert found == [dead]


def test_backends_of_both_policies_count() -> None:
    made = plan(cluster=(REMOTE,), local=(LOCAL,), protocol=UDP, external_local=True)
    both = connection(VIRTUAL, REMOTE), connection(NODE_PORT, LOCAL)
    gone = connection(NODE_PORT, GONE)
    assert judged(None, made, *both, gone) == [gone]


def test_families_are_apart() -> None:
    made = plan(cluster=(LOCAL,), local=(), protocol=UDP, version=6)
    gone = connection(VIRTUAL, GONE, version=6)
    assert judged(None, made, gone, connection(VIRTUAL, GONE)) == [gone]


def test_at_the_start_everything_is_looked_at() -> None:
    """UDP that was translated from an address of the service CIDRs, where no Service is, too."""
    made = of(UDP, LOCAL)
    gone = connection(VIRTUAL, GONE)
    orphan, orphan_tcp = connection(("10.96.0.9", 53), GONE), connection(("10.96.0.9", 53), GONE, TCP)
    others = connection(("192.0.2.1", 53)), connection(("192.0.2.1", 53), GONE), connection(("10.96.0.9", 53))
    found = judged(None, made, gone, orphan, orphan_tcp, *others, everything=True)
    assert found == [gone, orphan]


def test_an_endpoint_that_joins_asks_for_no_look() -> None:
    for protocol in ALL:
        state = StaleConnections()
        state.take(None, of(protocol, LOCAL))
        state.begin()
        state.take(of(protocol, LOCAL), of(protocol, LOCAL, REMOTE))
        assert not state.in_doubt


def test_a_look_that_failed_is_made_again() -> None:
    state = StaleConnections()
    state.take(None, of(UDP, LOCAL))
    looked_at = state.begin()
    assert not state.in_doubt
    state.again(looked_at)
    assert state.begin() == looked_at


def test_a_place_that_went_over_to_another_service_stays_known() -> None:
    """The one who had it goes after the one who has it has come."""
    mine, other = of(UDP, LOCAL), plan("other", (REMOTE,), (), protocol=UDP)
    state = StaleConnections()
    state.take(None, mine)
    state.take(None, other)
    state.take(mine, None)
    state.begin()
    state.doubt(other)
    to_other, to_mine = connection(VIRTUAL, REMOTE), connection(VIRTUAL, LOCAL)
    assert state.stale((to_other, to_mine), state.begin(), OWN, lambda _key, _serving: ()) == [to_mine]


NODE_PORTS = {
    "everywhere but loopback": ((), {"10.0.0.1": True, "127.0.0.1": False, "::1": False, "fd00::1": True}),
    "in a network": (("10.0.0.0/24",), {"10.0.0.1": True, "10.0.1.1": False, "fd00::1": True}),
    "of the other family": (("fd00::/64",), {"10.0.0.1": True, "fd00::1": True, "fd01::1": False}),
}


@pytest.mark.parametrize(("networks", "answers"), NODE_PORTS.values(), ids=NODE_PORTS.keys())
def test_addresses_that_have_node_ports(networks: tuple[str, ...], answers: dict[str, bool]) -> None:
    settings = Settings(node="a", node_port_addresses=tuple(map(ipaddress.ip_network, networks)))
    assert {text: settings.has_node_ports(ipaddress.ip_address(text)) for text in answers} == answers


def test_a_connection_says_whether_it_was_translated() -> None:
    one = connection(VIRTUAL, LOCAL)
    assert one.translated
    assert not msgspec.structs.replace(one, endpoint=one.destination, endpoint_port=one.port).translated
    assert backend(LOCAL).port == 8080
