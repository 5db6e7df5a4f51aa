"""`podwire lab`: a cluster of network namespaces on this machine. The verbs are thin; podwire.lab does the work."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec

from podwire import manifests
from podwire.errors import PodwireError
from podwire.lab import cluster, names, node, process, proxy, state
from podwire.lab.state import LabState

BACKENDS = ("vxlan", "direct", "auto")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs and their flags; each takes `--name`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.add_argument("--name", default="lab", metavar="LAB", help="which lab (%(default)s)")
        return made

    _add_up(verb("up", "build a lab and wait until it works"))
    for name, text in (("apply", "create or change what manifests say"), ("delete", "delete what manifests name")):
        made = verb(name, text)
        made.add_argument("-f", dest="manifests", action="append", required=True, metavar="MANIFEST",
                          help="a file, a folder, or - for standard input; may be given again")  # fmt: skip
    made = verb("exec", "run a command in a pod's network")
    made.add_argument("pod", metavar="POD")
    made.add_argument("-n", "--namespace", default="default", metavar="NS")
    made.add_argument("-c", "--container", default="", metavar="CONTAINER")
    made.add_argument("words", nargs="+", metavar="-- CMD …")
    made = verb("logs", "what a pod's container has written")
    made.add_argument("pod", metavar="POD")
    made.add_argument("-n", "--namespace", default="default", metavar="NS")
    made.add_argument("-c", "--container", default="", metavar="CONTAINER")
    made.add_argument("-f", "--follow", action="store_true", help="go on with what it writes from now on")
    made.add_argument("-p", "--previous", action="store_true", help="of its run before the last restart")
    made = verb("node", "run a command on a node")
    made.add_argument("node", metavar="NAME")
    made.add_argument("words", nargs="+", metavar="-- CMD …")
    made = verb("status", "nodes, pods and services of a lab")
    made.add_argument("-o", dest="output", choices=("table", "json"), default="table", help="(%(default)s)")
    made = verb("down", "remove a lab, in whatever state it is")
    made.add_argument("--all", action="store_true", help="every lab of this machine")


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (%(default)s)")
    parser.add_argument("--backend", default="vxlan", metavar="BACKEND",
                        help="how nodes reach each other's pods: vxlan, direct or auto (%(default)s)")  # fmt: skip
    parser.add_argument("--segments", type=int, default=1, metavar="N",
                        help="networks that nodes are on: 1, or 2 with a router between (%(default)s)")  # fmt: skip
    parser.add_argument("--proxy", default="nftables", metavar="MODE",
                        help="what programs Services: nftables, iptables, or none (%(default)s)")  # fmt: skip
    parser.add_argument("--pod-cidr", default="10.244.0.0/16", metavar="CIDR[,CIDR]",
                        help="one network, or one of each family; the underlay has the same (%(default)s)")  # fmt: skip
    text = ", ".join(str(network) for network in names.SERVICE_CIDRS.values())
    parser.add_argument("--service-cidr", default="", metavar="CIDR[,CIDR]", help=f"of the pods' families ({text})")
    parser.add_argument("--etcd", type=int, choices=(1, 3), default=1, help="how many etcd members (%(default)s)")
    text = "certificates for etcd's members and for each node, of an authority of the lab's own"
    parser.add_argument("--etcd-tls", action="store_true", help=text)
    parser.add_argument("--kube-apiserver", metavar="PATH", help="a real API server instead of the built-in one")
    parser.add_argument("-f", dest="manifests", action="append", default=[], metavar="MANIFEST",
                        help="apply this and wait for its pods; may be given again")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Does what the verb says. Returns its exit code."""
    if os.geteuid() != 0:
        raise PodwireError("a lab is made of network namespaces: run this as root")
    signal.signal(signal.SIGTERM, _interrupt)  # so that an `up` that is asked to end cleans up
    names.check_lab_name(arguments.name)
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "up": _up, "apply": _apply, "delete": _delete, "exec": _exec, "logs": _logs, "node": _node, "status": _status,
        "down": _down,
    }  # fmt: skip
    return verbs[arguments.verb](arguments)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _up(arguments: argparse.Namespace) -> int:
    objects = manifests.load(arguments.manifests)
    lab = cluster.up(wanted_lab(arguments), _say)
    if objects:
        try:
            cluster.wait_ready(lab, cluster.apply(lab, objects, _say))
            cluster.wait_rolled_out(lab, objects)
        except PodwireError as error:
            raise PodwireError(f"lab {lab.name} is up, but its manifests are not: {error}") from error
    _say(f"lab {lab.name} is up: export KUBECONFIG={lab.files.kubeconfig}")
    return 0


