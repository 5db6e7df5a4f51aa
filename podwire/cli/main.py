"""The `podwire` command: one subcommand a module of this package, imported only when it is named.

A subcommand's module has `add_arguments(parser)` and `run(arguments) -> int`, the exit code. What goes wrong for a
reason that the user can mend is raised as `podwire.errors.PodwireError` and printed as one line, without a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import podwire
from podwire.errors import PodwireError

COMMANDS = {
    "lab": "a cluster of network namespaces on this machine",
    "install": "lay the CNI executable and its configuration down on this node",
    "uninstall": "take them off this node again",
    "etcd-role": "print the etcdctl commands that give a node's daemon its role",
    "status": "what the daemon of this node says about itself",
    "ipam": "what etcd, journal, kernel and runtime say about this node, side by side",
    "cluster": "what holds for all nodes; change how they reach each other's pods",
    "service": "Services as a node sees them; where a connection would go",
    "node": "the nodes of the cluster; forget one that is gone for good; clean this one, which is given up",
    "policy": "what NetworkPolicies let pass: one flow, or all pods by all pods",
    "explain": "the way from a pod to another, to a Service or to an address, hop by hop, and which hop fails",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns its exit code: 0 success, 1 failure, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="podwire", description="A Kubernetes pod network.")
    parser.add_argument("--version", action="version", version=f"podwire {podwire.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    chosen = next((word for word in arguments if word in COMMANDS), None)
    module = importlib.import_module(f"podwire.cli.{chosen.replace('-', '_')}") if chosen else None
    if module is not None and chosen is not None:
        module.add_arguments(parsers[chosen])
    parsed = parser.parse_args(arguments)
    assert module is not None, "argparse ends the process when no command was given"
    try:
        return int(module.run(parsed))
    except PodwireError as error:
        print(f"podwire {chosen}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
