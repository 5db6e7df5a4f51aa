"""The lab's store: versions, conflicts, deletion, watches that resume; the law: a replayed watch is the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from itertools import count
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.lab.api import kinds, selectors
from podwire.lab.api.errors import AlreadyExists, ApiError, BadRequest, Conflict, Forbidden, Gone, Invalid, NotFound
from podwire.lab.api.kinds import NAMESPACES, NODES, PODS, Kind
from podwire.lab.api.log import EventType
from podwire.lab.api.store import PERMANENT_NAMESPACES, Store
from podwire.lab.api.watch import Event

T = TypeVar("T")
CONFIG_MAPS = next(kind for kind in kinds.BUILTIN if kind.kind == "ConfigMap")
LIMIT = 90.0  # seconds after which a test that waits has failed


def run(story: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(story, LIMIT))


def make_store(history: int = 4096) -> Store:
    numbers = count(1)
    return Store(clock=lambda: 1_000_000.0, new_uid=lambda: f"uid-{next(numbers)}", history=history)


def pod(name: str = "web", namespace: str = "default", **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "spec": {"containers": [{"name": "c", "image": "x"}]},
    }


def config(name: str, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default", **metadata}, "data": {}}


def names(objects: list[dict[str, Any]]) -> list[str]:
    return [obj["metadata"]["name"] for obj in objects]


async def take(events: AsyncIterator[Event], number: int) -> list[Event]:
    return [await anext(events) for _ in range(number)]


def said(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.type.value, event.object["metadata"]["name"]) for event in events]


# --- writing ----------------------------------------------------------------------------------------------------


def test_a_created_object_carries_what_the_server_says_about_it() -> None:
    store = make_store()
    made = store.create(PODS, {"metadata": {"name": "web", "uid": "mine"}, "spec": {"containers": [{"name": "c"}]}})
    metadata = made["metadata"]
    assert (metadata["namespace"], metadata["creationTimestamp"]) == ("default", "1970-01-12T13:46:40Z")
    assert metadata["uid"].startswith("uid-")
    assert int(metadata["resourceVersion"]) == store.version
    assert (made["apiVersion"], made["kind"]) == ("v1", "Pod")


def test_a_caller_s_copy_is_its_own() -> None:
    store = make_store()
    made = store.create(PODS, pod())
    made["spec"]["containers"].clear()
    store.list(PODS)[0]["spec"].clear()
    assert store.get(PODS, "web", "default")["spec"]["containers"]


def test_generated_names_differ() -> None:
    store = make_store()
    made = [store.create(PODS, {**pod(), "metadata": {"generateName": "web-"}}) for _ in range(20)]
    assert len({one["metadata"]["name"] for one in made}) == 20


Attempt = Callable[[Store], object]
REFUSED: dict[str, tuple[Attempt, type[ApiError], str]] = {
    "a name that is taken": (
        lambda s: s.create(PODS, pod()), AlreadyExists, 'pods "web" already exists',
    ),
    "a namespace that is missing": (
        lambda s: s.create(PODS, pod(namespace="shop")), NotFound, 'namespaces "shop" not found',
    ),
    "reading what is not there": (lambda s: s.get(PODS, "db", "default"), NotFound, 'pods "db" not found'),
    "updating what is not there": (lambda s: s.update(PODS, pod("db")), NotFound, 'pods "db" not found'),
    "updating without a name": (lambda s: s.update(PODS, {"metadata": {}}), BadRequest, "metadata.name"),
    "deleting what is not there": (lambda s: s.delete(PODS, "db", "default"), NotFound, 'pods "db" not found'),
    "updating an old version": (
        lambda s: s.update(PODS, pod(resourceVersion="1")), Conflict, "the object has been modified",
    ),
    "updating another's uid": (lambda s: s.update(PODS, pod(uid="x")), Conflict, "the UID in the precondition (x)"),
    "deleting another's uid": (
        lambda s: s.delete(PODS, "web", "default", uid="x"), Conflict, "the UID in the precondition (x)",
    ),
    "creating with a version": (lambda s: s.create(PODS, pod("b", resourceVersion="1")), BadRequest, "resourceVersion"),
    "deleting the default namespace": (lambda s: s.delete(NAMESPACES, "default"), Forbidden, "may not be deleted"),
    "changing a pod's containers": (
        lambda s: s.update(PODS, {**pod(), "spec": {"containers": [{"name": "other"}]}}), Invalid, "spec.containers",
    ),
    "renaming": (
        lambda s: s.modify(PODS, "web", "default", lambda _: pod("other")), BadRequest, "cannot be changed",
    ),
    "binding a pod twice": (
        lambda s: (s.bind("web", "default", "node1"), s.bind("web", "default", "node2")), Conflict, '"node1"',
    ),
    "applying a status to nothing": (
        lambda s: s.apply(PODS, pod("db"), "me", subresource="status"), NotFound, 'pods "db" not found',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    attempt, error, message = REFUSED[case]
    store = make_store()
    store.create(PODS, pod())
    with pytest.raises(error) as caught:
        attempt(store)
    assert message in str(caught.value)


def test_of_two_writers_of_one_version_the_second_is_told() -> None:
    store = make_store()
    store.create(CONFIG_MAPS, config("c"))
    one, other = store.get(CONFIG_MAPS, "c", "default"), store.get(CONFIG_MAPS, "c", "default")
    store.update(CONFIG_MAPS, {**one, "data": {"by": "one"}})
    with pytest.raises(Conflict):
        store.update(CONFIG_MAPS, {**other, "data": {"by": "other"}})
    assert store.get(CONFIG_MAPS, "c", "default")["data"] == {"by": "one"}


def test_a_write_that_changes_nothing_takes_no_version() -> None:
    store = make_store()
    made = store.create(CONFIG_MAPS, config("c"))
    before = store.version
    store.update(CONFIG_MAPS, made)
    store.modify(CONFIG_MAPS, "c", "default", lambda obj: obj)
    assert store.version == before


def test_generation_counts_changes_of_what_is_wanted_only() -> None:
    store = make_store()
    store.create(CONFIG_MAPS, config("c"))

    def generation(change: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
        return int(store.modify(CONFIG_MAPS, "c", "default", change)["metadata"]["generation"])

    assert generation(lambda obj: {**obj, "metadata": {**obj["metadata"], "labels": {"a": "b"}}}) == 1
    assert generation(lambda obj: {**obj, "data": {"a": "b"}}) == 2


def test_status_and_the_rest_are_written_apart() -> None:
    store = make_store()
    store.create(PODS, {**pod(), "status": {"phase": "Running"}})
    assert store.get(PODS, "web", "default")["status"] == {"phase": "Pending"}
    store.set_status(PODS, "web", "default", {"phase": "Running"})
    store.modify(PODS, "web", "default", lambda obj: {**obj, "status": {"phase": "Failed"}})
    assert store.get(PODS, "web", "default")["status"] == {"phase": "Running"}


def test_a_dry_run_keeps_nothing() -> None:
    store = make_store()
    before = store.version
    assert store.create(PODS, pod(), dry_run=True)["metadata"]["uid"]
    made = store.create(CONFIG_MAPS, config("c"))
    store.update(CONFIG_MAPS, {**made, "data": {"a": "b"}}, dry_run=True)
    store.delete(CONFIG_MAPS, "c", "default", dry_run=True)
    store.apply(CONFIG_MAPS, config("d"), "me", dry_run=True)
    assert store.version == before + 1
    assert names(store.list(CONFIG_MAPS)) == ["c"]


def test_applying_creates_then_merges_then_removes_what_is_no_longer_said() -> None:
    store = make_store()

    def apply(labels: dict[str, str]) -> tuple[dict[str, Any], bool]:
        made, new = store.apply(CONFIG_MAPS, config("c", labels=labels), "me")
        return made["metadata"]["labels"], new

    assert apply({"a": "1", "b": "1"}) == ({"a": "1", "b": "1"}, True)
    store.apply(CONFIG_MAPS, config("c", labels={"other": "1"}), "another")
    assert apply({"a": "2"}) == ({"a": "2", "other": "1"}, False)


def test_applying_a_pod_with_one_port_over_two_protocols_again_changes_nothing() -> None:
    store, obj = make_store(), pod()
    obj["spec"]["containers"][0]["ports"] = [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}]
    store.apply(PODS, obj, "me")
    before = store.version
    store.apply(PODS, obj, "me")
    assert store.version == before


# --- deletion ---------------------------------------------------------------------------------------------------


def test_a_pod_on_a_node_stays_until_its_kubelet_lets_it_go() -> None:
    store = make_store()
    store.create(PODS, pod())
    store.bind("web", "default", "node1")
    marked = store.delete(PODS, "web", "default")
    assert marked["metadata"]["deletionTimestamp"] == "1970-01-12T13:47:10Z"
    assert store.delete(PODS, "web", "default")["metadata"]["resourceVersion"] == marked["metadata"]["resourceVersion"]
    store.set_status(PODS, "web", "default", {"phase": "Failed"})
    assert names(store.list(PODS)) == ["web"]
    assert "deletionTimestamp" not in store.delete(PODS, "web", "default", grace_seconds=0)["metadata"]
    assert store.list(PODS) == []


def test_a_pod_on_no_node_goes_at_once() -> None:
    store = make_store()
    store.create(PODS, pod())
    store.delete(PODS, "web", "default")
    assert store.list(PODS) == []


def test_an_object_with_finalizers_goes_with_the_last_of_them() -> None:
    store = make_store()
    store.create(CONFIG_MAPS, config("c", finalizers=["a", "b"]))
    store.delete(CONFIG_MAPS, "c", "default")

    def without_first(obj: dict[str, Any]) -> dict[str, Any]:
        return {**obj, "metadata": {**obj["metadata"], "finalizers": obj["metadata"]["finalizers"][1:]}}

    store.modify(CONFIG_MAPS, "c", "default", without_first)
    assert names(store.list(CONFIG_MAPS)) == ["c"]
    store.modify(CONFIG_MAPS, "c", "default", without_first)
    assert store.list(CONFIG_MAPS) == []


def test_a_namespace_goes_when_the_last_pod_in_it_has_gone_and_takes_nothing_new_before() -> None:
    store = make_store()
    store.create(NAMESPACES, {"metadata": {"name": "shop"}})
    store.create(PODS, pod("scheduled", "shop"))
    store.create(PODS, pod("waiting", "shop"))
    store.create(PODS, pod("elsewhere"))
    store.bind("scheduled", "shop", "node1")
    assert store.delete(NAMESPACES, "shop")["status"]["phase"] == "Terminating"
    assert names(store.list(PODS)) == ["elsewhere", "scheduled"]
    with pytest.raises(Forbidden):
        store.create(PODS, pod("late", "shop"))
    store.delete(PODS, "scheduled", "shop", grace_seconds=0)
    assert store.find(NAMESPACES, "shop") is None


def test_an_empty_namespace_goes_at_once() -> None:
    store = make_store()
    store.create(NAMESPACES, {"metadata": {"name": "shop"}})
    assert "deletionTimestamp" not in store.delete(NAMESPACES, "shop")["metadata"]
    assert names(store.list(NAMESPACES)) == sorted(PERMANENT_NAMESPACES)


# --- lists and watches ------------------------------------------------------------------------------------------


def test_pages_together_are_the_list() -> None:
    store, found, after, version = make_store(), [], None, None
    for number in range(7):
        store.create(CONFIG_MAPS, config(f"c{number}"))
    for _ in range(3):
        page = store.page(CONFIG_MAPS, limit=3, after=after, version=version)
        found += names(page.items)
        after, version = page.next_name, page.version
    assert (found, after) == ([f"c{number}" for number in range(7)], None)


def test_a_page_whose_first_is_forgotten_is_too_old() -> None:
    store = make_store(history=3)
    for number in range(7):
        store.create(CONFIG_MAPS, config(f"c{number}"))
    with pytest.raises(Gone):
        store.page(CONFIG_MAPS, version=1)


def test_a_watch_without_version_tells_what_is_there_and_then_what_comes() -> None:
    async def story() -> None:
        store = make_store()
        store.create(PODS, pod("a"))
        async with aclosing(store.watch(PODS)) as events:
            assert said(await take(events, 1)) == [("ADDED", "a")]
            waiting = asyncio.ensure_future(take(events, 3))
            await asyncio.sleep(0)
            store.create(NODES, {"metadata": {"name": "no-business-of-this-watch"}})
            store.create(PODS, pod("b"))
            store.set_status(PODS, "a", "default", {"phase": "Running"})
            store.delete(PODS, "b", "default")
            assert said(await waiting) == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]

    run(story())


def test_a_watch_resumes_where_it_was_and_not_before() -> None:
    async def story() -> None:
        store = make_store()
        for name in "abc":
            store.create(PODS, pod(name))
        async with aclosing(store.watch(PODS, after=0)) as events:
            first = await take(events, 2)
        async with aclosing(store.watch(PODS, after=first[-1].version)) as events:
            assert said(await take(events, 1)) == [("ADDED", "c")]

    run(story())


def test_objects_that_come_into_view_are_added_and_those_that_leave_it_are_deleted() -> None:
    async def story() -> None:
        store = make_store()
        ready = selectors.parse(PODS, "", "status.phase=Running")
        store.create(PODS, pod("a"))
        async with aclosing(store.watch(PODS, selector=ready, after=store.version)) as events:
            for phase in ("Running", "Running", "Failed", "Pending"):
                store.set_status(PODS, "a", "default", {"phase": phase})
            store.set_status(PODS, "a", "default", {"phase": "Running", "podIP": "10.0.0.1"})
            store.delete(PODS, "a", "default")
            found = await take(events, 4)
        assert said(found) == [("ADDED", "a"), ("DELETED", "a"), ("ADDED", "a"), ("DELETED", "a")]
        assert found[1].object["status"]["phase"] == "Running"
        assert found[1].version < found[2].version

    run(story())


def test_a_watch_of_one_namespace_sees_no_other() -> None:
    async def story() -> None:
        store = make_store()
        store.create(NAMESPACES, {"metadata": {"name": "shop"}})
        async with aclosing(store.watch(PODS, namespace="shop", after=store.version)) as events:
            store.create(PODS, pod("a"))
            store.create(PODS, pod("b", "shop"))
            assert said(await take(events, 1)) == [("ADDED", "b")]

    run(story())


@pytest.mark.parametrize("after", [0, 5, 10**9], ids=["forgotten", "just forgotten", "never given out"])
def test_a_watch_from_a_version_that_is_not_kept_is_gone(after: int) -> None:
    async def story() -> None:
        store = make_store(history=3)
        while store.version < 9:
            store.create(CONFIG_MAPS, config(f"c{store.version}"))
        with pytest.raises(Gone):
            await anext(store.watch(CONFIG_MAPS, after=after))
        async with aclosing(store.watch(CONFIG_MAPS, after=6)) as events:
            assert [event.version for event in await take(events, 3)] == [7, 8, 9]

    run(story())


def test_a_watcher_that_stands_still_too_long_is_told_so() -> None:
    async def story() -> None:
        store = make_store(history=3)
        async with aclosing(store.watch(CONFIG_MAPS, after=store.version)) as events:
            store.create(CONFIG_MAPS, config("first"))
            assert said(await take(events, 1)) == [("ADDED", "first")]
            for number in range(5):
                store.create(CONFIG_MAPS, config(f"c{number}"))
            with pytest.raises(Gone):
                await take(events, 5)

    run(story())


def test_bookmarks_carry_the_version_even_when_only_others_change() -> None:
    async def story() -> None:
        store = make_store()
        async with aclosing(store.watch(PODS, after=store.version, bookmark_seconds=0.01)) as events:
            node = store.create(NODES, {"metadata": {"name": "n"}})
            while (event := await anext(events)).version < int(node["metadata"]["resourceVersion"]):
                assert event.type is EventType.BOOKMARK
        assert event.type is EventType.BOOKMARK
        assert event.object["kind"] == "Pod"

    run(story())


def test_a_watch_that_ends_leaves_no_listener() -> None:
    async def story() -> None:
        store = make_store()
        async with aclosing(store.watch(PODS, after=0)) as events:
            store.create(PODS, pod())
            await take(events, 1)
            assert store.log.listeners
        assert not store.log.listeners

    run(story())


# --- the law ----------------------------------------------------------------------------------------------------

KIND_NAMES: list[tuple[Kind, str]] = [(kind, name) for kind in (PODS, CONFIG_MAPS) for name in "abc"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["create", "label", "status", "bind", "delete", "let go", "apply"]),
        st.sampled_from(KIND_NAMES),
        st.sampled_from("xyz"),
    ),
    max_size=25,
)


def step(store: Store, what: str, kind: Kind, name: str, value: str) -> None:
    obj = pod(name) if kind is PODS else config(name)
    match what:
        case "create":
            store.create(kind, {**obj, "metadata": {**obj["metadata"], "labels": {"v": value}}})
        case "label":
            store.modify(
                kind, name, "default", lambda old: {**old, "metadata": {**old["metadata"], "labels": {"v": value}}}
            )
        case "status":
            store.set_status(PODS, name, "default", {"phase": value})
        case "bind":
            store.bind(name, "default", value)
        case "delete":
            store.delete(kind, name, "default")
        case "let go":
            store.delete(kind, name, "default", grace_seconds=0)
        case "apply":
            store.apply(kind, {**obj, "metadata": {**obj["metadata"], "labels": {"v": value}}}, value)


@settings(max_examples=60, deadline=None)
@given(before=STEPS, after=STEPS, wanted=st.sampled_from(["", "v=x", "v!=x", "v in (x,y)", "!v"]))
def test_a_list_and_the_watch_after_it_are_the_store(before: Any, after: Any, wanted: str) -> None:
    async def story() -> None:
        store = make_store()
        selector = selectors.parse(PODS, wanted)

        def play(steps: Any) -> None:
            for what, (kind, name), value in steps:
                try:
                    step(store, what, kind, name, value)
                except ApiError:
                    continue

        play(before)
        page = store.page(PODS, selector=selector)
        seen = {obj["metadata"]["name"]: obj for obj in page.items}
        play(after)
        last, version = store.version, page.version
        events = store.watch(PODS, selector=selector, after=page.version, bookmark_seconds=0.0)
        async with aclosing(events):
            async for event in events:
                assert event.version >= version
                version, name = event.version, event.object["metadata"].get("name", "")
                if event.type is EventType.BOOKMARK:
                    if version == last:
                        break
                elif event.type is EventType.DELETED:
                    del seen[name]
                else:
                    assert (event.type is EventType.ADDED) == (name not in seen)
                    seen[name] = event.object
        assert sorted(seen.items()) == [(obj["metadata"]["name"], obj) for obj in store.list(PODS, selector=selector)]

    run(story())
