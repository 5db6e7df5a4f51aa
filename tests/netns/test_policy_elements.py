"""Changes of policies as messages: the kernel has then what nft's text would have left, and knows whose it was."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kube_proxy_lite.apply.nft import Nft
from kube_proxy_lite.apply.nftevents import NftEvents, in_tables
from kube_proxy_lite.apply.policy_nftables import PolicyApplier
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.policy_elements import read
from kube_proxy_lite.render.policy_nftables import TABLE, PolicyRenderer
from podwire.kube.objects import Namespace, NetworkPolicy, Pod
from podwire.netns import inside, open_netns
from tests.policy_cases import BASE, Manifest, pod, pods, policy

NODE = "pwelements"
POLICIES = (
    policy("x/by-label", select={"pod": "a"}, ingress=[{"from": [pods(role="friend")]}]),
    policy("x/by-name", select={"role": "friend"}, egress=[{"to": [pods()], "ports": [{"port": "serve-80-tcp"}]}]),
    policy("z/closed", select={"role": "friend"}),
)
CHANGES: tuple[tuple[str, Manifest], ...] = (
    ("a member comes", pod("x/b", pod="b", role="friend")),
    ("another one", pod("x/c", role="friend")),
    ("it goes", pod("x/c")),
    ("it comes back", pod("x/c", role="friend")),
    ("a member goes", pod("x/b", pod="b")),
    ("it comes again, and is selected, too", pod("x/b", pod="a", role="friend")),
)


@pytest.fixture
def there() -> Iterator[int]:
    """A namespace, entered by whoever plays."""
    subprocess.run(("ip", "netns", "add", NODE), check=True)
    fd = open_netns(str(Path("/run/netns") / NODE))
    try:
        yield fd
    finally:
        os.close(fd)
        subprocess.run(("ip", "netns", "del", NODE), check=True)


def play(there: int, story: Coroutine[Any, Any, None]) -> None:
    with inside(there):
        asyncio.run(story)


class Stage:
    """A kernel with POLICIES."""

    def __init__(self) -> None:
        self.policies = Policies("node1")
        self.renderer, self.applier = PolicyRenderer(), PolicyApplier()

    def put(self, *manifests: Manifest) -> tuple[str, ...]:
        """The scripts that follow from objects."""
        for each in manifests:
            match each["kind"]:
                case "Pod":
                    self.policies.set_pod(msgspec.convert(each, Pod))
                case "Namespace":
                    self.policies.set_namespace(msgspec.convert(each, Namespace))
                case _:
                    self.policies.set_policy(msgspec.convert(each, NetworkPolicy))
        return self.renderer.update(self.policies.drain(), frozenset())

    async def begin(self) -> None:
        self.put(*BASE, *POLICIES)
        await self.applier.apply(self.renderer.resync(await self.applier.read()))


def test_what_messages_leave_is_what_should_be(there: int) -> None:
    async def story() -> None:
        stage = Stage()
        await stage.begin()
        packed = 0
        for name, manifest in CHANGES:
            scripts = stage.put(manifest)
            packed += sum(read(each) is not None for each in scripts)
            await stage.applier.apply(scripts)
            assert stage.renderer.resync(await stage.applier.read()) == (), name
        assert packed >= 4  # the others make and unmake chains

    play(there, story())


def test_a_message_is_no_drift_and_a_strangers_change_is(there: int) -> None:
    async def story() -> None:
        stage = Stage()
        await stage.begin()
        drifted = asyncio.Event()
        events = NftEvents(in_tables((TABLE.split()[1],)), drifted.set, stage.applier.is_own)
        watching = asyncio.create_task(events.watch_forever())
        await asyncio.sleep(0.05)
        await stage.applier.apply(stage.put(CHANGES[0][1]))
        await stage.applier.apply(stage.put(CHANGES[1][1]))
        await asyncio.sleep(0.2)
        assert not drifted.is_set()
        await Nft().script(f"add element {TABLE} known4 {{ 192.0.2.1 }}\n")
        await asyncio.wait_for(drifted.wait(), 90)
        watching.cancel()

    play(there, story())


def test_a_message_that_the_kernel_refuses_has_changed_nothing_and_says_why(there: int) -> None:
    async def story() -> None:
        stage = Stage()
        await stage.begin()
        before = await stage.applier.read()
        script = (
            f"add element {TABLE} known4 {{ 192.0.2.1 }}\nadd element {TABLE} ingress4 {{ 192.0.2.1 : goto in_none }}\n"
        )
        with pytest.raises(ApplyFailed, match="ingress4"):
            await stage.applier.apply([script])
        assert await stage.applier.read() == before

    play(there, story())
