"""Commands that measure runs and speeds. Each prints a table and says which files it wrote beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from typer import Option

from hldm.commands import options
from hldm.config import load_config
from hldm.evaluation.tables import READING, compare, legend, measured_on, show
from hldm.runs.doing import loading
from hldm.runs.export import EVALUATION
from hldm.runs.folder import shipped_run
from hldm.runs.location import find_model
from hldm.runs.reports import PICTURES, check_picture_path, check_report_path, save_report
from hldm.runs.signals import is_first_rank

Draws = Annotated[int, Option(help="noise levels a chunk; an even number")]
Context = Option(
    metavar="N",
    help="also with documents cut every N bytes, to see what context from farther away saves: each takes as long as "
    "the bound itself; may repeat",
)
Without = Option(
    metavar="PART=RUN",
    help="with --parts: a run that was trained without the part for as long; may repeat",
)
STRATEGIES_HELP = "one strategy, or your own, module:Class; may repeat (default: all of hldm)"
Halves = Literal["training", "writing"]


def _save(path: Path | None, write: Callable[[Path], Any]) -> None:
    """Write a file that was asked for, and say so."""
    if path is not None:
        write(path)
        print(f"wrote {path}")


def evaluate(
    *,
    run: options.RunOrShipped = None,
    twin: Annotated[bool, Option("--twin", help="the shipped run's twin")] = False,
    split: Annotated[options.Split | None, Option(help="split of the run's data (default: test)")] = None,
    text: options.Text = None,
    json: options.Report = None,
    prompts: Annotated[int, Option(help="prompts to continue; 0: none")] = 24,
    max_characters: options.MaxCharacters = 200,
    draws: Draws = 8,
    samples: Annotated[int, Option(help="also the bound by this many importance-weighted draws")] = 0,
    context: Annotated[list[int] | None, Context] = None,
    meaning: Annotated[
        bool,
        Option("--meaning", help="also find verses in another translation by the model's vectors: a minute"),
    ] = False,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
) -> None:
    """Bits per character, reconstruction and ROUGE of a run.

    Measured on held-out text, with speed and cost.
    """
    if json is not None:
        check_report_path(json, "bits_per_character")
    if twin and run is not None:
        raise ValueError("--twin is the shipped run's twin: give it or --run, not both")
    options.check_split(split, text)
    with loading():
        from hldm.evaluation.evaluate import evaluate_run

    folder = shipped_run(twin) if run is None else find_model(run)
    evaluation = evaluate_run(
        folder,
        split=split or "test",
        text=text,
        draws=draws,
        samples=samples,
        contexts=context or [],
        prompts=prompts,
        max_characters=max_characters,
        seed=seed,
    )
    if meaning:
        from hldm.jepa.similarity import meaning_of

        evaluation["meaning"] = meaning_of(folder)
    columns = {evaluation["run"]: evaluation}
    show(
        *measured_on(columns),
        compare(columns),
        *(evaluation["alive"] or {}).get("complaints", []),
        READING,
    )
    if text is not None and evaluation["alive"]:
        named, flag = run or "small", " --allow-code" if allow_code else ""
        print(
            f"What each part is worth on it: hldm diagnose --parts --run {named}{flag} --text {quote(str(text))}"
        )
    is_kept = (
        run is not None
        and text is None
        and split in (None, "test")
        and (run / "autoencoder" / "checkpoints").is_dir()
    )
    if is_kept:
        save_report(folder / EVALUATION, evaluation)  # for the report and the card
        print(f"kept in {folder / EVALUATION}")
    _save(json, lambda path: save_report(path, evaluation))
    if not is_kept and json is None:
        print("only printed: --json FILE keeps these figures, and more")


def diagnose(
    *,
    run: options.Run,
    split: Annotated[
        options.Split | None, Option(help="of the run's data (default: validation, with --parts test)")
    ] = None,
    text: options.Text = None,
    draws: Draws = 8,
    seed: options.Seed = 0,
    json: options.Report = None,
    figure: Annotated[
        Path | None, Option("--figure", "--png", help="draw the figures: .png, .svg or .pdf")
    ] = None,
    parts: Annotated[bool, Option("--parts", help="what each part is worth instead (docs/parts.md)")] = False,
    twin: Annotated[Path | None, Option(metavar="RUN", help="with --parts: the twin to compare with")] = None,
    without: Annotated[list[str] | None, Without] = None,
    allow_code: options.AllowCode = False,
) -> None:
    """What latents hold, cost, and give to the decoder.

    With --parts: what the bound loses when a part of the model is hidden.
    """
    if not parts and (twin is not None or without):
        raise ValueError("--twin and --without belong to the table of parts: give --parts, too")
    others = _runs_by_part(without or [])
    if json is not None:
        check_report_path(json, "rows" if parts else "latent_by_dimension")
    if figure is not None:
        check_picture_path(figure)
    options.check_split(split, text)
    from hldm.studies.diagnosis import diagnose_run, summary
    from hldm.studies.plots import plot_diagnosis, plot_parts

    model = find_model(run)
    draw: Callable[..., None]
    if parts:
        from hldm.evaluation.parts_table import parts_of_run, tables

        found = parts_of_run(
            model,
            split=split or "test",
            text=text,
            twin=None if twin is None else find_model(twin),
            without={name: find_model(other) for name, other in others.items()},
            draws=draws,
            seed=seed,
        )
        shown, draw = tables(found), plot_parts
    else:
        found = diagnose_run(model, split=split or "validation", text=text, draws=draws, seed=seed)
        shown, draw = summary(found), plot_diagnosis
    show(*shown)
    _save(json, lambda path: save_report(path, found))
    _save(figure, lambda path: draw(found, path))


def _runs_by_part(given: list[str]) -> dict[str, Path]:
    """NAME=RUN, several times, as a dict. Raises ValueError for anything else."""
    found: dict[str, Path] = {}
    for text in given:
        name, is_pair, run = text.partition("=")
        if not (name and is_pair and run):
            raise ValueError(f"--without takes PART=RUN, e.g. denoiser=runs/without, got {text!r:.80}")
        if name in found:
            raise ValueError(f"--without {name} is given twice: one run a part")
        found[name] = Path(run)
    return found


def rate_curve(
    *,
    config: options.Paired,
    overrides: options.PairOverrides = None,
    name: options.StudyName = None,
    minutes: options.Minutes,
    only: Annotated[
        list[str] | None, Option(metavar="DIAL", help="setting to vary; may repeat (default: all)")
    ] = None,
    clock: options.Clock = "wall",
) -> None:
    """What latents carry against what they cost.

    One dial is turned at a time; each point and the twin are trained for the same minutes.
    """
    from hldm.studies.plots import plot_rate_curve
    from hldm.studies.rate_curve import run_curve, table

    given = options.with_name(overrides, name)
    curve = run_curve(config, minutes, only=only or [], clock=clock, overrides=given)
    target = Path("runs") / f"{curve['name']}-curve" / "rate-curve.png"
    plot_rate_curve(curve, *(target.with_suffix(f".{kind}") for kind in PICTURES))
    show(table(curve), f"rate-curve.json, rate-curve.png, .svg and .pdf are in {target.parent}")


def chunkers(
    *,
    config: options.Paired,
    overrides: options.PairOverrides = None,
    name: options.StudyName = None,
    minutes: options.Minutes,
    only: Annotated[list[str] | None, Option(metavar="STRATEGY", help=STRATEGIES_HELP)] = None,
    targets: Annotated[list[int] | None, Option(help="bytes a latent; may repeat (default: 6, 12)")] = None,
    clock: options.Clock = "wall",
) -> None:
    """Every chunking strategy, trained and measured alike.

    For the same minutes, at the same bytes a latent.
    """
    from hldm.studies.league import run_league, table
    from hldm.studies.plots import plot_league

    given = options.with_name(overrides, name)
    asked = targets or [6, 12]
    league = run_league(config, minutes, only=only or [], targets=asked, clock=clock, overrides=given)
    folder = Path("runs") / f"{league['name']}-league"
    plot_league(league, *(folder / f"league.{kind}" for kind in PICTURES))
    show(table(league), f"league.json, league.md, league.png, .svg and .pdf are in {folder}")


def judge(
    *,
    run: Annotated[Path, Option(help="model whose writing is judged")],
    judge: Annotated[Path | None, Option(metavar="RUN", help="a twin trained with another seed")] = None,
    twin: Annotated[Path | None, Option(metavar="RUN", help="twin whose writing is judged, too")] = None,
    text: options.Text = None,
    vary: Annotated[
        list[str] | None, Option(help="setting to vary: steps, scheduler, ...; may repeat")
    ] = None,
    prompts: Annotated[int, Option(help="continuations")] = 48,
    max_characters: options.MaxCharacters = 400,
    seed: options.Seed = 0,
    json: options.Report = None,
    allow_code: options.AllowCode = False,
) -> None:
    """How good written text is, beside the true text.

    The judges are other models than the one that wrote it.
    """
    if json is not None:
        check_report_path(json, "judged")
    from hldm.studies.judge import MEANINGS, judge_run, table

    found = judge_run(
        find_model(run),
        judge=None if judge is None else find_model(judge),
        twin=None if twin is None else find_model(twin),
        text=text,
        vary=vary or [],
        prompts=prompts,
        max_characters=max_characters,
        seed=seed,
    )
    shown = table(found)
    show(shown, legend(MEANINGS, shown.head), *filter(None, [found["no_mauve"]]))
    _save(json, lambda path: save_report(path, found))


def bench(
    *,
    config: Annotated[Path, Option(metavar="FILE", help="e.g. configs/tiny.yaml")],
    twin: Annotated[
        Path | None, Option(metavar="FILE", help="config of the twin (default: CONFIG-twin.yaml beside it)")
    ] = None,
    only: Annotated[Halves | None, Option(help="measure one half only")] = None,
    long: Annotated[bool, Option("--long", help="also write after 10^5 and 10^6 bytes: minutes")] = False,
    steps: Annotated[int, Option(min=1, help="training steps to time, of each")] = 10,
    json: options.Report = None,
) -> None:
    """Speed of training and generation, beside the twin's.

    Several processes: accelerate launch ... -m hldm bench --only training ...
    """
    if json is not None:
        check_report_path(json, "bytes_per_step")
    from hldm.studies import bench

    other = twin or config.with_name(f"{config.stem}-twin{config.suffix}")
    found = bench.measure(load_config(config), load_config(other), steps=steps, only=only, long=long)
    if is_first_rank():
        show(*bench.report(found))
        _save(json, lambda path: save_report(path, found))
