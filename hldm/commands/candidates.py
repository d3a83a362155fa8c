"""`hldm candidates`: what choosing from several continuations buys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from hldm.commands import options
from hldm.evaluation.tables import show
from hldm.runs.location import find_model
from hldm.runs.reports import check_report_path, save_report

RULES_HELP = "one rule, e.g. mbr; may repeat (default: all that the model supports)"
TEMPERATURE_HELP = "temperature of the bytes, for each rule; may repeat (default: 0.7, 0.85, 1)"


def candidates(
    *,
    run: options.Run,
    twin: Annotated[Path | None, Option(metavar="RUN", help="twin whose writing is judged, too")] = None,
    rule: Annotated[list[str] | None, Option(help=RULES_HELP)] = None,
    candidates: Annotated[int, Option(help="candidates at each place")] = 8,
    depth: Annotated[int, Option(help="chunks of a candidate")] = 16,
    decoder_temperature: Annotated[list[float] | None, Option(help=TEMPERATURE_HELP)] = None,
    prompts: Annotated[int, Option(min=2, help="continuations")] = 128,
    max_characters: options.MaxCharacters = 200,
    seed: options.Seed = 0,
    json: options.Report = None,
    allow_code: options.AllowCode = False,
) -> None:
    """Whether the best of several continuations beats single draws.

    The judges have no part in ranking; compared at the entropy of the true text.
    """
    if json is not None:
        check_report_path(json, "candidates_judged")
    from hldm.studies import best_of

    found = best_of.study_candidates(
        find_model(run),
        twin=None if twin is None else find_model(twin),
        rules=rule or [],
        candidates=candidates,
        depth=depth,
        temperatures=decoder_temperature or best_of.TEMPERATURES,
        prompts=prompts,
        max_characters=max_characters,
        seed=seed,
    )
    show(best_of.table(found), best_of.LEGEND)
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
