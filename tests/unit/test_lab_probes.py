"""What probes mean, what a pod's status says, what a container's environment is: tables, the clock passed in."""

from __future__ import annotations

from typing import Any

import pytest

from podwire.lab.api import table
from podwire.lab.api.kinds import PODS
from podwire.lab.podstatus import pod_status
from podwire.lab.probes import Exec, Health, HttpGet, Probe, TcpSocket, plan_probes
from podwire.lab.probing import request
from podwire.lab.program import ConfigMissing, container_environment, plan_init_program

Object = dict[str, Any]


def probe(**fields: Any) -> Probe:
    return Probe(action=TcpSocket(port=80), **fields)


# --- results ----------------------------------------------------------------------------------------------------

# A story is a row of "kind result"; after each, what is to be known: S(tarted), R(eady), F(ailed).
STORIES: dict[str, tuple[dict[str, Probe], list[tuple[str, str]]]] = {
    "readiness: unready until the first success": ({"readiness": probe()}, [("", "S"), ("readiness +", "SR")]),
    "readiness: as many successes in a row as are asked for": (
        {"readiness": probe(success_threshold=2)},
        [("readiness +", "S"), ("readiness -", "S"), ("readiness +", "S"), ("readiness +", "SR")],
    ),
    "readiness: as many failures in a row as are allowed": (
        {"readiness": probe(failure_threshold=2)},
        [("readiness +", "SR"), ("readiness -", "SR"), ("readiness +", "SR"), ("readiness -", "SR"),
         ("readiness -", "S"), ("readiness +", "SR")],
    ),
    "readiness never restarts": (
        {"readiness": probe(failure_threshold=1)}, [("readiness -", "S"), ("readiness -", "S"), ("readiness -", "S")],
    ),
    "liveness: ready at once, restarted at the threshold": (
        {"liveness": probe(failure_threshold=3)},
        [("", "SR"), ("liveness -", "SR"), ("liveness -", "SR"), ("liveness -", "SF")],
    ),
    "liveness: a success begins the count anew": (
        {"liveness": probe(failure_threshold=2)},
        [("liveness -", "SR"), ("liveness +", "SR"), ("liveness -", "SR"), ("liveness -", "SF")],
    ),
    "startup: nothing holds until it has passed": ({"startup": probe()}, [("", ""), ("startup +", "SR")]),
    "startup: then the others": (
        {"startup": probe(), "readiness": probe()}, [("startup -", ""), ("startup +", "S"), ("readiness +", "SR")],
    ),
    "startup: failed": (
        {"startup": probe(failure_threshold=2), "liveness": probe()}, [("startup -", ""), ("startup -", "F")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STORIES)
def test_what_results_mean(case: str) -> None:
    probes, steps = STORIES[case]
    health, now = Health(probes, 0.0), 0.0
    for step, wanted in steps:
        if step:
            kind, result = step.split()
            assert kind in health.kinds
            now = health.due_at(kind)
            before = (health.started, health.ready, health.failed)
            changed = health.record(kind, result == "+", now)
            assert changed == (before != (health.started, health.ready, health.failed))
        known = "S" * health.started + "R" * health.ready + "F" * bool(health.failed)
        assert known == wanted, step
        assert not (health.failed and health.kinds), "who has failed is not looked at any more"


def test_when_probes_are_made() -> None:
    health = Health({"readiness": probe(initial_delay=5, period=2)}, 100.0)
    assert health.due_at("readiness") == 105
    health.record("readiness", True, 105.5)
    assert health.due_at("readiness") == 107, "at an even pace, however long an answer takes"
    health.record("readiness", True, 112.0)
    assert health.due_at("readiness") == 112, "and no two at once when one took longer than the period"


def test_startup_is_alone_until_it_has_passed() -> None:
    health = Health({kind: probe() for kind in ("startup", "liveness", "readiness")}, 0.0)
    assert health.kinds == ["startup"]
    health.record("startup", True, 0.0)
    assert health.kinds == ["liveness", "readiness"]


# --- manifests --------------------------------------------------------------------------------------------------

PORTS = [{"containerPort": 8080, "name": "http"}]
ACTIONS: dict[str, tuple[Object, object]] = {
    "httpGet": ({"httpGet": {"port": 80}}, HttpGet(port=80)),
    "httpGet with all": (
        {"httpGet": {"port": "http", "path": "up", "host": "::1", "scheme": "HTTPS",
                     "httpHeaders": [{"name": "X-A", "value": "b"}]}},
        HttpGet(port=8080, path="/up", host="::1", tls=True, headers=(("X-A", "b"),)),
    ),
    "tcpSocket": ({"tcpSocket": {"port": "http"}}, TcpSocket(port=8080)),
    "a port in quotes": ({"tcpSocket": {"port": "81"}}, TcpSocket(port=81)),
    "exec": ({"exec": {"command": ["test", "-e", "/up"]}}, Exec(command=("test", "-e", "/up"))),
    "no such port": ({"tcpSocket": {"port": "ftp"}}, "liveness probe is left out: the container has no port 'ftp'"),
    "grpc": ({"grpc": {"port": 1}}, "liveness probe is left out: the lab probes by httpGet, tcpSocket or exec"),
}  # fmt: skip


@pytest.mark.parametrize("case", ACTIONS)
def test_what_is_probed(case: str) -> None:
    spec, wanted = ACTIONS[case]
    probes, left_out = plan_probes({"name": "c", "ports": PORTS, "livenessProbe": spec})
    assert (left_out[0] if left_out else probes["liveness"].action) == wanted


def test_the_numbers_of_a_probe() -> None:
    numbers = {"initialDelaySeconds": 1, "periodSeconds": 2, "timeoutSeconds": 3, "failureThreshold": 5}
    spec = {"tcpSocket": {"port": 80}, "successThreshold": 4, **numbers}
    probes, _ = plan_probes({"readinessProbe": spec, "livenessProbe": {"tcpSocket": {"port": 80}}})
    readiness, liveness = probes["readiness"], probes["liveness"]
    assert (readiness.initial_delay, readiness.period, readiness.timeout) == (1, 2, 3)
    assert (readiness.success_threshold, readiness.failure_threshold) == (4, 5)
    assert (liveness.initial_delay, liveness.period, liveness.timeout) == (0, 10, 1)
    assert (liveness.success_threshold, liveness.failure_threshold) == (1, 3)


def test_a_probe_says_which_host_it_asks() -> None:
    said = request(HttpGet(port=80, path="/up", headers=(("Host", "web.shop"), ("X-A", "b"))), "10.0.0.1").decode()
    assert said.startswith("GET /up HTTP/1.1\r\nhost: web.shop\r\n")
    assert "x-a: b\r\n" in said
    assert said.endswith("connection: close\r\n\r\n")
    assert b"host: [fd00::7]:80\r\n" in request(HttpGet(port=80), "fd00::7")


# --- a pod's status ---------------------------------------------------------------------------------------------


def entry(state: str, ready: bool = False, code: int = 0, reason: str = "") -> Object:
    states = {
        "waiting": {"waiting": {"reason": reason or "ContainerCreating"}},
        "running": {"running": {}},
        "ended": {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}},
    }
    return {"name": "c", "ready": ready, "started": state == "running", "restartCount": 0, "state": states[state]}


UP, DOWN, WAITS, DONE, FAILED = (
    entry("running", ready=True), entry("running"), entry("waiting"), entry("ended"), entry("ended", code=3),
)  # fmt: skip
# policy, init containers, containers → phase, Initialized, Ready, the word under STATUS
STATUSES: dict[str, tuple[str, list[Object], list[Object], str, bool, bool, str]] = {
    "all is well": ("Always", [], [UP, UP], "Running", True, True, "Running"),
    "one is not ready": ("Always", [], [UP, DOWN], "Running", True, False, "Running"),
    "one has not begun": ("Always", [], [UP, WAITS], "Pending", True, False, "ContainerCreating"),
    "init runs": ("Always", [DONE, DOWN], [WAITS], "Pending", False, False, "Init:1/2"),
    "init failed and will be tried again": (
        "Always", [entry("waiting", reason="CrashLoopBackOff")], [WAITS], "Pending", False, False,
        "Init:CrashLoopBackOff",
    ),
    "init failed": ("Never", [FAILED], [WAITS], "Failed", False, False, "Init:Error"),
    "init is over": ("Always", [DONE, DONE], [UP], "Running", True, True, "Running"),
    "over": ("Never", [DONE], [DONE], "Succeeded", True, False, "Completed"),
    "over, badly": ("Never", [], [DONE, FAILED], "Failed", True, False, "Error"),
    "over, badly, and begun anew": ("OnFailure", [], [DONE, FAILED], "Running", True, False, "Error"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATUSES)
def test_the_status_of_a_pod(case: str) -> None:
    policy, init, containers, phase, initialized, ready, word = STATUSES[case]
    spec: Object = {"restartPolicy": policy, "nodeName": "n", "containers": [{"name": "c"} for _ in containers]}
    spec["initContainers"] = [{"name": "c"} for _ in init]
    begun = not any("waiting" in one["state"] for one in containers)
    status = pod_status(spec, {"reason": "x"}, ["172.31.0.11"], ["10.244.1.2"], init, containers, begun, "now")
    conditions = {one["type"]: one["status"] == "True" for one in status["conditions"]}
    assert (status["phase"], conditions["Initialized"], conditions["Ready"]) == (phase, initialized, ready)
    assert "reason" not in status
    shown = table.table(PODS, [{"metadata": {"name": "a"}, "spec": spec, "status": status}], 0.0)
    assert shown["rows"][0]["cells"][2] == word


def test_a_sidecar_runs_beside_and_must_be_ready_too() -> None:
    spec: Object = {"initContainers": [{"name": "c", "restartPolicy": "Always"}], "containers": [{"name": "c"}]}
    for side, initialized, ready in ((WAITS, False, False), (DOWN, True, False), (UP, True, True)):
        status = pod_status(spec, {}, ["172.31.0.11"], [], [side], [UP], True, "now")
        conditions = {one["type"]: one["status"] == "True" for one in status["conditions"]}
        assert (conditions["Initialized"], conditions["Ready"]) == (initialized, ready)


# --- the environment --------------------------------------------------------------------------------------------

POD: Object = {
    "metadata": {"name": "web-1", "namespace": "shop", "uid": "u1", "labels": {"app": "web"}},
    "spec": {"nodeName": "node2"}, "status": {"hostIP": "172.31.0.12"},
}  # fmt: skip
KNOWN = {
    ("ConfigMap", "settings"): {"data": {"MODE": "fast", "LEVEL": "3"}},
    ("Secret", "keys"): {"data": {"TOKEN": "aGVsbG8="}, "stringData": {"PLAIN": "text"}},
}


def field(path: str) -> Object:
    return {"name": "V", "valueFrom": {"fieldRef": {"fieldPath": path}}}


def key(kind: str, name: str, which: str, **more: Any) -> Object:
    return {"name": "V", "valueFrom": {kind: {"name": name, "key": which, **more}}}


VALUES: dict[str, tuple[Object, str | None]] = {
    "text": ({"name": "V", "value": "a"}, "a"),
    "nothing said is empty": ({"name": "V"}, ""),
    "a variable before it": ({"name": "V", "value": "$(MODE)-$(NO)-$$(MODE)"}, "fast-$(NO)-$(MODE)"),
    "name": (field("metadata.name"), "web-1"),
    "namespace": (field("metadata.namespace"), "shop"),
    "uid": (field("metadata.uid"), "u1"),
    "label": (field("metadata.labels['app']"), "web"),
    "no such annotation": (field("metadata.annotations['a/b']"), ""),
    "node": (field("spec.nodeName"), "node2"),
    "address": (field("status.podIP"), "10.244.1.7"),
    "addresses": (field("status.podIPs"), "10.244.1.7,fd00::7"),
    "host": (field("status.hostIP"), "172.31.0.12"),
    "a field that there is not": (field("spec.color"), None),
    "key of a ConfigMap": (key("configMapKeyRef", "settings", "LEVEL"), "3"),
    "key of a Secret": (key("secretKeyRef", "keys", "TOKEN"), "hello"),
    "key of a Secret as it was written": (key("secretKeyRef", "keys", "PLAIN"), "text"),
    "an optional key": (key("configMapKeyRef", "settings", "NO", optional=True), None),
    "an optional ConfigMap": (key("configMapKeyRef", "nothing", "NO", optional=True), None),
}


def find_object(kind: str, name: str) -> Object | None:
    return KNOWN.get((kind, name))


@pytest.mark.parametrize("case", VALUES)
def test_a_variable(case: str) -> None:
    variable, wanted = VALUES[case]
    container = {"name": "c", "env": [variable], "envFrom": [{"configMapRef": {"name": "settings"}}]}
    environment = container_environment(POD, container, ("10.244.1.7", "fd00::7"), find_object)
    assert environment.get("V") == wanted


def test_all_of_a_config_map_and_of_a_secret() -> None:
    sources = [{"prefix": "S_", "secretRef": {"name": "keys"}}, {"configMapRef": {"name": "settings"}},
               {"configMapRef": {"name": "nothing", "optional": True}}]  # fmt: skip
    container = {"name": "c", "envFrom": sources, "env": [{"name": "MODE", "value": "slow"}]}
    environment = container_environment(POD, container, (), find_object)
    assert {"S_TOKEN": "hello", "MODE": "slow", "LEVEL": "3"}.items() <= environment.items()


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        (key("configMapKeyRef", "nothing", "K"), 'configmap "nothing" not found'),
        (key("secretKeyRef", "keys", "K"), "couldn't find key K in Secret keys"),
    ],
)
def test_what_is_missing_is_named(variable: Object, said: str) -> None:
    with pytest.raises(ConfigMissing, match=said):
        container_environment(POD, {"name": "c", "env": [variable]}, (), find_object)


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"command": ["sh", "-c"], "args": ["$(HOSTNAME)"]}, ("/bin/sh", "-c", "web-1")),
        ({"command": ["/srv/migrate"]}, ("/bin/echo", "podwire lab: '/srv/migrate' is not a program of this machine: "
                                         "this init container did nothing")),
        ({"image": "migrate:1", "ports": [{"containerPort": 80}]},
         ("/bin/echo", "podwire lab: there is no command, and no image 'migrate:1' to take one from: "
                       "this init container did nothing")),
    ],
)  # fmt: skip
def test_what_an_init_container_runs(container: Object, words: tuple[str, ...]) -> None:
    program = plan_init_program(POD, {"name": "c", **container}, (), {"sh": "/bin/sh"}.get)
    assert program.words == words
    assert bool(program.warnings) == (words[0] == "/bin/echo")
