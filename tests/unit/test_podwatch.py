"""The handshake between daemon and proxy over a real socket: when an ADD may answer, and when it must not."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipam_daemon.errors import DeletedMeanwhile, TryAgainLater
from ipam_daemon.model import Attachment, AttachmentKey, PodRef
from ipam_daemon.podwatch import PodWatch
from ipam_daemon.server import end_serving
from kube_proxy_lite.attached import Attached, AttachedPods
from kube_proxy_lite.model import Network
from podwire.v1 import policy_pb2, policy_pb2_grpc

PATIENCE = 90.0
BLOCK, OTHER_BLOCK = ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("10.244.9.0/24")


def attachment(name: str, pod: str = "web") -> Attachment:
    """An attachment of a container `name`."""
    return Attachment(
        key=AttachmentKey("podwire", name, "eth0"),
        netns="/run/netns/x",
        host_ifname=f"pw{name}",
        mac="0a:58:0a:f4:01:07",
        mtu=1450,
        addresses=(ipaddress.ip_interface("10.244.1.7/24"),),
        pod=PodRef(namespace="shop" if pod else "", name=pod, uid=f"uid-{pod}" if pod else ""),
        created=0.0,
        created_ns=1,
    )


class Proxy:
    """A proxy that is there, and settles what it is told to."""

    def __init__(self, socket: Path, synced: bool = True, settles: bool = True) -> None:
        self.synced, self.settles = synced, settles
        self.known: dict[int, Attached] = {}
        self.blocks_seen: frozenset[Network] = frozenset()
        self.client = AttachedPods(socket, self, lambda: self.synced)
        self._task = asyncio.create_task(self.client.follow_forever())

    def attached(self, pods: Iterable[Attached], everything: bool) -> None:
        pods = list(pods)
        if everything:
            self.known.clear()
        self.known.update({pod.number: pod for pod in pods})
        if self.settles:
            self.client.settle([pod.number for pod in pods])

    def gone(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.known.pop(number, None)

    def blocks(self, blocks: frozenset[Network]) -> None:
        self.blocks_seen = blocks

    async def knows(self, *names: str) -> None:
        """Waits until these pods are what it knows."""
        await until(lambda: self.client.connected and sorted(pod.name for pod in self.known.values()) == sorted(names))

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the condition is about another task
            await asyncio.sleep(0.005)


class Node:
    """A daemon's side, served."""

    def __init__(self, tmp_path: Path, timeout: float) -> None:
        self.socket = tmp_path / "s"
        self.blocks = [BLOCK]
        self.watch = PodWatch(True, timeout, lambda: self.blocks)
        self.server: Any = None

    async def __aenter__(self) -> Node:
        self.server = grpc.aio.server()
        policy_pb2_grpc.add_PolicyServicer_to_server(self.watch, self.server)  # type: ignore[no-untyped-call]
        self.server.add_insecure_port(f"unix:{self.socket}")
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(0)

    async def add(self, each: Attachment) -> str:
        """An ADD as far as policies are concerned: "answered", or the error's words."""
        self.watch.announce(each)
        try:
            await self.watch.settled(each)
        except (TryAgainLater, DeletedMeanwhile) as error:
            self.watch.withdraw(each.key)
            return str(error)
        return "answered"


def play(tmp_path: Path, story: Callable[[Node], Coroutine[Any, Any, None]], timeout: float = PATIENCE) -> None:
    """Runs a story on a node whose ADDs wait `timeout` seconds."""

    async def run() -> None:
        async with Node(tmp_path, timeout) as node:
            await story(node)

    asyncio.run(run())


