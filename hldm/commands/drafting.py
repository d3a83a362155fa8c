"""The command that makes a draft: what guesses a run's text, so that it is written faster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from hldm.commands.options import AllowCode, Clock, Minutes, Report, RunName, Seed
from hldm.config import config_of_run
from hldm.runs.location import SHIPPED, find_model, pipeline_of
from hldm.runs.reports import check_report_path, save_report

DRAFT = "draft"  # the folder of a run that holds its own


def draft(
    *,
    run: RunName,
    to: Annotated[Path | None, Option(metavar="FOLDER", help="folder to write (default: RUN/draft)")] = None,
    minutes: Minutes = 2.0,
    clock: Clock = "wall",
    measure: Annotated[
        bool, Option("--measure", help="measure writing with and without it, in turns")
    ] = False,
    seed: Seed = 0,
    json: Report = None,
    allow_code: AllowCode = False,
) -> None:
    """Make a table of guesses that speeds up writing; the text stays the same to the byte.

    It is made from as much of the run's training text as the minutes allow. Nothing is trained.
    """
    if json is not None:
        check_report_path(json, "drafts")
        if not measure:
            raise ValueError("--json holds what --measure finds: give both")
    if to is None and run in SHIPPED and not Path(run).exists():
        raise ValueError(
            f"{run} comes with hldm and is left as it is: name a folder, e.g. --to runs/{run}-draft"
        )
    found = find_model(run)
    path = found / "autoencoder" / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{found} does not say which text it was trained on: give the folder of the run"
        )
    from hldm.evaluation.tables import show
    from hldm.generation.draft import make_draft, save_draft
    from hldm.generation.pipeline import read_pipeline
    from hldm.sources.corpora import load_corpus
    from hldm.studies import bench_drafts

    pipeline = read_pipeline(pipeline_of(found))
    gamma_0 = 0.0 if pipeline.prior is None else float(pipeline.prior.diffusion.gamma_0)
    corpus = load_corpus(config_of_run(found).data, "train")
    made = make_draft(pipeline.autoencoder, gamma_0, corpus, minutes=minutes, clock=clock, say=print)
    written = save_draft(made, found / DRAFT if to is None else to)
    print(f"wrote {written}, {written.stat().st_size:,} bytes")
    print(f'hldm generate --run {run}{"" if to is None else f" --draft {to}"} --prompt "..." writes with it')
    if measure:
        model = bench_drafts.Drafted(pipeline.autoencoder, pipeline.prior, pipeline.settings, made)
        figures = bench_drafts.measure({run: model}, seed=seed)
        show(bench_drafts.report(figures))
        if json is not None:
            save_report(json, {"drafts": figures})
            print(f"wrote {json}")
