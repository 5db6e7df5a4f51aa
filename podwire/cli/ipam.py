"""`podwire ipam check`: what etcd, journal, kernel and runtime say about this node, side by side.

The daemon looks and repairs (ipam_daemon/inspection.py): it has the journal open, and knows what is under way. This
only asks it and prints. docs/operations.md says what each difference means.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict
from rich.console import Console

from podwire.cli.agent import add_output, add_socket, agent
from podwire.v1 import agent_pb2

_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    text = "compare what etcd, journal, kernel and runtime say about this node"
    check = verbs.add_parser("check", help=text, description=f"{text}. Exits with 0 when nothing differs, else with 1.")
    check.add_argument("--fix", action="store_true", help="repair what can be repaired, and say what was done")
    check.add_argument(
        "--runtime-endpoint",
        default="",
        metavar="URL",
        help="ask the container runtime for its sandboxes, too: unix:///run/containerd/containerd.sock",
    )
    add_output(check)
    add_socket(check)


def run(arguments: argparse.Namespace) -> int:
    """Prints what differs. Returns 0 when nothing does (any more), 1 otherwise. Raises TryAgain without a daemon."""
    with agent(arguments.socket) as stub:
        answer = stub.Audit(
            agent_pb2.AuditRequest(fix=arguments.fix, runtime_endpoint=arguments.runtime_endpoint), timeout=_SECONDS
        )
    if arguments.output == "json":
        print(json.dumps(MessageToDict(answer, always_print_fields_with_no_presence=True), indent=2))
    else:
        _print(answer, arguments.fix)
    return 1 if answer.remaining else 0


def _print(answer: agent_pb2.AuditResponse, fix: bool) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if not answer.differences:
        console.print(f"{answer.node}: etcd, journal, kernel and runtime say the same")
        return
    console.print(f"{answer.node}: {_count(answer.differences)}")
    _print_each(console, answer.differences, fixing=fix)
    if fix:
        console.print("\ndone:" if answer.done else "\nnothing could be done")
        for line in answer.done:
            console.print(f"  {line}")
        console.print(f"\nleft: {_count(answer.remaining)}" if answer.remaining else "\nnothing differs any more")
        _print_each(console, answer.remaining, fixing=False)
    elif any(each.fix for each in answer.differences):
        console.print("\n`podwire ipam check --fix` repairs what says so; the daemon does most of it by itself in time")


def _print_each(console: Console, differences: Iterable[agent_pb2.Difference], *, fixing: bool) -> None:
    for each in differences:
        console.print(f"\n{each.kind}  {each.subject}")
        for source in sorted(each.says):
            console.print(f"  {source:<8} {each.says[source]}")
        console.print(f"  why      {each.why}")
        if each.fix and not fixing:
            console.print(f"  --fix    {each.fix}")
        if each.advice:
            console.print(f"  you      {each.advice}")


def _count(differences: Iterable[agent_pb2.Difference]) -> str:
    number = len(list(differences))
    return f"{number} difference{'' if number == 1 else 's'}"