def test_an_add_answers_when_the_proxy_has_settled_its_pod(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        proxy = Proxy(node.socket)
        assert await node.add(attachment("a")) == "answered"
        (pod,) = proxy.known.values()
        assert (pod.key, pod.uid, pod.addresses) == (
            ("shop", "web"),
            "uid-web",
            (ipaddress.ip_address("10.244.1.7"),),
        )
        assert proxy.blocks_seen == {BLOCK}
        await proxy.end()

    play(tmp_path, story)


def test_an_add_does_not_answer_before(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        proxy = Proxy(node.socket, settles=False)
        adding = asyncio.create_task(node.add(attachment("a")))
        await proxy.knows("web")
        await asyncio.sleep(0.2)
        assert not adding.done()
        proxy.client.settle(proxy.known)
        assert await adding == "answered"
        await proxy.end()

    play(tmp_path, story)


def test_a_pod_without_a_name_waits_for_nobody(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        assert await node.add(attachment("a", pod="")) == "answered"

    play(tmp_path, story)


def test_where_policies_are_off_nobody_waits(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.watch = PodWatch(enabled=False)
        assert await node.add(attachment("a")) == "answered"
        assert node.watch.hindrance == ""

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("connected", "synced", "words"),
    [
        (False, False, "no podwire-proxy is connected"),
        (True, False, "does not know the cluster's policies yet"),
        (True, True, "has not said that the pod's policies are in the kernel"),
    ],
)
def test_an_add_that_waits_in_vain_says_for_what(tmp_path: Path, connected: bool, synced: bool, words: str) -> None:
    async def story(node: Node) -> None:
        proxy = Proxy(node.socket, synced=synced, settles=False) if connected else None
        if proxy:
            await proxy.knows()
            await until(lambda: not node.watch.hindrance if synced else words in node.watch.hindrance)
        assert words in await node.add(attachment("a"))
        if proxy:
            await proxy.knows()
            await proxy.end()

    play(tmp_path, story, timeout=0.3)


def test_a_proxy_that_comes_late_is_told_and_the_add_goes_on(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        adding = asyncio.create_task(node.add(attachment("a")))
        await asyncio.sleep(0.1)
        assert node.watch.hindrance == "networkPolicy is on, and no podwire-proxy is connected"
        proxy = Proxy(node.socket)
        assert await adding == "answered"
        assert node.watch.hindrance == ""
        await proxy.end()

    play(tmp_path, story)


def test_a_proxy_that_dies_with_the_answer_is_replaced_by_another(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        first = Proxy(node.socket, settles=False)
        adding = asyncio.create_task(node.add(attachment("a")))
        await first.knows("web")
        await first.end()
        await until(lambda: bool(node.watch.hindrance))
        second = Proxy(node.socket)
        assert await adding == "answered"
        await second.end()

    play(tmp_path, story)


def test_a_proxy_that_comes_back_hears_of_all_pods_and_of_no_other(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        first = Proxy(node.socket)
        for name in ("a", "b", "c"):
            await node.add(attachment(name, pod=f"pod-{name}"))
        node.watch.withdraw(attachment("b").key)
        await first.knows("pod-a", "pod-c")
        await first.end()
        node.watch.withdraw(attachment("c").key)
        second = Proxy(node.socket)
        await second.knows("pod-a")
        await second.end()

    play(tmp_path, story)


def test_pods_of_an_earlier_daemon_are_told_and_not_waited_for(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.watch.adopt([attachment("a", pod="old"), attachment("b", pod="")])
        proxy = Proxy(node.socket, settles=False)
        await proxy.knows("old")
        await proxy.end()

    play(tmp_path, story)


def test_a_del_ends_the_wait(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        proxy = Proxy(node.socket, settles=False)
        adding = asyncio.create_task(node.add(attachment("a")))
        await proxy.knows("web")
        node.watch.interrupt(attachment("a").key)
        assert "was deleted" in await adding
        await proxy.knows()
        await proxy.end()

    play(tmp_path, story)


def test_of_two_proxies_the_first_that_answers_counts(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        slow, quick = Proxy(node.socket, settles=False), Proxy(node.socket)
        await slow.knows()
        assert await node.add(attachment("a")) == "answered"
        await slow.knows("web")
        await slow.end()
        await quick.end()

    play(tmp_path, story)


def test_many_pods_at_once_are_settled_each_by_its_number(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        proxy = Proxy(node.socket)
        answers = await asyncio.gather(*(node.add(attachment(f"c{n}", pod=f"p{n}")) for n in range(200)))
        assert set(answers) == {"answered"}
        await until(lambda: len(proxy.known) == 200)
        await proxy.end()

    play(tmp_path, story)


def test_a_daemon_that_ends_finishes_its_adds_and_then_lets_its_proxies_go(tmp_path: Path) -> None:
    """A proxy's call has no end of its own: the end of the daemon must not wait for it."""

    async def story(node: Node) -> None:
        proxy = Proxy(node.socket, settles=False)
        adding = asyncio.create_task(node.add(attachment("a")))
        await proxy.knows("web")
        ending = asyncio.create_task(end_serving(node.server, lambda: asyncio.wait({adding}), node.watch))
        await asyncio.sleep(0.1)
        assert not ending.done()
        proxy.client.settle(proxy.known)
        assert await adding == "answered"
        await asyncio.wait_for(ending, PATIENCE)
        await until(lambda: not proxy.client.connected)
        await proxy.end()

    play(tmp_path, story)


def test_a_pod_is_not_taken_for_one_of_the_daemon_before(tmp_path: Path) -> None:
    """Its number is another's in no later process: what was settled for a daemon that is gone says nothing to the next,
    and a pod that went while none ran is not kept alive by the number of another."""

    async def story(node: Node) -> None:
        former = PodWatch(True, PATIENCE, lambda: [BLOCK])
        former.announce(attachment("gone", pod="gone"))
        node.watch.announce(attachment("new", pod="new"))
        assert not numbers(former) & numbers(node.watch)

    play(tmp_path, story)


def numbers(watch: PodWatch) -> set[int]:
    """The numbers of the pods that it tells of."""
    return {pod.number for pod in watch._pods.values()}


def test_a_proxy_that_listens_no_more_is_let_go(tmp_path: Path) -> None:
    """One that hangs must not fill the daemon's memory; it calls again when it goes on."""

    async def story(node: Node) -> None:
        async with grpc.aio.insecure_channel(f"unix:{node.socket}") as channel:
            stub = policy_pb2_grpc.PolicyStub(channel)  # type: ignore[no-untyped-call]
            call = stub.WatchPods()
            await call.write(policy_pb2.WatchPodsRequest(synced=True))
            await until(lambda: node.watch.hindrance == "")
            for each in range(20_000):
                node.watch.adopt([attachment("a", pod=f"{each:0250}")])
                node.watch.blocks_changed()
                if each % 100 == 0:
                    await asyncio.sleep(0)
            assert node.watch.hindrance == "networkPolicy is on, and no podwire-proxy is connected"
            call.cancel()

    play(tmp_path, story)


def test_a_block_that_was_returned_is_told_at_once(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        proxy = Proxy(node.socket)
        await until(lambda: proxy.blocks_seen == {BLOCK})
        node.blocks.append(OTHER_BLOCK)
        node.watch.blocks_changed()
        await until(lambda: proxy.blocks_seen == {BLOCK, OTHER_BLOCK})
        await proxy.end()

    play(tmp_path, story)


def test_a_connection_that_has_ended_takes_no_news_from_the_next(tmp_path: Path) -> None:
    """gRPC asks for requests of a connection after its end. Whoever asks first must not leave the other without."""

    async def story() -> None:
        client = Proxy(tmp_path / "nobody")
        await client.end()
        client.client._turn = 1
        former = client.client._requests(1)
        await anext(former)
        waiting = asyncio.create_task(anext(former, None))
        await asyncio.sleep(0)
        client.client._turn = 2
        current = client.client._requests(2)
        await anext(current)  # is being sent when the pod is settled
        client.client.settle([7])
        assert await waiting is None
        async with asyncio.timeout(PATIENCE):
            assert list((await anext(current)).settled) == [7]

    asyncio.run(story())
