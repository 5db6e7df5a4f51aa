"""What `kubectl logs` reads: the files that containers write, whole, from their end, or as they grow.

    GET …/pods/NAME/log?container=C   &tailLines=N &limitBytes=N &previous=true &follow=true

A container's output is in one file, the one before its last restart in another; `find` knows where. Times are not kept
(`timestamps`, `sinceSeconds` and `sinceTime` are refused). A follower ends when the pod is gone or the container has
ended for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from podwire.lab.api import requests
from podwire.lab.api.errors import BadRequest
from podwire.lab.api.kinds import PODS
from podwire.lab.api.store import Store

Object = dict[str, Any]
FindLog = Callable[[str, str, str, bool], Path]  # namespace, pod, container, whether the one before the last restart
_LOOK_SECONDS = 0.2  # between looks at a file that is followed
_NOT_KEPT = ("timestamps", "sinceSeconds", "sinceTime")


async def answer(request: web.Request, store: Store, find: FindLog, pod: Object) -> web.StreamResponse:
    """The log that the request asks for. Raises BadRequest when the pod has no such container, or it has not begun."""
    query = request.query
    for name in _NOT_KEPT:
        if query.get(name, "") not in ("", "false"):
            raise BadRequest(f"{name}: this lab does not keep the time of a line")
    container = _container(pod, query.get("container", ""))
    metadata = pod["metadata"]
    previous = query.get("previous") == "true"
    path = find(metadata["namespace"], metadata["name"], container, previous)
    if not path.exists():
        what = "previous terminated container" if previous else "container"
        state = "not found" if previous else "is waiting to start"
        raise BadRequest(f'{what} "{container}" in pod "{metadata["name"]}" {state}')
    tail, limit = requests.number(request, "tailLines"), requests.number(request, "limitBytes")
    with path.open("rb") as file:
        data = file.read()
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        text = data if tail is None else b"".join(data.splitlines(keepends=True)[len(data.splitlines()) - tail :])
        await response.write(text if limit is None else text[:limit])
        following = query.get("follow") == "true"
        while following:
            following = _may_grow(store, pod, container)  # asked before reading: its last words are read, too
            if more := file.read():
                await response.write(more)
            if following:
                await asyncio.sleep(_LOOK_SECONDS)
    return response


def _container(pod: Object, name: str) -> str:
    spec = pod["spec"]
    known = [one["name"] for one in (*(spec.get("initContainers") or ()), *spec["containers"])]
    if name and name not in known:
        raise BadRequest(f"container {name} is not valid for pod {pod['metadata']['name']}")
    if not name and len(known) > 1:
        choices = " ".join(known)
        raise BadRequest(
            f"a container name must be specified for pod {pod['metadata']['name']}, choose one of: [{choices}]"
        )
    return name or str(known[0])


def _may_grow(store: Store, pod: Object, container: str) -> bool:
    metadata = pod["metadata"]
    now = store.find(PODS, metadata["name"], metadata["namespace"])
    if now is None or now["metadata"]["uid"] != metadata["uid"]:
        return False
    status = now.get("status") or {}
    statuses = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    state = next((one.get("state") or {} for one in statuses if one["name"] == container), {})
    return "terminated" not in state
