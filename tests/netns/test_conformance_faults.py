"""The contract of a daemon in trouble: GC goes on past what fails, STATUS tells cut-off pods from a full node."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.identity import boottime_ns
from ipam_daemon.server import CniService
from podwire.v1 import cni_pb2
from tests.netns.node_fixtures import block, call, engine, key, play, pods
from tests.netns.test_check_and_gc import gc_config


def test_gc_goes_on_past_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wire will not go; the others do, and the error is told. The next GC takes it."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(3) as made:
                names = [each.name for each in made]
                ends = [(await it.add(each.name, each.path))["interfaces"][0]["name"] for each in made]
                kill = it.wires.kill

                def stubborn(host_ifname: str) -> None:
                    if host_ifname == ends[0]:
                        raise PlumbingFailed("it will not go")
                    kill(host_ifname)

                with monkeypatch.context() as patched:
                    patched.setattr(it.wires, "kill", stubborn)
                    with pytest.raises(PlumbingFailed, match="it will not go"):
                        await it.attachments.collect_garbage(call("GC", "", config=gc_config()))
                assert [each.key for each in it.journal.attachments()] == [key(names[0])]
                await it.attachments.collect_garbage(call("GC", "", config=gc_config()))
                assert it.journal.attachments() == ()

    play(story)


def test_status_is_51_when_pods_are_cut_off_and_50_when_none_is(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                service = CniService(it.attachments, it.metrics, lambda: ["a reason"])
                config = b'{"cniVersion": "1.1.0", "name": "podnet", "type": "podwire"}'

                async def status() -> int:
                    request = cni_pb2.CallRequest(
                        command="STATUS", stdin=config, api_min=1, api_max=1, issued_at=boottime_ns()
                    )
                    return int(json.loads((await service.Call(request, None)).stdout)["code"])

                assert await status() == 50
                it.attachments.addresses.use_blocks([block(ipaddress.ip_network("10.244.9.0/28"))])
                assert await it.attachments.fence() == 1
                assert await status() == 51
                assert not a.pings("10.244.1.1", 1)
                await it.delete("a")
                assert await status() == 50

    play(story)
