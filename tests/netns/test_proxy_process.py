"""podwire-proxy, the process, on a kernel: what survives it, what it repairs, what follows what."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from podwire.kube.kinds import SERVICE_CIDRS as SERVICE_CIDRS_KIND
from tests.netns.plain_api import inside
from tests.netns.proxy_fixtures import (
    PATIENCE,
    SERVICE_CIDRS,
    Proxy,
    ProxyStage,
    clean,
    endpoints,
    node,
    proxy_stage,
    service,
    until,
)
from tests.unit.service_cases import LOCAL, LOCAL_2, REMOTE

WEB = (service("web"), endpoints("web", LOCAL))
WEB_6 = (service("web6", version=6), endpoints("web6", LOCAL, version=6))
PLACE = "10.96.0.1 . 6 . 80"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyStage]:
    with proxy_stage(tmp_path_factory.mktemp("proxy")) as made:
        yield made


@pytest.fixture
def place(whole: ProxyStage) -> Iterator[ProxyStage]:
    clean(whole)
    yield whole
    clean(whole)


# --- Drift --------------------------------------------------------------------------------------------------------

DAMAGE = {
    "a table deleted": "delete table ip podwire_proxy",
    "a chain flushed": "flush chain ip6 podwire_proxy prerouting",
    "an element deleted": f"delete element ip podwire_proxy services {{ {PLACE} }}",
    "an element added": "add element ip podwire_proxy services { 10.96.0.66 . 6 . 80 : drop }",
    "everything flushed": "flush ruleset",
}


def words(place: ProxyStage) -> list[str]:
    """All of nftables, in an order that does not depend on hashes and on what came first."""
    return sorted(place.rules().replace(",", " ").split())


def damaged(place: ProxyStage, period: float, *names: str) -> Proxy:
    """A proxy of that period, all of whose rules are repaired after each of these damages."""
    place.api.put(*WEB, *WEB_6, SERVICE_CIDRS, node())
    proxy = place.start(syncPeriod=period)
    until(lambda: proxy.metric("kubeproxy_sync_full_proxy_rules_duration_seconds_count") > 0)
    before = words(place)
    assert "podwire_proxy" in before
    for name in names:
        place.node.run("nft", "-f", "-", stdin=DAMAGE[name])
        until(lambda: words(place) == before, lambda name=name: f"{name}: {place.rules()}")  # type: ignore[misc]
        assert place.answers() == LOCAL
    return proxy


def test_what_somebody_damages_is_repaired_as_it_happens(place: ProxyStage) -> None:
    proxy = damaged(place, 3600, *DAMAGE)
    assert proxy.metric("podwire_proxy_drift_total", rules="services") >= len(DAMAGE)


def test_without_events_what_somebody_damages_is_repaired_periodically(
    place: ProxyStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is started with events that nobody gets."""
    (tmp_path / "sitecustomize.py").write_text(
        "import kube_proxy_lite.apply.nftevents as events, podwire.runner as runner\n"
        "events.NftEvents.take = lambda self, datagram: None\n"
        "runner._REST = 1.0\n"  # else a look is had the more rarely the longer it takes
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    proxy = damaged(place, 0.3, "an element deleted", "an element added")
    assert proxy.metric("podwire_proxy_drift_total", rules="services") == 0


def test_rules_of_others_are_no_drift(place: ProxyStage) -> None:
    place.api.put(*WEB)
    proxy = place.start(syncPeriod=3600)
    place.node.run("nft", "-f", "-", stdin="add table inet other; add chain inet other c; add rule inet other c drop")
    place.api.put(service("second", 2), endpoints("second", LOCAL))
    place.served("10.96.0.2", LOCAL)
    assert proxy.metric("podwire_proxy_drift_total") == 0
    assert "table inet other" in place.rules()


def test_a_proxy_in_a_container_knows_its_own_changes(place: ProxyStage) -> None:
    """Where processes have other numbers than the kernel tells."""
    place.api.put(*WEB)
    proxy = place.start(syncPeriod=3600, unshared=True)
    for turn in range(3):
        place.api.put(endpoints("web", *((LOCAL_2,) if turn % 2 == 0 else (LOCAL,))))
        place.served("10.96.0.1", LOCAL if turn % 2 else LOCAL_2)
    place.node.run("nft", "delete", "table", "ip", "podwire_proxy")
    place.served("10.96.0.1", LOCAL_2)
    assert proxy.metric("podwire_proxy_drift_total") == 1
    until(lambda: proxy.metric("kubeproxy_sync_full_proxy_rules_duration_seconds_count") == 2)


# --- Ends and beginnings ------------------------------------------------------------------------------------------


def generation(place: ProxyStage) -> int:
    """A number that every transaction of nftables raises."""

    def ask() -> int:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as channel:
            channel.send(struct.pack("=IHHIIBBH", 20, 10 << 8 | 16, 1, 1, 0, 0, 0, 0))  # NFT_MSG_GETGEN
            return int(struct.unpack_from("!I", channel.recv(4096), 24)[0])

    return inside(place.node.path, ask)


def test_a_restart_changes_nothing(place: ProxyStage) -> None:
    place.api.put(*WEB, *WEB_6, SERVICE_CIDRS, node())
    proxy = place.start()
    place.node.run("conntrack", "-L")
    for with_signal in (signal.SIGTERM, signal.SIGKILL):
        before = generation(place), place.rules()
        assert proxy.end(with_signal) in (0, -signal.SIGKILL)
        assert place.answers() == LOCAL, "rules stay without a proxy"
        proxy = place.start()
        until(lambda: proxy.metric("kubeproxy_conntrack_reconciler_sync_duration_seconds_count") > 0)  # noqa: B023
        assert (generation(place), place.rules()) == before


def test_one_killed_in_the_middle_of_its_start_is_followed_by_one_that_completes_it(place: ProxyStage) -> None:
    objects = [each for n in range(1, 251) for v in (4, 6)
               for each in (service(f"s{n}-{v}", n, v), endpoints(f"s{n}-{v}", LOCAL, REMOTE, version=v))]  # fmt: skip
    place.api.put(*objects)
    place.start().end()
    wanted = words(place)
    for _ in range(3):
        place.node.run("nft", "flush", "ruleset")
        proxy = place.start(ready=False)
        until(lambda: "podwire_proxy" in place.node.run("nft", "list", "tables"))
        proxy.end(signal.SIGKILL)
        again = place.start()
        assert again.metric("podwire_proxy_sync_failures_total") == 0
        assert words(place) == wanted
        again.end()


def test_a_new_process_begins_while_the_old_one_runs(place: ProxyStage) -> None:
    place.api.put(*WEB)
    old = place.start()
    before = generation(place)
    new = place.start()
    until(lambda: len(new.said("started")) == 1)
    for turn, host in enumerate((LOCAL_2, LOCAL, REMOTE)):
        place.api.put(endpoints("web", host), service(f"more{turn}", 10 + turn))
        place.served("10.96.0.1", host)
    assert generation(place) > before
    assert new.said("cannot be served") == [], "ports are shared"
    assert old.end() == 0
    until(lambda: new.healthz()[0] == 200)
    place.api.put(endpoints("web", LOCAL_2))
    place.served("10.96.0.1", LOCAL_2)
    assert new.alive()


# --- nft that fails ------------------------------------------------------------------------------------------------


def wrapper(folder: Path, text: str) -> str:
    """A folder with an `nft` of our own."""
    made = folder / "bin"
    made.mkdir(exist_ok=True)
    (made / "nft").write_text(f'#!/bin/sh\n{text}\nexec /usr/sbin/nft "$@"\n')
    (made / "nft").chmod(0o755)
    return f"{made}:{os.environ['PATH']}"


def test_an_nft_that_fails_is_tried_again_and_said_once(place: ProxyStage, tmp_path: Path) -> None:
    marker = tmp_path / "broken"
    path = wrapper(tmp_path, f"if [ -e {marker} ]; then echo 'out of order' >&2; exit 1; fi")
    place.api.put(*WEB)
    proxy = place.start(path=path)
    marker.touch()
    place.api.put(endpoints("web", REMOTE))
    until(lambda: proxy.metric("podwire_proxy_sync_failures_total") >= 3)
    assert proxy.metric("kubeproxy_sync_proxy_rules_nftables_sync_failures_total") >= 3
    until(lambda: proxy.metric("podwire_proxy_sync_failures_total") >= 4)
    assert [each["level"] for each in proxy.said("out of order")] == ["warning"] * 2, (
        "what could not be done, then read"
    )
    assert place.answers() == LOCAL
    marker.unlink()
    place.served("10.96.0.1", REMOTE)
    until(lambda: len(proxy.said("works again")) == 1)


def test_a_node_without_nft_is_told_what_is_missing(place: ProxyStage, tmp_path: Path) -> None:
    proxy = place.start(ready=False, path=str(tmp_path))
    assert proxy.process.wait(PATIENCE) == 1
    assert proxy.log.read_text() == (
        "podwire-proxy: the program nft is not there, expected it in PATH; it comes with nftables\n"
    )


def test_an_nft_that_takes_its_time_delays_and_spoils_nothing(place: ProxyStage, tmp_path: Path) -> None:
    path = wrapper(tmp_path, "sleep 0.3")
    place.api.put(*WEB)
    proxy = place.start(path=path)
    for host in (LOCAL_2, REMOTE, LOCAL):
        place.api.put(endpoints("web", host))
    place.served("10.96.0.1", LOCAL)
    assert proxy.metric("podwire_proxy_sync_failures_total") == 0


# --- The API --------------------------------------------------------------------------------------------------------


def test_an_api_that_is_away_changes_nothing(place: ProxyStage) -> None:
    place.api.put(*WEB)
    proxy = place.start()
    before = place.rules()
    place.api.stop()
    try:
        proxy.end()
        again = place.start(ready=False)
        until(lambda: again.healthz()[0] == 503 and again.metric("podwire_proxy_api_trouble") > 0)
        assert "not in the kernel yet" in again.healthz()[1]["reason"]
        assert again.healthz("/livez")[0] == 200
        assert place.rules() == before
        assert place.answers() == LOCAL
    finally:
        place.api.start()
    until(lambda: again.healthz()[0] == 200)
    place.api.stop()
    try:
        until(lambda: again.metric("podwire_proxy_api_trouble") > 0)
        place.node.run("nft", "delete", "table", "ip", "podwire_proxy")
        place.served("10.96.0.1", LOCAL)
        assert again.healthz()[0] == 200
    finally:
        place.api.start()
    place.api.put(endpoints("web", LOCAL_2))
    place.served("10.96.0.1", LOCAL_2)


@pytest.mark.slow
def test_a_role_that_may_not_read_service_cidrs_leaves_no_node_without_rules(place: ProxyStage) -> None:
    place.api.refused[SERVICE_CIDRS_KIND.path] = 403
    place.api.put(*WEB)
    proxy = place.start()
    assert place.answers() == LOCAL
    assert proxy.said("going on without servicecidrs")


def test_a_folder_of_manifests_in_place_of_an_api(place: ProxyStage, tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "web.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(WEB)}))
    place.start("--manifests", str(folder))
    assert place.answers() == LOCAL
    (folder / "web.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": [WEB[0], endpoints("web", REMOTE)]})
    )
    place.served("10.96.0.1", REMOTE)
    (folder / "web.json").unlink()
    until(lambda: PLACE not in place.elements("services"))


