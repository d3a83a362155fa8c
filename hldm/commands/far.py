"""The command that measures what earlier chunks can still say of the next latent, and what a pyramid finds of it."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from hldm.commands import options
from hldm.config import Documents
from hldm.evaluation.tables import show
from hldm.runs.doing import doing
from hldm.runs.location import find_model
from hldm.runs.reports import check_report_path, save_report


def far(
    *,
    run: options.Run,
    documents: Annotated[
        Documents | None, Option(help="documents of the built-in text (default: as in the run's training)")
    ] = None,
    beam: Annotated[
        list[int] | None, Option(min=1, max=1024, help="blocks of each level to open; may repeat")
    ] = None,
    draws: Annotated[int, Option(min=1, max=64, help="draws of each chunk's latent")] = 2,
    seed: options.Seed = 0,
    json: options.Report = None,
    allow_code: options.AllowCode = False,
) -> None:
    """What earlier chunks can still say of the next latent.

    The document's own memory, its neighbours searched among the nearest chunks, through the pyramid, and among all;
    fitted on the validation split, measured on the test split.
    """
    if json is not None:
        check_report_path(json, "rows")
    from hldm.generation.pyramid import BEAM
    from hldm.studies.far import far_context, table

    beams = sorted(set(beam or [BEAM]))
    with doing("reading held-out text, and seeking what is like it earlier on"):
        found = far_context(find_model(run), documents=documents, beams=beams, draws=draws, seed=seed)
    show(table(found))
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
