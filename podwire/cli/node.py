"""`podwire node`: the nodes of the cluster as etcd has them, one that is gone for good forgotten, this one cleaned.

`list` and `forget` speak to etcd, not to a daemon: the node that is asked about may be the one that is gone. Where etcd
is, and with which credentials, is in the configuration of the daemon of this node, unless flags say otherwise. `clean`
speaks to nobody but this node's kernel.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from ipam_daemon import nodes, settings
from ipam_daemon.cleaning import clean
from ipam_daemon.nodes import NodeView
from ipam_daemon.settings import Settings
from podwire.cli.agent import add_output
from podwire.cli.etcd import add_config, add_etcd, options, with_etcd
from podwire.etcd import EtcdOptions


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
        add_etcd(verb)
    text = "take the daemon's devices, routes and nft tables off this node, which is given up"
    note = "Refused while the daemon runs or a pod is attached."
    add_config(verbs.add_parser("clean", help=text, description=f"{text}. {note}"))


def run(arguments: argparse.Namespace) -> int:
    """Does what the verb says. Returns its exit code. Raises PodwireError."""
    if arguments.verb == "clean":
        return _clean(settings.read(arguments.config))
    where = options(arguments)
    if arguments.verb == "list":
        found = with_etcd(where, nodes.list_nodes)
        if arguments.output == "json":
            print(json.dumps([plain(each) for each in found], indent=2))
        else:
            _print(found)
        return 0
    return _forget(where, arguments.name, sure=arguments.yes)


def _forget(where: EtcdOptions, name: str, *, sure: bool) -> int:
    views = {each.name: each for each in with_etcd(where, nodes.list_nodes)}
    if not sure and name in views:
        blocks = ", ".join(str(block.cidr) for block in views[name].blocks) or "no block"
        print(f"{name} has {blocks}. Its pods, if any still run, lose their addresses to others.", file=sys.stderr)
        if not sys.stdin.isatty() or input(f"Forget {name}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was done; --yes answers yes", file=sys.stderr)
            return 1
    released = with_etcd(where, lambda session: nodes.forget(session, name))
    print(f"forgot {name}")
    for block in released:
        print(f"released {block.cidr} of pool {block.pool}")
    return 0


def _clean(chosen: Settings) -> int:
    done = clean(chosen)
    for each in done:
        print(f"removed  {each}")
    if not done:
        print("nothing of the daemon is left on this node")
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
