"""The etcd session against a real etcd: keys, transactions, fail-over, leases, watches through every kind of outage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from podwire import config
from podwire.etcd import EtcdError, EtcdOptions, EtcdSession, EtcdUnavailable, Lease, SessionClosed, session
from podwire.etcd.records import (
    Changes,
    Compare,
    Delete,
    Deleted,
    Get,
    Operation,
    Put,
    Snapshot,
    Written,
    absent,
    has_value,
    unchanged,
)
from podwire.lab.etcd import EtcdServer

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Until = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]
NOBODY = "http://127.0.0.1:1"


def connect(*endpoints: str, **more: Any) -> EtcdSession:
    return EtcdSession(EtcdOptions(endpoints=endpoints), **more)


class Attempts:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def attempt(self, method: str, endpoint: str, outcome: str, seconds: float) -> None:
        del method, seconds
        self.seen.append((endpoint, outcome))

    def watch(self, prefix: str, event: str) -> None:
        """Not of interest."""


class Hurried:
    """A clock on which sleeping takes no time, but is counted."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        await asyncio.sleep(0)


# --- keys and transactions --------------------------------------------------------------------------------------


def test_a_range_longer_than_a_page_is_whole(
    server: EtcdServer, prefix: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PAGE", 3)
    keys = [f"{prefix}{number:02}" for number in range(10)]

    async def story() -> tuple[list[str], int, int]:
        async with connect(server.endpoint) as etcd:
            for key in keys:
                last = await etcd.put(key, b"x")
            await etcd.put(prefix.rstrip("/") + "0", b"a neighbour, not below the prefix")
            listing = await etcd.get_prefix(prefix, keys_only=True)
            return [item.key for item in listing.items], listing.revision, last

    found, revision, last = run(story())
    assert found == keys
    assert revision > last


TRANSACTIONS: dict[str, tuple[Callable[[str, int], Compare], bool]] = {
    "absent, of a key that is there": (lambda key, _: absent(key), False),
    "absent, of a key that is not": (lambda key, _: absent(key + "-other"), True),
    "unchanged": (unchanged, True),
    "changed since": (lambda key, revision: unchanged(key, revision - 1), False),
    "unchanged at 0 says absent": (lambda key, _: unchanged(key + "-other", 0), True),
    "value as expected": (lambda key, _: has_value(key, b"here"), True),
    "another value": (lambda key, _: has_value(key, b"there"), False),
}


@pytest.mark.parametrize("name", TRANSACTIONS)
def test_a_transaction_compares(name: str, server: EtcdServer, prefix: str, run: Run) -> None:
    compare, holds = TRANSACTIONS[name]
    key = prefix + "key"

    async def story() -> tuple[bool, bytes | None]:
        async with connect(server.endpoint) as etcd:
            revision = await etcd.put(key, b"here")
            then: list[Operation] = [Delete(key), Put(prefix + "then", b""), Get(key)]
            result = await etcd.txn([compare(key, revision)], then, [Get(prefix + "none"), Get(key)])
            item = result.found[-1]
            return result.succeeded, item.value if item else None

    assert run(story()) == (holds, None if holds else b"here")


# --- endpoints --------------------------------------------------------------------------------------------------


def test_a_dead_endpoint_is_passed_over_and_then_not_asked_again(server: EtcdServer, prefix: str, run: Run) -> None:
    attempts = Attempts()

    async def story() -> None:
        async with connect(NOBODY, server.endpoint, observer=attempts) as etcd:
            await etcd.put(prefix + "a", b"1")
            await etcd.get(prefix + "a")
            assert (etcd.connected, etcd.last_error) == (True, "")

    run(story())
    alive = server.endpoint.removeprefix("http://")
    assert attempts.seen == [(NOBODY.removeprefix("http://"), "no connection"), (alive, "ok"), (alive, "ok")]


def test_calls_and_watch_go_over_to_the_second_endpoint(server: EtcdServer, prefix: str, run: Run, cable: Any) -> None:
    async def story() -> None:
        async with (
            cable(server.endpoint) as one,
            cable(server.endpoint) as two,
            connect(one.endpoint, two.endpoint) as etcd,
            aclosing(etcd.watch_prefix(prefix)) as watch,
        ):
            await anext(watch)
            await one.pull()
            await until_put(etcd, prefix + "a")
            changes = await anext(watch)
            assert isinstance(changes, Changes)
            assert [event.item.key for event in changes.events if isinstance(event, Written)] == [prefix + "a"]

    run(story())


async def until_put(etcd: EtcdSession, key: str) -> None:
    """A write whose connection breaks under it is the caller's to repeat."""
    while True:
        try:
            await etcd.put(key, b"")
            return
        except EtcdUnavailable:
            await asyncio.sleep(0.01)


def test_a_member_that_answers_late_is_left_for_another_with_all_that_waits_on_it(
    server: EtcdServer, prefix: str, run: Run, cable: Any
) -> None:
    """It accepts connections and answers everything, a minute late."""
    attempts = Attempts()

    async def story() -> None:
        async with (
            cable(server.endpoint) as slow,
            connect(slow.endpoint, server.endpoint, observer=attempts) as etcd,
            aclosing(etcd.watch_prefix(prefix)) as watch,
        ):
            await etcd.put(prefix + "kept", b"")
            assert isinstance(await anext(watch), Snapshot)
            await etcd.put(prefix + "seen", b"")
            await anext(watch)
            slow.delay = 60.0
            assert await etcd.get(prefix + "kept"), "the read itself goes over"
            assert attempts.seen[-1] == (server.endpoint.removeprefix("http://"), "ok")
            await etcd.put(prefix + "new", b"")
            changes = await anext(watch)
            assert isinstance(changes, Changes), "so does the watch, and has lost nothing"
            assert etcd.history.breaks == 0

    run(story())


class Failing:
    """A member that answers every request about keys with an error."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details
        self._server = grpc.aio.server()
        self.endpoint = ""

    async def _fail(self, _: bytes, context: Any) -> None:
        await context.abort(self._code, self._details)

    async def __aenter__(self) -> Failing:
        calls = {name: grpc.unary_unary_rpc_method_handler(self._fail) for name in ("Range", "Txn", "Put")}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("etcdserverpb.KV", calls),))
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)


FAILURES = {
    "etcd notices before us that time is up": (grpc.StatusCode.UNKNOWN, "context deadline exceeded", False),
    "what it waited for has ended": (grpc.StatusCode.UNKNOWN, "context canceled", False),
    "the leader changed": (grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed", False),
    "nobody takes the proposal": (grpc.StatusCode.UNKNOWN, "raft proposal dropped", True),
    "there is no leader": (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader", True),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_member_that_fails_is_left_and_does_not_refuse(name: str, server: EtcdServer, prefix: str, run: Run) -> None:
    """A read goes to another member, and so does a write when it is certain that nothing was done."""
    code, details, nothing_done = FAILURES[name]

    async def story() -> None:
        async with Failing(code, details) as failing:
            async with connect(failing.endpoint, server.endpoint) as etcd:
                assert await etcd.get(prefix + "a") is None
            async with connect(failing.endpoint, server.endpoint) as etcd:
                if nothing_done:
                    assert (await etcd.txn([absent(prefix + "a")], [Put(prefix + "a", b"")], [])).succeeded
                else:
                    with pytest.raises(EtcdUnavailable, match=details):
                        await etcd.put(prefix + "a", b"")
                    assert await etcd.get(prefix + "a") is None, "it was not repeated"

    run(story())


def test_nobody_there_is_a_typed_error_that_names_the_endpoints(run: Run) -> None:
    async def story() -> None:
        async with connect(NOBODY, "127.0.0.1:2") as etcd:
            with pytest.raises(EtcdUnavailable, match=r"127\.0\.0\.1:1, 127\.0\.0\.1:2"):
                await etcd.get("/a")
            assert not etcd.connected
            assert "no connection" in etcd.last_error

    run(story())


def test_a_refusal_is_not_an_outage(server: EtcdServer, run: Run) -> None:
    async def story() -> None:
        async with connect(server.endpoint) as etcd:
            with pytest.raises(EtcdError) as refused:
                await etcd.revoke(12345)
            assert refused.value.code == "NOT_FOUND"

    run(story())


FOREVER: dict[str, Callable[[EtcdSession], Awaitable[object]]] = {
    "a watch": lambda etcd: anext(etcd.watch_prefix("/a/")),
    "a lease's renewal": lambda etcd: etcd.keep_alive(Lease(1, 10)),
}


@pytest.mark.parametrize("name", FOREVER)
def test_an_absent_etcd_is_asked_at_most_once_a_second(name: str, run: Run) -> None:
    attempts, clock, minutes = Attempts(), Hurried(), 5

    async def story() -> None:
        async with connect(NOBODY, clock=clock, observer=attempts) as etcd:
            task = asyncio.ensure_future(FOREVER[name](etcd))
            while clock.now() < 60 * minutes:
                assert not task.done(), task
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(story())
    assert 10 * minutes < len(attempts.seen) < 60 * minutes


def test_closing_ends_what_waits_and_cancelling_stays_cancelling(server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        etcd = connect(server.endpoint)
        watch, cancelled = etcd.watch_prefix(prefix), etcd.watch_prefix(prefix)
        await anext(watch)
        await anext(cancelled)
        waiting, cancelling = asyncio.ensure_future(anext(watch)), asyncio.ensure_future(anext(cancelled))
        await etcd.get(prefix)
        cancelling.cancel()
        await asyncio.wait([cancelling])
        assert cancelling.cancelled()
        await etcd.close()
        with pytest.raises(SessionClosed):
            await waiting
        with pytest.raises(SessionClosed):
            await etcd.get(prefix)

    run(story())


def test_a_watch_that_is_just_being_opened_ends_with_its_session(server: EtcdServer, prefix: str, run: Run) -> None:
    """At every step of the loop on its way: grpc.aio leaves a write waiting when the call ends before it has begun."""

    async def story() -> None:
        for steps in range(40):
            etcd = connect(server.endpoint)
            watch = etcd.watch_prefix(prefix)
            await anext(watch)
            opening = asyncio.ensure_future(anext(watch))
            for _ in range(steps):
                await asyncio.sleep(0)
            await etcd.close()
            with pytest.raises(SessionClosed):
                await opening

    run(story())


# --- leases -----------------------------------------------------------------------------------------------------


def test_a_lease_outlives_its_term_while_it_is_renewed_and_its_loss_is_told(
    own_server: EtcdServer, prefix: str, run: Run, until: Until
) -> None:
    async def story() -> None:
        async with connect(own_server.endpoint) as etcd:
            kept, left = await etcd.grant(4), await etcd.grant(4)  # two thirds of it are for a machine that stalls
            await etcd.put(prefix + "kept", b"", lease=kept.id)
            await etcd.put(prefix + "left", b"", lease=left.id)
            renewal = asyncio.create_task(etcd.keep_alive(kept))

            async def left_is_gone() -> bool:
                return await etcd.get(prefix + "left") is None

            await until(left_is_gone)
            assert await etcd.get(prefix + "kept")
            await etcd.revoke(kept.id)
            await renewal

    run(story())


# --- watches ----------------------------------------------------------------------------------------------------


def test_a_watch_tells_what_is_and_then_what_happens(server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        async with connect(server.endpoint) as etcd, aclosing(etcd.watch_prefix(prefix)) as watch:
            await etcd.put(prefix + "old", b"1")
            snapshot = await anext(watch)
            assert isinstance(snapshot, Snapshot)
            assert [(item.key, item.value) for item in snapshot.items] == [(prefix + "old", b"1")]
            await etcd.txn([], [Put(prefix + "new", b"2"), Delete(prefix + "old")])
            changes = await anext(watch)
            assert isinstance(changes, Changes)
            assert {type(event): event for event in changes.events}[Deleted] == Deleted(prefix + "old")
            assert changes.revision > snapshot.revision

    run(story())


def test_a_watch_survives_a_restart_of_etcd(own_server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        async with connect(own_server.endpoint) as etcd, aclosing(etcd.watch_prefix(prefix)) as watch:
            assert isinstance(await anext(watch), Snapshot)
            own_server.kill()
            waiting = asyncio.ensure_future(anext(watch))
            with pytest.raises(EtcdUnavailable):
                await etcd.put(prefix + "a", b"")
            own_server.start()
            await until_put(etcd, prefix + "a")
            assert isinstance(await waiting, Changes), "the same data: resumed, not begun anew"

    run(story())


def test_what_happened_while_cut_off_is_told_afterwards_in_order(
    server: EtcdServer, prefix: str, run: Run, cable: Any
) -> None:
    async def story() -> list[object]:
        async with (
            cable(server.endpoint) as line,
            connect(server.endpoint) as other,
            connect(line.endpoint) as etcd,
            aclosing(etcd.watch_prefix(prefix)) as watch,
        ):
            await anext(watch)
            await other.put(prefix + "before", b"")
            await anext(watch)  # what follows must not tell of it again
            await line.pull()
            for number in range(20):
                await other.put(f"{prefix}{number}", b"")
            await other.delete(prefix + "0")
            await line.plug()
            events: list[object] = []
            while len(events) < 21:
                batch = await anext(watch)
                assert isinstance(batch, Changes)
                events += [event.item.key if isinstance(event, Written) else event for event in batch.events]
            return events

    assert run(story()) == [*(f"{prefix}{number}" for number in range(20)), Deleted(prefix + "0")]


def test_compaction_while_cut_off_gives_a_new_snapshot(
    own_server: EtcdServer, prefix: str, run: Run, cable: Any
) -> None:
    async def story() -> None:
        async with (
            cable(own_server.endpoint) as line,
            connect(own_server.endpoint) as other,
            connect(line.endpoint) as etcd,
            aclosing(etcd.watch_prefix(prefix)) as watch,
        ):
            await other.put(prefix + "gone", b"")
            await anext(watch)
            await line.pull()
            await other.delete(prefix + "gone")
            await other.compact(await other.put(prefix + "new", b""))
            await line.plug()
            snapshot = await anext(watch)
            assert isinstance(snapshot, Snapshot)
            assert [item.key for item in snapshot.items] == [prefix + "new"]
            await other.put(prefix + "later", b"")
            assert isinstance(await anext(watch), Changes), "and goes on from there"

    run(story())


def test_a_wiped_etcd_gives_a_new_snapshot(own_server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        async with connect(own_server.endpoint) as etcd, aclosing(etcd.watch_prefix(prefix)) as watch:
            for _ in range(5):
                await etcd.put(prefix + "before", b"")
            before = await anext(watch)
            own_server.kill()
            own_server.wipe()
            own_server.start()
            after = await anext(watch)
            assert isinstance(after, Snapshot)
            assert after.items == ()
            assert after.revision < before.revision

    run(story())


# --- options ----------------------------------------------------------------------------------------------------

REFUSED = {
    "no endpoint": ("endpoints: []", "at least one"),
    "no port": ("endpoints: ['http://etcd']", "'http://etcd' is not an endpoint"),
    "a path": ("endpoints: ['http://etcd:2379/v3']", "is not an endpoint"),
    "another scheme": ("endpoints: ['unix://etcd:1']", "is not an endpoint"),
    "a port that is none": ("endpoints: ['etcd:http']", "is not an endpoint"),
    "certificates for plain http": ("{endpoints: ['http://etcd:2379'], ca: /ca.pem}", "use https"),
    "half a client certificate": ("{endpoints: ['etcd:2379'], cert: /c.pem}", "cert and key go together"),
    "a user without a password": ("{user: node-1}", "user goes together with password"),
    "a password without a user": ("{passwordFile: /etc/podwire/etcd-password}", "user goes together with password"),
    "two passwords": ("{user: a, password: b, passwordFile: /c}", "one of them is enough"),
    "an unknown key": ("{endpoint: 'etcd:2379'}", "endpoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    text, message = REFUSED[name]
    path = tmp_path / "etcd.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=r"etcd\.yaml") as refused:
        config.load(path, EtcdOptions)
    assert message in str(refused.value)


def test_a_missing_certificate_names_the_file(run: Run) -> None:
    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=("https://127.0.0.1:1",), ca="/nonexistent/ca.pem")) as etcd:
            with pytest.raises(config.ConfigError, match=r"/nonexistent/ca\.pem"):
                await etcd.get("/a")

    run(story())
