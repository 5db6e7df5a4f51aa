"""`podwire policy`: what NetworkPolicies let pass, from manifests or from a cluster; nothing is sent to anybody.

test     one flow: allowed or denied, by which rule or policies      0 allowed, 1 denied, 2 cannot be answered
matrix   every pod by every pod, as a table or a picture             0, 2 cannot be answered
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from podwire import manifests
from podwire.cli.objects import add_cluster, read_access
from podwire.errors import PodwireError
from podwire.explain import matrix as matrices
from podwire.explain import verdict
from podwire.explain.cluster import Cluster, read_port
from podwire.explain.manifests import read_objects
from podwire.explain.matrix_picture import render_html, render_svg
from podwire.explain.matrix_text import render_text
from podwire.explain.objects import Objects

_UNANSWERED = 2
_WIDTH = 120  # of what is not a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    text = "whether a flow is allowed, and which rule or policies decide"
    test = verbs.add_parser("test", help=text, description=f"{text}. Exits with 0 allowed, 1 denied, 2 not answered.")
    _add_objects(test, "of names that do not say one (default)")
    test.add_argument(
        "--from", dest="source", required=True, metavar="POD|ADDRESS", help="NAMESPACE/NAME, or an address"
    )
    test.add_argument("--to", required=True, metavar="POD|SERVICE|ADDRESS", help="svc/… and pod/… where a name is both")
    test.add_argument("--port", required=True, metavar="PORT[/PROTOCOL]", help="80, 53/UDP, or a port's name")
    test.add_argument("-o", dest="output", choices=("text", "json"), default="text", help="default: %(default)s")
    text = "which pods reach which, as a table or a picture"
    matrix = verbs.add_parser("matrix", help=text, description=text)
    _add_objects(matrix, "this namespace's pods alone (those of all)")
    matrix.add_argument(
        "--port", action="append", default=[], metavar="PORT[/PROTOCOL]",
        help="ask about this port; may be given again (default: the ports that each pod declares)",
    )  # fmt: skip
    matrix.add_argument("-o", dest="output", choices=("table", "svg", "html", "json"), default="table")
    matrix.add_argument(
        "--output", dest="file", type=Path, metavar="FILE", help="write it there instead of printing it"
    )


def _add_objects(parser: argparse.ArgumentParser, namespace: str) -> None:
    parser.add_argument(
        "-f", dest="manifests", action="append", default=[], metavar="MANIFESTS",
        help="a file, a folder, or - for standard input, instead of a cluster; may be given again",
    )  # fmt: skip
    parser.add_argument("-n", "--namespace", metavar="NS", help=namespace)
    add_cluster(parser)


def run(arguments: argparse.Namespace) -> int:
    """Does what the verb says. Returns its exit code; what cannot be answered is 2, since 1 is an answer."""
    try:
        cluster = Cluster(_objects(arguments))
        return _test(cluster, arguments) if arguments.verb == "test" else _matrix(cluster, arguments)
    except PodwireError as error:
        print(f"podwire policy {arguments.verb}: {error}", file=sys.stderr)
        return _UNANSWERED


def _objects(arguments: argparse.Namespace) -> Objects:
    if not arguments.manifests:
        from podwire.explain.live import fetch  # aiohttp takes 0.2 s to import

        return fetch(read_access(arguments))
    if arguments.kubeconfig or arguments.name:
        raise PodwireError("-f is instead of --kubeconfig and --name: give one of them")
    return read_objects(manifests.load(arguments.manifests))


def _test(cluster: Cluster, arguments: argparse.Namespace) -> int:
    namespace = arguments.namespace or "default"
    answer = verdict.ask(
        cluster,
        cluster.place(arguments.source, namespace, source=True),
        cluster.place(arguments.to, namespace),
        read_port(arguments.port),
    )
    if arguments.output == "json":
        print(json.dumps(verdict.plain(cluster, answer), indent=2))
    else:
        print("\n".join(verdict.describe(cluster, answer)))
    return 0 if answer.allowed else 1


def _matrix(cluster: Cluster, arguments: argparse.Namespace) -> int:
    namespaces = [arguments.namespace] if arguments.namespace else []
    matrix = matrices.make_matrix(cluster, [read_port(text) for text in arguments.port], namespaces)
    if arguments.output == "json":
        text = json.dumps(matrices.plain(matrix), indent=2) + "\n"
    elif arguments.output == "table":
        width = shutil.get_terminal_size((_WIDTH, 0)).columns if sys.stdout.isatty() else _WIDTH
        text = "\n".join(render_text(matrix, width)) + "\n"
    else:
        text = render_svg(matrix) if arguments.output == "svg" else render_html(matrix)
    if arguments.file is None:
        sys.stdout.write(text)
        return 0
    try:
        arguments.file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PodwireError(f"{arguments.file}: cannot be written: {error.strerror}") from error
    return 0
