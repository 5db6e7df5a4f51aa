"""`python -m bench`: runs scenarios, prints their tables and bounds, writes bench/results/<time>.json.

Exit status 0 when everything was measured, whether or not a bound was reached; 1 when something did not work.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import msgspec

from bench import machine
from bench.report import Report, Table, render, render_bounds, render_table, replace_regions
from bench.scenarios import SCENARIOS, Scenario
from bench.stage import Stage
from podwire.errors import PodwireError

_HERE = Path(__file__).resolve().parent
_DOCUMENT = _HERE.parent / "docs" / "performance.md"


def main() -> int:
    """Returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args()
    unknown = set(arguments.scenario) - {each.name for each in SCENARIOS}
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}")
    if arguments.write_docs and arguments.scenario:
        parser.error("--write-docs takes all scenarios: the document is about one run")
    chosen = [each for each in SCENARIOS if not arguments.scenario or each.name in arguments.scenario]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    described = machine.describe()
    print(_machine(described), flush=True)
    try:
        reports = {each.name: _run(each, arguments.rounds, arguments.quick) for each in chosen}
    except PodwireError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    bounds = [bound for report in reports.values() for bound in report.bounds]
    if bounds:
        print(f"\n{render_bounds(bounds)}")
    path = _write_json(described, reports)
    print(f"\nall samples: {path}")
    if arguments.write_docs:
        regions = {name: render(report) for name, report in reports.items()}
        regions |= {"machine": _machine(described), "bounds": render_bounds(bounds)}
        _DOCUMENT.write_text(replace_regions(_DOCUMENT.read_text(), regions))
        print(f"written: {_DOCUMENT}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Podwire (root).")
    scenarios = "; ".join(f"{each.name}: {each.about} ({each.rounds})" for each in SCENARIOS)
    parser.add_argument("scenario", nargs="*", help=f"default: all. {scenarios}")
    parser.add_argument("-n", "--rounds", type=int, default=0, help="rounds, or pods, instead of a scenario's own")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works")
    parser.add_argument("--write-docs", action="store_true", help="put the numbers into docs/performance.md")
    return parser


def _run(scenario: Scenario, rounds: int, quick: bool) -> Report:
    print(f"\n### {scenario.about}", flush=True)
    began = time.monotonic()
    with Stage() as stage:
        report = scenario.run(stage, rounds or (scenario.quick if quick else scenario.rounds))
    print(f"\n{render(report)}\n\n({time.monotonic() - began:.0f} s)", flush=True)
    return report


def _machine(described: Mapping[str, str]) -> str:
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    rows = (("command", command), *described.items())
    return render_table(Table(title="The machine", columns=("", ""), rows=rows))


def _write_json(described: Mapping[str, str], reports: Mapping[str, Report]) -> Path:
    folder = _HERE / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%dT%H%M%S')}.json"
    plain = {"machine": dict(described), "arguments": sys.argv[1:], "scenarios": msgspec.to_builtins(dict(reports))}
    path.write_text(json.dumps(plain, indent=1))
    return path


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
