"""A small synchronous client of the API, for the `podwire lab` commands: standard library, a connection a request.

    manifest ──▶ which kind: the table, what the server discovers, a guess ──▶ path ──▶ request ──▶ object, or ApiError

`connect` makes the connected socket, for a server that is reached from another network namespace or over a unix socket.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from podwire.lab.api import kinds
from podwire.lab.api.admission import Object
from podwire.lab.api.errors import ApiError, BadRequest, NotFound, Unreachable, from_status
from podwire.lab.api.kinds import Kind, Registry

_APPLY = "application/apply-patch+yaml"


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What `apply` did. `action` is created, configured or unchanged; `warnings` are the server's own words."""

    kind: Kind
    name: str
    namespace: str
    action: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind.kind.lower()}{f'.{self.kind.group}' if self.kind.group else ''}/{self.name} {self.action}"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A successful response: HTTP code, the decoded body, the texts of its Warning headers."""

    code: int
    body: Object
    warnings: tuple[str, ...] = ()


class Client:
    """The API at `url` (http only). `timeout` is in seconds, for every wait of a request.

    Every method raises the ApiError that the server answered, or Unreachable when there is no answer.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 10.0,
        connect: Callable[[], socket.socket] | None = None,
        manager: str = "podwire",
    ) -> None:
        self.url = url
        self._timeout = timeout
        self._connect = connect
        self._manager = manager
        self._kinds = Registry()

    # --- objects ------------------------------------------------------------------------------------------------

    def apply(self, manifest: Object, namespace: str = "default") -> Applied:
        """Creates the object or merges it in; `namespace` is for one that names none.

        A manifest with generateName alone is created, since there is nothing to merge it into.
        """
        kind = self.kind_of(manifest)
        place = _namespace(kind, manifest, namespace)
        name = manifest["metadata"].get("name")
        if not name:
            answer = self.request("POST", path(kind, place), manifest)
            return _applied(kind, place, "created", answer)
        before = self.find(kind, name, place)
        query = {"fieldManager": self._manager, "force": "true"}
        answer = self.request("PATCH", path(kind, place, name), manifest, content_type=_APPLY, query=query)
        action = "created" if answer.code == HTTPStatus.CREATED else "configured"
        if before is not None and _version(before) == _version(answer.body):
            action = "unchanged"
        return _applied(kind, place, action, answer)

    def delete(self, manifest: Object, namespace: str = "default") -> bool:
        """Deletes what the manifest names. Returns False if there was none."""
        kind = self.kind_of(manifest)
        name = manifest["metadata"].get("name")
        if not name:
            raise BadRequest(f"{kind.kind}: metadata.name: a deletion needs the object's name")
        try:
            self.request("DELETE", path(kind, _namespace(kind, manifest, namespace), name))
        except NotFound:
            return False
        return True

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object:
        """One object. Raises NotFound."""
        return self.request("GET", path(kind, namespace, name)).body

    def find(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """One object, or None."""
        try:
            return self.get(kind, name, namespace)
        except NotFound:
            return None

    def list(self, kind: Kind, namespace: str = "", *, labels: str = "", fields: str = "") -> list[Object]:
        """All objects that the selectors let through; an empty namespace means all of them."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        items: list[Object] = self.request("GET", path(kind, namespace), query=query).body["items"]
        return items

    def ready(self) -> bool:
        """Whether the server answers."""
        try:
            self._send("GET", "/readyz", None, {})
        except Unreachable:
            return False
        return True

    def kind_of(self, manifest: Mapping[str, Any]) -> Kind:
        """The kind of a manifest: from the table, else from the server's discovery, else guessed from its name."""
        api_version, name = str(manifest["apiVersion"]), str(manifest["kind"])
        found = self._kinds.named(api_version, name) or self._discovered(api_version, name)
        return found or kinds.guess(api_version, name)

    def _discovered(self, api_version: str, name: str) -> Kind | None:
        group, _, version = api_version.rpartition("/")
        try:
            root = f"/apis/{api_version}" if group else f"/api/{version}"
            resources = self.request("GET", root).body["resources"]
        except NotFound:
            return None
        for one in resources:
            if one["kind"] == name and "/" not in one["name"]:
                return self._kinds.add(
                    kinds.stored(group, version, name, one["name"], namespaced=bool(one["namespaced"]))
                )
        return None

    # --- HTTP ---------------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        where: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        query: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request; `where` is a path of the API, `body` plain data."""
        given = {key: value for key, value in (query or {}).items() if value}
        target = f"{where}?{urlencode(given)}" if given else where
        headers = {"Accept": "application/json", "Content-Type": content_type}
        response, data = self._send(method, target, None if body is None else json.dumps(body).encode(), headers)
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise ApiError(f"{self.url}{where}: the answer ({response.status}) is not JSON") from error
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise from_status(response.status, answer)
        warnings = tuple(_warning(text) for text in response.headers.get_all("Warning") or ())
        return Answer(code=response.status, body=answer, warnings=warnings)

    def text(self, where: str, *, query: Mapping[str, str] | None = None) -> str:
        """What is at a path that answers with text, such as a log."""
        response, data = self._send("GET", f"{where}?{urlencode(query or {})}", None, {})
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise from_status(response.status, json.loads(data))
        return data.decode(errors="replace")

    def _send(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "localhost", parts.port, timeout=self._timeout)
        try:
            if self._connect is not None:
                connection.sock = self._connect()
            connection.request(method, target, body=body, headers=headers)
            response = connection.getresponse()
            return response, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(
                f"the API server at {self.url} cannot be reached: {error or type(error).__name__}"
            ) from error
        finally:
            connection.close()


def path(kind: Kind, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """The path of an object, or of its collection."""
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    scope = f"/namespaces/{quote(namespace, safe='')}" if kind.namespaced and namespace else ""
    rest = "".join(f"/{quote(step, safe='')}" for step in (kind.plural, name, subresource) if step)
    return f"{root}{scope}{rest}"


def _namespace(kind: Kind, manifest: Object, otherwise: str) -> str:
    return (manifest["metadata"].get("namespace") or otherwise) if kind.namespaced else ""


def _applied(kind: Kind, namespace: str, action: str, answer: Answer) -> Applied:
    name = answer.body["metadata"]["name"]
    return Applied(kind=kind, name=name, namespace=namespace, action=action, warnings=answer.warnings)


def _version(obj: Object) -> str:
    return str(obj["metadata"]["resourceVersion"])


def _warning(header: str) -> str:
    """The text of a Warning header (RFC 7234 §5.5): `299 - "text"`."""
    return header.split(" ", 2)[-1].strip().strip('"')
