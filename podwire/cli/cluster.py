"""`podwire cluster`: what holds for all nodes, and its backend changed while pods run (ipam_daemon/cluster.py)."""

from __future__ import annotations

import argparse
import json

import msgspec
from rich.console import Console

from ipam_daemon import cluster
from ipam_daemon.model import BackendType, encode
from podwire.cli.agent import add_output
from podwire.cli.etcd import add_etcd, options, with_etcd
from podwire.errors import PodwireError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    text = "the pools and the backend that hold"
    show = verbs.add_parser("show", help=text, description=text)
    add_output(show)
    text = "change how nodes reach each other's pods; every daemon follows at once, and no pod is touched"
    change = verbs.add_parser("set", help=text, description=text)
    change.add_argument("--backend", choices=[str(each) for each in BackendType], help="how pods of others are reached")
    change.add_argument("--vni", type=int, metavar="N", help="VXLAN's id; packets between nodes are lost meanwhile")
    change.add_argument("--port", type=int, metavar="N", help="VXLAN's UDP port; likewise")
    for verb in (show, change):
        add_etcd(verb)


def run(arguments: argparse.Namespace) -> int:
    """Does what the verb says. Returns its exit code. Raises PodwireError."""
    where = options(arguments)
    if arguments.verb == "show":
        config = with_etcd(where, cluster.read_config)
        plain = msgspec.json.decode(encode(config))
        if arguments.output == "json":
            print(json.dumps(plain, indent=2))
            return 0
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for pool in config.pools:
            console.print(f"pool {pool.name}: {pool.cidr} in blocks of /{pool.block_size}")
        console.print(f"backend {config.backend.type}: VNI {config.backend.vni}, UDP port {config.backend.port}")
        return 0
    wanted = {"type": arguments.backend, "vni": arguments.vni, "port": arguments.port}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    if not wanted:
        raise PodwireError("set what? --backend, --vni or --port")
    before, after = with_etcd(where, lambda session: cluster.change_backend(session, wanted))
    was, now = (f"{each.type} (VNI {each.vni}, UDP port {each.port})" for each in (before, after))
    print(f"backend {now}, as it was" if before == after else f"backend {now}, was {was}; the daemons follow")
    return 0
