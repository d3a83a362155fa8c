"""`hldm summaries`: what a block of chunks is best summed up by."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from hldm.commands import options


def summaries(
    *,
    run: options.RunOrShipped = None,
    minutes: Annotated[
        float, Option(callback=options.check_minutes, help="minutes of training for each prior")
    ] = 0.5,
    seeds: Annotated[int, Option(min=2, help="seeds that every prior is trained with")] = 3,
    chunks: Annotated[int, Option(min=1, help="chunks of the test text to measure, about")] = 6000,
    seed: options.Seed = 0,
    json: options.Report = None,
    allow_code: options.AllowCode = False,
) -> None:
    """What summaries beyond the mean save in bits of latents.

    Trains small priors that differ in what their pyramid holds, on the frozen latents of a run.
    """
    from hldm.evaluation.tables import show
    from hldm.runs.location import find_model
    from hldm.runs.reports import check_report_path, save_report

    if json is not None:
        check_report_path(json, "compared")
    model = find_model("small" if run is None else run)
    from hldm.studies.summaries import compare_summaries, tables

    found = compare_summaries(
        model,
        minutes=minutes,
        seeds=seeds,
        chunks=chunks,
        seed=seed,
        say=lambda line: print(line, flush=True),
    )
    show(*tables(found))
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
