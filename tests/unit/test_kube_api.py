"""Following kinds of a server: the lab's own API, and one that does what it should not. Real sockets on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from podwire.kube.api import CHUNK, ApiSource, Pace
from podwire.kube.client import Client, Timing
from podwire.kube.kinds import SERVICE_CIDRS, SERVICES, Wanted, one_node, pods_of_node, proxied_services
from podwire.kube.objects import Service
from podwire.kube.source import Silent
from podwire.lab.api import kinds as lab
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store
from tests.unit.kube_fixtures import (
    IMPATIENT,
    QUICK,
    Mirror,
    Reply,
    Script,
    client,
    event,
    eventually,
    listing,
    mark,
    mirrored,
    run,
    service,
    status,
)

ALL = Wanted(kind=SERVICES)


class Seen(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.left_out: list[str] = []

    def follow(self, kind: str, event: str) -> None:  # noqa: ARG002
        self.events.append(event)

    def skipped(self, kind: str, name: str, reason: str) -> None:  # noqa: ARG002
        self.left_out.append(name)


# --- the lab's server -------------------------------------------------------------------------------------------


def made(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default", "labels": labels}, "spec": {"ports": [{"port": 80}]}}


@asynccontextmanager
async def lab_api(**options: Any) -> AsyncIterator[tuple[Store, Client]]:
    store = Store(history=options.pop("history", 4096))
    async with ApiServer(store, **options).serving() as url, client(url) as one:
        yield store, one


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "in chunks"])
def test_a_mirror_follows_a_server(streams: bool) -> None:
    async def story() -> None:
        async with lab_api() as (store, one):
            for number in range(CHUNK + 10):
                store.create(lab.SERVICES, made(f"s{number}"))
            store.create(lab.SERVICES, made("theirs", **{"service.kubernetes.io/service-proxy-name": "other"}))
            source = ApiSource(one, pace=QUICK)
            source.streams = streams
            async with mirrored(source, proxied_services()) as mirror:
                await mirror.until(lambda: mirror.synced)
                assert len(mirror.objects) == CHUNK + 10
                assert [batch.synced for batch in mirror.batches[:-1]] == [False] * (len(mirror.batches) - 1)
                store.delete(lab.SERVICES, "s1", "default")
                store.create(lab.SERVICES, made("new"))
                await mirror.until(lambda: ("default", "new") in mirror.objects)
                await mirror.until(lambda: ("default", "s1") not in mirror.objects)

    run(story)


def test_a_watch_carries_on_after_its_time_is_up() -> None:
    async def story() -> None:
        async with lab_api() as (store, one):
            source = ApiSource(one, pace=Pace(watch=1.0), chance=lambda: 0.5)
            async with mirrored(source, ALL) as mirror:
                for name in "abc":
                    await asyncio.sleep(0.6)  # so that a watch of 1.5 s ends in between
                    store.create(lab.SERVICES, made(name))
                    await mirror.until(lambda name=name: ("default", name) in mirror.objects)  # type: ignore[misc]
                assert source.problems == {}

    run(story)


def test_a_history_that_is_forgotten_is_listed_and_compared() -> None:
    async def story() -> None:
        seen = Seen()
        store = Store(history=4)
        async with ApiServer(store).serving() as url, client(url, observer=seen) as one:
            store.create(lab.SERVICES, made("keep"))
            store.create(lab.SERVICES, made("drop"))
            async with mirrored(ApiSource(one, pace=QUICK), ALL) as mirror:
                await mirror.until(lambda: len(mirror.objects) == 2)
                store.delete(lab.SERVICES, "drop", "default")
                for number in range(9):  # at once: the watch falls out of the log
                    store.create(lab.SERVICES, made(f"s{number}"))
                await mirror.until(lambda: "s8" in mirror.names and "drop" not in mirror.names)
                assert "expired" in seen.events
                told = [obj.metadata.name for batch in mirror.batches for obj in batch.upserts]
                assert told.count("keep") == 1

    run(story)


def test_a_server_that_went_away_and_lost_its_history_is_listed_anew() -> None:
    async def story() -> None:
        first = Store()
        first.create(lab.SERVICES, made("old"))
        source: ApiSource | None = None
        async with ApiServer(first).serving() as url:
            port = int(url.rpartition(":")[2])
            one = client(url)
            source = ApiSource(one, pace=QUICK)
            task_mirror: Mirror[Service] = Mirror()
            task = asyncio.create_task(task_mirror.follow(source, ALL))
            await task_mirror.until(lambda: task_mirror.names == ["old"])
        await eventually(lambda: "services" in source.problems)
        assert task_mirror.names == ["old"]
        second = Store(first_version=first.version + 1000)
        second.create(lab.SERVICES, made("young"))
        async with ApiServer(second).serving(port=port):
            await task_mirror.until(lambda: task_mirror.names == ["young"])
            assert source.problems == {}
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await one.close()

    run(story)


def test_one_node_and_its_pods() -> None:
    async def story() -> None:
        async with lab_api() as (store, one):
            for name in ("n1", "n2"):
                store.create(lab.NODES, {"metadata": {"name": name}})
            spec = {"containers": [{"name": "c", "image": "x"}]}
            for name, node in (("p1", "n1"), ("p2", "n2")):
                pod = {"metadata": {"name": name, "namespace": "default"}, "spec": {**spec, "nodeName": node}}
                store.create(lab.PODS, pod)
            source = ApiSource(one, pace=QUICK)
            async with (
                mirrored(source, one_node("n1")) as nodes,
                mirrored(source, pods_of_node("n1")) as pods,
            ):
                await nodes.until(lambda: nodes.synced)
                await pods.until(lambda: pods.synced)
                assert (list(nodes.objects), list(pods.objects)) == ([("", "n1")], [("default", "p1")])

    run(story)


# --- a server that does as it is told ---------------------------------------------------------------------------

Story = Callable[[Script, Mirror[Service], ApiSource, Seen], Any]


def scripted(
    *replies: Reply, wanted: Wanted[Service] = ALL, streams: bool = False, pace: Pace = QUICK, **options: Any
) -> Callable[[Story], None]:
    """Runs a story against replies in this order; the last one is a watch that hangs."""

    def tell(story: Story) -> None:
        async def whole() -> None:
            script, seen = Script(*replies, Reply(then="hang")), Seen()
            timing = Timing(answer=2.0) if pace is IMPATIENT else None
            async with script.serving() as url, client(url, observer=seen, timing=timing) as one:
                source = ApiSource(one, pace=pace, **options)
                source.streams = streams
                async with mirrored(source, wanted) as mirror:
                    await story(script, mirror, source, seen)

        run(whole)

    return tell


LIST = Reply.of(listing(10, service("a", 1)))
STREAMED = Reply(event("ADDED", service("a", 1)), mark(10, ends_list=True), then="hang")
B = event("ADDED", service("b", 11))
LATE = event("ADDED", service("b", 16))
AB = Reply.of(listing(20, service("a", 1), service("b", 11)))

# What comes first, what comes then, and what has been asked for when both objects are there.
ROADS: dict[str, tuple[bool, list[Reply], list[str]]] = {
    "a list and a watch": (False, [LIST, Reply(B, then="hang")], ["list", "watch 10"]),
    "a streamed list that goes on": (
        True, [Reply(event("ADDED", service("a", 1)), mark(10, ends_list=True), B, then="hang")], ["stream"],
    ),
    "streamed lists are refused (400)": (
        True, [Reply.of(status(400), 400), LIST, Reply(B, then="hang")], ["stream", "list", "watch 10"],
    ),
    "streamed lists are forbidden fields (422)": (
        True, [Reply.of(status(422), 422), LIST, Reply(B, then="hang")], ["stream", "list", "watch 10"],
    ),
    "streamed lists are not known: no mark comes": (
        True, [Reply(event("ADDED", service("a", 1)), then="hang"), LIST, Reply(B, then="hang")],
        ["stream", "list", "watch 10"],
    ),
    "streamed lists are not known: a plain bookmark comes": (
        True, [Reply(event("ADDED", service("a", 1)), mark(9), then="hang"), LIST, Reply(B, then="hang")],
        ["stream", "list", "watch 10"],
    ),
    "a streamed list breaks off": (
        True, [Reply(event("ADDED", service("a", 1)), then="drop"), LIST, Reply(B, then="hang")],
        ["stream", "list", "watch 10"],
    ),
    "a streamed list ends before its mark": (
        True, [Reply(event("ADDED", service("a", 1))), LIST, Reply(B, then="hang")], ["stream", "list", "watch 10"],
    ),
    "410 when the watch begins": (
        False, [LIST, Reply.of(status(410, "Expired"), 410), AB], ["list", "watch 10", "list"],
    ),
    "410 within the watch": (
        False, [LIST, Reply(event("ERROR", status(410, "Expired"))), AB], ["list", "watch 10", "list"],
    ),
    "410 in the middle of a list": (
        False,
        [Reply.of(listing(10, service("a", 1), token="t")), Reply.of(status(410, "Expired"), 410), AB],
        ["list", "list", "list"],
    ),
    "410 in the middle of a streamed list": (
        True,
        [Reply(event("ERROR", status(410, "Expired"))), AB],
        ["stream", "list"],
    ),
    "500 to a list": (False, [Reply.of(status(500), 500), AB], ["list", "list"]),
    "500 to a watch": (
        False, [LIST, Reply.of(status(503), 503), Reply(B, then="hang")], ["list", "watch 10", "watch 10"],
    ),
    "500 within a watch": (False, [LIST, Reply(event("ERROR", status(500))), AB], ["list", "watch 10", "list"]),
    "a list that is cut": (
        False, [Reply(b'{"metadata":{"resourceVersion":"10"},"items":[{', then="drop"), AB], ["list", "list"],
    ),
    "a list that ends within an object": (
        False, [Reply(b'{"metadata":{"resourceVersion":"10"},"items":[{'), AB], ["list", "list"],
    ),
    "a list that does not move on": (
        False, [Reply.of(listing(10, token="t")), Reply.of(listing(10, token="t")), AB], ["list", "list", "list"],
    ),
    "a watch that is cut within a line": (
        False, [LIST, Reply(mark(15), LATE[:40], then="drop"), Reply(LATE, then="hang")],
        ["list", "watch 10", "watch 15"],
    ),
    "a watch that ends within a line": (
        False, [LIST, Reply(mark(15), LATE[:40]), Reply(LATE, then="hang")], ["list", "watch 10", "watch 15"],
    ),
    "a watch with a line that is no JSON": (
        False, [LIST, Reply(b"<html>\n", then="hang"), AB], ["list", "watch 10", "list"],
    ),
    "a watch that says nothing at all": (
        False, [LIST, Reply(then="hang"), Reply(B, then="hang")], ["list", "watch 10", "watch 10"],
    ),
    "a watch that is not answered": (
        False, [LIST, Reply(then="no answer"), Reply(B, then="hang")], ["list", "watch 10", "watch 10"],
    ),
    "a watch that ends at once": (False, [LIST, Reply(), Reply(B, then="hang")], ["list", "watch 10", "watch 10"]),
    "HTML from a proxy on the way": (
        False, [Reply(b"<html>login</html>", headers={"Content-Type": "text/html"}), AB], ["list", "list"],
    ),
    "a redirect": (False, [Reply(code=302, headers={"Location": "http://127.0.0.1:1/"}), AB], ["list", "list"]),
}  # fmt: skip


@pytest.mark.parametrize(("streams", "replies", "asked"), ROADS.values(), ids=ROADS)
def test_every_road_leads_to_the_same_state(streams: bool, replies: list[Reply], asked: list[str]) -> None:
    async def story(script: Script, mirror: Mirror[Service], source: ApiSource, _: Seen) -> None:
        await mirror.until(lambda: mirror.names == ["a", "b"] and mirror.synced)
        assert script.kinds_of_rounds()[: len(asked)] == asked
        assert source.problems == {}

    waits = any(reply.then in ("hang", "no answer") and B not in reply.pieces for reply in replies)
    scripted(*replies, streams=streams, pace=IMPATIENT if waits else QUICK)(story)


def test_after_a_list_that_ran_out_all_is_asked_for_at_once() -> None:
    async def story(script: Script, mirror: Mirror[Service], _: ApiSource, __: Seen) -> None:
        await mirror.until(lambda: mirror.synced)
        parameters = [(one.get("limit"), one.get("continue")) for one in script.asked[:3]]
        assert parameters == [("500", None), ("500", "t"), (None, None)]
        assert mirror.names == ["a", "b"]

    chunk = Reply.of(listing(10, service("a", 1), service("gone", 2), token="t"))
    scripted(chunk, Reply.of(status(410, "Expired"), 410), AB)(story)


def test_what_is_asked_of_a_watch() -> None:
    async def story(script: Script, mirror: Mirror[Service], _: ApiSource, __: Seen) -> None:
        await mirror.until(lambda: mirror.synced)
        await eventually(lambda: len(script.asked) > 1)
        streamed, watched = script.asked[:2]
        timeouts = [int(one.pop("timeoutSeconds")) for one in (streamed, watched)]
        assert all(300 <= seconds <= 600 for seconds in timeouts)
        common = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "labelSelector": "!service.kubernetes.io/service-proxy-name",
        }
        assert streamed == {**common, "sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        assert watched == {**common, "resourceVersion": "10"}

    ended = Reply(event("ADDED", service("a", 1)), mark(10, ends_list=True))
    scripted(ended, wanted=proxied_services(), streams=True)(story)


def test_a_server_that_streams_no_lists_is_not_asked_again() -> None:
    async def story(script: Script, mirror: Mirror[Service], source: ApiSource, _: Seen) -> None:
        await mirror.until(lambda: mirror.names == ["a", "b"])
        assert script.kinds_of_rounds()[:4] == ["stream", "list", "watch 10", "list"]
        assert not source.streams

    scripted(Reply.of(status(400), 400), LIST, Reply.of(status(410), 410), AB, streams=True)(story)


def test_a_refusal_is_said_in_words_and_tried_again() -> None:
    async def story(_: Script, mirror: Mirror[Service], source: ApiSource, __: Seen) -> None:
        await eventually(lambda: "services" in source.problems)
        assert "answers 403: services is forbidden" in source.problems["services"]
        assert not mirror.synced
        gate.set()
        await mirror.until(lambda: mirror.synced)
        assert source.problems == {}

    gate = asyncio.Event()
    forbidden = Reply.of(status(403, "Forbidden", 'services is forbidden: User "x" cannot list resource'), 403)
    again = Reply.of(listing(10, service("a", 1)), gate=gate)
    scripted(forbidden, again)(story)


def test_a_kind_that_the_server_does_not_have_is_empty_if_it_may_be() -> None:
    async def story() -> None:
        script = Script(Reply.of(status(404, "NotFound"), 404))
        async with script.serving() as url, client(url) as one:
            source = ApiSource(one, pace=QUICK)
            async with mirrored(source, Wanted(kind=SERVICE_CIDRS, optional=True)) as mirror:
                await mirror.until(lambda: mirror.synced)
                await eventually(lambda: len(script.asked) > 2)
                assert (mirror.objects, source.problems) == ({}, {})
                assert len(mirror.batches) == 1

    run(story)


def test_broken_objects_are_named_and_the_rest_goes_on() -> None:
    async def story(_: Script, mirror: Mirror[Service], source: ApiSource, seen: Seen) -> None:
        await mirror.until(lambda: mirror.names == ["a", "b"])
        assert seen.left_out == ["default/bad", "default/worse", ""]
        assert set(source.skipped["services"]) == {("default", "bad"), ("default", "worse")}
        release.set()
        await mirror.until(lambda: mirror.names == ["a", "b", "bad"])
        await eventually(lambda: source.skipped["services"] == {})

    release = asyncio.Event()
    bad = service("bad", 2, ports="none")
    nameless = {"metadata": {"namespace": "default"}}
    first = Reply.of(listing(10, service("a", 1), bad))
    lines = (event("ADDED", service("worse", 11, ports=7)), event("ADDED", nameless), event("ADDED", service("b", 12)))
    mended = (event("MODIFIED", service("bad", 13)), event("DELETED", service("worse", 14)))
    scripted(first, Reply(*lines), Reply(*mended, gate=release, then="hang"))(story)


def test_a_line_of_megabytes_is_read() -> None:
    async def story(_: Script, mirror: Mirror[Service], __: ApiSource, ___: Seen) -> None:
        await mirror.until(lambda: mirror.names == ["a", "b"])

    large = service("b", 11)
    large["metadata"]["annotations"] = {"blob": "x" * (8 << 20)}
    scripted(LIST, Reply(event("ADDED", large), then="hang"))(story)


def test_a_line_that_never_ends_is_given_up() -> None:
    async def story(_: Script, mirror: Mirror[Service], __: ApiSource, seen: Seen) -> None:
        await mirror.until(lambda: mirror.names == ["a", "b"])
        assert "garbled" in seen.events

    scripted(LIST, Reply(b"x" * 100_000, then="hang"), AB, longest_line=1000)(story)


def test_what_happens_while_the_consumer_works_is_one_change_a_key() -> None:
    async def story() -> None:
        async with lab_api() as (store, one):
            store.create(lab.SERVICES, made("a"))
            batches = ApiSource(one, pace=QUICK).follow(ALL)
            first = await anext(batches)
            assert first.synced
            for number in range(200):
                changed = {**made("a"), "spec": {"ports": [{"port": number + 1}]}}
                store.update(lab.SERVICES, changed)
            last = store.get(lab.SERVICES, "a", "default")["metadata"]["resourceVersion"]
            number = 0
            async for batch in batches:
                number += 1
                if batch.upserts[-1].metadata.resource_version == last:
                    break
            assert number < 50
            await batches.aclose()

    run(story)


def test_ending_a_follower_ends_its_connection() -> None:
    async def story() -> None:
        async with lab_api() as (store, one):
            async with mirrored(ApiSource(one, pace=QUICK), ALL) as mirror:
                await mirror.until(lambda: mirror.synced)
                assert len(store.log.listeners) == 1
            store.create(lab.SERVICES, made("a"))
            await eventually(lambda: not store.log.listeners)

    run(story)


def test_pauses_grow_and_end() -> None:
    class Clock:
        """Time that passes only in pauses."""

        def __init__(self) -> None:
            self.time, self.pauses = 0.0, list[float]()

        def now(self) -> float:
            return self.time

        async def sleep(self, seconds: float) -> None:
            self.pauses.append(seconds)
            self.time += seconds
            await asyncio.sleep(0)

    async def story() -> None:
        clock = Clock()
        waiting = Reply.of(status(429), 429, headers={"Retry-After": "7"})
        failing = [Reply.of(status(500), 500)] * 6
        script = Script(waiting, *failing, LIST, Reply(), Reply(mark(10)), Reply(then="hang"))
        async with script.serving() as url, client(url, clock=clock) as one:
            source = ApiSource(one, chance=lambda: 1.0)
            source.streams = False
            async with mirrored(source, ALL) as mirror:
                await mirror.until(lambda: mirror.synced)
                await eventually(lambda: len(script.asked) == 11)
        asked_for, fallen_back, listed, empty = 10.5, [0.5, 1.0, 2.0, 4.0, 8.0, 15.0], 0.0, [15.0, 15.0]
        assert clock.pauses == [asked_for, *fallen_back, listed, *empty]

    run(story)
