"""The scale and log subresources over HTTP, what discovery says of them, and label selectors as specs write them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from podwire.lab.api import selectors
from podwire.lab.api.errors import BadRequest
from podwire.lab.api.kinds import DEPLOYMENTS, PODS
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store

LIMIT = 90.0
SCALE_PATH = "/apis/apps/v1/namespaces/default/deployments/web/scale"
LOG_PATH = "/api/v1/namespaces/default/pods/web/log"
TEMPLATE = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c"}]}}
DEPLOYMENT = {
    "metadata": {"name": "web"},
    "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": TEMPLATE},
}
POD = {"metadata": {"name": "web"}, "spec": {"containers": [{"name": "c"}], "initContainers": [{"name": "i"}]}}
Call = Callable[..., Awaitable[tuple[int, Any]]]


def serve(story: Callable[[Store, Call], Awaitable[None]], logs: Path) -> None:
    async def whole() -> None:
        store = Store()
        store.create(DEPLOYMENTS, DEPLOYMENT)
        store.create(PODS, POD)

        def find_log(_namespace: str, pod: str, container: str, previous: bool) -> Path:
            return logs / f"{pod}.{container}{'.previous' if previous else ''}"

        async with ApiServer(store, find_log=find_log).serving() as url, aiohttp.ClientSession() as session:

            async def call(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
                async with session.request(method, url + path, json=body, headers=headers) as response:
                    json = response.content_type == "application/json"
                    return response.status, await response.json() if json else await response.text()

            await asyncio.wait_for(story(store, call), LIMIT)

    asyncio.run(whole())


def test_scale_is_read_put_and_patched(tmp_path: Path) -> None:
    async def story(store: Store, call: Call) -> None:
        code, scale = await call("GET", SCALE_PATH)
        assert (code, scale["kind"], scale["apiVersion"]) == (200, "Scale", "autoscaling/v1")
        assert (scale["spec"], scale["status"]) == ({"replicas": 2}, {"replicas": 0, "selector": "app=web"})
        code, done = await call("PUT", SCALE_PATH, {**scale, "spec": {"replicas": 5}})
        assert (code, done["spec"]) == (200, {"replicas": 5})
        assert store.get(DEPLOYMENTS, "web", "default")["spec"]["replicas"] == 5
        assert store.get(DEPLOYMENTS, "web", "default")["metadata"]["generation"] == 2
        code, status = await call("PUT", SCALE_PATH, {**scale, "spec": {"replicas": 6}})
        assert (code, status["reason"]) == (409, "Conflict")
        merge = {"Content-Type": "application/merge-patch+json"}
        assert (await call("PATCH", SCALE_PATH, {"spec": {"replicas": 1}}, **merge))[0] == 200
        assert store.get(DEPLOYMENTS, "web", "default")["spec"]["replicas"] == 1
        code, status = await call("PATCH", SCALE_PATH, {"spec": {"replicas": -1}}, **merge)
        assert (code, "spec.replicas: Invalid value: -1" in status["message"]) == (422, True)
        assert (await call("DELETE", SCALE_PATH))[0] == 405
        assert (await call("GET", "/api/v1/namespaces/default/pods/web/scale"))[0] == 404

    serve(story, tmp_path)


def test_logs_whole_in_part_and_missing(tmp_path: Path) -> None:
    (tmp_path / "web.c").write_text("one\ntwo\nthree\n")
    (tmp_path / "web.c.previous").write_text("zero\n")

    async def story(_store: Store, call: Call) -> None:
        for query, code, wanted in (
            ("container=c", 200, "one\ntwo\nthree\n"),
            ("container=c&tailLines=2", 200, "two\nthree\n"),
            ("container=c&tailLines=0", 200, ""),
            ("container=c&tailLines=99", 200, "one\ntwo\nthree\n"),
            ("container=c&limitBytes=3", 200, "one"),
            ("container=c&previous=true", 200, "zero\n"),
            ("", 400, "a container name must be specified for pod web, choose one of: [i c]"),
            ("container=x", 400, "container x is not valid for pod web"),
            ("container=i", 400, 'container "i" in pod "web" is waiting to start'),
            ("container=i&previous=true", 400, 'previous terminated container "i" in pod "web" not found'),
            ("container=c&sinceSeconds=5", 400, "does not keep the time of a line"),
        ):
            answered, body = await call("GET", f"{LOG_PATH}?{query}")
            said = body if isinstance(body, str) else body["message"]
            assert answered == code, query
            assert said == wanted if code == 200 else wanted in said, query

    serve(story, tmp_path)


def test_a_log_that_is_followed_ends_with_its_container(tmp_path: Path) -> None:
    log = tmp_path / "web.c"
    log.write_text("one\n")

    async def whole() -> None:
        store = Store()
        store.create(PODS, POD)
        server = ApiServer(store, find_log=lambda *_: log)
        async with (
            server.serving() as url,
            aiohttp.ClientSession() as session,
            session.get(f"{url}{LOG_PATH}?container=c&follow=true") as response,
        ):
            assert await response.content.readline() == b"one\n"
            with log.open("a") as file:
                file.write("two\n")
            assert await response.content.readline() == b"two\n"
            with log.open("a") as file:
                file.write("last words\n")
            ended = {"containerStatuses": [{"name": "c", "state": {"terminated": {}}}]}
            store.set_status(PODS, "web", "default", ended)
            assert await response.content.read() == b"last words\n"

    asyncio.run(asyncio.wait_for(whole(), LIMIT))


def test_discovery_names_the_subresources(tmp_path: Path) -> None:
    async def story(_store: Store, call: Call) -> None:
        _, apps = await call("GET", "/apis/apps/v1")
        scales = {one["name"]: one for one in apps["resources"] if one["name"].endswith("/scale")}
        assert scales.keys() == {"deployments/scale", "replicasets/scale"}
        assert {(one["group"], one["version"], one["kind"]) for one in scales.values()} == {
            ("autoscaling", "v1", "Scale")
        }
        _, core = await call("GET", "/api/v1")
        assert ["get"] in [one["verbs"] for one in core["resources"] if one["name"] == "pods/log"]

    serve(story, tmp_path)


SELECTORS: list[tuple[dict[str, Any] | None, str, bool]] = [
    (None, "", True),
    ({}, "", True),
    ({"matchLabels": {"app": "web"}}, "app=web", True),
    ({"matchLabels": {"app": "db"}}, "app=db", False),
    ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["db", "web"]}]}, "app in (db,web)", True),
    ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}, "app!=web", False),
    ({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["a", "b"]}]}, "tier notin (a,b)", True),
    ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, "app", True),
    ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, "!app", False),
    ({"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "x", "operator": "Exists"}]}, "app=web,x", False),
]


@pytest.mark.parametrize(("spec", "text", "matches"), SELECTORS)
def test_label_selectors_of_specs(spec: dict[str, Any] | None, text: str, matches: bool) -> None:
    selector = selectors.from_object(spec)
    assert selectors.to_text(selector) == text
    assert selector.matches({"metadata": {"labels": {"app": "web"}}}) is matches
    assert selectors.parse(PODS, text) == selector, "what is written can be read back"


def test_an_operator_that_there_is_not() -> None:
    with pytest.raises(BadRequest, match="'Like' is not one of In, NotIn, Exists, DoesNotExist"):
        selectors.from_object({"matchExpressions": [{"key": "a", "operator": "Like"}]})
