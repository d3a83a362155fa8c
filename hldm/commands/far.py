"""The command that measures what earlier chunks could still say of the next latent."""

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
        Documents | None, Option(help="of the built-in text (default: those that the run was trained on)")
    ] = None,
    levels: Annotated[
        int, Option(min=0, max=12, help="of means above the single chunks; 0: single chunks alone")
    ] = 3,
    window: Annotated[int, Option(min=1, max=4096, help="entries of each level, at least")] = 24,
    blocks: Annotated[
        int,
        Option(
            min=0, help="with --levels 0: read so many blocks of 8 in full, chosen by their means; 0: all"
        ),
    ] = 0,
    json: options.Report = None,
    allow_code: options.AllowCode = False,
) -> None:
    """What earlier chunks could still say of the next latent.

    A cache over single chunks, and means of the pyramid or blocks that they select, beside the mixture of a frozen
    model: fitted on the validation split, measured on the test split, whole and with parts of it hidden.
    """
    if json is not None:
        check_report_path(json, "worth")
    from hldm.studies.far_cache import far_context, table

    with doing("reading held-out text, and fitting a cache of earlier chunks"):
        found = far_context(find_model(run), documents=documents, levels=levels, window=window, blocks=blocks)
    show(table(found))
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
