"""Commands that put a model through benchmarks: the lm-evaluation-harness, and minimal pairs from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Context, Option

from hldm.commands import options
from hldm.evaluation.tables import show
from hldm.runs.reports import check_report_path, save_report

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # of typer: for `lm_eval`


def lm_eval(context: Context) -> None:
    """The lm-evaluation-harness with hldm among its models.

    Takes the arguments of `lm_eval`: hldm lm-eval --model hldm --model_args run=small,draws=32 --tasks TASK. Needs the
    extra of that name: pip install "hldm[lm-eval]".
    """
    from hldm.evaluation.lm_eval import run_harness

    run_harness(context.args)


def pairs(
    *,
    file: Annotated[Path, Option(metavar="FILE", help="JSONL with good and bad, plain or .gz")],
    run: options.RunName = "small",
    group: Annotated[str, Option(metavar="KEY", help="accuracy is given for each of its values")] = "term",
    draws: Annotated[int, Option(help="noise levels a chunk; an even number")] = 32,
    samples: Annotated[
        int, Option(min=0, help="compare the bounds by this many importance-weighted draws")
    ] = 0,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    json: options.Report = None,
) -> None:
    """How often the better of two texts is the likelier one.

    Minimal pairs such as BLiMP's, scored under common noise; accuracy by group with Wilson's interval.
    """
    if json is not None:
        check_report_path(json, "groups")
    from hldm.studies.minimal_pairs import LEGEND, judge_pairs, table

    found = judge_pairs(file, run, group=group, draws=draws, samples=samples, seed=seed)
    show(table(found), LEGEND)
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
