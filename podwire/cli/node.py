"""`podwire node`: the nodes of the cluster as etcd has them, and one that is gone for good forgotten.

Both speak to etcd, not to a daemon: the node that is asked about may be the one that is gone. Where etcd is, and with
which credentials, is in the configuration of the daemon of this node, unless flags say otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from ipam_daemon import nodes, settings
from ipam_daemon.nodes import NodeView
from podwire.cli.agent import add_output
from podwire.errors import PodwireError
from podwire.etcd import EtcdOptions, EtcdSession

CONFIG = Path("/etc/podwire/ipamd.yaml")
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    text = "every node: machine, addresses, blocks, whether its daemon lives"
    listing = verbs.add_parser("list", help=text, description=text)
    add_output(listing)
    text = "delete the record and the blocks of a node that is gone for good"
    forget = verbs.add_parser("forget", help=text, description=f"{text}. Refused while its daemon lives.")
    forget.add_argument("name", metavar="NAME")
    forget.add_argument("--yes", action="store_true", help="do not ask")
    for verb in (listing, forget):
        verb.add_argument(
            "--config",
            type=Path,
            default=CONFIG,
            metavar="FILE",
            help="a daemon's configuration (default: %(default)s)",
        )
        verb.add_argument(
            "--etcd", action="append", metavar="ENDPOINT", help="instead of the configuration's; may be given again"
        )
        verb.add_argument(
            "--cacert", default="", metavar="FILE", help="with --etcd: the server's certificate authority"
        )
        verb.add_argument("--cert", default="", metavar="FILE", help="with --etcd: the client's certificate")
        verb.add_argument("--key", default="", metavar="FILE", help="with --etcd: its private key")
        verb.add_argument("--user", default="", metavar="NAME", help="with --etcd: an etcd user")
        verb.add_argument("--password-file", default="", metavar="FILE", help="with --etcd: the user's password")


def run(arguments: argparse.Namespace) -> int:
    """Does what the verb says. Returns its exit code. Raises PodwireError."""
    options = _options(arguments)
    if arguments.verb == "list":
        found = _with_etcd(options, nodes.list_nodes)
        if arguments.output == "json":
            print(json.dumps([plain(each) for each in found], indent=2))
        else:
            _print(found)
        return 0
    return _forget(options, arguments.name, sure=arguments.yes)


def _options(arguments: argparse.Namespace) -> EtcdOptions:
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


def _with_etcd(options: EtcdOptions, act: Callable[[EtcdSession], Awaitable[T]]) -> T:
    async def whole() -> T:
        async with EtcdSession(options) as session:
            return await act(session)

    return asyncio.run(whole())


def _forget(options: EtcdOptions, name: str, *, sure: bool) -> int:
    views = {each.name: each for each in _with_etcd(options, nodes.list_nodes)}
    if not sure and name in views:
        blocks = ", ".join(str(block.cidr) for block in views[name].blocks) or "no block"
        print(f"{name} has {blocks}. Its pods, if any still run, lose their addresses to others.", file=sys.stderr)
        if not sys.stdin.isatty() or input(f"Forget {name}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was done; --yes answers yes", file=sys.stderr)
            return 1
    released = _with_etcd(options, lambda session: nodes.forget(session, name))
    print(f"forgot {name}")
    for block in released:
        print(f"released {block.cidr} of pool {block.pool}")
    return 0


def plain(view: NodeView) -> dict[str, object]:
    """A node as JSON has it; the keys are stable. Times are in seconds since the epoch, null when not known."""
    record = view.record
    return {
        "name": view.name,
        "live": bool(view.live),
        "gone": view.gone or None,
        "machine": record.node_id if record else view.live or None,
        "generation": record.generation if record else None,
        "addresses": [str(each) for each in record.addresses] if record else [],
        "blocks": [str(block.cidr) for block in view.blocks],
        "version": record.version if record else "",
        "published": record.published or None if record else None,
        "problems": problems(view),
    }


def problems(view: NodeView) -> list[str]:
    """What is not right about what etcd has of a node, in words."""
    found = [f"{key} cannot be read" for key in view.damaged]
    if view.record is None:
        return [*found, "no record"] if not view.damaged else found
    if view.live and view.live != view.record.node_id:
        found.append(f"machine {view.live} holds its name")
    claimed = {block.cidr for block in view.blocks}
    found += [f"tells of {cidr}, and has not claimed it" for cidr in view.record.blocks if cidr not in claimed]
    found += [f"{cidr} is claimed, and not told of" for cidr in claimed if cidr not in view.record.blocks]
    foreign = [block.cidr for block in view.blocks if block.node_id != view.record.node_id]
    return found + [f"{cidr} was claimed by another machine of the name" for cidr in foreign]


def _print(found: Sequence[NodeView]) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("NODE", "LIVE", "ADDRESSES", "BLOCKS", "MACHINE", "GEN", "VERSION", "PUBLISHED", box=None)
    for view in found:
        shown = msgspec.convert(plain(view), dict)
        table.add_row(
            view.name,
            "yes" if view.live else _gone(view.gone),
            " ".join(shown["addresses"]),
            " ".join(shown["blocks"]),
            shown["machine"] or "-",
            str(shown["generation"] or "-"),
            shown["version"] or "-",
            _moment(shown["published"]),
        )
    console.print(table)
    for view in found:
        for problem in problems(view):
            console.print(f"{view.name}: {problem}")


def _gone(seconds: float) -> str:
    return f"no, since {_moment(seconds)}" if seconds else "no"


def _moment(seconds: float | None) -> str:
    if not seconds:
        return "-"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
