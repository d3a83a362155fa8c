"""`hldm frontier`: bits against speed, for twins of several sizes and latent recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from hldm.commands import options
from hldm.evaluation.tables import show
from hldm.runs.reports import PICTURES


def frontier(
    *,
    config: options.Paired,
    overrides: options.PairOverrides = None,
    name: options.StudyName = None,
    minutes: options.Minutes,
    only: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="one entry: twin-0.5M, base, ...; may repeat (default: all)"),
    ] = None,
    repeat: Annotated[
        list[str] | None, Option(metavar="NAME", help="with three seeds instead of one; may repeat")
    ] = None,
    clock: options.Clock = "wall",
) -> None:
    """Bits against speed: twins of several sizes beside latent recipes.

    All are trained for the same minutes and write in turns.
    """
    from hldm.studies.frontier import run_frontier, table
    from hldm.studies.plots import plot_frontier

    given = options.with_name(overrides, name)
    study = run_frontier(
        config, minutes, only=only or [], repeated=repeat or [], clock=clock, overrides=given
    )
    folder = Path("runs") / f"{study['name']}-frontier"
    plot_frontier(study, *(folder / f"frontier.{kind}" for kind in PICTURES))
    show(
        table(study),
        "under the twins, N: bits that a twin as fast, writing N texts at once, would need more; negative: fewer",
        f"frontier.json, frontier.png, .svg and .pdf are in {folder}",
    )
