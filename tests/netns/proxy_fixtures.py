"""podwire-proxy as a process on the node of service_stage.py, with objects from an API or a folder of manifests."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from kube_proxy_lite.render.nftables_layout import WORDS
from kube_proxy_lite.render.nftables_listing import parse_table
from podwire.kube.objects import SERVICE_NAME_LABEL
from tests.netns.node_fixtures import Netns, command
from tests.netns.plain_api import PORT, Object, PlainApi, inside
from tests.netns.service_stage import Stage
from tests.unit.service_cases import address, network

HEALTH_PORT, METRICS_PORT = 10256, 10249
PATIENCE = 90.0
_numbers = itertools.count(1)


# --- objects ------------------------------------------------------------------------------------------------------


def service(name: str, number: int = 1, version: int = 4, protocol: str = "TCP", **spec: Any) -> Object:
    """10.96.0.N:80, or its twin in IPv6."""
    ports = [{"port": 80, "targetPort": 8080, "protocol": protocol}]
    if "node_port" in spec:
        ports[0]["nodePort"] = spec.pop("node_port")
        spec.setdefault("type", "NodePort")
    own = str(address(f"10.96.0.{number}", version))
    status = spec.pop("status", {})
    spec = {"type": "ClusterIP", "clusterIP": own, "clusterIPs": [own], "ports": ports, **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec, "status": status}


def endpoints(
    of: str, *hosts: str, version: int = 4, protocol: str = "TCP", terminating: tuple[str, ...] = ()
) -> Object:
    """The slice of a Service with pods at those IPv4 addresses, or their twins; those in 10.244.1 are on node a."""
    states = [(host, {"ready": True, "serving": True, "terminating": False}) for host in hosts]
    states += [(host, {"ready": False, "serving": True, "terminating": True}) for host in terminating]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{of}-{version}", "labels": {SERVICE_NAME_LABEL: of}},
        "addressType": f"IPv{version}",
        "ports": [{"name": "", "port": 8080, "protocol": protocol}],
        "endpoints": [
            {
                "addresses": [str(address(host, version))],
                "conditions": conditions,
                "nodeName": "a" if host.startswith("10.244.1.") else "b",
            }
            for host, conditions in states
        ],
    }


def node(**spec: Any) -> Object:
    """Node a."""
    status = {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}, "spec": spec, "status": status}


SERVICE_CIDRS: Object = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "ServiceCIDR",
    "metadata": {"name": "kubernetes"},
    "spec": {"cidrs": ["10.96.0.0/16", str(network("10.96.0.0/16", 6))]},
}


# --- the process --------------------------------------------------------------------------------------------------


class Proxy:
    """A running podwire-proxy."""

    def __init__(self, place: Netns, config: Path, *flags: str, path: str = "", unshared: bool = False) -> None:
        self._place = place
        self.log = config.with_name(f"proxy-{next(_numbers)}.log")
        words = [shutil.which("ip") or "ip", "netns", "exec", place.name]
        words += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if unshared else []
        words += [sys.executable, "-m", "kube_proxy_lite.main", "--config", str(config), *flags]
        environment = os.environ | {"PATH": path or os.environ["PATH"]}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)

    def end(self, with_signal: int = signal.SIGTERM) -> int:
        """Ends it. What it returned."""
        self.process.send_signal(with_signal)
        return self.process.wait(PATIENCE)

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def said(self, *words: str) -> list[dict[str, Any]]:
        """The lines of its log that have all of these words."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and all(word in line for word in words)]

    def healthz(self, page: str = "/healthz", port: int = HEALTH_PORT) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, body, headers; 0 when nobody answers."""
        try:
            status, body, headers = inside(self._place.path, lambda: ask("127.0.0.1", port, page))
        except OSError:
            return 0, {}, {}
        return status, json.loads(body), headers

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0 when there is none."""
        _, text, _ = inside(self._place.path, lambda: ask("127.0.0.1", METRICS_PORT, "/metrics"))
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.partition(" ")[0].partition("{")[0] == name and all(each in line for each in wanted)
        )


