"""The lab's API over HTTP, on loopback: verbs, watches, warnings, tables, the client, and a kubectl if there is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import yaml

from podwire import manifests
from podwire.lab.api import client as api_client
from podwire.lab.api.client import Client
from podwire.lab.api.errors import AlreadyExists, ApiError, Conflict, Gone, Invalid, NotFound, Unreachable
from podwire.lab.api.kinds import CRDS, DEPLOYMENTS, NAMESPACES, NODES, PODS, REPLICA_SETS, SERVICES
from podwire.lab.api.kubeconfig import kubeconfig
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store

T = TypeVar("T")
PODS_PATH = "/api/v1/namespaces/default/pods"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
WIDGETS_PATH = "/apis/example.org/v1/namespaces/default/widgets"
LIMIT = 90.0  # seconds after which a test that waits has failed


def pod(name: str = "web", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "spec": {"containers": [{"name": "c", "image": "x"}]}}


class Api:
    """A server with its store, and a session to talk to it."""

    def __init__(self, store: Store, url: str, session: aiohttp.ClientSession) -> None:
        self.store, self.url, self._session = store, url, session

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        options.setdefault("headers", {"Content-Type": "application/json"})
        async with self._session.request(method, self.url + path, data=data, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text

    async def patch(self, path: str, kind: str, body: Any, query: str = "") -> tuple[int, Any]:
        return await self.call("PATCH", f"{path}{query}", body, headers={"Content-Type": f"application/{kind}"})

    def watch(self, path: str, query: str = "") -> Any:
        return self._session.get(f"{self.url}{path}?watch=1&{query}")


async def lines(response: aiohttp.ClientResponse, number: int) -> list[dict[str, Any]]:
    return [json.loads(await response.content.readline()) for _ in range(number)]


def said(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["type"], event["object"]["metadata"].get("name", "")) for event in events]


def serve(story: Callable[[Api], Awaitable[T]], *, history: int = 4096, bookmark_seconds: float = 60.0) -> T:
    async def whole() -> T:
        store = Store(history=history)
        server = ApiServer(store, bookmark_seconds=bookmark_seconds)
        async with server.serving() as url, aiohttp.ClientSession() as session:
            return await asyncio.wait_for(story(Api(store, url, session)), LIMIT)

    return asyncio.run(whole())


def with_client(work: Callable[[Client], T], store: Store | None = None) -> T:
    """Runs synchronous work against a server in this process, in a thread of its own."""

    async def whole() -> T:
        async with ApiServer(store or Store()).serving() as url:
            return await asyncio.wait_for(asyncio.to_thread(work, Client(url)), LIMIT)

    return asyncio.run(whole())


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


# --- kinds that are not served, discovery, tables ---------------------------------------------------------------


def test_an_unknown_kind_is_stored_listed_discovered_and_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    async def story(api: Api) -> None:
        warnings = []
        async with aiohttp.ClientSession() as session:
            for name in ("one", "two"):
                widget = {
                    "apiVersion": "example.org/v1",
                    "kind": "Widget",
                    "metadata": {"name": name},
                    "spec": {"x": 1},
                }
                async with session.post(api.url + WIDGETS_PATH, json=widget) as response:
                    assert response.status == 201
                    warnings += response.headers.getall("Warning", [])
        assert warnings == ['299 - "Widget (example.org/v1) is stored and listed, but nothing in this lab acts on it"']
        _, listed = await api.call("GET", WIDGETS_PATH)
        assert (listed["kind"], [one["metadata"]["name"] for one in listed["items"]]) == ("WidgetList", ["one", "two"])
        _, resources = await api.call("GET", "/apis/example.org/v1")
        assert resources["resources"][0]["name"] == "widgets"
        _, groups = await api.call("GET", "/apis")
        assert "example.org" in [group["name"] for group in groups["groups"]]

    with caplog.at_level(logging.WARNING, logger="podwire.lab.api.server"):
        serve(story)
    assert len([record for record in caplog.records if "Widget" in record.getMessage()]) == 1


def test_a_refused_object_does_not_make_its_kind_known() -> None:
    async def story(api: Api) -> None:
        wrong = {"kind": "Wigdet", "metadata": {"name": "a/b"}}
        assert (await api.call("POST", WIDGETS_PATH, wrong))[0] == 422
        assert (await api.call("GET", WIDGETS_PATH))[0] == 404
        assert (await api.call("POST", WIDGETS_PATH, {"kind": "Widget", "metadata": {"name": "a"}}))[0] == 201

    serve(story)


def test_a_pod_is_not_warned_about() -> None:
    assert with_client(lambda client: client.apply({"apiVersion": "v1", "kind": "Pod", **pod()}).warnings) == ()


def test_a_definition_makes_its_kind_known() -> None:
    async def story(api: Api) -> None:
        definition = {
            "metadata": {"name": "gears.example.org"},
            "spec": {
                "group": "example.org",
                "names": {"kind": "Gear", "plural": "gears"},
                "scope": "Cluster",
                "versions": [{"name": "v1", "subresources": {"status": {}}}, {"name": "v0", "served": False}],
            },
        }
        api_path = api_client.path(CRDS)
        assert (await api.call("POST", api_path, definition))[0] == 201
        assert (await api.call("GET", "/apis/example.org/v1/gears"))[1]["items"] == []
        assert (await api.call("GET", "/apis/example.org/v0/gears"))[0] == 404
        assert (await api.call("POST", "/apis/example.org/v1/gears", {"metadata": {"name": "g"}}))[0] == 201
        _, done = await api.call("PUT", "/apis/example.org/v1/gears/g/status", {"status": {"turns": 1}})
        assert done["status"] == {"turns": 1}

    serve(story)


def test_discovery_and_openapi_agree_on_what_there_is() -> None:
    async def story(api: Api) -> None:
        _, index = await api.call("GET", "/openapi/v3")
        assert "api/v1" in index["paths"]
        for name, entry in index["paths"].items():
            _, document = await api.call("GET", entry["serverRelativeURL"])
            _, resources = await api.call("GET", f"/{name}")
            kinds = {op["patch"]["x-kubernetes-group-version-kind"]["kind"] for op in document["paths"].values()}
            assert kinds >= {one["kind"] for one in resources["resources"] if "/" not in one["name"]}
            for operation in document["paths"].values():
                assert "fieldValidation" in [one["name"] for one in operation["patch"]["parameters"]]
        for path in ("/healthz", "/readyz", "/livez"):
            assert await api.call("GET", path) == (200, "ok")
        assert (await api.call("GET", "/version"))[1]["major"] == "1"

    serve(story)


def test_a_table_of_pods_for_who_asks() -> None:
    async def story(api: Api) -> None:
        await api.call("POST", PODS_PATH, pod())
        api.store.bind("web", "default", "node1")
        status = {"phase": "Running", "podIPs": [{"ip": "10.244.1.2"}], "containerStatuses": [{"ready": True}]}
        api.store.set_status(PODS, "web", "default", status)
        _, table = await api.call("GET", PODS_PATH, headers={"Accept": TABLE})
        cells = dict(zip((one["name"] for one in table["columnDefinitions"]), table["rows"][0]["cells"], strict=True))
        wanted = {"Name": "web", "Ready": "1/1", "Status": "Running", "IP": "10.244.1.2", "Node": "node1"}
        assert {name: cells[name] for name in wanted} == wanted
        assert table["rows"][0]["object"]["metadata"]["namespace"] == "default"

    serve(story)


def test_every_kind_has_a_table_even_for_bare_objects() -> None:
    async def story(api: Api) -> None:
        for kind in list(api.store.kinds):
            obj: dict[str, Any] = {"metadata": {"name": "bare"}}
            if kind is PODS:
                obj["spec"] = {"containers": [{"name": "c"}]}
            elif kind is SERVICES:
                obj["spec"] = {"ports": [{"port": 80}]}
            elif kind in (DEPLOYMENTS, REPLICA_SETS):
                template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}}
                obj["spec"] = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
            api.store.create(kind, obj)
            code, table = await api.call("GET", api_client.path(kind), headers={"Accept": TABLE})
            assert (code, "bare" in [row["cells"][0] for row in table["rows"]]) == (200, True)

    serve(story)


# --- the client -------------------------------------------------------------------------------------------------

MANIFEST = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {a: "1"}}
spec: {containers: [{name: c, image: x}]}
---
apiVersion: example.org/v1
kind: Widget
metadata: {name: w}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
"""


