"""The command that makes a folder to share of a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from hldm.commands.options import AllowCode, Run
from hldm.runs.doing import loading
from hldm.runs.location import find_model

LICENCE = "licence of the weights, e.g. cc-by-4.0 (default: mit for the built-in text, else unknown)"


def export(
    *,
    run: Run,
    to: Annotated[Path, Option(help="folder to make; it must not be there yet")],
    licence: Annotated[str, Option("--licence", "--license", metavar="SPDX", help=LICENCE)] = "",
    prompt: Annotated[str, Option(help="beginning of the card's sample")] = "",
    measure: Annotated[bool, Option("--measure", help="evaluate a run that has no scores yet")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Make a folder of a trained run, to share.

    Weights, settings, scores and a model card: what it is, what it can and how it was made.
    """
    with loading():
        from hldm.evaluation.sharing import share_run

    share_run(find_model(run), to, licence=licence.lower(), prompt=prompt, measure=measure)
    print(f'Load it anywhere: HLDMPipeline.from_pretrained("{to}"), hldm generate --run {to}')
    print(f"Measure it on any text: hldm evaluate --run {to} --text FILE")