def ask(host: str, port: int, page: str) -> tuple[int, str, dict[str, str]]:
    """Asks over HTTP. Raises OSError."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", page)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), {key.lower(): value for key, value in answer.getheaders()}
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


class ProxyStage:
    """The stage, an API in its node, and proxies there."""

    def __init__(self, stage: Stage, api: PlainApi, folder: Path) -> None:
        self.stage = stage
        self.api = api
        self.folder = folder
        self.node = stage.node
        self._proxies: list[Proxy] = []
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{PORT}"}}],
                    "users": [{"name": "u", "user": {}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            )
        )

    def start(self, *flags: str, path: str = "", unshared: bool = False, ready: bool = True, **config: Any) -> Proxy:
        """A proxy more, when it is ready."""
        settings: dict[str, Any] = {
            "node": "a",
            "kubernetes": {"kubeconfig": str(self.kubeconfig)},
            "clusterCIDRs": ["10.244.0.0/16", str(network("10.244.0.0/16", 6))],
            "networkPolicy": False,
            **config,
        }
        file = self.folder / f"proxy-{next(_numbers)}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        proxy = Proxy(self.node, file, *flags, path=path, unshared=unshared)
        self._proxies.append(proxy)
        if ready:
            until(lambda: proxy.healthz()[0] == 200 or not proxy.alive(), lambda: proxy.log.read_text())
            assert proxy.alive(), proxy.log.read_text()
        return proxy

    def close(self) -> None:
        """Ends them all."""
        for proxy in self._proxies:
            if proxy.alive():
                proxy.end(signal.SIGKILL)
        until(lambda: not self._programs())  # what one that was killed has started ends by itself

    def _programs(self) -> list[str]:
        """Programs that change rules, and run on the node."""
        names = []
        for pid in command("ip", "netns", "pids", self.node.name).split():
            with contextlib.suppress(OSError):
                names.append(Path(f"/proc/{pid}/comm").read_text())
        return [name for name in names if name.startswith(("nft", "ip6tables", "iptables", "xtables"))]

    def rules(self) -> str:
        """All of nftables on the node."""
        return self.node.run("nft", "list", "ruleset")

    def elements(self, name: str, version: int = 4) -> dict[str, str]:
        """The elements of one of the proxy's sets or maps; none when there is no table."""
        text = self.node.run("nft", "-p", "list", "table", *WORDS[version].table.split(), check=False)
        return dict(parse_table(text).sets.get(name, {}))

    def answers(self, to: str = "10.96.0.1", port: int = 80, protocol: str = "TCP", place: Netns | None = None) -> str:
        """Who answers one connection from the client's pod; or `refuse`, `drop`."""
        seen = self.stage.ask(place or self.stage.client, protocol, to, port, {"anything"})
        return seen.pop().partition(" ")[0]

    def served(self, to: str, *by: str, port: int = 80, protocol: str = "TCP") -> None:
        """Waits until somebody of these answers, be it `refuse`."""
        until(lambda: self.answers(to, port, protocol) in by)


def until(holds: Callable[[], bool], why: Callable[[], str] = str, seconds: float = PATIENCE) -> None:
    """Waits until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


@contextlib.contextmanager
def proxy_stage(folder: Path) -> Iterator[ProxyStage]:
    """Everything, until the end of the block."""
    with Stage() as stage, PlainApi(stage.node.path) as api:
        made = ProxyStage(stage, api, folder)
        try:
            yield made
        finally:
            made.close()


def clean(made: ProxyStage) -> None:
    """As before the first proxy: none runs, no rule, no connection, no object."""
    made.close()
    made.node.run("nft", "flush", "ruleset")
    made.api.clear()
    for family in ("ipv4", "ipv6"):
        made.node.run("conntrack", "-F", "-f", family, check=False)


def sent(place: Netns, kind: int, to: str, port: int, own_port: int = 0) -> socket.socket:
    """A socket in a namespace, connected; for UDP that says where it goes."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET

    def make() -> socket.socket:
        made = socket.socket(family, kind)
        made.settimeout(PATIENCE)
        made.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", own_port))
        made.connect((to, port))
        return made

    return inside(place.path, make)
