"""The store over HTTP, as a kubectl or a daemon expects it.

    GET/POST/PUT/PATCH/DELETE  /api/v1/… and /apis/GROUP/VERSION/…  ──▶ paths.parse ──▶ one handler a verb ──▶ store

A kind that is not in the table becomes known when an object of it is sent, under the plural of the path. A kind on
which nothing in the lab acts is answered with a `Warning: 299` header and logged, once. Bodies are JSON or YAML,
answers JSON, lists and watches also tables. A watch is a chunked stream of one JSON object a line; stopping the server
ends it.

Every handler runs between two awaits on the store's event loop: what it reads and writes is of one instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

import podwire
from podwire.lab.api import discovery, kinds, patch, podlogs, requests, table
from podwire.lab.api.admission import Object
from podwire.lab.api.errors import ApiError, BadRequest, Gone, MethodNotAllowed, NotFound, UnsupportedMediaType
from podwire.lab.api.kinds import CRDS, PODS, Kind
from podwire.lab.api.log import EventType
from podwire.lab.api.paths import Target, parse
from podwire.lab.api.podlogs import FindLog
from podwire.lab.api.scale import scale_of, scaled
from podwire.lab.api.store import Store
from podwire.lab.api.watch import Event

logger = logging.getLogger(__name__)
MAX_BODY = 8 * 1024 * 1024
BOOKMARK_SECONDS = 60.0  # as the real server, roughly
_APPLY = "application/apply-patch+yaml"
Handler = Callable[[web.Request, Kind, Target], Awaitable[web.StreamResponse]]


class ApiServer:
    """`app` is the aiohttp application on `store`. `bookmark_seconds` is how often a quiet watch hears from us.

    `find_log` says where a container's log is; without it there are none.
    """

    def __init__(
        self, store: Store, *, bookmark_seconds: float = BOOKMARK_SECONDS, find_log: FindLog | None = None
    ) -> None:
        self.store = store
        self._find_log = find_log
        self._bookmark_seconds = bookmark_seconds
        self._watches: set[asyncio.Task[Any]] = set()
        self._warned: set[tuple[str, str, str]] = set()
        self.app = web.Application(client_max_size=MAX_BODY, middlewares=[self._answer_errors])
        self.app.on_shutdown.append(self._end_watches)
        routes = self.app.router
        for path in ("/healthz", "/readyz", "/livez"):
            routes.add_get(path, self._healthy)
        routes.add_get("/version", self._version)
        routes.add_get("/openapi/v2", self._openapi_v2)
        routes.add_get("/openapi/v3", self._openapi_index)
        routes.add_get("/openapi/v3/{where:.+}", self._openapi_document)
        routes.add_get("/api", self._api_versions)
        routes.add_get("/apis", self._group_list)
        routes.add_get("/apis/{group}", self._group)
        routes.add_get("/api/{version}", self._resource_list)
        routes.add_get("/apis/{group}/{version}", self._resource_list)
        routes.add_route("*", "/api/{version}/{rest:.+}", self._resource)
        routes.add_route("*", "/apis/{group}/{version}/{rest:.+}", self._resource)

    @contextlib.asynccontextmanager
    async def serving(
        self, host: str = "127.0.0.1", port: int = 0, *, listener: socket.socket | None = None
    ) -> AsyncIterator[str]:
        """Serves while the context lasts, and gives the URL. `listener` is a bound socket, of any namespace."""
        runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        try:
            site: web.BaseSite
            site = web.SockSite(runner, listener) if listener else web.TCPSite(runner, host, port)
            await site.start()
            if isinstance(runner.addresses[0], str):  # a unix socket has no URL of its own
                yield "http://localhost"
                return
            address, number = runner.addresses[0][:2]
            yield f"http://[{address}]:{number}" if ":" in address else f"http://{address}:{number}"
        finally:
            await runner.cleanup()

    # --- what is not an object ----------------------------------------------------------------------------------

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return web.json_response(error.to_object(), status=error.code)
        except web.HTTPException as error:
            kind = NotFound if error.status == 404 else MethodNotAllowed if error.status == 405 else BadRequest
            status = kind("the server could not find the requested resource" if error.status == 404 else error.reason)
            return web.json_response({**status.to_object(), "code": error.status}, status=error.status)

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _version(self, _: web.Request) -> web.Response:
        """The Kubernetes version whose API is imitated, for clients that choose by it."""
        version = {"major": "1", "minor": "31", "gitVersion": f"v1.31.0+podwire-{podwire.__version__}"}
        return web.json_response({**version, "platform": "linux/amd64"})

    async def _api_versions(self, _: web.Request) -> web.Response:
        return web.json_response(discovery.api_versions())

    async def _group_list(self, _: web.Request) -> web.Response:
        return web.json_response(discovery.group_list(self.store.kinds))

    async def _group(self, request: web.Request) -> web.Response:
        return _found(discovery.group(self.store.kinds, request.match_info["group"]))

    async def _resource_list(self, request: web.Request) -> web.Response:
        group, version = request.match_info.get("group"), request.match_info["version"]
        return _found(discovery.resource_list(self.store.kinds, f"{group}/{version}" if group else version))

    async def _openapi_v2(self, _: web.Request) -> web.Response:
        return web.Response(body=discovery.OPENAPI_V2, content_type=discovery.OPENAPI_V2_TYPE)

    async def _openapi_index(self, _: web.Request) -> web.Response:
        return web.json_response(discovery.openapi_index(self.store.kinds))

    async def _openapi_document(self, request: web.Request) -> web.Response:
        root, _, api_version = request.match_info["where"].partition("/")
        document = discovery.openapi_document(self.store.kinds, api_version) if root in ("api", "apis") else None
        return _found(document)

    async def _end_watches(self, _: web.Application) -> None:
        for task in self._watches:
            task.cancel()

    # --- dispatch -----------------------------------------------------------------------------------------------

    async def _resource(self, request: web.Request) -> web.StreamResponse:
        info = request.match_info
        target = parse(info.get("group", ""), info["version"], info["rest"].rstrip("/").split("/"))
        handler = self._handler(request, target)
        kind = self.store.kinds.find(target.group, target.version, target.plural)
        if kind is None:
            kind = await self._unknown(request, target)
        if target.subresource and not _has_subresource(kind, target.subresource):
            raise NotFound(f"{kind.resource} have no {target.subresource!r} here")
        response = await handler(request, kind, target)
        if request.method in ("POST", "PATCH", "PUT"):
            self.store.kinds.add(kind)  # only now: a refused object must not settle what the path's kind is called
            self._warn_once(kind, response)
        return response

    def _handler(self, request: web.Request, target: Target) -> Handler:
        verbs: dict[str, Handler] = {}
        if target.subresource in ("binding", "eviction"):
            verbs = {"POST": self._bind if target.subresource == "binding" else self._evict}
        elif target.subresource == "scale":
            verbs = {"GET": self._get_scale, "PUT": self._update_scale, "PATCH": self._patch_scale}
        elif target.subresource == "log":
            verbs = {"GET": self._log}
        elif target.name:
            verbs = {"GET": self._get, "PUT": self._update, "PATCH": self._patch}
            if not target.subresource:
                verbs["DELETE"] = self._delete
        else:
            verbs = {"GET": self._list, "POST": self._create, "DELETE": self._delete_collection}
        if request.method not in verbs:
            raise MethodNotAllowed(f"{request.method} is not supported here; {', '.join(verbs)} are")
        return verbs[request.method]

    async def _unknown(self, request: web.Request, target: Target) -> Kind:
        """The kind that the first object of it declares by being sent; anything else about it is 404."""
        applied = request.method == "PATCH" and request.content_type == _APPLY
        if target.subresource or not (request.method == "POST" or applied):
            raise NotFound("the server could not find the requested resource")
        name = (await requests.body(request)).get("kind")
        if not isinstance(name, str) or not name:
            raise BadRequest(
                f"kind: Required value: {target.plural} are not known yet, so the object must say its kind"
            )
        namespaced = bool(target.namespace)
        return kinds.stored(target.group, target.version, name, target.plural, namespaced=namespaced)

    def _warn_once(self, kind: Kind, response: web.StreamResponse) -> None:
        if not kind.stored_only or kind.key in self._warned:
            return
        self._warned.add(kind.key)
        text = f"{kind.kind} ({kind.api_version}) is stored and listed, but nothing in this lab acts on it"
        logger.warning(text, extra={"fields": {"kind": kind.kind, "api_version": kind.api_version}})
        response.headers["Warning"] = f'299 - "{text}"'

    # --- reading ------------------------------------------------------------------------------------------------

    async def _get(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        obj = self.store.get(kind, target.name, target.namespace)
        return web.json_response(self._shaped(request, kind, obj))

    async def _list(self, request: web.Request, kind: Kind, target: Target) -> web.StreamResponse:
        query = request.query
        if query.get("watch") in ("1", "true"):
            return await self._watch(request, kind, target)
        selector = requests.selector(request, kind)
        after, version = requests.continuation(query.get("continue", ""))
        limit = requests.number(request, "limit") or 0
        page = self.store.page(kind, target.namespace, selector, limit=limit, after=after, version=version)
        metadata: Object = {"resourceVersion": str(page.version)}
        if page.next_name is not None:
            metadata |= {"continue": requests.continue_token(page), "remainingItemCount": page.remaining}
        if requests.wants_table(request):
            shown = table.table(kind, page.items, time.time(), query.get("includeObject", "Metadata"))
            return web.json_response({**shown, "metadata": metadata})
        return web.json_response(
            {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata, "items": page.items}
        )

    async def _watch(self, request: web.Request, kind: Kind, target: Target) -> web.StreamResponse:
        query, selector = request.query, requests.selector(request, kind)
        text = query.get("resourceVersion", "")
        after = requests.number(request, "resourceVersion") if text not in ("", "0") else None
        streamed = query.get("sendInitialEvents") == "true"
        events = self.store.watch(
            kind,
            namespace=target.namespace,
            selector=selector,
            after=None if streamed else after,
            bookmark_seconds=self._bookmark_seconds if query.get("allowWatchBookmarks") in ("1", "true") else None,
            initial_bookmark=streamed,
        )
        if after is not None and not streamed:
            self.store.log.after(after)  # too old: say so with the status code, while there still is one
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b"")
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            async with asyncio.timeout(requests.number(request, "timeoutSeconds")):
                await self._stream(request, kind, response, events)
        except (TimeoutError, ConnectionError):
            pass  # the end that the client asked for, or the client itself is gone
        finally:
            self._watches.discard(task)
        return response

    async def _stream(
        self, request: web.Request, kind: Kind, response: web.StreamResponse, events: AsyncGenerator[Event, None]
    ) -> None:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    shown = event.object
                    if event.type is not EventType.BOOKMARK:
                        shown = self._shaped(request, kind, shown)
                    await response.write(_line({"type": event.type.value, "object": shown}))
        except Gone as error:
            await response.write(_line({"type": "ERROR", "object": error.to_object()}))

    def _shaped(self, request: web.Request, kind: Kind, obj: Object) -> Object:
        """The object as the client wants it: itself, or a table of one row."""
        if not requests.wants_table(request):
            return obj
        shown = table.table(kind, [obj], time.time(), request.query.get("includeObject", "Metadata"))
        return {**shown, "metadata": {"resourceVersion": obj["metadata"]["resourceVersion"]}}

    # --- writing ------------------------------------------------------------------------------------------------

    async def _create(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        obj = requests.placed(await requests.body(request), kind, target)
        made = self.store.create(kind, obj, dry_run=requests.dry_run(request))
        self._learn_definition(kind, made)
        return web.json_response(made, status=201)

    async def _update(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        obj = requests.placed(await requests.body(request), kind, target)
        done = self.store.update(kind, obj, subresource=target.subresource, dry_run=requests.dry_run(request))
        return web.json_response(done)

    async def _patch(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        dry_run, how = requests.dry_run(request), request.content_type
        if how == _APPLY:
            obj = requests.placed(await requests.body(request), kind, target)
            manager = request.query.get("fieldManager", "")
            if not manager:
                raise BadRequest("fieldManager is required for apply patch")
            done, new = self.store.apply(kind, obj, manager, subresource=target.subresource, dry_run=dry_run)
            self._learn_definition(kind, done)
            return web.json_response(done, status=201 if new else 200)
        _check_patch_type(how, kind)
        change = _change(how, await requests.plain(request), kind)
        done = self.store.modify(
            kind, target.name, target.namespace, change, subresource=target.subresource, dry_run=dry_run
        )
        return web.json_response(done)

    def _learn_definition(self, kind: Kind, obj: Object) -> None:
        if kind is CRDS:
            for declared in kinds.declared_by(obj):
                self.store.kinds.add(declared)

    async def _delete(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        options = await requests.delete_options(request)
        conditions = options.get("preconditions") or {}
        if options.get("propagationPolicy") == "Orphan" or options.get("orphanDependents"):
            self.store.orphan(kind, target.name, target.namespace)
        last = self.store.delete(
            kind,
            target.name,
            target.namespace,
            grace_seconds=requests.grace_seconds(request, options),
            uid=conditions.get("uid", ""),
            version=conditions.get("resourceVersion", ""),
            dry_run=requests.dry_run(request),
        )
        if "deletionTimestamp" in last["metadata"]:
            return web.json_response(last)
        details = {"name": target.name, "group": kind.group, "kind": kind.plural, "uid": last["metadata"]["uid"]}
        return web.json_response(_success(details))

    async def _delete_collection(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        options, selector = await requests.delete_options(request), requests.selector(request, kind)
        if kind.namespaced and not target.namespace:
            raise MethodNotAllowed("a collection is deleted in one namespace at a time")
        for obj in self.store.list(kind, target.namespace, selector):
            with contextlib.suppress(NotFound):  # it may have gone with another of them
                grace = requests.grace_seconds(request, options)
                name, namespace = obj["metadata"]["name"], obj["metadata"].get("namespace", "")
                self.store.delete(kind, name, namespace, grace_seconds=grace, dry_run=requests.dry_run(request))
        return web.json_response(_success({"group": kind.group, "kind": kind.plural}))

    async def _get_scale(self, _: web.Request, kind: Kind, target: Target) -> web.Response:
        return web.json_response(scale_of(self.store.get(kind, target.name, target.namespace)))

    async def _update_scale(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        wanted = await requests.body(request)
        return self._scale(request, kind, target, lambda _: wanted)

    async def _patch_scale(self, request: web.Request, kind: Kind, target: Target) -> web.Response:
        change = _change(request.content_type, await requests.plain(request), kind)
        return self._scale(request, kind, target, change)

    def _scale(
        self, request: web.Request, kind: Kind, target: Target, change: Callable[[Object], Object]
    ) -> web.Response:
        done = self.store.modify(
            kind, target.name, target.namespace, lambda obj: scaled(kind, obj, change(scale_of(obj))),
            dry_run=requests.dry_run(request),
        )  # fmt: skip
        return web.json_response(scale_of(done))

    async def _log(self, request: web.Request, kind: Kind, target: Target) -> web.StreamResponse:
        if self._find_log is None:
            raise NotFound("there are no logs here")
        pod = self.store.get(kind, target.name, target.namespace)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)  # one that follows ends with the server
        try:
            return await podlogs.answer(request, self.store, self._find_log, pod)
        finally:
            self._watches.discard(task)

    async def _bind(self, request: web.Request, _: Kind, target: Target) -> web.Response:
        node = ((await requests.body(request)).get("target") or {}).get("name")
        if not node:
            raise BadRequest("target.name: Required value: a binding names a node")
        self.store.bind(target.name, target.namespace, node)
        return web.json_response(_success({}), status=201)

    async def _evict(self, request: web.Request, _: Kind, target: Target) -> web.Response:
        options = (await requests.body(request)).get("deleteOptions") or {}
        grace = options.get("gracePeriodSeconds")
        self.store.delete(PODS, target.name, target.namespace, grace_seconds=grace, dry_run=requests.dry_run(request))
        return web.json_response(_success({}), status=201)


def _has_subresource(kind: Kind, name: str) -> bool:
    known = {"status": kind.status, "scale": kind.scale}
    return known.get(name, kind is PODS and name in ("binding", "eviction", "log"))


def _found(document: Object | None) -> web.Response:
    if document is None:
        raise NotFound("the server could not find the requested resource")
    return web.json_response(document)


def _success(details: Object) -> Object:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def _line(value: Object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _change(content_type: str, body: Any, kind: Kind) -> Callable[[Object], Object]:
    """What a patch of this type does to an object."""
    match content_type:
        case "application/merge-patch+json":
            return lambda obj: patch.merge_patch(obj, body)
        case "application/json-patch+json":
            return lambda obj: patch.json_patch(obj, body)
    keys = patch.merge_keys(kind.kind)
    return lambda obj: patch.strategic_patch(obj, body, keys)


def _check_patch_type(content_type: str, kind: Kind) -> None:
    known = ["application/json-patch+json", "application/merge-patch+json", _APPLY]
    if kind.builtin:  # of other kinds nobody has said by which keys their lists are merged
        known.insert(2, "application/strategic-merge-patch+json")
    if content_type not in known:
        raise UnsupportedMediaType(f"the patch is {content_type}; for {kind.resource} it is one of {', '.join(known)}")
