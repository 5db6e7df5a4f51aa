"""A node's proxy: `podwire-proxy` in the node's namespaces, with a configuration file as an operator would write it.

    kubeconfig (the API at its address on the underlay) ──▶ podwire-proxy ──▶ the node's kernel
    the daemon's socket ◀── which pods' policies are in the kernel ──┘

It reaches the API by the API's own address, never by a ClusterIP, which it would have to program first. As with the
daemon, the process comes and goes; rules and connections stay.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
from pathlib import Path

import yaml

from podwire import netns
from podwire.errors import PodwireError
from podwire.lab import names, process
from podwire.lab.api.kubeconfig import kubeconfig
from podwire.lab.node import PYTHON, enter_command
from podwire.lab.process import Process
from podwire.lab.state import LabState, NodeState, write_atomically

NONE = "none"
MODES = ("nftables", "iptables", NONE)
_START_SECONDS = 120.0
_END_SECONDS = 60.0
_ASK_SECONDS = 10.0


def proxy_role(node: str) -> str:
    """The role of the node's proxy."""
    return f"proxy-{node}"


def config_path(state: LabState, node: str) -> Path:
    """The proxy's configuration, as the machine and every node see it."""
    return state.files.node_path(node, "/etc/podwire") / "proxy.yaml"


def proxy_config(state: LabState, node: NodeState) -> dict[str, object]:
    """What the file says."""
    anywhere = "[::]" if ":" in node.addresses[0] else "0.0.0.0"
    return {
        "node": node.name,
        "mode": state.proxy,
        "kubernetes": {"kubeconfig": str(state.files.node_kubeconfig)},
        "clusterCIDRs": list(state.pod_cidrs),
        "daemonSocket": str(state.files.ipamd_socket(node.name)),
        "healthListen": f"{anywhere}:{names.PROXY_HEALTH_PORT}",
        "metricsListen": f"{anywhere}:{names.PROXY_METRICS_PORT}",
    }


def install(state: LabState, node: NodeState) -> None:
    """Lays the node's configuration down; what it needs of the lab as a whole is `install_shared`'s."""
    config_path(state, node.name).write_text(yaml.safe_dump(proxy_config(state, node), sort_keys=False))


def install_shared(state: LabState) -> None:
    """Writes the kubeconfig with which nodes reach the API."""
    url = f"http://{names.url_host(state.control_address)}:{names.API_PORT}"
    write_atomically(state.files.node_kubeconfig, kubeconfig(url, f"podwire-{state.name}").encode())


def start(state: LabState, node: str) -> Process:
    """Starts the node's proxy; `healthy` says whether its rules are up to date. Raises PodwireError when it runs."""
    running = process.recorded(state.files, proxy_role(node))
    if running is not None and running.alive:
        raise PodwireError(f"the proxy of {node} runs already, as process {running.pid}")
    command = [*PYTHON, "-m", "kube_proxy_lite.main", "--config", str(config_path(state, node))]
    return process.start(state.files, proxy_role(node), [*enter_command(state, node), *command])


def end(state: LabState, node: str, with_signal: int = signal.SIGTERM, seconds: float = _END_SECONDS) -> None:
    """Ends the node's proxy: SIGTERM as an upgrade does, SIGKILL as a crash. Raises PodwireError if it does not go."""
    running = process.recorded(state.files, proxy_role(node))
    if running is None or not running.alive:
        raise PodwireError(f"the proxy of {node} does not run")
    running.kill(with_signal)
    if not running.wait_gone(seconds):
        raise PodwireError(f"the proxy of {node} is still there after {seconds:.0f} s")


def why_unhealthy(state: LabState, node: NodeState) -> str:
    """What its /healthz objects to, in words; empty when the rules are up to date. Asked from inside the node."""
    family = socket.AF_INET6 if ":" in node.addresses[0] else socket.AF_INET
    try:
        descriptor = netns.open_netns(str(state.netns(node.name)))
        try:
            with netns.inside(descriptor):
                opened = socket.socket(family, socket.SOCK_STREAM)
        finally:
            os.close(descriptor)
        with opened:
            opened.settimeout(_ASK_SECONDS)
            opened.connect((node.addresses[0], names.PROXY_HEALTH_PORT))
            opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
            answer = http.client.HTTPResponse(opened)
            answer.begin()
            body = answer.read().decode(errors="replace")
    except (OSError, PodwireError, http.client.HTTPException) as error:
        return f"it does not answer: {error}"
    return "" if answer.status == http.HTTPStatus.OK else body


def wait_healthy(state: LabState, node: NodeState, seconds: float = _START_SECONDS) -> None:
    """Waits until the node's rules are up to date. Raises PodwireError with the reason and the end of the log."""
    log, role, why = state.files.log(proxy_role(node.name)), proxy_role(node.name), ""

    def is_healthy() -> bool:
        nonlocal why
        running = process.recorded(state.files, role)
        if running is None or not running.alive:
            raise PodwireError(f"the proxy of {node.name} has ended:{process.last_lines(log)}")
        why = why_unhealthy(state, node)
        return not why

    try:
        process.wait_for(is_healthy, seconds, f"the proxy of {node.name}")
    except PodwireError as error:
        raise PodwireError(f"{error} ({why}):{process.last_lines(log)}" if why else str(error)) from error
