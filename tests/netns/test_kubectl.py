"""A lab as the user of a real kubectl sees it: apply, get, describe, logs, scale, rollout, wait, delete.

kubectl is optional, and never fetched: any of 1.27 to 1.33 on the PATH will do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from podwire.lab import cluster
from podwire.lab.api.kinds import DEPLOYMENTS, PODS
from podwire.lab.state import LabState

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")

MANIFEST = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      initContainers:
      - {name: greet, image: busybox, command: [echo, "hello from $(HOSTNAME)"]}
      containers:
      - name: web
        image: web:1
        ports: [{containerPort: 80, name: http}]
        env: [{name: COLOR, valueFrom: {configMapKeyRef: {name: paint, key: color}}}]
        readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1, timeoutSeconds: 30}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: paint}
data: {color: red}
---
apiVersion: v1
kind: Pod
metadata: {name: bare, labels: {app: bare}}
spec: {containers: [{name: say, image: busybox, command: [sh, -c, "seq 3; exec sleep 1000"]}]}
"""


class Kubectl:
    """A kubectl with a home of its own, so that nothing of the user's is read or written."""

    def __init__(self, lab: LabState, home: Path) -> None:
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": str(lab.files.kubeconfig)}

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", *words], input=stdin, capture_output=True, text=True, timeout=300, env=self._environment,
            check=False,
        )  # fmt: skip

    def __call__(self, *words: str, stdin: str = "") -> str:
        done = self.run(*words, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def kubectl(lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    return Kubectl(lab, tmp_path_factory.mktemp("home"))


@pytest.fixture
def shop(lab: LabState, kubectl: Kubectl) -> Iterator[Kubectl]:
    """The manifest, applied and rolled out; deleted, and all of its pods gone, in the end."""
    applied = kubectl("apply", "-f", "-", stdin=MANIFEST)
    try:
        assert applied.splitlines() == ["deployment.apps/web created", "configmap/paint created", "pod/bare created"]
        kubectl("rollout", "status", "deployment/web", "--timeout=120s")
        kubectl("wait", "--for=condition=Ready", "pod/bare", "--timeout=120s")
        yield kubectl
    finally:
        kubectl("delete", "--ignore-not-found", "-f", "-", stdin=MANIFEST)
        kubectl("wait", "--for=delete", "pod", "--all", "--timeout=120s")
    assert cluster.client(lab).list(DEPLOYMENTS) == []
    assert cluster.client(lab).list(PODS) == []


def rows(text: str) -> dict[str, list[str]]:
    """A printed table without its header, by the first column."""
    return {line.split()[0]: line.split() for line in text.splitlines()[1:] if line.strip()}


def test_get_and_describe(shop: Kubectl) -> None:
    assert rows(shop("get", "deploy"))["web"][1:4] == ["2/2", "2", "2"]
    assert shop("get", "deploy", "-o", "wide").splitlines()[0].split() == [
        "NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE", "CONTAINERS", "IMAGES", "SELECTOR",
    ]  # fmt: skip
    (replica_set,) = rows(shop("get", "rs"))
    pods = rows(shop("get", "pods", "-o", "wide"))
    assert len([name for name in pods if name.startswith(f"{replica_set}-")]) == 2
    for row in pods.values():
        assert row[1:4] == ["1/1", "Running", "0"]
        assert row[5].startswith("10.244."), "IP"
        assert row[6].startswith("node"), "NODE"
    described = shop("describe", "deployment", "web")
    assert "2 desired | 2 updated | 2 total | 2 available | 0 unavailable" in described
    assert f"Scaled up replica set {replica_set} from 0 to 2" in described
    pod = shop("describe", "pod", "-l", "app=web")
    assert f"Controlled By:  ReplicaSet/{replica_set}" in pod
    assert "http-get http://:http/ delay=0s timeout=30s period=1s #success=1 #failure=3" in pod
    assert "COLOR:" in pod
    assert "bare" in shop("describe", "node", next(row[6] for name, row in pods.items() if name == "bare"))
    assert shop("get", "all", "-o", "name").splitlines().count("deployment.apps/web") == 1


SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80, targetPort: http, nodePort: 30080}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: web}
spec: {rules: [{http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: web, port: {number: 80}}}}]}}]}
"""
TAKEN = """
apiVersion: v1
kind: Service
metadata: {name: other}
spec: {type: NodePort, ports: [{port: 80, nodePort: 30080}]}
"""


def test_services_and_what_goes_with_them(shop: Kubectl) -> None:
    shop("apply", "-f", "-", stdin=SERVICES)
    try:
        ready = "jsonpath={.endpoints[1].conditions.ready}=true"
        shop("wait", f"--for={ready}", "endpointslice", "-l", "kubernetes.io/service-name=web", "--timeout=120s")
        (found,) = rows(shop("get", "endpointslices")).values()
        assert (found[0][:4], found[1], found[2], len(found[3].split(","))) == ("web-", "IPv4", "80", 2)
        shop("wait", "--for=jsonpath={.status.loadBalancer.ingress[0].ip}", "service/web", "--timeout=120s")
        name, kind, cluster_ip, balanced, ports, _ = rows(shop("get", "services"))["web"]
        assert (name, kind, ports) == ("web", "LoadBalancer", "80:30080/TCP")
        assert cluster_ip.startswith("10.96.")
        assert balanced.startswith("198.51.100.")
        assert f"IP:                       {cluster_ip}" in shop("describe", "service", "web")
        refused = shop.run("create", "-f", "-", stdin=TAKEN)
        assert "spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated" in refused.stderr
        shop("patch", "service", "web", "-p", '{"spec": {"type": "ClusterIP"}}')
        assert rows(shop("get", "services"))["web"][1:5] == ["ClusterIP", cluster_ip, "<none>", "80/TCP"]
    finally:
        shop("delete", "-f", "-", stdin=SERVICES)
    assert shop("get", "endpointslices", "-o", "name") == ""


def test_logs(shop: Kubectl) -> None:
    assert shop("logs", "bare") == "1\n2\n3\n"
    assert shop("logs", "bare", "--tail=1") == "3\n"
    (first, *_) = shop("get", "pods", "-l", "app=web", "-o", "name").split()
    name = first.removeprefix("pod/")
    assert shop("logs", name, "-c", "greet") == f"hello from {name}\n"
    assert "hello from web-" in shop("logs", "deploy/web", "--all-containers")
    refused = shop.run("logs", "bare", "-p")
    assert (refused.returncode, 'previous terminated container "say"' in refused.stderr) == (1, True)


def test_scale_roll_out_and_back(shop: Kubectl) -> None:
    assert shop("scale", "deploy/web", "--replicas=3") == "deployment.apps/web scaled\n"
    shop("rollout", "status", "deploy/web", "--timeout=120s")
    assert rows(shop("get", "deploy"))["web"][1] == "3/3"
    (first,) = rows(shop("get", "rs"))
    shop("set", "image", "deploy/web", "web=web:2")
    assert "successfully rolled out" in shop("rollout", "status", "deploy/web", "--timeout=120s")
    sizes = {name: row[1] for name, row in rows(shop("get", "rs")).items()}
    assert sorted(sizes.values()) == ["0", "3"]
    assert sizes[first] == "0"
    assert {"1", "2"} <= rows(shop("rollout", "history", "deploy/web")).keys()
    shop("rollout", "undo", "deploy/web")
    shop("rollout", "status", "deploy/web", "--timeout=120s")
    sizes = {name: row[1] for name, row in rows(shop("get", "rs")).items()}
    assert sizes[first] == "3", "back to the ReplicaSet that was"
    shop("rollout", "restart", "deploy/web")
    shop("rollout", "status", "deploy/web", "--timeout=120s")
    assert len(rows(shop("get", "rs"))) == 3
    assert "unchanged" in shop("apply", "-f", "-", stdin=MANIFEST.split("---")[1])
    refused = shop.run("scale", "deploy/web", "--replicas=1", "--current-replicas=7")
    assert refused.returncode == 1
    shop("scale", "deploy/web", "--replicas=0")
    shop("wait", "--for=delete", "pod", "-l", "app=web", "--timeout=120s")
    assert list(rows(shop("get", "pods"))) == ["bare"]


def test_delete_with_and_without_what_is_owned(shop: Kubectl) -> None:
    (gone, *_) = shop("get", "pods", "-l", "app=web", "-o", "name").split()
    shop("delete", gone)
    shop("wait", "--for=condition=Available", "deploy/web", "--timeout=120s")
    shop("rollout", "status", "deploy/web", "--timeout=120s")
    names = shop("get", "pods", "-l", "app=web", "-o", "name").split()
    assert gone not in names
    shop("delete", "deploy", "web", "--cascade=orphan")
    assert len(shop("get", "pods,rs", "-l", "app=web", "-o", "name").split()) == 3
    shop("delete", "rs", "-l", "app=web")
    shop("wait", "--for=delete", "pod", "-l", "app=web", "--timeout=120s")


def test_a_manifest_that_is_wrong_is_refused_with_the_field(kubectl: Kubectl) -> None:
    wrong = MANIFEST.split("---")[0].replace("matchLabels: {app: web}", "matchLabels: {app: wep}")
    done = kubectl.run("apply", "-f", "-", stdin=wrong)
    assert done.returncode == 1
    assert "spec.template.metadata.labels: Invalid value" in done.stderr
