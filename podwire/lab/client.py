"""The `podwire lab` command's side of the lab's API server: a handful of requests, one after another, no watch.

The standard library's HTTP client does: a command makes few requests, and must start fast. Manifests are applied on
the server (server-side apply), so that nothing is compared here.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from podwire.errors import PodwireError
from podwire.lab import manifests
from podwire.lab.api.kinds import Kind, Registry, guess

_SECONDS = 10
_MANAGER = "podwire-lab"
Object = dict[str, Any]


class Client:
    """Requests to one API server. Raises PodwireError with the server's message when it refuses."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._kinds = Registry()

    def apply(self, obj: Object) -> tuple[Object, str]:
        """Creates or changes an object. Returns it, and the server's warning if it gave one."""
        kind = self._kind(obj)
        if "name" not in obj["metadata"]:
            return self._request("POST", self.collection(kind, self._namespace(kind, obj)), obj)
        path = f"{self.path(kind, obj)}?fieldManager={_MANAGER}&force=true"
        return self._request("PATCH", path, obj, "application/apply-patch+yaml")

    def delete(self, obj: Object) -> bool:
        """Deletes an object by what names it; False when there was none."""
        try:
            self._request("DELETE", self.path(self._kind(obj), obj))
        except NotThere:
            return False
        return True

    def list(self, api_version: str, kind: str, namespace: str = "") -> list[Object]:
        """All objects of a kind, of one namespace or of all."""
        found, _ = self._request(
            "GET", self.collection(self._kind({"apiVersion": api_version, "kind": kind}), namespace)
        )
        return list(found["items"])

    def get(self, api_version: str, kind: str, name: str, namespace: str = "default") -> Object:
        """One object. Raises NotThere."""
        obj = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": namespace}}
        found, _ = self._request("GET", self.path(self._kind(obj), obj))
        return found

    def _kind(self, obj: Mapping[str, Any]) -> Kind:
        return self._kinds.named(obj["apiVersion"], obj["kind"]) or guess(obj["apiVersion"], obj["kind"])

    def _namespace(self, kind: Kind, obj: Mapping[str, Any]) -> str:
        return str(obj["metadata"].get("namespace") or "default") if kind.namespaced else ""

    def collection(self, kind: Kind, namespace: str) -> str:
        """The path of a kind's objects."""
        root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
        return f"{root}/namespaces/{quote(namespace)}/{kind.plural}" if namespace else f"{root}/{kind.plural}"

    def path(self, kind: Kind, obj: Mapping[str, Any]) -> str:
        """The path of an object."""
        return f"{self.collection(kind, self._namespace(kind, obj))}/{quote(obj['metadata']['name'])}"

    def _request(
        self, method: str, path: str, body: Object | None = None, content_type: str = "application/json"
    ) -> tuple[Object, str]:
        connection = http.client.HTTPConnection(self._host, timeout=_SECONDS)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": content_type})
            response = connection.getresponse()
            answer = json.loads(response.read() or b"{}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise PodwireError(f"the lab's API server at {self._host} does not answer: {error}") from error
        finally:
            connection.close()
        if response.status >= 400:
            kind = NotThere if response.status == 404 else PodwireError
            raise kind(str(answer.get("message", f"{method} {path}: {response.status}")))
        return answer, response.headers.get("Warning", "").partition('"')[2].removesuffix('"')


class NotThere(PodwireError):
    """The object that is asked for does not exist."""


def apply_files(url: str, sources: Sequence[str | Path], say: Callable[[str], None]) -> list[tuple[str, str]]:
    """Applies manifests, namespaces first. Returns the (namespace, name) of the pods among them."""
    client, pods = Client(url), []
    for obj in manifests.apply_order(manifests.load(sources)):
        made, warning = client.apply(obj)
        metadata = made["metadata"]
        say(f"{obj['kind'].lower()}/{metadata['name']} applied" + (f" ({warning})" if warning else ""))
        if obj["kind"] == "Pod":
            pods.append((metadata["namespace"], metadata["name"]))
    return pods


def delete_files(url: str, sources: Sequence[str | Path], say: Callable[[str], None]) -> list[tuple[str, str]]:
    """Deletes what manifests name, in reverse. Returns the (namespace, name) of the pods among it."""
    client, pods = Client(url), []
    for obj in reversed(manifests.apply_order(manifests.load(sources))):
        name = obj["metadata"].get("name")
        if name is None:
            raise PodwireError(f"{obj['kind']} with generateName: what to delete has no name")
        there = client.delete(obj)
        say(f"{obj['kind'].lower()}/{name} {'deleted' if there else 'was not there'}")
        if obj["kind"] == "Pod":
            pods.append((obj["metadata"].get("namespace") or "default", name))
    return pods
