"""`podwire install`: lay the CNI executable and its configuration down on this node."""

from __future__ import annotations

import argparse
from pathlib import Path

from podwire import install as installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags; every one has a default that suits a node."""
    parser.add_argument(
        "--cni-bin-dir",
        type=Path,
        default=installation.BIN_DIR,
        metavar="DIR",
        help="where the runtime looks for plugins (%(default)s)",
    )
    parser.add_argument(
        "--cni-conf-dir",
        type=Path,
        default=installation.CONF_DIR,
        metavar="DIR",
        help="where the runtime looks for networks (%(default)s)",
    )
    parser.add_argument(
        "--socket", type=Path, default=installation.SOCKET, metavar="PATH", help="the daemon's socket (%(default)s)"
    )
    parser.add_argument(
        "--queue-dir",
        type=Path,
        default=installation.QUEUE_DIR,
        metavar="DIR",
        help="where deletions wait for a daemon that is down (%(default)s)",
    )
    parser.add_argument(
        "--network",
        default=installation.NETWORK,
        metavar="NAME",
        help="the network's name in the configuration (%(default)s)",
    )
    parser.add_argument(
        "--runtime",
        choices=("relocatable", "system"),
        help="what the executable runs on: a Python of its own, beside the plugins, or the node's (relocatable, "
        "with --python system)",
    )
    parser.add_argument(
        "--python",
        type=Path,
        metavar="PATH",
        help="the interpreter to use or to copy, 3.9 or newer (the one that runs this)",
    )
    add_host_dir(parser)


def add_host_dir(parser: argparse.ArgumentParser) -> None:
    """The flag for a node whose folders are mounted elsewhere."""
    parser.add_argument(
        "--host-cni-bin-dir",
        type=Path,
        metavar="DIR",
        help="--cni-bin-dir as the node sees it, when this runs in a container (the same)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Installs and says where. Raises InstallError."""
    executable = installation.install(
        cni_bin_dir=arguments.cni_bin_dir,
        cni_conf_dir=arguments.cni_conf_dir,
        socket=arguments.socket,
        queue_dir=arguments.queue_dir,
        network=arguments.network,
        python=arguments.python,
        runtime=arguments.runtime or ("system" if arguments.python else "relocatable"),
        host_cni_bin_dir=arguments.host_cni_bin_dir,
    )
    interpreter = executable.read_text().splitlines()[0].removeprefix("#!").split()[0]
    print(f"interpreter    {interpreter}")
    print(f"executable     {executable}")
    print(f"configuration  {arguments.cni_conf_dir / installation.CONFLIST}")
    return 0
