"""`hldm decoding`: what rules of decoding buy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from hldm.commands import options
from hldm.evaluation.tables import show
from hldm.runs.location import find_model
from hldm.runs.reports import check_report_path, save_report


def decoding(
    *,
    run: options.Run,
    twin: Annotated[
        Path | None, Option(metavar="RUN", help="twin for decoding by contrast, measured too")
    ] = None,
    prompts: Annotated[int, Option(min=2, help="continuations of each seed")] = 128,
    max_characters: options.MaxCharacters = 100,
    seeds: Annotated[int, Option(min=2, help="seeds that everything is written with")] = 3,
    seed: options.Seed = 0,
    json: options.Report = None,
    allow_code: options.AllowCode = False,
) -> None:
    """Whether contrast, early exit or guidance beat a lower temperature.

    Judged bits against entropy; the judges are independent of the model.
    """
    if json is not None:
        check_report_path(json, "decoded")
    from hldm.studies import decoding as study

    found = study.measure_decoding(
        find_model(run),
        twin=None if twin is None else find_model(twin),
        prompts=prompts,
        max_characters=max_characters,
        seeds=seeds,
        seed=seed,
    )
    show(study.table(found), study.LEGEND)
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
