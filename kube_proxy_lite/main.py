"""`podwire-proxy`: reads the configuration, and runs the proxy until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import podwire
from kube_proxy_lite import settings
from kube_proxy_lite.modes import remove_all_but
from kube_proxy_lite.proxy import Proxy
from kube_proxy_lite.settings import Mode, ProxyConfig
from podwire import logs
from podwire.errors import PodwireError

log = logging.getLogger("kube_proxy_lite.main")
_COLLECT_AFTER = (50_000, 20, 20)  # new objects, and collections of the younger generation


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the proxy. Returns 0 after SIGTERM, 1 when it could not start or could not go on, 2 for wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.cleanup:
            asyncio.run(remove_all_but(None, policy=False))
            return 0
        config = _config(arguments)
        logs.configure(config.log_level)
        spare_collector()
        asyncio.run(_run(config))
    except (PodwireError, OSError, BaseExceptionGroup) as error:
        for each in _leaves(error):
            if not isinstance(each, PodwireError | OSError):
                raise
            print(f"podwire-proxy: {each}", file=sys.stderr)
        return 1
    return 0


def spare_collector() -> None:
    """Lets Python's collector of cycles look more rarely, and not at what has been imported.

    What the proxy keeps has no cycles, and at a start it is all new: looked at every 700 objects, as is the default,
    50,000 slices take a third longer.
    """
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="podwire-proxy", description="Kubernetes Services on this node.")
    parser.add_argument("--config", type=Path, help="a YAML file; flags go before what it says")
    parser.add_argument("--node", help="this node's name; default: the configuration's, or the host name")
    parser.add_argument("--mode", choices=[mode.value for mode in Mode], help="default: nftables")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--kubeconfig", help="how the API is reached; default: $KUBECONFIG, or the service account")
    source.add_argument("--manifests", metavar="DIR", help="a folder of manifests instead of an API")
    parser.add_argument("--cluster-cidr", metavar="C", help="the pods' networks, with commas between")
    parser.add_argument("--cleanup", action="store_true", help="take all rules out of the kernel, and end")
    parser.add_argument("--version", action="version", version=f"podwire-proxy {podwire.__version__}")
    return parser


def _config(arguments: argparse.Namespace) -> ProxyConfig:
    return settings.read(
        arguments.config,
        arguments.kubeconfig,
        node=arguments.node,
        mode=Mode(arguments.mode) if arguments.mode else None,
        manifests=arguments.manifests,
        cluster_cidrs=tuple(arguments.cluster_cidr.split(",")) if arguments.cluster_cidr else None,
    )


async def _run(config: ProxyConfig) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await Proxy(config).run(stopped)
    log.info("stopped")


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for each in error.exceptions for leaf in _leaves(each)]


if __name__ == "__main__":
    sys.exit(main())
