"""Clients of the lab's API: its own, by TCP and by a Unix socket, what that raises, and a kubectl if there is one."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from podwire import manifests
from podwire.lab.api.client import Client
from podwire.lab.api.errors import AlreadyExists, ApiError, Conflict, Gone, Invalid, NotFound, Unreachable
from podwire.lab.api.kinds import NAMESPACES, PODS
from podwire.lab.api.kubeconfig import kubeconfig
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store
from tests.unit.lab_api_stage import LIMIT, with_client

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
