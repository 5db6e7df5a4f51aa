"""The objects of a lab: in memory, versioned by one counter, watched through one log.

    create / update / modify / apply / bind / delete ──▶ admission ──▶ _commit: number, object, log entry ──▶ watchers

Every write takes the next resourceVersion. A write that changes nothing takes none. An object that is kept is never
changed in place, and callers always get copies (3 µs a small pod) that are theirs to change. All
of it belongs to one event loop: no method waits, hence none is interrupted, and nothing here is safe across threads.

Deletion. Pods on a node are marked (deletionTimestamp) and stay until the kubelet deletes them with `grace_seconds=0`;
objects with finalizers stay until an update removes the last one; a namespace stays, Terminating, until it is empty;
everything else goes at once.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime

import msgspec

from podwire.lab.api import admission, patch, service_addresses
from podwire.lab.api.admission import Object, copied
from podwire.lab.api.errors import AlreadyExists, BadRequest, Conflict, Forbidden, Gone, NotFound
from podwire.lab.api.kinds import NAMESPACES, PODS, SERVICE_CIDRS, SERVICES, Kind, Registry
from podwire.lab.api.log import ChangeLog, EventType
from podwire.lab.api.selectors import EVERYTHING, Selector
from podwire.lab.api.watch import Event, View, bookmark, follow

Objects = list[Object]  # a name of its own, since `list` is a method of Store
PERMANENT_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
_SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # as the real server: no vowels, so no words


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a list. `version` is where a watch carries on. `next_name` (namespace, name) is the last one of this
    page when there are more, else None; `remaining` counts those."""

    items: list[Object]
    version: int
    next_name: tuple[str, str] | None = None
    remaining: int = 0


