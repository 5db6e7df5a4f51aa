"""`podwire uninstall`: take the CNI executable, its runtime and its configuration off this node."""

from __future__ import annotations

import argparse
from pathlib import Path

from podwire import install as installation
from podwire.cli.install import add_host_dir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags; the defaults are those of `podwire install`."""
    for flag, default, metavar, meaning in (
        ("--cni-bin-dir", installation.BIN_DIR, "DIR", "where the executable is"),
        ("--cni-conf-dir", installation.CONF_DIR, "DIR", "where the configuration is"),
        ("--queue-dir", installation.QUEUE_DIR, "DIR", "where deletions wait for a daemon that is down"),
    ):
        parser.add_argument(flag, type=Path, default=default, metavar=metavar, help=f"{meaning} (%(default)s)")
    parser.add_argument(
        "--network",
        default=installation.NETWORK,
        metavar="NAME",
        help="the network's name in the configuration (%(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="throw away deletions that the runtime was told are done")
    add_host_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    """Uninstalls and says what is gone and what stays. Raises UninstallError."""
    removal = installation.uninstall(
        cni_bin_dir=arguments.cni_bin_dir,
        cni_conf_dir=arguments.cni_conf_dir,
        queue_dir=arguments.queue_dir,
        network=arguments.network,
        force=arguments.force,
        host_cni_bin_dir=arguments.host_cni_bin_dir,
    )
    for path in removal.removed:
        print(f"removed  {path}")
    for path, reason in removal.kept:
        print(f"left     {path}: {reason}")
    if not removal.removed:
        print("nothing of Podwire is installed here")
    return 0
