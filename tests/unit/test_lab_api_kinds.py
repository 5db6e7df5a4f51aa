"""What the lab's API serves: kinds that it knows, kinds that it meets, discovery and OpenAPI, and tables for kubectl.

A kind that nothing here acts on is stored all the same, with a warning that says so; a definition makes one known.
"""

from __future__ import annotations

import logging
from typing import Any

import aiohttp
import pytest

from podwire.lab.api import client as api_client
from podwire.lab.api.kinds import CRDS, DEPLOYMENTS, PODS, REPLICA_SETS, SERVICES
from tests.unit.lab_api_stage import PODS_PATH, WIDGETS_PATH, Api, pod, serve, with_client

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"


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
