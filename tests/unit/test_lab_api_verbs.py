"""The lab's API over HTTP, on loopback: an object's life, what is refused, patches, deletions, lists, and watches.

What the server says is what the store has: a stale version is a conflict, a list comes in chunks, and a watch carries
on from a list without a gap, or says that it cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import aiohttp
import pytest
import yaml

from podwire.lab.api.kinds import NODES, PODS
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store
from tests.unit.lab_api_stage import LIMIT, PODS_PATH, WIDGETS_PATH, Api, pod, serve

# --- verbs ------------------------------------------------------------------------------------------------------


def test_an_object_s_life() -> None:
    async def story(api: Api) -> None:
        code, made = await api.call("POST", PODS_PATH, pod())
        assert (code, made["status"]["phase"]) == (201, "Pending")
        code, again = await api.call("POST", PODS_PATH, pod())
        assert (code, again["reason"], again["details"]["name"]) == (409, "AlreadyExists", "web")
        made["metadata"]["labels"] = {"a": "b"}
        code, changed = await api.call("PUT", f"{PODS_PATH}/web", made)
        assert (code, changed["metadata"]["labels"]) == (200, {"a": "b"})
        code, stale = await api.call(
            "PUT", f"{PODS_PATH}/web", {**made, "metadata": {**made["metadata"], "labels": {}}}
        )
        assert (code, stale["reason"]) == (409, "Conflict")
        code, done = await api.call("PUT", f"{PODS_PATH}/web/status", {**changed, "status": {"phase": "Running"}})
        assert (code, done["status"]) == (200, {"phase": "Running"})
        code, gone = await api.call("DELETE", f"{PODS_PATH}/web")
        assert (code, gone["status"], gone["details"]["uid"]) == (200, "Success", made["metadata"]["uid"])
        code, missing = await api.call("GET", f"{PODS_PATH}/web")
        assert (code, missing["reason"], missing["message"]) == (404, "NotFound", 'pods "web" not found')

    serve(story)


REFUSED: dict[str, tuple[str, str, Any, int, str]] = {
    "no such path": ("GET", "/nowhere", None, 404, "could not find"),
    "no such kind": ("GET", "/apis/example.org/v1/widgets", None, 404, "could not find"),
    "no such group": ("GET", "/apis/example.org/v1", None, 404, "could not find"),
    "no such subresource": ("GET", f"{PODS_PATH}/web/exec", None, 404, "pods have no 'exec' here"),
    "a collection is not replaced": ("PUT", PODS_PATH, {}, 405, "PUT is not supported here"),
    "not JSON": ("POST", PODS_PATH, b"{", 400, "not JSON"),
    "a list for an object": ("POST", PODS_PATH, [], 400, "an object is expected"),
    "another kind than the path's": ("POST", PODS_PATH, {"kind": "Node"}, 400, "kind is 'Node' in the object"),
    "another namespace than the path's": (
        "POST", PODS_PATH, {"metadata": {"namespace": "x"}}, 400, "metadata.namespace is 'x'",
    ),
    "a pod without containers": (
        "POST", PODS_PATH, {"metadata": {"name": "a"}, "spec": {}}, 422, "spec.containers: Required value",
    ),
    "a namespace that is missing": (
        "POST", "/api/v1/namespaces/shop/pods", pod(), 404, 'namespaces "shop" not found',
    ),
    "a selector that cannot be read": ("GET", f"{PODS_PATH}?labelSelector=a+in+b", None, 400, "labelSelector"),
    "a limit that is no number": ("GET", f"{PODS_PATH}?limit=x", None, 400, "limit is 'x'"),
    "a token of nobody's": ("GET", f"{PODS_PATH}?continue=x", None, 400, "continue"),
    "a dry run of something": ("POST", f"{PODS_PATH}?dryRun=Some", pod(), 400, "dryRun is 'Some'"),
    "an unknown kind that does not say its name": ("POST", WIDGETS_PATH, {"metadata": {"name": "a"}}, 400, "kind"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_a_status_with_a_message(case: str) -> None:
    method, path, body, code, message = REFUSED[case]

    async def story(api: Api) -> None:
        answered, status = await api.call(method, path, body)
        assert (answered, status["kind"], status["code"]) == (code, "Status", code)
        assert message in status["message"]

    serve(story)


PATCHES: dict[str, tuple[str, Any, dict[str, str]]] = {
    "merge": ("merge-patch+json", {"metadata": {"labels": {"a": None, "b": "2"}}}, {"b": "2"}),
    "strategic": ("strategic-merge-patch+json", {"metadata": {"labels": {"$patch": "replace", "c": "3"}}}, {"c": "3"}),
    "JSON": ("json-patch+json", [{"op": "replace", "path": "/metadata/labels/a", "value": "2"}], {"a": "2"}),
    "apply": ("apply-patch+yaml", {"metadata": {"labels": {"b": "2"}}}, {"a": "1", "b": "2"}),
}


@pytest.mark.parametrize("case", PATCHES)
def test_every_kind_of_patch(case: str) -> None:
    kind, body, labels = PATCHES[case]

    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod(a="1"))
        code, done = await api.patch(f"{PODS_PATH}/web", kind, body, "?fieldManager=me")
        assert (code, done["metadata"]["labels"]) == (200, labels)

    serve(story)


def test_a_patch_of_another_kind_is_told_which_there_are() -> None:
    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod())
        await api.call("POST", WIDGETS_PATH, {"kind": "Widget", "metadata": {"name": "a"}})
        code, status = await api.patch(f"{PODS_PATH}/web", "fancy-patch", {})
        assert (code, "strategic-merge-patch+json" in status["message"]) == (415, True)
        code, status = await api.patch(f"{WIDGETS_PATH}/a", "strategic-merge-patch+json", {})
        assert (code, "one of application/json-patch+json, application/merge-patch+json" in status["message"]) == (
            415,
            True,
        )

    serve(story)


def test_a_patch_of_an_old_version_is_a_conflict() -> None:
    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod())
        change = {"metadata": {"resourceVersion": "1", "labels": {"a": "b"}}}
        code, status = await api.patch(f"{PODS_PATH}/web", "merge-patch+json", change)
        assert (code, status["reason"]) == (409, "Conflict")

    serve(story)


def test_applied_yaml_creates_and_merges() -> None:
    async def story(api: Api) -> None:
        path, body = f"{PODS_PATH}/web?fieldManager=me", yaml.safe_dump(pod(a="1")).encode()
        headers = {"Content-Type": "application/apply-patch+yaml"}
        assert (await api.call("PATCH", path, body, headers=headers))[0] == 201
        assert (await api.call("PATCH", path, body, headers=headers))[0] == 200
        code, status = await api.call("PATCH", f"{PODS_PATH}/web", body, headers=headers)
        assert (code, status["message"]) == (400, "fieldManager is required for apply patch")

    serve(story)


def test_a_pod_on_a_node_is_deleted_in_two_steps() -> None:
    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod())
        assert (await api.call("POST", f"{PODS_PATH}/web/binding", {"target": {"name": "node1"}}))[0] == 201
        code, status = await api.call("POST", f"{PODS_PATH}/web/binding", {"target": {"name": "node2"}})
        assert (code, status["reason"]) == (409, "Conflict")
        code, marked = await api.call("POST", f"{PODS_PATH}/web/eviction", {"deleteOptions": {"gracePeriodSeconds": 9}})
        assert (code, marked["status"]) == (201, "Success")
        _, marked = await api.call("DELETE", f"{PODS_PATH}/web", {"gracePeriodSeconds": 5})
        assert marked["metadata"]["deletionGracePeriodSeconds"] == 5
        _, gone = await api.call("DELETE", f"{PODS_PATH}/web?gracePeriodSeconds=0")
        assert gone["status"] == "Success"

    serve(story)


def test_a_selected_part_of_a_collection_is_listed_and_deleted() -> None:
    async def story(api: Api) -> None:
        for name, app in (("a", "web"), ("b", "web"), ("c", "db")):
            await api.call("POST", PODS_PATH, pod(name, app=app))
        _, found = await api.call("GET", "/api/v1/pods?labelSelector=app%3Dweb&fieldSelector=metadata.name%21%3Da")
        assert [one["metadata"]["name"] for one in found["items"]] == ["b"]
        await api.call("DELETE", f"{PODS_PATH}?labelSelector=app%3Dweb")
        assert [one["metadata"]["name"] for one in api.store.list(PODS)] == ["c"]

    serve(story)


def test_a_list_comes_in_chunks() -> None:
    async def story(api: Api) -> None:
        for name in "abcde":
            await api.call("POST", PODS_PATH, pod(name))
        names, token, left = [], "", []
        while True:
            _, page = await api.call("GET", f"{PODS_PATH}?limit=2&continue={token}")
            names += [one["metadata"]["name"] for one in page["items"]]
            left.append(page["metadata"].get("remainingItemCount"))
            token = page["metadata"].get("continue", "")
            if not token:
                break
        assert (names, left) == (list("abcde"), [3, 1, None])

    serve(story)


# --- watches ----------------------------------------------------------------------------------------------------


async def lines(response: aiohttp.ClientResponse, number: int) -> list[dict[str, Any]]:
    return [json.loads(await response.content.readline()) for _ in range(number)]


def said(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["type"], event["object"]["metadata"].get("name", "")) for event in events]


def test_a_watch_over_http_carries_on_from_a_list() -> None:
    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod("a"))
        _, listed = await api.call("GET", PODS_PATH)
        await api.call("POST", PODS_PATH, pod("b"))
        version = listed["metadata"]["resourceVersion"]
        async with api.watch(PODS_PATH, f"resourceVersion={version}") as response:
            await api.call("DELETE", f"{PODS_PATH}/a")
            first = await lines(response, 2)
        assert said(first) == [("ADDED", "b"), ("DELETED", "a")]
        version = first[0]["object"]["metadata"]["resourceVersion"]
        async with api.watch(PODS_PATH, f"resourceVersion={version}") as response:
            assert said(await lines(response, 1)) == [("DELETED", "a")]

    serve(story)


def test_a_watch_without_a_version_begins_with_what_is_there() -> None:
    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod("a"))
        for query in ("", "resourceVersion=0"):
            async with api.watch(PODS_PATH, query) as response:
                assert said(await lines(response, 1)) == [("ADDED", "a")]

    serve(story)


def test_a_streamed_list_ends_with_a_marked_bookmark() -> None:
    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod("a"))
        query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
        async with api.watch(PODS_PATH, query) as response:
            added, mark = await lines(response, 2)
        assert said([added, mark]) == [("ADDED", "a"), ("BOOKMARK", "")]
        assert mark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}

    serve(story)


def test_a_version_that_is_forgotten_is_410_and_one_that_gets_lost_on_the_way_an_error_event() -> None:
    async def story(api: Api) -> None:
        for name in "abcdef":
            await api.call("POST", PODS_PATH, pod(name))
        async with api.watch(PODS_PATH, "resourceVersion=1") as response:
            assert (response.status, (await response.json())["reason"]) == (410, "Expired")
        async with api.watch(PODS_PATH, f"resourceVersion={api.store.version}") as response:
            for name in "ghijkl":
                api.store.create(PODS, pod(name))  # at once: the watch has no chance to read in between
            (event,) = await lines(response, 1)
            assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
            assert await response.content.readline() == b""

    serve(story, history=4)


def test_bookmarks_come_to_those_who_ask() -> None:
    async def story(api: Api) -> None:
        query = f"resourceVersion={api.store.version}&allowWatchBookmarks=true"
        async with api.watch(PODS_PATH, query) as response:
            node = api.store.create(NODES, {"metadata": {"name": "n"}})
            while True:
                (event,) = await lines(response, 1)
                assert event["type"] == "BOOKMARK"
                if event["object"]["metadata"]["resourceVersion"] == node["metadata"]["resourceVersion"]:
                    break

    serve(story, bookmark_seconds=0.02)


def test_a_watch_ends_when_its_time_is_up_or_the_server_stops() -> None:
    async def story(api: Api) -> None:
        async with api.watch(PODS_PATH, "timeoutSeconds=1") as response:
            assert await response.content.readline() == b""
        assert not api.store.log.listeners

    serve(story)

    async def stopped() -> None:
        store = Store()
        server = ApiServer(store)
        async with server.serving() as url, aiohttp.ClientSession() as session:
            async with session.get(f"{url}{PODS_PATH}?watch=1") as response:
                await server.app.shutdown()  # what a stop begins with, before it waits for requests under way
                with contextlib.suppress(aiohttp.ClientError):
                    assert await response.content.readline() == b""
            assert not store.log.listeners

    asyncio.run(asyncio.wait_for(stopped(), LIMIT))