def test_a_manifest_is_applied_twice_changed_and_deleted() -> None:
    objects = manifests.apply_order(manifests.parse(MANIFEST, "shop.yaml"))

    def work(client: Client) -> None:
        assert [str(client.apply(obj)) for obj in objects] == [
            "namespace/shop created",
            "pod/web created",
            "widget.example.org/w created",
        ]
        assert [client.apply(obj).action for obj in objects] == ["unchanged"] * 3
        objects[1]["metadata"]["labels"] = {"b": "2"}
        assert client.apply(objects[1]).action == "configured"
        assert client.get(PODS, "web", "shop")["metadata"]["labels"] == {"b": "2"}
        assert [client.delete(obj) for obj in reversed(objects)] == [True] * 3
        assert [client.delete(obj) for obj in reversed(objects)] == [False] * 3

    with_client(work)


def test_another_client_finds_the_plural_that_was_used() -> None:
    store = Store()

    def work(client: Client) -> None:
        person = {"kind": "Person", "metadata": {"name": "ann"}}
        client.request("POST", "/apis/example.org/v1/people", person)
        assert client.kind_of({"apiVersion": "example.org/v1", "kind": "Person"}).plural == "people"
        assert client.delete({"apiVersion": "example.org/v1", **person})

    with_client(work, store)


