"""Deployments and ReplicaSets: what is planned, as tables, and what comes of plans that are carried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.lab.api.errors import Invalid
from podwire.lab.api.kinds import DEPLOYMENTS, PODS, REPLICA_SETS
from podwire.lab.api.store import Store
from podwire.lab.controllers import Controllers
from podwire.lab.deployments import Size, find_new, limits, plan_deployment, rolling_sizes, template_hash
from podwire.lab.replicasets import deletion_order, plan_replica_set
from podwire.lab.workloads import Create, Delete, SetStatus, Update, condition, is_active, timestamp

Object = dict[str, Any]
EPOCH = 1_700_000_000.0


def template(image: str = "web:1", **labels: str) -> Object:
    return {"metadata": {"labels": {"app": "web", **labels}}, "spec": {"containers": [{"name": "c", "image": image}]}}


def deployment(replicas: int = 3, image: str = "web:1", **spec: Any) -> Object:
    return {
        "metadata": {"name": "web"},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template(image), **spec
        },
    }  # fmt: skip


class World:
    """A store with controllers, pods that do what the test says, and a clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = EPOCH
        self.store = Store(clock=lambda: self.now)
        self.controllers = Controllers(self.store, clock=lambda: self.now)

    def apply(self, obj: Object) -> None:
        self.store.apply(DEPLOYMENTS, obj, "test")

    def look(self, times: int = 12) -> None:
        """Passes until one changes nothing; that must come soon."""
        for _ in range(times):
            version = self.store.version
            self.controllers.look()
            if self.store.version == version:
                return
        raise AssertionError(f"{times} passes, and still something to do")

    def pods(self, **labels: str) -> list[Object]:
        found = [pod for pod in self.store.list(PODS) if is_active(pod)]
        return [pod for pod in found if labels.items() <= (pod["metadata"].get("labels") or {}).items()]

    def images(self) -> list[str]:
        return sorted(pod["spec"]["containers"][0]["image"] for pod in self.pods())

    def make_ready(self, pod: Object, ready: bool = True) -> None:
        state = {"type": "Ready", "status": str(ready), "lastTransitionTime": timestamp(self.now)}
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        self.store.set_status(PODS, name, namespace, {"phase": "Running", "conditions": [state]})

    def run_all(self) -> None:
        """Every pod becomes ready, and what follows from that, until nothing does."""
        for _ in range(60):
            self.look()
            waiting = [pod for pod in self.pods() if condition(pod, "Ready").get("status") != "True"]
            if not waiting:
                return
            for pod in waiting:
                self.make_ready(pod)
        raise AssertionError("it does not come to an end")

    def status(self) -> Object:
        status: Object = self.store.get(DEPLOYMENTS, "web", "default")["status"]
        return status

    def sizes(self) -> dict[str, int]:
        found = self.store.list(REPLICA_SETS)
        return {one["spec"]["template"]["spec"]["containers"][0]["image"]: one["spec"]["replicas"] for one in found}


@pytest.fixture
def world() -> World:
    return World()


# --- Deployments, as their user sees them -----------------------------------------------------------------------


def test_a_deployment_makes_a_replica_set_and_that_makes_pods(world: World) -> None:
    world.apply(deployment(3))
    world.look()
    (replica_set,) = world.store.list(REPLICA_SETS)
    digest = replica_set["metadata"]["labels"]["pod-template-hash"]
    assert replica_set["metadata"]["name"] == f"web-{digest}"
    assert len(world.pods()) == 3
    for pod in world.pods():
        name = pod["metadata"]["name"]
        assert name.startswith(f"web-{digest}-")
        assert len(name.rpartition("-")[2]) == 5
        assert pod["metadata"]["labels"] == {"app": "web", "pod-template-hash": digest}
        (owner,) = pod["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == (
            "ReplicaSet",
            replica_set["metadata"]["uid"],
            True,
        )
    assert world.status()["unavailableReplicas"] == 3
    assert condition({"status": world.status()}, "Available")["status"] == "False"
    world.run_all()
    said = world.status()
    counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas", "unavailableReplicas")
    assert [said[field] for field in counts] == [3, 3, 3, 3, 0]
    assert said["observedGeneration"] == 1
    assert condition({"status": said}, "Available")["status"] == "True"
    assert condition({"status": said}, "Progressing")["reason"] == "NewReplicaSetAvailable"


