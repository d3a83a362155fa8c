"""The command that shows a run as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hldm.commands.options import AllowCode, Seed, Text
from hldm.runs.doing import loading
from hldm.runs.reports import check_page_path

MARK = b"<!doctype html><!-- hldm report -->"  # hldm.app.report.build.PAGE_MARK, without importing torch


def report(
    run: Annotated[Path, Argument(metavar="RUN", help="folder of a run, small, small-twin or owner/name")],
    *,
    against: Annotated[
        Path | None, Option(metavar="RUN", help="another run to compare with, e.g. its twin")
    ] = None,
    html: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="file to write (default: report.html in a run's own folder, else NAME-report.html)",
        ),
    ] = None,
    text: Text = None,
    measure: Annotated[bool, Option("--measure", help="measure even if there is an evaluation.json")] = False,
    seed: Seed = 0,
    allow_code: AllowCode = False,
) -> None:
    """A run as one page to look at.

    Curves, figures, a passage in chunks, the latents on a plane, how one is denoised, samples, faults. The page needs
    no network.
    """
    is_ours = (run / "autoencoder" / "checkpoints").is_dir()
    target = html or (run / "report.html" if is_ours else Path(f"{run.resolve().name}-report.html"))
    check_page_path(target, MARK)
    with loading():
        from hldm.app.report.build import build_report
        from hldm.runs.files import atomic_write

    page = build_report(run, against=against, text=text, measure=measure, seed=seed)
    atomic_write(target, page)
    print(f"wrote {target} ({len(page.encode()) / 1e6:.1f} MB): open it in a browser")
