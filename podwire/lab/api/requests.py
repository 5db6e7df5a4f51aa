"""HTTP requests, taken apart: bodies, query parameters and list tokens, with errors that say what would be right."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from aiohttp import web

from podwire import manifests
from podwire.lab.api import selectors
from podwire.lab.api.admission import Object
from podwire.lab.api.errors import BadRequest, UnsupportedMediaType
from podwire.lab.api.kinds import Kind
from podwire.lab.api.paths import Target
from podwire.lab.api.store import Page


async def plain(request: web.Request) -> Any:
    """The body as plain data: JSON, or YAML by its content type."""
    kind, text = request.content_type, await request.text()
    if kind.endswith("yaml"):
        try:
            found = [one for one in manifests.documents(text, "body") if one is not None]
        except manifests.ManifestError as error:
            raise BadRequest(str(error)) from error
        if len(found) != 1:
            raise BadRequest(f"body: {len(found)} YAML documents; there should be one")
        return found[0]
    if kind not in ("application/octet-stream", "text/plain") and not kind.endswith("json"):
        hint = (
            "; `kubectl apply` and `kubectl create -f` send it, `kubectl create KIND` may not"
            if "proto" in kind
            else ""
        )
        raise UnsupportedMediaType(f"the body is {kind}; application/json and application/yaml are read here{hint}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRequest(f"body: not JSON: {error}") from error


async def body(request: web.Request) -> Object:
    """The body, which must be an object."""
    found = await plain(request)
    if not isinstance(found, dict):
        raise BadRequest("body: an object is expected")
    return found


def placed(obj: Object, kind: Kind, target: Target) -> Object:
    """The object with the path's kind, name and namespace; raises BadRequest when it says other ones."""
    for field, right in (("apiVersion", kind.api_version), ("kind", kind.kind)):
        if obj.get(field) not in (None, "", right):
            raise BadRequest(f"{field} is {obj[field]!r} in the object and {right!r} in the path")
    metadata = obj.get("metadata")
    if metadata is None and target.name:
        metadata = {}
    if not isinstance(metadata, dict):
        return obj
    metadata = dict(metadata)
    for field, right in (("name", target.name), ("namespace", target.namespace)):
        said = metadata.get(field)
        if right and said and said != right:
            raise BadRequest(f"metadata.{field} is {said!r} in the object and {right!r} in the path")
        if right:
            metadata[field] = right
    return {**obj, "metadata": metadata}


async def delete_options(request: web.Request) -> Object:
    """The body of a DELETE (meta/v1 DeleteOptions), empty when there is none."""
    return await body(request) if (await request.read()).strip() else {}


def grace_seconds(request: web.Request, options: Object) -> int | None:
    """How long a deletion may take, from the options or the query; None leaves it to the object."""
    asked = options.get("gracePeriodSeconds")
    if asked is None:
        return number(request, "gracePeriodSeconds")
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
        raise BadRequest(f"gracePeriodSeconds is {asked!r}; it should be a number of seconds")
    return asked


def dry_run(request: web.Request) -> bool:
    """Whether nothing is to be kept (`dryRun=All`)."""
    asked = request.query.get("dryRun", "")
    if asked not in ("", "All"):
        raise BadRequest(f"dryRun is {asked!r}; it should be All, or absent")
    return bool(asked)


def number(request: web.Request, name: str) -> int | None:
    """A query parameter that is a number; None when it is absent or empty."""
    text = request.query.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise BadRequest(f"{name} is {text!r}; it should be a number")
    return int(text)


def selector(request: web.Request, kind: Kind) -> selectors.Selector:
    """What `labelSelector` and `fieldSelector` select."""
    return selectors.parse(kind, request.query.get("labelSelector", ""), request.query.get("fieldSelector", ""))


def continue_token(page: Page) -> str:
    """The token with which a client asks for what follows this page."""
    return base64.urlsafe_b64encode(json.dumps([page.version, page.next_name]).encode()).decode()


def continuation(token: str) -> tuple[tuple[str, str] | None, int | None]:
    """Where a list carries on: after which namespace and name, and the version of its first page."""
    if not token:
        return None, None
    try:
        version, (namespace, name) = json.loads(base64.urlsafe_b64decode(token))
        return (str(namespace), str(name)), int(version)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadRequest("continue: this is not a token that a list has returned") from error


def wants_table(request: web.Request) -> bool:
    """Whether the client would rather have a table than the objects: kubectl names it first when it does."""
    first = request.headers.get("Accept", "").partition(",")[0]
    return "as=Table" in first and "application/json" in first
