"""Which cluster's API is meant, for the subcommands that read it: a lab's, or the one of a kubeconfig."""

from __future__ import annotations

import argparse

from podwire.errors import PodwireError
from podwire.kube import options
from podwire.kube.access import Access
from podwire.kube.options import KubeOptions


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The flags that say which cluster."""
    parser.add_argument("--name", metavar="LAB", help="a lab of this machine")
    parser.add_argument("--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, or the pod's service account")


def read_access(arguments: argparse.Namespace) -> Access:
    """How the API is reached. Raises PodwireError when nothing says, or there is no such lab."""
    if arguments.name and arguments.kubeconfig:
        raise PodwireError("--name and --kubeconfig each say a cluster: give one of them")
    kubeconfig = arguments.kubeconfig or ""
    if arguments.name:
        from podwire.lab import state

        kubeconfig = str(state.load(arguments.name).files.kubeconfig)
    return options.access(KubeOptions(kubeconfig=kubeconfig), virtual=True)