ERRORS: dict[str, tuple[Callable[[Client], object], type[ApiError], str]] = {
    "not found": (lambda c: c.get(PODS, "db", "default"), NotFound, 'pods "db" not found'),
    "already there": (
        lambda c: c.request("POST", "/api/v1/namespaces", {"metadata": {"name": "default"}}), AlreadyExists, "already",
    ),
    "a stale version": (
        lambda c: c.request(
            "PUT", "/api/v1/namespaces/default", {"metadata": {"name": "default", "resourceVersion": "999"}}
        ),
        Conflict, "has been modified",
    ),
    "invalid": (
        lambda c: c.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "A"}, "spec": {}}), Invalid, '"A"',
    ),
    "too old": (lambda c: c.request("GET", "/api/v1/pods", query={"watch": "1", "resourceVersion": "999"}), Gone, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_the_client_raises_what_the_server_said(case: str) -> None:
    attempt, error, message = ERRORS[case]

    def work(client: Client) -> None:
        with pytest.raises(error) as caught:
            attempt(client)
        assert message in str(caught.value)

    with_client(work)


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        client = Client(f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert not client.ready()
        with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:\d+ cannot be reached"):
            client.list(PODS)


def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")

    def connect() -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(path)
        return connected

    async def whole() -> list[str]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            async with ApiServer(Store()).serving(listener=listener):
                client = Client("http://lab", connect=connect)
                found = await asyncio.to_thread(client.list, NAMESPACES, fields="metadata.name=default")
                return [one["metadata"]["name"] for one in found]

    assert asyncio.run(whole()) == ["default"]


# --- kubectl ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_a_kubectl_applies_gets_patches_and_deletes(tmp_path: Path) -> None:
    manifest = tmp_path / "shop.yaml"
    manifest.write_text("---".join(part for part in MANIFEST.split("---") if "Widget" not in part))

    async def whole() -> None:
        store = Store()
        async with ApiServer(store).serving() as url:
            config = tmp_path / "kubeconfig"
            config.write_text(kubeconfig(url, "lab"))

            def kubectl(*words: str) -> str:
                environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": str(config)}
                done = subprocess.run(
                    ["kubectl", *words], capture_output=True, text=True, timeout=LIMIT, env=environment, check=False
                )
                assert done.returncode == 0, done.stderr
                return done.stdout

            async def ask(*words: str) -> str:
                return await asyncio.to_thread(kubectl, *words)

            space = tmp_path / "namespace.yaml"
            space.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
            await ask("create", "-f", str(space))
            applied = await ask("apply", "-f", str(manifest))
            assert "pod/web created" in applied
            assert "pod/web unchanged" in await ask("apply", "-f", str(manifest))
            assert "web" in await ask("get", "po", "-A", "-o", "wide")
            await ask("label", "pod", "web", "-n", "shop", "tier=front")
            assert await ask("get", "pod", "-n", "shop", "-l", "tier=front", "-o", "name") == "pod/web\n"
            assert "deleted" in await ask("delete", "pod", "web", "-n", "shop")
            assert store.list(PODS) == []

    asyncio.run(asyncio.wait_for(whole(), 2 * LIMIT))