# --- What goes ------------------------------------------------------------------------------------------------------

FOREIGN = """
table ip other { chain c { type nat hook prerouting priority -150; ip daddr 10.96.0.1 accept; }; }
table inet podwire { set s { type ipv4_addr; elements = { 10.0.0.1 }; }; }
table ip nat { chain KUBE-SERVICES { accept; }; chain mine { accept; }; }
"""


POLICY = {"nftables": "podwire_policy", "iptables": "PODWIRE-POLICY"}
"""What says that policies are enforced."""


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_cleanup_removes_what_is_ours_and_nothing_else(place: ProxyStage, mode: str) -> None:
    place.node.run("nft", "-f", "-", stdin=FOREIGN)
    before = place.rules()
    place.api.put(*WEB, *WEB_6)
    place.start(mode=mode, networkPolicy=True).end()
    assert POLICY[mode] in place.rules()
    assert place.answers() == LOCAL
    cleaner = place.start("--cleanup", ready=False)
    assert cleaner.process.wait(PATIENCE) == 0, cleaner.log.read_text()
    left = place.rules()
    assert "podwire_p" not in left
    assert "PODWIRE" not in left
    assert place.node.run("ipset", "list", "-n") == ""
    if mode == "nftables":
        assert left == before
    else:
        assert "KUBE-SVC" not in left
        assert "chain mine" in left