class Store:
    """See the module. `clock` gives seconds since the epoch, `history` is how many changes watches can go back.

    `first_version` lets a restarted server number on from above its predecessor, so that its clients notice (410).
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        new_uid: Callable[[], str] = lambda: str(uuid.uuid4()),
        history: int = 4096,
        first_version: int = 0,
    ) -> None:
        self.kinds = Registry()
        self.log = ChangeLog(history, first_version)
        self._clock = clock
        self._new_uid = new_uid
        self._objects: dict[tuple[str, str, str], dict[tuple[str, str], Object]] = {}
        self._applied: dict[tuple[str, str], Object] = {}  # (uid, field manager) → what it applied last
        for name in PERMANENT_NAMESPACES:
            self.create(NAMESPACES, {"metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}})

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest resourceVersion."""
        return self.log.head

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object:
        """One object. Raises NotFound."""
        return copied(self._require(kind, name, namespace))

    def find(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """One object, or None."""
        found = self._objects.get(kind.key, {}).get((namespace, name))
        return None if found is None else copied(found)

    def list(self, kind: Kind, namespace: str = "", selector: Selector = EVERYTHING) -> Objects:
        """All objects in view, by namespace and name; an empty namespace means all of them."""
        return self.page(kind, namespace, selector).items

    def page(
        self,
        kind: Kind,
        namespace: str = "",
        selector: Selector = EVERYTHING,
        *,
        limit: int = 0,
        after: tuple[str, str] | None = None,
        version: int | None = None,
    ) -> Page:
        """At most `limit` objects (0: all) whose (namespace, name) is above `after`.

        Pages are not of one instant. `version` is the first page's: a watch from there repeats what changed between
        the pages, which brings a reader to the same end. Raises Gone when that is too long ago.
        """
        if version is not None:
            self._check_version(version)
        view = View(kind=kind, namespace=namespace, selector=selector)
        objects = self._objects.get(kind.key, {})
        keys = sorted(key for key, obj in objects.items() if (after is None or key > after) and view.shows(obj))
        chosen = keys[:limit] if limit else keys
        return Page(
            items=[copied(objects[key]) for key in chosen],
            version=self.version if version is None else version,
            next_name=chosen[-1] if len(chosen) < len(keys) else None,
            remaining=len(keys) - len(chosen),
        )

    async def watch(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        selector: Selector = EVERYTHING,
        after: int | None = None,
        bookmark_seconds: float | None = None,
        initial_bookmark: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Events newer than version `after`; without one, everything there is as ADDED, and then what follows.

        `initial_bookmark` marks the end of that first part. Raises Gone when `after` is too old: list again.
        """
        view = View(kind=kind, namespace=namespace, selector=selector)
        if after is None:
            page = self.page(kind, namespace, selector)
            after = page.version
            for obj in page.items:
                yield Event(EventType.ADDED, obj)
        if initial_bookmark:
            yield bookmark(kind, after, initial_end=True)
        async with aclosing(follow(self.log, view, after, bookmark_seconds)) as events:
            async for event in events:
                yield event

    # --- writing ------------------------------------------------------------------------------------------------

    def create(self, kind: Kind, obj: Object, *, dry_run: bool = False) -> Object:
        """Keeps a new object and returns it as kept. `metadata.generateName` makes a name.

        Raises Invalid, AlreadyExists, NotFound (no such namespace), Forbidden (the namespace is being deleted).
        """
        if isinstance(obj.get("metadata"), dict) and obj["metadata"].get("resourceVersion"):
            raise BadRequest("resourceVersion should not be set on objects to be created")
        obj = self._named(kind, obj)
        new = admission.for_create(kind, obj)
        metadata = new["metadata"]
        if kind.namespaced:
            self._check_namespace(kind, new)
        if (metadata.get("namespace", ""), metadata["name"]) in self._objects.get(kind.key, {}):
            raise AlreadyExists(
                f'{kind.resource} "{metadata["name"]}" already exists', _details(kind, metadata["name"])
            )
        self._assign_addresses(kind, None, new)
        metadata["uid"] = self._new_uid()
        metadata["creationTimestamp"] = self._now()
        return self._commit(kind, None, new, dry_run)

    def update(self, kind: Kind, obj: Object, *, subresource: str = "", dry_run: bool = False) -> Object:
        """Replaces an object, or its `status` alone. One that carries a resourceVersion replaces that version only.

        Raises NotFound, Conflict (the object has changed since), Invalid.
        """
        metadata = obj.get("metadata")
        if not isinstance(metadata, dict) or not metadata.get("name"):
            raise BadRequest("metadata.name: an update needs the object's name")
        namespace = metadata.get("namespace") or "default" if kind.namespaced else ""
        current = self._require(kind, metadata["name"], namespace)
        self._check_same(kind, current, metadata.get("resourceVersion"), metadata.get("uid"))
        new = admission.for_update(kind, current, obj, subresource)
        if not subresource:
            self._assign_addresses(kind, current, new)
        return self._commit(kind, current, new, dry_run)

    def modify(
        self,
        kind: Kind,
        name: str,
        namespace: str,
        change: Callable[[Object], Object],
        *,
        subresource: str = "",
        dry_run: bool = False,
    ) -> Object:
        """Reads, changes and replaces in one step: `change` gets a copy and returns the object that is wanted."""
        wanted = change(copied(self._require(kind, name, namespace)))
        if not isinstance(wanted, dict) or not isinstance(wanted.get("metadata"), dict):
            raise BadRequest("the patch leaves no object with metadata")
        metadata = wanted["metadata"]
        if metadata.get("name") != name or (metadata.get("namespace") or "") != namespace:
            raise BadRequest("metadata.name and metadata.namespace cannot be changed")
        return self.update(kind, wanted, subresource=subresource, dry_run=dry_run)

    def set_status(self, kind: Kind, name: str, namespace: str, status: Object) -> Object:
        """Replaces an object's status. Raises NotFound."""
        return self.modify(kind, name, namespace, lambda obj: {**obj, "status": status}, subresource="status")

    def apply(
        self, kind: Kind, obj: Object, manager: str, *, subresource: str = "", dry_run: bool = False
    ) -> tuple[Object, bool]:
        """Creates the object or merges it in (see `patch.apply_patch`). Returns it, and whether it is new."""
        config = self._named(kind, copied(obj))
        if not isinstance(config.get("metadata"), dict) or not config["metadata"].get("name"):
            raise BadRequest("metadata.name: an applied object needs a name")
        name, namespace = config["metadata"]["name"], config["metadata"].get("namespace", "")
        for field in ("uid", "resourceVersion", "managedFields"):
            config["metadata"].pop(field, None)
        admission.merged_by(kind, config)  # not all defaults: what it does not say is not its to change
        config.pop("spec" if subresource else "status", None)
        current = self._objects.get(kind.key, {}).get((namespace, name))
        if current is None:
            if subresource:
                raise self._missing(kind, name)
            made, new = self.create(kind, config, dry_run=dry_run), True
        else:
            last = self._applied.get((current["metadata"]["uid"], manager))
            keys = patch.merge_keys(kind.kind) if kind.builtin else {}
            self._check_same(kind, current, obj["metadata"].get("resourceVersion"), obj["metadata"].get("uid"))
            wanted = patch.apply_patch(current, config, last, keys)
            made, new = self.update(kind, wanted, subresource=subresource, dry_run=dry_run), False
        if not dry_run:
            self._applied[(made["metadata"]["uid"], manager)] = config
        return made, new

    def bind(self, name: str, namespace: str, node: str) -> Object:
        """Puts a pod on a node. Raises NotFound, and Conflict for a pod that has one or is being deleted."""
        current = self._require(PODS, name, namespace)
        taken = current["spec"].get("nodeName")
        if taken or "deletionTimestamp" in current["metadata"]:
            why = f'is already assigned to node "{taken}"' if taken else "is being deleted"
            raise Conflict(f"pod {name} {why}", _details(PODS, name))
        new = copied(current)
        new["spec"]["nodeName"] = node
        conditions = [one for one in new["status"].get("conditions", ()) if one.get("type") != "PodScheduled"]
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": self._now()}
        new["status"]["conditions"] = [*conditions, scheduled]
        return self._commit(PODS, current, new, dry_run=False)

    def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str = "",
        *,
        grace_seconds: int | None = None,
        uid: str = "",
        version: str = "",
        dry_run: bool = False,
    ) -> Object:
        """Removes an object or marks it (see the module), and returns its last state: one that carries a
        deletionTimestamp is still there. Raises NotFound, Conflict (another uid or version), Forbidden."""
        current = self._require(kind, name, namespace)
        self._check_same(kind, current, version, uid)
        if kind is NAMESPACES and name in PERMANENT_NAMESPACES:
            raise Forbidden(f'namespaces "{name}" is forbidden: this namespace may not be deleted')
        if dry_run:
            return copied(current)
        if kind is NAMESPACES:
            return self._delete_namespace(current)
        grace = _grace(kind, current, grace_seconds)
        if grace == 0 and not current["metadata"].get("finalizers"):
            return self._remove(kind, current)
        return self._mark_deleted(kind, current, grace)

    def orphan(self, kind: Kind, name: str, namespace: str = "") -> None:
        """Takes the object out of all `ownerReferences` (propagationPolicy Orphan). Raises NotFound."""
        uid = self._require(kind, name, namespace)["metadata"]["uid"]
        for other in tuple(self.kinds):
            for obj in tuple(self._objects.get(other.key, {}).values()):
                owners = obj["metadata"].get("ownerReferences") or ()
                if any(one.get("uid") == uid for one in owners):
                    free = copied(obj)
                    free["metadata"]["ownerReferences"] = [one for one in owners if one.get("uid") != uid]
                    self._commit(other, obj, free, dry_run=False)

    # --- inside -------------------------------------------------------------------------------------------------

    def _mark_deleted(self, kind: Kind, current: Object, grace: int) -> Object:
        marked = copied(current)
        metadata = marked["metadata"]
        if metadata.get("deletionGracePeriodSeconds", grace + 1) <= grace:  # a later deletion only ever shortens
            return marked
        metadata["deletionTimestamp"] = self._now(grace)
        metadata["deletionGracePeriodSeconds"] = grace
        return self._commit(kind, current, marked, dry_run=False)

    def _delete_namespace(self, current: Object) -> Object:
        name = current["metadata"]["name"]
        if "deletionTimestamp" not in current["metadata"]:
            terminating = copied(current)
            terminating["metadata"]["deletionTimestamp"] = self._now()
            terminating["metadata"]["deletionGracePeriodSeconds"] = 0
            terminating["status"] = {**terminating.get("status", {}), "phase": "Terminating"}
            current = self._store(NAMESPACES, current, terminating)
        for kind in tuple(self.kinds):
            for namespace, inside in tuple(self._objects.get(kind.key, {})):
                if namespace == name and kind.namespaced:
                    self.delete(kind, inside, namespace)
        self._finish_namespace(name)
        return self.find(NAMESPACES, name) or _last_state(current, self.version)

    def _finish_namespace(self, name: str) -> None:
        """Removes a namespace that is being deleted and holds nothing any more."""
        current = self._objects[NAMESPACES.key].get(("", name))
        if current is None or "deletionTimestamp" not in current["metadata"]:
            return
        if not any(key[0] == name for objects in self._objects.values() for key in objects):
            self._remove(NAMESPACES, current)

    def _commit(self, kind: Kind, current: Object | None, new: Object, dry_run: bool) -> Object:
        """Keeps `new` in the place of `current`, unless they are the same. Returns a copy of what is then there."""
        if current is not None:
            new["metadata"]["resourceVersion"] = current["metadata"]["resourceVersion"]
        if dry_run or new == current:
            return new
        if current is not None and _is_released(new):
            return self._remove(kind, current)
        return self._store(kind, current, new)

    def _store(self, kind: Kind, current: Object | None, new: Object) -> Object:
        kept = copied(new)
        kept["metadata"]["resourceVersion"] = str(self.log.head + 1)
        key = (kept["metadata"].get("namespace", ""), kept["metadata"]["name"])
        self._objects.setdefault(kind.key, {})[key] = kept
        self.log.append(kind, current, kept)
        return copied(kept)

    def _remove(self, kind: Kind, current: Object) -> Object:
        metadata = current["metadata"]
        namespace = metadata.get("namespace", "")
        del self._objects[kind.key][(namespace, metadata["name"])]
        for applied in [key for key in self._applied if key[0] == metadata["uid"]]:
            del self._applied[applied]
        self.log.append(kind, current, None)
        last = _last_state(current, self.version)
        if namespace:
            self._finish_namespace(namespace)
        return last

    def _assign_addresses(self, kind: Kind, current: Object | None, new: Object) -> None:
        """Gives a Service what it gets of the cluster's ServiceCIDRs, and its ports. Raises Invalid."""
        if kind is not SERVICES:
            return
        own = (new["metadata"]["namespace"], new["metadata"]["name"])
        others = (other for key, other in self._objects.get(SERVICES.key, {}).items() if key != own)
        networks = service_addresses.networks_of(self._objects.get(SERVICE_CIDRS.key, {}).values())
        try:
            service_addresses.assign(new, current, others, networks)
        except service_addresses.Refused as refused:
            raise admission.invalid(kind, new, [refused.problem]) from refused

    def _named(self, kind: Kind, obj: Object) -> Object:
        metadata = obj.get("metadata")
        if not isinstance(metadata, dict):
            return obj
        metadata = dict(metadata)
        if not metadata.get("name") and metadata.get("generateName"):
            suffix = "".join(random.choices(_SUFFIX_LETTERS, k=5))
            metadata["name"] = f"{str(metadata['generateName'])[:58]}{suffix}"
        if kind.namespaced:
            metadata["namespace"] = metadata.get("namespace") or "default"
        else:
            metadata.pop("namespace", None)
        return {**obj, "metadata": metadata}

    def _require(self, kind: Kind, name: str, namespace: str) -> Object:
        found = self._objects.get(kind.key, {}).get((namespace, name))
        if found is None:
            raise self._missing(kind, name)
        return found

    def _missing(self, kind: Kind, name: str) -> NotFound:
        return NotFound(f'{kind.resource} "{name}" not found', _details(kind, name))

    def _check_namespace(self, kind: Kind, new: Object) -> None:
        name = new["metadata"]["namespace"]
        if "deletionTimestamp" in self._require(NAMESPACES, name, "")["metadata"]:
            raise Forbidden(
                f'{kind.resource} "{new["metadata"]["name"]}" is forbidden: unable to create new content in namespace '
                f"{name} because it is being terminated"
            )

    def _check_same(self, kind: Kind, current: Object, version: str | None, uid: str | None) -> None:
        metadata = current["metadata"]
        if uid and uid != metadata["uid"]:
            why = f"the UID in the precondition ({uid}) is not the object's ({metadata['uid']})"
        elif version and version not in ("0", metadata["resourceVersion"]):
            why = "the object has been modified; please apply your changes to the latest version and try again"
        else:
            return
        name = metadata["name"]
        raise Conflict(f'Operation cannot be fulfilled on {kind.resource} "{name}": {why}', _details(kind, name))

    def _check_version(self, version: int) -> None:
        try:
            self.log.after(version)
        except Gone as error:
            raise Gone(
                "the continue parameter is too old to display a consistent list: list again from the start"
            ) from error

    def _now(self, plus_seconds: int = 0) -> str:
        return datetime.fromtimestamp(self._clock() + plus_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _last_state(obj: Object, version: int) -> Object:
    """What a deletion returns: without a deletionTimestamp, since the object is gone, not going."""
    last = copied(obj)
    last["metadata"]["resourceVersion"] = str(version)
    last["metadata"].pop("deletionTimestamp", None)
    return last


def _details(kind: Kind, name: str) -> Object:
    return {"name": name, "group": kind.group, "kind": kind.plural}


def _grace(kind: Kind, current: Object, asked: int | None) -> int:
    if kind is not PODS or not current["spec"].get("nodeName"):
        return 0
    if asked is not None:
        return max(0, asked)
    return max(1, int(current["spec"].get("terminationGracePeriodSeconds", 30)))  # 0 only when someone asks


def _is_released(obj: Object) -> bool:
    """Whether an object that is being deleted has nothing left to wait for."""
    metadata = obj["metadata"]
    waits = (
        metadata.get("finalizers") or metadata.get("deletionGracePeriodSeconds", 0) > 0 or obj["kind"] == "Namespace"
    )
    return "deletionTimestamp" in metadata and not waits
