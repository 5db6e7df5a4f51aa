"""CHECK and GC: what differs is named, what nobody has is removed, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipam_daemon.cni import NetworkConfig, PreviousInterface, PreviousIp, PreviousResult, ValidAttachment
from ipam_daemon.errors import (
    CheckFailed,
    InvalidConfig,
    TryAgainLater,
)
from tests.netns.node_fixtures import (
    Engine,
    Netns,
    call,
    command,
    engine,
    key,
    play,
    pods,
)

# --- CHECK --------------------------------------------------------------------------------------------------------


def previous(address: str = "10.244.1.3/28", ifname: str = "eth0") -> NetworkConfig:
    """The configuration of a CHECK: the result of the ADD comes with it."""
    return NetworkConfig(
        name="podnet",
        cni_version="1.1.0",
        previous=PreviousResult(
            interfaces=(PreviousInterface(name="pw0"), PreviousInterface(name=ifname)),
            ips=(PreviousIp(address=address),),
        ),
    )


async def check(it: Engine, pod: Netns, config: NetworkConfig | None = None) -> None:
    await it.attachments.check(call("CHECK", "a", pod.path, config=config or previous()))


TAKEN_APART = {  # where, `ip …`, what CHECK says
    "address removed": ("pod", "addr flush dev eth0", "has lost its address 10.244.1.3/28"),
    "default route removed": ("pod", "route del default", "no default route via 10.244.1.1"),
    "MAC changed": (
        "pod",
        "link set eth0 address 02:00:00:00:00:01",
        "has MAC 02:00:00:00:00:01, expected 0a:58:0a:f4:01:03",
    ),
    "pod's end down": ("pod", "link set eth0 down", "eth0 is down"),
    "pod's end renamed": ("pod", "link set eth0 down name other", "has no interface eth0"),
    "port out of the bridge": ("node", "link set HOST nomaster", "not a port of pw0"),
    "port that keeps frames to itself": (
        "node",
        "link set HOST type bridge_slave group_fwd_mask 0",
        "a port of other settings",
    ),
    "port down": ("node", "link set HOST down", "is down"),
    "wire deleted": ("node", "link del HOST", "is gone"),
    "namespace deleted": ("machine", "netns del POD", "no network namespace"),
}


@pytest.mark.parametrize(("where", "damage", "says"), TAKEN_APART.values(), ids=TAKEN_APART.keys())
def test_check_names_what_somebody_took_apart(tmp_path: Path, where: str, damage: str, says: str) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                host = (await it.add("a", a.path))["interfaces"][0]["name"]
                await check(it, a)
                words = damage.replace("HOST", host).replace("POD", a.name).split()
                command("ip", *{"pod": ("-n", a.name), "node": ("-n", it.node.name), "machine": ()}[where], *words)
                with pytest.raises(CheckFailed) as caught:
                    await check(it, a)
                assert says in str(caught.value)
                assert caught.value.code == 103

    play(story)


def test_check_compares_the_previous_result(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                with pytest.raises(CheckFailed, match="is not attached"):
                    await check(it, a)
                await it.add("a", a.path)
                with pytest.raises(CheckFailed, match=r"no address 10\.244\.1\.3/28"):
                    await check(it, a, previous(address="10.244.1.9/28"))
                with pytest.raises(CheckFailed, match="no interface eth0"):
                    await check(it, a, previous(ifname="eth1"))
                with pytest.raises(InvalidConfig, match="prevResult is missing"):
                    await check(it, a, NetworkConfig(name="podnet", cni_version="1.1.0"))

    play(story)


def test_check_before_the_block_is_known_is_to_be_tried_again(tmp_path: Path) -> None:
    """The journal was lost and rebuilt from the kernel; etcd has not said yet which blocks this node has."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                again = it.restarted()
                with pytest.raises(TryAgainLater):
                    await check(again, a)
                again.journal.close()

    play(story)


# --- GC -----------------------------------------------------------------------------------------------------------


def gc_config(*keep: str, network: str = "podnet") -> NetworkConfig:
    return NetworkConfig(
        name=network,
        cni_version="1.1.0",
        valid_attachments=tuple(ValidAttachment(container_id=each, ifname="eth0") for each in keep),
    )


def test_gc_removes_what_the_runtime_does_not_list(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                await it.add("a", a.path)
                await it.add("b", b.path)
                await it.attachments.collect_garbage(call("GC", "", config=gc_config(network="other")))
                assert it.counts()["used"] == 2, "another network's attachments are not its business"
                await it.attachments.collect_garbage(call("GC", "", config=gc_config("a")))
                assert [each.key for each in it.journal.attachments()] == [key("a")]
                assert a.pings("10.244.1.1")

    play(story)


def test_gc_leaves_alone_what_was_added_after_it_was_issued(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                late = call("GC", "", config=gc_config())
                await it.add("a", a.path)
                await it.attachments.collect_garbage(late)
                assert a.pings("10.244.1.1")

    play(story)


def test_gc_without_a_list_removes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                await it.attachments.collect_garbage(call("GC", ""))
                assert it.counts()["used"] == 1

    play(story)
