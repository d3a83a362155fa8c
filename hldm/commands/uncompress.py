"""`hldm uncompress`: text written back from the summaries of a model."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from hldm.commands import options


def uncompress(
    *,
    run: options.RunOrShipped = None,
    minutes: Annotated[
        float, Option(callback=options.check_minutes, help="minutes of training for each decoder")
    ] = 2.0,
    chunks: Annotated[int, Option(min=1, max=64, help="chunks that a summary stands for")] = 8,
    seed: options.Seed = 0,
    json: options.Report = None,
    allow_code: options.AllowCode = False,
) -> None:
    """Write text back from summaries alone: what the mean of some chunks still holds.

    Trains a small decoder for each kind of summary, and one that reads none.
    """
    from hldm.evaluation.tables import show
    from hldm.runs.location import find_model
    from hldm.runs.reports import check_report_path, save_report

    if json is not None:
        check_report_path(json, "summaries")
    model = find_model("small" if run is None else run)
    from hldm.jepa.uncompress import tables, uncompress_run

    found = uncompress_run(
        model, chunks=chunks, minutes=minutes, seed=seed, say=lambda line: print(line, flush=True)
    )
    show(*tables(found))
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