def test_one_mode_follows_another_and_nothing_is_left_of_it(place: ProxyStage) -> None:
    place.api.put(*WEB)
    for mode, there, gone in (
        ("nftables", "podwire_proxy", "KUBE-SVC"),
        ("iptables", "KUBE-SVC", "podwire_proxy"),
        ("nftables", "podwire_proxy", "KUBE-SVC"),
    ):
        proxy = place.start(mode=mode)
        until(lambda there=there, gone=gone: there in place.rules() and gone not in place.rules())  # type: ignore[misc]
        assert place.answers() == LOCAL
        proxy.end()
    proxy = place.start(mode="none")
    until(lambda: "podwire" not in place.rules())
    assert proxy.alive()


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_policies_that_are_switched_off_are_gone(place: ProxyStage, mode: str) -> None:
    place.start(networkPolicy=True, mode=mode).end()
    assert POLICY[mode] in place.rules()
    place.start(mode=mode)
    until(lambda: POLICY[mode] not in place.rules())


def test_policies_follow_the_mode(place: ProxyStage) -> None:
    for mode, other in (("nftables", "iptables"), ("iptables", "nftables"), ("nftables", "iptables")):
        proxy = place.start(networkPolicy=True, mode=mode)
        until(lambda mode=mode, other=other: POLICY[mode] in place.rules() and POLICY[other] not in place.rules())  # type: ignore[misc]
        proxy.end()
