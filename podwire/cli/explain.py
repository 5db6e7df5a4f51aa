"""`podwire explain`: the whole way from a pod to another, to a Service or to an address, hop by hop from the kernel.

In a lab (`--name`) every hop is read back; on a node those of this node, and the others are marked. Nothing is sent.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from podwire.cli.agent import add_socket
from podwire.cli.objects import add_cluster, read_access
from podwire.errors import PodwireError
from podwire.explain.reading import LabReader, NodeReader, Reader, explain
from podwire.explain.report import plain, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.epilog = "Exits with 0 when no hop fails, 1 when one does, 2 when it cannot be answered."
    parser.add_argument("source", metavar="POD", help="NAMESPACE/NAME")
    parser.add_argument("target", metavar="POD|SERVICE|ADDRESS", help="svc/… and pod/… where a name is both")
    parser.add_argument("port", metavar="PORT[/PROTOCOL]", help="80, 53/UDP, or a port's name")
    parser.add_argument("-n", "--namespace", default="default", metavar="NS", help="of names without one (%(default)s)")
    parser.add_argument("-q", "--quiet", action="store_true", help="without the commands")
    parser.add_argument("-o", dest="output", choices=("text", "json"), default="text", help="default: %(default)s")
    parser.add_argument("--node", default="", metavar="NAME", help="this node (as its daemon says, or the host's name)")
    add_cluster(parser)
    add_socket(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the path. Returns 0 when nothing fails, 1 when something does, 2 when it cannot be told."""
    from podwire.explain.live import fetch

    console = Console(highlight=False)
    try:
        reader: Reader = LabReader(arguments.name) if arguments.name else NodeReader(arguments.socket, arguments.node)
        path = explain(
            fetch(read_access(arguments)),
            reader,
            arguments.source,
            arguments.target,
            arguments.port,
            arguments.namespace,
        )
    except PodwireError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"podwire explain: {error}")
        return 2
    if arguments.output == "json":
        print(json.dumps(plain(path), indent=2))
    else:
        show(path, console, commands=not arguments.quiet)
    return 0 if plain(path)["passes"] else 1
