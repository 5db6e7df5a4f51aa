"""The lab's controllers: Deployments and ReplicaSets, what belongs to one that is gone, Services' slices and balancers.

    store's log ─▶ something changed ─▶ all plans, from the objects as they are ─▶ actions ─▶ store ─▶ …

Level-triggered: a pass looks at all that there is and does what is missing, so it matters neither what woke it nor what
the last one got done. Passes follow each other until one changes nothing. A pass over 50 pods takes about 2 ms; at most
one is made every _PAUSE_SECONDS. The plans are pure: deployments.py, replicasets.py, workloads.py,
endpoints.py, load_balancers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from podwire.kube.objects import SERVICE_NAME_LABEL
from podwire.lab import names
from podwire.lab.api.errors import ApiError, Conflict, Gone, NotFound
from podwire.lab.api.kinds import DEPLOYMENTS, ENDPOINT_SLICES, NODES, PODS, REPLICA_SETS, SERVICES
from podwire.lab.api.service_addresses import Refused
from podwire.lab.api.store import Store
from podwire.lab.deployments import is_rolled_out, plan_deployment
from podwire.lab.endpoints import ZONE_LABEL, plan_endpoint_slices, plan_stray_slices
from podwire.lab.events import record
from podwire.lab.load_balancers import ingress_of, is_balanced, plan_balanced
from podwire.lab.replicasets import plan_replica_set
from podwire.lab.workloads import Action, Create, Delete, SetStatus, Update, is_going, plan_orphans

_log = logging.getLogger(__name__)
_OWNING = (DEPLOYMENTS, REPLICA_SETS, PODS)
_KINDS = (*_OWNING, SERVICES, ENDPOINT_SLICES, NODES)
_PAUSE_SECONDS = 0.02
_TICK_SECONDS = 1.0  # while something waits for time to pass: minReadySeconds, a progress deadline

Object = dict[str, Any]


class Controllers:
    """All controllers of a lab on its store. `clock` is in seconds since the epoch.

    `balanced` are the networks of load balancers' addresses.
    """

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.time, balanced: Sequence[names.Network] = ()
    ) -> None:
        self._store = store
        self._balanced = balanced
        self._refused: set[tuple[str, str]] = set()  # what has been said, by uid
        self._clock = clock
        self._seen = -1

    async def run(self) -> None:
        """Follows the store for ever."""
        grown = asyncio.Event()
        self._store.log.listeners.add(grown.set)
        try:
            while True:
                grown.clear()
                if self._concerned():
                    self.look()
                waiting = _TICK_SECONDS if self._waits_for_time() else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(waiting):
                        await grown.wait()
                if not grown.is_set():
                    self._seen = -1
                await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            self._store.log.listeners.discard(grown.set)

    def _concerned(self) -> bool:
        """Whether anything of our kinds has changed since the last look."""
        seen, self._seen = self._seen, self._store.version
        if seen < 0:
            return True
        try:
            return any(change.kind in _KINDS for change in self._store.log.after(seen))
        except Gone:  # too much has happened to know
            return True

    def look(self) -> None:
        """One pass: what is to be done now, done."""
        for action in plan_orphans(*(self._store.list(kind) for kind in _OWNING)):
            self._do(action)
        now = self._clock()
        if deployments := self._store.list(DEPLOYMENTS):
            replica_sets, pods = self._by_namespace(REPLICA_SETS), self._by_namespace(PODS)
            for one in deployments:
                space = one["metadata"]["namespace"]
                self._carry_out(one, partial(plan_deployment, one, replica_sets[space], pods[space], now))
        if found := self._store.list(REPLICA_SETS):
            pods = self._by_namespace(PODS)
            for one in found:
                self._carry_out(one, partial(plan_replica_set, one, pods[one["metadata"]["namespace"]], now))

        self._look_at_services()

    def _look_at_services(self) -> None:
        services, slices = self._store.list(SERVICES), self._by_namespace(ENDPOINT_SLICES)
        for action in plan_stray_slices(services, [one for some in slices.values() for one in some]):
            self._do(action)
        if not services:
            return
        zones = {
            node["metadata"]["name"]: (node["metadata"].get("labels") or {}).get(ZONE_LABEL, "")
            for node in self._store.list(NODES)
        }
        pods = self._by_namespace(PODS)
        for one in services:
            space, name = one["metadata"]["namespace"], one["metadata"]["name"]
            of_it = [
                each for each in slices[space] if (each["metadata"].get("labels") or {}).get(SERVICE_NAME_LABEL) == name
            ]
            self._carry_out(one, partial(plan_endpoint_slices, one, pods[space], zones, of_it))
        for one in services:
            if is_balanced(one) or ingress_of(one):  # one after the other: none may get what another just got
                self._carry_out(one, partial(plan_balanced, one, self._store.list(SERVICES), self._balanced))

    def _by_namespace(self, kind: Any) -> dict[str, list[Object]]:
        found: dict[str, list[Object]] = defaultdict(list)
        for obj in self._store.list(kind):
            found[obj["metadata"]["namespace"]].append(obj)
        return found

    def _waits_for_time(self) -> bool:
        return any(
            one["spec"].get("minReadySeconds") or not is_rolled_out(one, one.get("status") or {})
            for one in (*self._store.list(DEPLOYMENTS), *self._store.list(REPLICA_SETS))
            if not is_going(one) and (one["kind"] == "Deployment" or one["spec"].get("minReadySeconds"))
        )

    def _carry_out(self, owner: Object, plan: Callable[[], list[Action]]) -> None:
        """Does what is planned for one owner; what cannot be done now is planned again by a later pass."""
        try:
            actions = plan()
        except Refused as refused:
            if (key := (owner["metadata"]["uid"], str(refused))) not in self._refused:
                self._refused.add(key)
                record(self._store, owner, "AllocationFailed", str(refused))
            return
        except (ApiError, LookupError, TypeError, ValueError, AttributeError) as error:  # an object of a shape that
            _log.exception("%s %s: no plan", owner["kind"], owner["metadata"]["name"])  # admission lets through
            record(self._store, owner, "NoPlan", f"{type(error).__name__}: {error}")
            return
        for action in actions:
            try:
                self._do(action)
            except (Conflict, NotFound):  # it has changed since it was read: the next pass sees it as it is
                continue
            except ApiError as error:
                _log.warning("%s %s: %s", owner["kind"], owner["metadata"]["name"], error)
                record(self._store, owner, "FailedCreate", str(error))
                return

    def _do(self, action: Action) -> None:
        match action:
            case Create(kind, obj, owner):
                made = self._store.create(kind, obj)
                if owner is not None:
                    record(self._store, owner, *_created(made), "Normal")
            case Update(kind, obj, owner, why):
                self._store.update(kind, obj)
                if why[0]:
                    record(self._store, owner, *why, "Normal")
            case SetStatus(kind, obj, status):
                metadata = obj["metadata"]
                self._store.set_status(kind, metadata["name"], metadata["namespace"], status)
            case Delete(kind, obj, owner):
                metadata = obj["metadata"]
                self._store.delete(kind, metadata["name"], metadata["namespace"], uid=metadata["uid"])
                if owner is not None:
                    message = f"Deleted {kind.kind.lower()}: {metadata['name']}"
                    record(self._store, owner, "SuccessfulDelete", message, "Normal")


def _created(made: Object) -> tuple[str, str]:
    """The event of something that was made: reason and message, as Kubernetes words them."""
    name = made["metadata"]["name"]
    if made["kind"] == REPLICA_SETS.kind:
        return "ScalingReplicaSet", f"Scaled up replica set {name} from 0 to {made['spec']['replicas']}"
    return "SuccessfulCreate", f"Created {made['kind'].lower()}: {name}"
