"""`podwire-ipamd`: reads the settings, makes sure that it is alone, and runs the daemon until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import podwire
from ipam_daemon import settings
from ipam_daemon.daemon import Daemon
from ipam_daemon.identity import take_lock
from ipam_daemon.settings import Settings
from podwire import logs
from podwire.errors import PodwireError

log = logging.getLogger("ipam_daemon.main")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the daemon. Returns 0 after SIGTERM, 1 when it could not start or could not go on, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="podwire-ipamd", description="The Podwire daemon of one node.")
    parser.add_argument("--config", type=Path, default=Path("/etc/podwire/ipamd.yaml"), help="default: %(default)s")
    parser.add_argument("--node", default="", help="this node's name; default: the configuration's, or the host name")
    parser.add_argument("--version", action="version", version=f"podwire-ipamd {podwire.__version__}")
    arguments = parser.parse_args(argv)
    try:
        chosen = settings.read(arguments.config, arguments.node)
        logs.configure(chosen.log_level)
        asyncio.run(_run(chosen))
    except (PodwireError, OSError, sqlite3.Error, BaseExceptionGroup) as error:
        for each in _leaves(error):
            if not isinstance(each, PodwireError | OSError | sqlite3.Error):
                raise
            print(f"podwire-ipamd: {each}", file=sys.stderr)
        return 1
    return 0


async def _run(chosen: Settings) -> None:
    run_dir = Path(chosen.run_dir)
    for directory in (run_dir, Path(chosen.state_dir), chosen.queue_dir):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    take_lock(run_dir)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    daemon = Daemon(chosen)
    try:
        await daemon.run(stopped)
    finally:
        await daemon.close()
    log.info("stopped")


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for each in error.exceptions for leaf in _leaves(each)]


if __name__ == "__main__":
    sys.exit(main())
