"""`python -m hldm.evaluation`, the same as `hldm evaluate`. Imports torch only once there is work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hldm.evaluation.tables import compare, show
from hldm.runs.exits import guarded
from hldm.runs.folder import shipped_run
from hldm.runs.reports import check_report_path, save_report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see `hldm.runs.exits.guarded`."""
    options = vars(_parser().parse_args(argv))  # but for these three, what `evaluate_run` takes
    run, twin, target = (options.pop(name) for name in ("run", "twin", "json"))

    def work() -> int:
        from hldm.evaluation.evaluate import evaluate_run

        if target is not None:
            check_report_path(target, "bits_per_character")
        if twin and run is not None:
            raise ValueError("--twin is the shipped run's twin: give it or --run, not both")
        evaluation = evaluate_run(run or shipped_run(twin), **options)
        if target is not None:
            save_report(target, evaluation)
        show(compare({evaluation["run"]: evaluation}))
        return 0

    return guarded(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hldm evaluate", description="Measure a trained run on held-out text."
    )
    parser.add_argument(
        "--run", type=Path, help="folder of the run, e.g. runs/demo (default: the one shipped)"
    )
    parser.add_argument("--twin", action="store_true", help="the shipped run's twin")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--split", choices=("validation", "test"), default="test", help="of the run's data (default test)"
    )
    where.add_argument("--text", type=Path, metavar="FILE", help="measure this file instead, as one document")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    for name, default, metavar, what in (
        ("--prompts", 24, "N", "to continue (default 24; 0: none)"),
        ("--max-characters", 200, "N", "of a continuation (default 200)"),
        ("--draws", 16, "M", "noise levels a chunk, even (default 16)"),
        ("--samples", 0, "K", "also the bound that K importance-weighted draws give (default 0: not)"),
        ("--seed", 0, "S", "of all noise (default 0)"),
    ):
        parser.add_argument(name, type=int, default=default, metavar=metavar, help=what)
    parser.add_argument(
        "--context",
        dest="contexts",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="also with documents cut every N bytes, to see what context from farther away saves: each N takes as "
        "long as the bound itself",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