def test_a_deleted_pod_is_replaced_by_one_of_another_name(world: World) -> None:
    world.apply(deployment(2))
    world.run_all()
    first, second = world.pods()
    world.store.delete(PODS, first["metadata"]["name"], "default")
    world.run_all()
    names = {pod["metadata"]["name"] for pod in world.pods()}
    assert len(names) == 2
    assert second["metadata"]["name"] in names
    assert first["metadata"]["name"] not in names


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 0), (0, 2)])
def test_scaling(world: World, before: int, after: int) -> None:
    world.apply(deployment(before))
    world.run_all()
    kept = {pod["metadata"]["name"] for pod in world.pods()}
    world.apply(deployment(after))
    world.run_all()
    now = {pod["metadata"]["name"] for pod in world.pods()}
    assert len(now) == after
    assert now <= kept or kept <= now, "pods that may stay stay"
    assert len(world.store.list(REPLICA_SETS)) == 1


def test_a_changed_template_is_rolled_out_and_back_to_the_replica_set_that_was(world: World) -> None:
    world.apply(deployment(3, "web:1"))
    world.run_all()
    (first,) = world.store.list(REPLICA_SETS)
    world.apply(deployment(3, "web:2"))
    world.run_all()
    assert world.images() == ["web:2"] * 3
    assert world.sizes() == {"web:1": 0, "web:2": 3}
    world.apply(deployment(3, "web:1"))
    world.run_all()
    assert world.sizes() == {"web:1": 3, "web:2": 0}
    again = world.store.get(REPLICA_SETS, first["metadata"]["name"], "default")
    assert again["metadata"]["uid"] == first["metadata"]["uid"]
    assert again["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "3"


def test_a_rollout_whose_pods_never_get_ready_keeps_the_old_ones_serving(world: World) -> None:
    world.apply(deployment(4, "web:1"))
    world.run_all()
    world.apply(deployment(4, "web:2"))
    world.look()
    assert world.images() == ["web:1"] * 3 + ["web:2"] * 2, "25 % of 4: one fewer, one more"
    world.now += 601
    world.look()
    progress = condition({"status": world.status()}, "Progressing")
    assert (progress["status"], progress["reason"]) == ("False", "ProgressDeadlineExceeded")
    world.run_all()
    assert condition({"status": world.status()}, "Progressing")["status"] == "True"


def test_recreate_takes_the_last_old_pod_away_before_the_first_new_one(world: World) -> None:
    world.apply(deployment(2, "web:1", strategy={"type": "Recreate"}))
    world.run_all()
    for pod in world.pods():
        world.store.bind(pod["metadata"]["name"], "default", "node1")  # from here on a deletion takes until it is done
    world.apply(deployment(2, "web:2", strategy={"type": "Recreate"}))
    world.look()
    assert world.images() == []
    first, second = world.store.list(PODS)
    world.store.delete(PODS, first["metadata"]["name"], "default", grace_seconds=0)
    world.look()
    assert world.images() == [], "one is still on its way out"
    world.store.delete(PODS, second["metadata"]["name"], "default", grace_seconds=0)
    world.run_all()
    assert world.images() == ["web:2"] * 2


def test_a_paused_deployment_is_scaled_but_not_rolled_out(world: World) -> None:
    world.apply(deployment(1, "web:1"))
    world.run_all()
    world.apply(deployment(1, "web:2", paused=True))
    world.run_all()
    assert world.images() == ["web:1"]
    world.apply(deployment(1, "web:2", paused=False))
    world.run_all()
    assert world.images() == ["web:2"]


def test_min_ready_seconds_are_waited_for(world: World) -> None:
    world.apply(deployment(1, minReadySeconds=30))
    world.run_all()
    assert (world.status()["readyReplicas"], world.status()["availableReplicas"]) == (1, 0)
    world.now += 30
    world.look()
    assert world.status()["availableReplicas"] == 1


def test_deletion_takes_everything_along_and_nothing_else(world: World) -> None:
    bare = {"metadata": {"name": "bare", "labels": {"app": "web"}}, "spec": {"containers": [{"name": "c"}]}}
    world.store.create(PODS, bare)
    world.apply(deployment(2))
    world.run_all()
    assert len(world.store.list(PODS)) == 3, "a pod of the same labels that was made by hand is not counted"
    world.store.delete(DEPLOYMENTS, "web", "default")
    world.look()
    assert world.store.list(REPLICA_SETS) == []
    assert [pod["metadata"]["name"] for pod in world.store.list(PODS)] == ["bare"]


def test_what_is_orphaned_on_purpose_stays(world: World) -> None:
    world.apply(deployment(2))
    world.run_all()
    world.store.orphan(DEPLOYMENTS, "web", "default")
    world.store.delete(DEPLOYMENTS, "web", "default")
    world.look()
    assert len(world.store.list(REPLICA_SETS)) == 1
    assert len(world.pods()) == 2


def test_old_replica_sets_are_kept_up_to_the_limit(world: World) -> None:
    for number in range(5):
        world.apply(deployment(1, f"web:{number}", revisionHistoryLimit=2))
        world.run_all()
    assert world.sizes() == {"web:2": 0, "web:3": 0, "web:4": 1}


def test_a_replica_set_of_its_own_and_a_pod_that_is_relabelled_out_of_it(world: World) -> None:
    selector = {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}
    spec = {"replicas": 2, "selector": selector, "template": template()}
    bare = {"metadata": {"name": "bare", "labels": {"app": "web"}}, "spec": {"containers": [{"name": "c"}]}}
    world.store.create(PODS, bare)
    world.store.create(REPLICA_SETS, {"metadata": {"name": "alone"}, "spec": spec})
    world.run_all()
    assert len(world.pods()) == 3, "one that was made by hand is not adopted"
    world.store.delete(PODS, "bare", "default")
    taken = world.pods()[0]
    world.store.update(PODS, {**taken, "metadata": {**taken["metadata"], "labels": {"app": "debug"}}})
    world.run_all()
    assert len(world.pods(app="web")) == 2
    (free,) = world.pods(app="debug")
    assert free["metadata"]["ownerReferences"] == []
    world.store.delete(REPLICA_SETS, "alone", "default")
    world.look()
    assert [pod["metadata"]["name"] for pod in world.pods()] == [taken["metadata"]["name"]]


def test_applying_again_does_not_take_back_what_kubectl_scale_did(world: World) -> None:
    silent = deployment()
    del silent["spec"]["replicas"]
    world.apply(silent)
    world.store.modify(DEPLOYMENTS, "web", "default", lambda obj: {**obj, "spec": {**obj["spec"], "replicas": 5}})
    world.apply(silent)
    world.look()
    assert len(world.pods()) == 5


def test_two_deployments_of_one_name_live_in_two_namespaces(world: World) -> None:
    for namespace in ("default", "kube-system"):
        world.apply({**deployment(2), "metadata": {"name": "web", "namespace": namespace}})
    world.run_all()
    placed = sorted(pod["metadata"]["namespace"] for pod in world.pods())
    assert placed == ["default", "default", "kube-system", "kube-system"]


def test_an_object_that_nobody_can_plan_for_does_not_stop_the_others(world: World) -> None:
    world.store.create(DEPLOYMENTS, {**deployment(1), "metadata": {"name": "broken"}})
    broken = world.store.get(DEPLOYMENTS, "broken", "default")
    world.store.set_status(DEPLOYMENTS, "broken", "default", {**broken.get("status", {}), "conditions": ["?"]})
    world.apply(deployment(1))
    world.controllers.look()
    world.controllers.look()
    assert len([pod for pod in world.pods() if pod["metadata"]["name"].startswith("web-")]) == 1


# --- steps of a rolling update ----------------------------------------------------------------------------------

STEPS: dict[str, tuple[int, int, int, Size | None, list[Size], int, list[int]]] = {
    "the first": (3, 1, 0, None, [], 3, []),
    "the new one starts within the surge": (4, 1, 1, None, [Size(4, 4)], 1, [3]),
    "nothing may be missing, so nothing goes yet": (3, 1, 0, Size(1, 0), [Size(3, 3)], 1, [3]),
    "one is available, one may go": (3, 1, 0, Size(1, 1), [Size(3, 3)], 1, [2]),
    "and the next comes": (3, 1, 0, Size(1, 1), [Size(2, 2)], 2, [2]),
    "no surge: first one fewer": (2, 0, 1, Size(0, 0), [Size(2, 2)], 0, [1]),
    "what serves nobody goes first": (3, 1, 0, Size(1, 0), [Size(3, 2)], 1, [3]),
    "what serves nobody goes first, the rest stays": (3, 1, 1, Size(1, 0), [Size(1, 0), Size(2, 2)], 1, [0, 2]),
    "the oldest first": (3, 3, 0, Size(3, 2), [Size(1, 1), Size(2, 2)], 3, [0, 1]),
    "the end": (3, 1, 0, Size(3, 3), [Size(1, 1)], 3, [0]),
    "scaled down": (1, 1, 0, Size(3, 3), [], 1, []),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_of_a_rolling_update(case: str) -> None:
    replicas, surge, unavailable, new, old, grown, shrunk = STEPS[case]
    assert rolling_sizes(replicas, surge, unavailable, new, old) == (grown, shrunk)


@given(st.integers(0, 12), st.integers(0, 5), st.integers(0, 5), st.lists(st.integers(0, 6), max_size=3), st.data())
def test_a_rolling_update_ends_and_stays_within_its_limits(
    replicas: int, surge: int, unavailable: int, sizes: list[int], data: st.DataObject
) -> None:
    """Whatever order pods get ready in: never too many, never too few that were there, and it ends."""
    if not surge and not unavailable:
        surge = 1
    unavailable = min(unavailable, replicas)
    new, old = Size(0, 0), [Size(size, size) for size in sizes]
    begun = sum(sizes)
    for _ in range(300):
        grown, shrunk = rolling_sizes(replicas, surge, unavailable, new, old)
        new = Size(grown, min(new.available, grown))
        old = [Size(size, min(size, one.available)) for size, one in zip(shrunk, old, strict=True)]
        assert new.wanted + sum(one.wanted for one in old) <= max(replicas + surge, begun)
        available = new.available + sum(one.available for one in old)
        assert available >= min(replicas - unavailable, begun)
        if new == Size(replicas, replicas) and not any(one.wanted for one in old):
            return
        if new.available < new.wanted:
            new = Size(new.wanted, new.available + data.draw(st.integers(1, new.wanted - new.available)))
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("replicas", "rolling", "wanted"),
    [
        (4, {}, (1, 1)),
        (1, {}, (1, 0)),
        (10, {"maxSurge": "25%", "maxUnavailable": "25%"}, (3, 2)),
        (10, {"maxSurge": 0, "maxUnavailable": "30%"}, (0, 3)),
        (3, {"maxSurge": 0, "maxUnavailable": "10%"}, (0, 1)),
        (3, {"maxSurge": "100%", "maxUnavailable": 9}, (3, 3)),
    ],
)
def test_limits(replicas: int, rolling: Object, wanted: tuple[int, int]) -> None:
    assert limits({"strategy": {"rollingUpdate": rolling}}, replicas) == wanted


# --- plans by themselves ----------------------------------------------------------------------------------------


def _pod(name: str, node: str = "n1", phase: str = "Running", ready: bool = True, restarts: int = 0) -> Object:
    status = {
        "phase": phase, "containerStatuses": [{"restartCount": restarts}],
        "conditions": [{"type": "Ready", "status": str(ready)}],
    }  # fmt: skip
    return {"metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"nodeName": node},
            "status": status}  # fmt: skip


def test_pods_go_in_the_order_in_which_they_are_missed_least() -> None:
    young = _pod("young", node="n3")
    young["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    pods = [
        _pod("old", node="n4"), young, _pod("restarted", node="n5", restarts=2), _pod("crowded", node="n1"),
        _pod("crowded too", node="n1"), _pod("not ready", ready=False, node="n6"),
        _pod("pending", phase="Pending", ready=False), _pod("nowhere", node="", phase="Pending", ready=False),
    ]  # fmt: skip
    order = [pod["metadata"]["name"] for pod in deletion_order(pods)]
    assert order == ["nowhere", "pending", "not ready", "crowded", "crowded too", "restarted", "young", "old"]


def test_ended_pods_do_not_count_and_are_left_alone() -> None:
    owner = {"metadata": {"name": "rs", "namespace": "default", "uid": "u"},
             "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "web"}}, "template": template()}}  # fmt: skip
    pod = _pod("done", phase="Failed")
    pod["metadata"] |= {"labels": {"app": "web"}, "ownerReferences": [{"uid": "u", "controller": True}]}
    actions = plan_replica_set(owner, [pod], EPOCH)
    assert [type(action) for action in actions] == [Create, SetStatus]


def test_a_plan_that_is_carried_out_leaves_nothing_to_do(world: World) -> None:
    world.apply(deployment(2))
    world.run_all()
    (one,) = world.store.list(DEPLOYMENTS)
    actions = plan_deployment(one, world.store.list(REPLICA_SETS), world.store.list(PODS), world.now + 1000)
    assert [type(action) for action in actions] == [SetStatus]
    assert not any(isinstance(action, Create | Update | Delete) for action in actions)
    assert actions[0].status == one["status"]  # type: ignore[union-attr]


def test_empty_fields_make_no_other_template() -> None:
    plain, typed = template(), template(**{"pod-template-hash": "x"})
    typed["metadata"]["creationTimestamp"] = None
    typed["spec"]["containers"][0]["resources"] = {}
    assert template_hash(plain) == template_hash(typed)
    replica_set = {"metadata": {"name": "a"}, "spec": {"template": typed}}
    assert find_new({"spec": {"template": plain}}, [replica_set]) is replica_set
    assert template_hash(plain) != template_hash(template("web:2"))


# --- what is refused --------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Object], object], str]] = {
    "no selector": (lambda d: d["spec"].pop("selector"), "spec.selector: Required value"),
    "a selector that does not match": (
        lambda d: d["spec"]["selector"]["matchLabels"].update(app="db"), "`selector` does not match template `labels`",
    ),
    "no template": (lambda d: d["spec"].pop("template"), "spec.template: Required value"),
    "no containers": (lambda d: d["spec"]["template"]["spec"].pop("containers"), "spec.template.spec.containers: Req"),
    "fewer than no pods": (lambda d: d["spec"].update(replicas=-1), "spec.replicas: Invalid value: -1"),
    "replicas in quotes": (lambda d: d["spec"].update(replicas="3"), 'spec.replicas: Invalid value: "3"'),
    "pods that end": (lambda d: d["spec"]["template"]["spec"].update(restartPolicy="Never"), 'supported values: "Alw'),
    "no such strategy": (lambda d: d["spec"].update(strategy={"type": "BigBang"}), "spec.strategy.type: Unsupported"),
    "a surge of some": (
        lambda d: d["spec"].update(strategy={"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "some"}}),
        'maxSurge: Invalid value: "some"',
    ),
    "no such operator": (
        lambda d: d["spec"].update(selector={"matchExpressions": [{"key": "app", "operator": "Like"}]}), "'Like'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, world: World) -> None:
    change, said = REFUSED[case]
    wrong = deployment()
    change(wrong)
    with pytest.raises(Invalid) as caught:
        world.store.create(DEPLOYMENTS, wrong)
    assert said in str(caught.value)


def test_a_selector_cannot_change(world: World) -> None:
    world.apply(deployment())
    changed = deployment(template=template(tier="front"))
    changed["spec"]["selector"] = {"matchLabels": {"tier": "front"}}
    with pytest.raises(Invalid, match="field is immutable"):
        world.store.update(DEPLOYMENTS, changed)
