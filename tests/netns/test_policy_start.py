"""No pod's packet passes before its policies do: the real executable, daemon and proxy, and pods that send at once.

A pod here is a namespace in which a thread sends without end, from before the ADD until after it: one flow that its
policy denies, one that it allows, each datagram a flow of its own. The pods' node in the API is one that the lab's
kubelets do not know, and so is the proxy's: nobody but the test attaches them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from podwire import netns
from podwire.lab import cluster, proxy, state
from podwire.lab.cni import Attachment, CniError, Runtime
from podwire.lab.node import enter_command
from podwire.lab.state import MARK, LabState
from tests.netns.lab_fixtures import fresh_name
from tests.netns.lab_fixtures import pod as lab_pod
from tests.netns.node_fixtures import Netns
from tests.netns.plain_api import inside

PATIENCE, GHOST = 90.0, "ghost"
DENIED, ALLOWED, TRY_AGAIN = 7001, 7002, 11
_numbers = itertools.count(1)
NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "race"}}
POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "only-7002", "namespace": "race"},
    "spec": {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
        "egress": [{"ports": [{"protocol": "UDP", "port": ALLOWED}]}],
    },
}


def guarded(name: str) -> dict[str, Any]:
    """A pod that the API shows, on a node whose kubelet is the test."""
    return lab_pod(name, namespace="race", nodeName=GHOST)


class Ear:
    """What arrives at a pod's two ports, kept apart."""

    def __init__(self, path: str) -> None:
        self.heard: dict[int, set[bytes]] = {DENIED: set(), ALLOWED: set()}
        self._sockets = {port: inside(path, lambda port=port: _bound(port)) for port in self.heard}  # type: ignore[misc]
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._listen, args=(port,), daemon=True) for port in self.heard]
        for each in self._threads:
            each.start()

    def _listen(self, port: int) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                self.heard[port].add(self._sockets[port].recv(64))

    def close(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        for each in self._sockets.values():
            each.close()


def _bound(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(0.1)
    made.bind(("0.0.0.0", port))
    return made


class Mouth:
    """Sends from a namespace to both ports, a new flow each time, from now on."""

    def __init__(self, path: str, word: str, to: str, source: str = "") -> None:
        self._path, self._word, self._to, self._source = path, word.encode(), to, source
        self.sent = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        fd = netns.open_netns(self._path)
        try:
            with netns.inside(fd):
                while not self._ending.wait(0.001):
                    for port in (DENIED, ALLOWED):
                        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made, contextlib.suppress(OSError):
                            if self._source:
                                made.bind((self._source, 0))
                            made.sendto(self._word, (self._to, port))
                            self.sent += 1
        finally:
            os.close(fd)

    def close(self) -> None:
        self._ending.set()
        self._thread.join()


class Start:
    """A lab of one node, whose proxy thinks that it is the ghost; a pod that hears; and attachments of the test's."""

    def __init__(self, lab: LabState, hearing: Netns) -> None:
        self.lab = lab
        self.node = lab.nodes[0]
        folders = ("/opt/cni/bin", "/etc/cni/net.d")
        programs, configurations = (lab.files.node_path(self.node.name, each) for each in folders)
        self._runtime = Runtime(enter_command(lab, self.node.name), programs, configurations, {MARK: lab.name})
        self._as_ghost()
        cluster.apply(lab, [lab_pod("target", nodeName=GHOST)])
        self.target = asyncio.run(self.add(self.attachment("target", hearing, "default")))
        self.ear = Ear(hearing.path)

    def _as_ghost(self) -> None:
        """The proxy begins anew under the ghost's name."""
        config = {**proxy.proxy_config(self.lab, self.node), "node": GHOST}
        proxy.config_path(self.lab, self.node.name).write_text(yaml.safe_dump(config))
        proxy.end(self.lab, self.node.name)
        proxy.start(self.lab, self.node.name)
        proxy.wait_healthy(self.lab, self.node)

    def attachment(self, name: str, place: Netns, namespace: str = "race") -> Attachment:
        """What the runtime asks for a pod."""
        args = {"IgnoreUnknown": "1", "K8S_POD_NAMESPACE": namespace, "K8S_POD_NAME": name}
        return Attachment(container_id=f"{place.name}-{name}", netns=place.path, args=tuple(args.items()))

    async def add(self, attachment: Attachment) -> str:
        """ADD, again where it says to try again, as a runtime does; the pod's address. Raises CniError."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                result = await self.add_once(attachment)
            except CniError as error:
                if error.code != TRY_AGAIN or time.monotonic() > deadline:
                    raise
                await self.delete(attachment)
            else:
                return str(ipaddress.ip_interface(result["ips"][0]["address"]).ip)

    async def add_once(self, attachment: Attachment) -> dict[str, Any]:
        """ADD; its result. Raises CniError."""
        return await self._runtime.add(attachment)

    async def delete(self, attachment: Attachment) -> None:
        await self._runtime.delete(attachment, None)

    def heard(self, word: str, port: int = ALLOWED) -> bool:
        """Whether the target has heard it."""
        return word.encode() in self.ear.heard[port]


@pytest.fixture(scope="module", params=["nftables", pytest.param("iptables", marks=pytest.mark.slow)])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    lab = LabState(name=fresh_name(), nodes=state.plan_nodes(1), proxy=request.param)
    cluster.up(lab)
    try:
        cluster.apply(lab, [NAMESPACE, POLICY])
        with Netns("target") as hearing:
            made = Start(lab, hearing)
            try:
                yield made
            finally:
                made.ear.close()
    finally:
        cluster.down(lab.name)


@contextlib.contextmanager
def pod(start: Start, in_api: bool = True) -> Iterator[tuple[str, Netns, Attachment]]:
    """A pod's name, its namespace and what to ask; it sends nothing yet, and is gone at the end."""
    name = f"p{next(_numbers)}"
    if in_api:
        cluster.apply(start.lab, [guarded(name)])
    with Netns("race") as place:
        attachment = start.attachment(name, place)
        try:
            yield name, place, attachment
        finally:
            asyncio.run(start.delete(attachment))
            cluster.delete(start.lab, [guarded(name)])


def until(holds: Callable[[], bool], why: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


async def started(start: Start, name: str, slots: asyncio.Semaphore) -> None:
    """One pod's start: it sends from before the ADD until what it may send has arrived."""
    async with slots:
        with Netns("race") as place:
            attachment = start.attachment(name, place)
            mouth = Mouth(place.path, name, start.target)
            try:
                await start.add(attachment)
                await asyncio.to_thread(until, lambda: start.heard(name), f"{name}: what is allowed does not arrive")
            finally:
                mouth.close()
                await start.delete(attachment)


@pytest.mark.parametrize("starts", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_start_lets_a_packet_through_that_is_denied(start: Start, starts: int) -> None:
    for _ in range(starts // 50):
        names = [f"p{next(_numbers)}" for _ in range(50)]
        cluster.apply(start.lab, [guarded(name) for name in names])

        async def run(names: list[str] = names) -> None:
            slots = asyncio.Semaphore(4)
            await asyncio.gather(*(started(start, name, slots) for name in names))

        asyncio.run(run())
        cluster.delete(start.lab, [guarded(name) for name in names])
    assert start.ear.heard[DENIED] == set()


def test_a_proxy_that_dies_in_the_middle_of_an_add_lets_nothing_through(start: Start) -> None:
    with pod(start) as (name, place, attachment):
        mouth = Mouth(place.path, name, start.target)
        try:
            proxy.end(start.lab, start.node.name, 9)

            async def story() -> None:
                adding = asyncio.create_task(start.add(attachment))
                await asyncio.to_thread(until, lambda: mouth.sent > 50)
                assert not adding.done()
                assert not start.heard(name)
                proxy.start(start.lab, start.node.name)
                await adding

            asyncio.run(story())
            until(lambda: start.heard(name))
        finally:
            mouth.close()
    assert not start.heard(name, DENIED)


@pytest.mark.slow
def test_without_a_proxy_the_runtime_is_told_to_try_again(start: Start) -> None:
    with pod(start) as (name, place, attachment):
        proxy.end(start.lab, start.node.name)
        mouth = Mouth(place.path, name, start.target)
        try:
            with pytest.raises(CniError, match="no podwire-proxy is connected") as caught:
                asyncio.run(start.add_once(attachment))
            assert caught.value.code == TRY_AGAIN
        finally:
            mouth.close()
            proxy.start(start.lab, start.node.name)
            proxy.wait_healthy(start.lab, start.node)
    assert not any(start.heard(name, port) for port in (DENIED, ALLOWED))


def test_a_pod_that_the_api_shows_late_starts_closed_and_opens(start: Start) -> None:
    with pod(start, in_api=False) as (name, place, attachment):
        mouth = Mouth(place.path, name, start.target)
        try:
            asyncio.run(start.add(attachment))
            sent = mouth.sent
            until(lambda: mouth.sent > sent + 100)
            assert not start.heard(name)
            cluster.apply(start.lab, [guarded(name)])
            until(lambda: start.heard(name))
        finally:
            mouth.close()
    assert not start.heard(name, DENIED)


def test_a_proxy_that_begins_anew_leaves_no_gap(start: Start) -> None:
    with pod(start) as (name, place, attachment):
        asyncio.run(start.add(attachment))
        for turn, with_signal in enumerate((15, 9)):
            word = f"{name} {turn}"
            mouth = Mouth(place.path, word, start.target)
            try:
                until(lambda word=word: start.heard(word))  # type: ignore[misc]
                proxy.end(start.lab, start.node.name, with_signal)
                start.ear.heard[ALLOWED].discard(word.encode())
                until(lambda word=word: start.heard(word))  # type: ignore[misc]
                proxy.start(start.lab, start.node.name)
                proxy.wait_healthy(start.lab, start.node)
                start.ear.heard[ALLOWED].discard(word.encode())
                until(lambda word=word: start.heard(word))  # type: ignore[misc]
            finally:
                mouth.close()
            assert not start.heard(word, DENIED)


def test_another_pods_address_or_mac_opens_nothing(start: Start) -> None:
    with pod(start) as (friend, _, friendly), pod(start) as (thief, place, attachment):
        owner, mac = asyncio.run(start.add(friendly)), ""
        asyncio.run(start.add(attachment))
        mouth = Mouth(place.path, thief, start.target)
        try:
            until(lambda: start.heard(thief))
        finally:
            mouth.close()
        place.ip("addr", "add", f"{owner}/32", "dev", "eth0")
        for turn, source in (("address", owner), ("MAC", "")):
            if turn == "MAC":
                mac = f"0a:58:{':'.join(f'{int(each):02x}' for each in owner.split('.'))}"
                place.ip("link", "set", "eth0", "address", mac)
            word = f"{thief} as {friend} by {turn}"
            mouth = Mouth(place.path, word, start.target, source)
            try:
                until(lambda mouth=mouth: mouth.sent > 100)  # type: ignore[misc]
            finally:
                mouth.close()
            assert not any(start.heard(word, port) for port in (DENIED, ALLOWED))
