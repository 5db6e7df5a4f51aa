"""The gRPC services on their unix socket, with a real engine behind them and the generated stubs before them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipam_daemon.identity import boottime_ns
from ipam_daemon.server import AgentService, CniService, make_server
from podwire.v1 import agent_pb2, agent_pb2_grpc, cni_pb2, cni_pb2_grpc
from tests.netns.node_fixtures import Engine, engine, hold, play, pods, settle

CONFIG = b'{"cniVersion": "1.1.0", "name": "podnet", "type": "podwire"}'


class Daemon:
    """A server before an engine, and its two stubs."""

    def __init__(self, it: Engine, channel: Any) -> None:
        self.it = it
        self.not_ready: list[str] = []
        self.path = it.folder / "ipamd.sock"
        self.cni_service = CniService(it.attachments, it.metrics, lambda: self.not_ready)
        self.cni = cni_pb2_grpc.CNIStub(channel)  # type: ignore[no-untyped-call]
        self.agent = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]

    def call(self, command: str, container_id: str = "c1", netns: str = "", **more: Any) -> Any:
        """A CNI call under way."""
        fields = {"api_min": 1, "api_max": 1, "stdin": CONFIG, "ifname": "eth0", "issued_at": boottime_ns(), **more}
        return self.cni.Call(cni_pb2.CallRequest(command=command, container_id=container_id, netns=netns, **fields))

    def counted(self, command: str, code: int) -> float | None:
        """How many calls ended with this code, by the metrics."""
        labels = {"command": command, "code": str(code)}
        return self.it.metrics.registry.get_sample_value("podwire_cni_calls_total", labels)


@asynccontextmanager
async def daemon(folder: Path) -> AsyncIterator[Daemon]:
    async with engine(folder) as it, grpc.aio.insecure_channel(f"unix:{folder}/ipamd.sock") as channel:
        served = Daemon(it, channel)
        status = agent_pb2.GetStatusResponse(node="node-1", ready=True)
        server = make_server(served.path, served.cni_service, AgentService(lambda: status, it.journal))
        await server.start()
        try:
            yield served
        finally:
            await server.stop(5)
            await served.cni_service.drain()


def said(answer: cni_pb2.CallResponse) -> dict[str, Any]:
    decoded = json.loads(answer.stdout)
    assert isinstance(decoded, dict)
    return decoded


def test_the_socket_is_roots_alone(tmp_path: Path) -> None:
    async def story() -> None:
        before = os.umask(0)
        os.umask(before)
        async with daemon(tmp_path) as it:
            mode = it.path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            after = os.umask(before)
            assert after == before, "other files keep their modes"

    play(story)


def test_the_socket_of_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    async def story() -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "ipamd.sock"))
        async with daemon(tmp_path) as it:
            assert (await it.call("STATUS")).exit_code == 0

    play(story)


def test_from_add_to_del(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            with pods(1) as (pod,):
                added = await it.call("ADD", netns=pod.path, args="IgnoreUnknown=1;K8S_POD_NAME=web")
                assert (added.exit_code, added.api) == (0, 1)
                assert said(added)["ips"][0]["address"] == "10.244.1.3/28"
                (listed,) = (await it.agent.ListAttachments(agent_pb2.ListAttachmentsRequest())).attachments
                assert (listed.container_id, listed.pod_name, list(listed.addresses)) == (
                    "c1",
                    "web",
                    ["10.244.1.3/28"],
                )
                assert listed.state == agent_pb2.Attachment.STATE_ATTACHED

                check = {**json.loads(CONFIG), "prevResult": said(added)}
                checked = await it.call("CHECK", netns=pod.path, stdin=json.dumps(check).encode())
                assert (checked.exit_code, checked.stdout) == (0, b"")

                deleted = await it.call("DEL")
                assert (deleted.exit_code, deleted.stdout) == (0, b"")
                (left,) = (await it.agent.ListAttachments(agent_pb2.ListAttachmentsRequest())).attachments
                assert left.state == agent_pb2.Attachment.STATE_RELEASING
                assert (it.counted("ADD", 0), it.counted("CHECK", 0), it.counted("DEL", 0)) == (1, 1, 1)

    play(story)


ERRORS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "an executable of tomorrow": ("ADD", {"api_min": 2, "api_max": 3}, 11, "API 2 to 3"),
    "an executable that says no version": ("DEL", {"api_min": 0, "api_max": 0}, 11, "API 0 to 0"),
    "an environment that is wrong": ("ADD", {"ifname": "a/b"}, 4, "CNI_IFNAME"),
    "a namespace that is not there": ("ADD", {"netns": "/run/netns/absent"}, 8, "no network namespace"),
    "no JSON": ("ADD", {"netns": "/x", "stdin": b"\xff"}, 6, "standard input"),
    "a command that nobody knows": ("RUN", {}, 4, "CNI_COMMAND is 'RUN'"),
    "nothing attached": ("CHECK", {"netns": "/x"}, 103, "is not attached"),
}


@pytest.mark.parametrize(("command", "fields", "code", "says"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_is_an_answer(tmp_path: Path, command: str, fields: dict[str, Any], code: int, says: str) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            answer = await it.call(command, **fields)
            assert answer.exit_code == 1
            assert answer.api == 1
            assert said(answer)["code"] == code
            assert says in said(answer)["msg"]
            assert it.counted(command if command != "RUN" else "other", code) == 1

    play(story)


def test_an_error_speaks_the_version_of_the_configuration(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            old = CONFIG.replace(b"1.1.0", b"0.4.0")
            assert said(await it.call("ADD", netns="/absent", stdin=old))["cniVersion"] == "0.4.0"

    play(story)


def test_status_says_why_not(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            assert (await it.call("STATUS")).exit_code == 0
            it.not_ready = ["etcd does not answer", "no block"]
            answer = await it.call("STATUS")
            assert (said(answer)["code"], said(answer)["msg"]) == (50, "etcd does not answer; no block")

    play(story)


def test_what_nobody_has_foreseen_is_an_answer_too(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            it.it.journal._db.execute("DROP TABLE attachment")
            answer = await it.call("DEL")
            assert (answer.exit_code, said(answer)["code"]) == (1, 11)
            assert "the journal" in said(answer)["msg"]
            with pytest.raises(sqlite3.Error):
                it.it.journal.attachments()

    play(story)


def test_a_caller_that_goes_in_the_middle_leaves_no_half_a_wire(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            with pods(1) as (pod,):
                goes_on = await hold(it.it.node)
                adding = it.call("ADD", netns=pod.path)
                while it.it.counts()["used"] == 0:  # noqa: ASYNC110  the call is on its way through the socket
                    await asyncio.sleep(0.01)
                adding.cancel()
                await settle()
                goes_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await adding
                await it.cni_service.drain()
                assert pod.pings("10.244.1.1"), "the ADD was finished"
                assert (await it.call("DEL")).exit_code == 0
                await it.it.reap()
                assert it.it.node.links() == {"pw0"}

    play(story)


def test_a_server_that_stops_waits_for_calls_whose_caller_has_gone(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            with pods(1) as (pod,):
                assert (await it.call("ADD", netns=pod.path)).exit_code == 0
                goes_on = await hold(it.it.node)
                deleting = it.call("DEL")
                while not it.cni_service._running:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                deleting.cancel()
                draining = asyncio.ensure_future(it.cni_service.drain())
                await settle()
                assert not draining.done()
                goes_on.set()
                await draining
                assert it.it.counts()["releasing"] == 1

    play(story)


def test_status_of_the_node(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            got = await it.agent.GetStatus(agent_pb2.GetStatusRequest())
            assert (got.node, got.ready) == ("node-1", True)

    play(story)


def test_a_large_configuration_is_taken(tmp_path: Path) -> None:
    async def story() -> None:
        async with daemon(tmp_path) as it:
            large = CONFIG[:-1] + b', "x": "' + b"y" * (5 << 20) + b'"}'
            assert (await it.call("DEL", stdin=large)).exit_code == 0

    play(story)
