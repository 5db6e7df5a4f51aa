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
        "--python",
        type=Path,
        metavar="PATH",
        help="the interpreter of the executable, 3.9 or newer (the one that runs this)",
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
    )
    print(f"executable     {executable}")
    print(f"configuration  {arguments.cni_conf_dir / installation.CONFLIST}")
    return 0
