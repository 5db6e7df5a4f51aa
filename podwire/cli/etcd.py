"""Where etcd is, for the subcommands that speak to it themselves: in a daemon's configuration, or in flags."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from ipam_daemon import settings
from podwire.errors import PodwireError
from podwire.etcd import EtcdOptions, EtcdSession

CONFIG = Path("/etc/podwire/ipamd.yaml")
T = TypeVar("T")

_FLAGS = (
    ("--cacert", "FILE", "the server's certificate authority"),
    ("--cert", "FILE", "the client's certificate"),
    ("--key", "FILE", "its private key"),
    ("--user", "NAME", "an etcd user"),
    ("--password-file", "FILE", "the user's password"),
)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The flag that names a daemon's configuration."""
    parser.add_argument(
        "--config", type=Path, default=CONFIG, metavar="FILE", help="a daemon's configuration (default: %(default)s)"
    )


def add_etcd(parser: argparse.ArgumentParser) -> None:
    """The flags that say where etcd is, and with which credentials."""
    add_config(parser)
    parser.add_argument(
        "--etcd", action="append", metavar="ENDPOINT", help="instead of the configuration's; may be given again"
    )
    for flag, what, text in _FLAGS:
        parser.add_argument(flag, default="", metavar=what, help=f"with --etcd: {text}")


def options(arguments: argparse.Namespace) -> EtcdOptions:
    """What the flags say. Raises PodwireError."""
    if not arguments.etcd:
        return settings.read(arguments.config).etcd
    try:
        return EtcdOptions(
            endpoints=tuple(arguments.etcd),
            ca=arguments.cacert,
            cert=arguments.cert,
            key=arguments.key,
            user=arguments.user,
            password_file=arguments.password_file,
        )
    except ValueError as error:
        raise PodwireError(str(error)) from error


def with_etcd(where: EtcdOptions, act: Callable[[EtcdSession], Awaitable[T]]) -> T:
    """Runs `act` with a session, which is closed in the end."""

    async def whole() -> T:
        async with EtcdSession(where) as session:
            return await act(session)

    return asyncio.run(whole())
