"""`podwire etcd-role NODE`: the etcd role of a node, as commands for whoever administers etcd (docs/etcd.md)."""

from __future__ import annotations

import argparse

from ipam_daemon.roles import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing is asked of etcd: the commands are printed."""
    parser.add_argument("node", metavar="NODE", help="the node's name, as its daemon has it")
    parser.add_argument("--user", default="", metavar="USER", help="the etcd user; default: the node's name")
    parser.add_argument(
        "--password-file", default="", metavar="FILE",
        help="the user has the password in FILE; default: none, and it is the common name of a client certificate",
    )  # fmt: skip
    parser.add_argument(
        "--admin", action="store_true",
        help="may write everything of Podwire's: the configuration, and the records of nodes that are forgotten",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Prints the commands."""
    words = recipe(arguments.node, arguments.user or arguments.node, arguments.password_file, admin=arguments.admin)
    print("\n".join(words))
    return 0