def wanted_lab(arguments: argparse.Namespace) -> LabState:
    """The lab that the flags describe. Raises PodwireError for what there is not, or not yet."""
    if arguments.backend not in BACKENDS:
        raise PodwireError(f"--backend {arguments.backend}: expected one of {', '.join(BACKENDS)}")
    if arguments.proxy not in proxy.MODES:
        later = " is not there yet;" if arguments.proxy == "ipvs" else ":"
        raise PodwireError(f"--proxy {arguments.proxy}{later} expected one of {', '.join(proxy.MODES)}")
    if arguments.kube_apiserver is not None:
        raise PodwireError(f"--kube-apiserver {arguments.kube_apiserver} is not there yet")
    pod_cidrs = _networks("--pod-cidr", arguments.pod_cidr)
    service_cidrs = _networks("--service-cidr", arguments.service_cidr) if arguments.service_cidr else []
    families = {network.version for network in pod_cidrs}
    for network in service_cidrs:
        if network.version not in families:
            raise PodwireError(f"--service-cidr {network}: pods have no IPv{network.version} (--pod-cidr)")
        for other in pod_cidrs:
            if other.version == network.version and other.overlaps(network):
                raise PodwireError(f"--service-cidr {network} overlaps --pod-cidr {other}")
    pod_cidr = ",".join(map(str, pod_cidrs))
    return LabState(
        name=arguments.name,
        nodes=state.plan_nodes(arguments.nodes, pod_cidr, arguments.segments),
        backend=arguments.backend,
        proxy=arguments.proxy,
        pod_cidr=pod_cidr,
        service_cidr=",".join(map(str, service_cidrs)),
        etcd_members=arguments.etcd,
        etcd_tls=arguments.etcd_tls,
    )


def _networks(flag: str, text: str) -> list[names.Network]:
    networks = [_network(flag, one) for one in text.split(",")]
    if len({network.version for network in networks}) < len(networks):
        raise PodwireError(f"{flag} {text}: expected at most one network of each family")
    return networks


def _network(flag: str, text: str) -> names.Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise PodwireError(f"{flag} {text}: {error}; expected a network such as 10.244.0.0/16") from None
    for underlay in names.UNDERLAYS[network.version]:
        if network.version == underlay.version and network.overlaps(underlay):
            raise PodwireError(f"{flag} {text} overlaps the lab's underlay, {underlay}")
    return network


def _apply(arguments: argparse.Namespace) -> int:
    cluster.apply(state.load(arguments.name), manifests.load(arguments.manifests), print)
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    lab = state.load(arguments.name)
    cluster.wait_deleted(lab, cluster.delete(lab, manifests.load(arguments.manifests), print))
    return 0


def _exec(arguments: argparse.Namespace) -> int:
    lab = state.load(arguments.name)
    _become(lab, *cluster.exec_command(lab, arguments.namespace, arguments.pod, arguments.container), arguments.words)


def _logs(arguments: argparse.Namespace) -> int:
    lab = state.load(arguments.name)
    path = cluster.container_log(
        lab, arguments.namespace, arguments.pod, arguments.container, previous=arguments.previous
    )
    if arguments.follow:
        os.execvp("tail", ["tail", "--lines=+1", "--follow=name", "--quiet", str(path)])
    sys.stdout.buffer.write(path.read_bytes())
    sys.stdout.buffer.flush()
    return 0


def _node(arguments: argparse.Namespace) -> int:
    lab = state.load(arguments.name)
    _become(lab, node.enter_command(lab, lab.node(arguments.node).name), {}, arguments.words)


def _become(lab: LabState, enter: list[str], environment: dict[str, str], words: list[str]) -> NoReturn:
    """Becomes the command: its input, output and exit code are then ours."""
    sys.stdout.flush()
    os.execvpe(enter[0], [*enter, *words], process.marked_environment(lab.name) | environment)


def _status(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from podwire.lab import status

    shown = status.status(state.load(arguments.name))
    if arguments.output == "json":
        print(msgspec.json.format(json.dumps(shown)))
    else:
        status.show(shown, Console())
    return 0


def _down(arguments: argparse.Namespace) -> int:
    wanted = state.labs() if arguments.all else [arguments.name]
    for name in wanted:
        if not cluster.down(name, _say):
            _say(f"there is no lab {name}")
    return 0
