"""The commands of `hldm` beside training and generation, one function each. Imports no torch by itself."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from hldm.config import ChunkingConfig, Config, ConfigError, Strategy, load_config
from hldm.evaluation.tables import compare, show
from hldm.runs.exits import guarded
from hldm.runs.folder import export_run
from hldm.text.bytes import MAX_PROMPT_BYTES, shows_colour
from hldm.text.encodings import read_text

DEMO_PROMPTS = 3  # continued by `hldm demo`


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`hldm evaluate`, the same as `python -m hldm.evaluation`."""
    from hldm.evaluation import evaluate as evaluation

    return evaluation.main(argv)


def diagnose(argv: Sequence[str] | None = None) -> int:
    """`hldm diagnose`."""
    parser = argparse.ArgumentParser(
        prog="hldm diagnose",
        description="What a trained run's latents hold, what the prior pays for them, what the decoder does with them.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, e.g. runs/demo")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--draws", type=int, default=8, metavar="M", help="noise levels a chunk (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all noise (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them there")
    arguments = parser.parse_args(argv)

    def work() -> int:
        from hldm.runs.reports import check_picture_path, check_report_path, save_report
        from hldm.studies.diagnosis import diagnose_run, summary

        if arguments.json is not None:
            check_report_path(arguments.json, "latent_by_dimension")
        if arguments.png is not None:
            check_picture_path(arguments.png)
        diagnosis = diagnose_run(
            arguments.run, split=arguments.split, draws=arguments.draws, seed=arguments.seed
        )
        show(*summary(diagnosis))
        if arguments.json is not None:
            save_report(arguments.json, diagnosis)
        if arguments.png is not None:
            from hldm.studies.plots import plot_diagnosis

            plot_diagnosis(diagnosis, arguments.png)
        return 0

    return guarded(work)


def _add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="what minutes count: cpu on a machine that is busy",
    )


def rate_curve(argv: Sequence[str] | None = None) -> int:
    """`hldm rate-curve`."""
    parser = argparse.ArgumentParser(
        prog="hldm rate-curve",
        description="Turn one dial at a time, train each point and the twin for the same minutes, measure.",
    )
    parser.add_argument("--config", type=Path, required=True, help="its twin is <name>-twin.yaml beside it")
    parser.add_argument("--minutes", type=float, required=True, metavar="M", help="of training, a point")
    parser.add_argument(
        "--only", action="append", default=[], metavar="DIAL", help="may repeat; default: all"
    )
    _add_clock(parser)
    arguments = parser.parse_args(argv)

    def work() -> int:
        from hldm.studies.plots import plot_rate_curve
        from hldm.studies.rate_curve import run_curve, table

        curve = run_curve(arguments.config, arguments.minutes, only=arguments.only, clock=arguments.clock)
        target = Path("runs") / f"{arguments.config.stem}-curve" / "rate-curve.png"
        plot_rate_curve(curve, target)
        show(table(curve), f"rate-curve.json and rate-curve.png are in {target.parent}")
        return 0

    return guarded(work)


def chunkers(argv: Sequence[str] | None = None) -> int:
    """`hldm chunkers`."""
    parser = argparse.ArgumentParser(
        prog="hldm chunkers",
        description="Train every chunking strategy for the same minutes at the same bytes a latent, and measure.",
    )
    parser.add_argument("--config", type=Path, required=True, help="its twin is <name>-twin.yaml beside it")
    parser.add_argument("--minutes", type=float, required=True, metavar="M", help="of training, each")
    parser.add_argument("--only", nargs="+", default=[], metavar="STRATEGY", help="default: all")
    parser.add_argument("--targets", nargs="+", type=int, default=[6, 12], metavar="N", help="bytes a latent")
    _add_clock(parser)
    arguments = parser.parse_args(argv)

    def work() -> int:
        from hldm.studies.league import run_league, table
        from hldm.studies.plots import plot_league

        league = run_league(
            arguments.config,
            arguments.minutes,
            only=arguments.only,
            targets=arguments.targets,
            clock=arguments.clock,
        )
        folder = Path("runs") / f"{arguments.config.stem}-league"
        plot_league(league, folder / "league.png")
        show(table(league), f"league.json, league.md and league.png are in {folder}")
        return 0

    return guarded(work)


def judge(argv: Sequence[str] | None = None) -> int:
    """`hldm judge`."""
    parser = argparse.ArgumentParser(
        prog="hldm judge",
        description="How good written text is, by judges that did not write it, beside the true text.",
    )
    parser.add_argument("--run", type=Path, required=True, help="whose writing is judged")
    parser.add_argument("--judge", type=Path, metavar="RUN", help="a twin trained with another seed")
    parser.add_argument("--twin", type=Path, metavar="RUN", help="its writing is judged, too")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME",
        help="steps, scheduler, temperature, ...; may repeat",
    )
    parser.add_argument("--prompts", type=int, default=48, metavar="N", help="continuations (default 48)")
    parser.add_argument("--max-characters", type=int, default=400, metavar="N", help="of each (default 400)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the writing (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    arguments = parser.parse_args(argv)

    def work() -> int:
        from hldm.runs.reports import check_report_path, save_report
        from hldm.studies.judge import judge_run, table

        if arguments.json is not None:
            check_report_path(arguments.json, "judged")
        found = judge_run(
            arguments.run,
            judge=arguments.judge,
            twin=arguments.twin,
            vary=arguments.vary,
            prompts=arguments.prompts,
            max_characters=arguments.max_characters,
            seed=arguments.seed,
        )
        show(table(found))
        if arguments.json is not None:
            save_report(arguments.json, found)
        return 0

    return guarded(work)


def chunk(argv: Sequence[str] | None = None) -> int:
    """`hldm chunk`."""
    parser = argparse.ArgumentParser(
        prog="hldm chunk", description="Show where a text is cut, by one strategy below another."
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="- is standard input")
    parser.add_argument(
        "--strategy",
        action="append",
        default=[],
        metavar="NAME",
        help="may repeat (default: every one)",
    )
    parser.add_argument(
        "--run", action="append", default=[], type=Path, help="cut as this run does; may repeat"
    )
    parser.add_argument("--min-bytes", type=int, default=4, metavar="N", help="of a chunk (default 4)")
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="of a chunk (default 12, of a sentence or paragraph 1024)"
    )
    parser.add_argument(
        "--target-bytes", type=float, default=6.0, metavar="N", help="mean, of strategies with a model"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        metavar="M",
        help="train a segmenter for each strategy that takes one (default: ask the models that come with hldm)",
    )
    parser.add_argument("--json", action="store_true", help="bytes of each chunk, as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page there instead")
    arguments = parser.parse_args(argv)

    def work() -> int:
        chunking = ChunkingConfig(
            min_bytes=arguments.min_bytes,
            max_bytes=12 if arguments.max_bytes is None else arguments.max_bytes,
            target_bytes=arguments.target_bytes,
        )
        if not 0 <= arguments.minutes < math.inf:
            raise ConfigError(f"--minutes must not be negative, got {arguments.minutes:g}")
        text = read_text(arguments.text, MAX_PROMPT_BYTES)
        from hldm.chunking.view import PAGE_MARK, as_json, as_page, as_text, cut_text
        from hldm.runs.files import atomic_write
        from hldm.runs.reports import check_page_path
        from hldm.training.segmenters import train_for_minutes

        if arguments.html is not None:
            check_page_path(arguments.html, PAGE_MARK)
        cuts = cut_text(
            text,
            arguments.strategy or ([] if arguments.run else get_args(Strategy)),
            arguments.run,
            chunking=chunking,
            whole_bytes=1024 if arguments.max_bytes is None else None,
            train=partial(train_for_minutes, arguments.minutes) if arguments.minutes else None,
        )
        if arguments.html is not None:
            atomic_write(arguments.html, as_page(cuts))
        else:
            print(as_json(cuts) if arguments.json else as_text(cuts, shows_colour(sys.stdout)))
        return 0

    return guarded(work)


def bench(argv: Sequence[str] | None = None) -> int:
    """`hldm bench`."""

    def work() -> int:
        from hldm.studies import bench as benchmark

        return benchmark.main(argv)

    return guarded(work)


def export(argv: Sequence[str] | None = None) -> int:
    """`hldm export`."""
    parser = argparse.ArgumentParser(
        prog="hldm export",
        description="Copy a trained run without checkpoints and logs, to keep or to share.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, e.g. runs/demo")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="that is not there yet")
    arguments = parser.parse_args(argv)

    def work() -> int:
        export_run(arguments.run, arguments.to)
        return 0

    return guarded(work)


def sizes(argv: Sequence[str] | None = None) -> int:
    """`hldm sizes`."""
    parser = argparse.ArgumentParser(
        prog="hldm sizes",
        description="What a config needs in memory and on disk, stage by stage; exit code 2 when it does not fit.",
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML; may repeat")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object, in bytes")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="any setting, e.g. data.lanes=64")
    arguments = parser.parse_intermixed_args(argv)

    def work() -> int:
        from hldm.training.sizes import report, survey

        found = survey(load_config(arguments.config, arguments.overrides))
        print(json.dumps(found, indent=1) if arguments.json else report(found))
        return 0 if found["fits"] else 2

    return guarded(work)


def doctor(argv: Sequence[str] | None = None) -> int:
    """`hldm doctor`."""

    def work() -> int:
        from hldm import doctor as checks

        return checks.main(argv)

    return guarded(work)


def demo(argv: Sequence[str] | None = None) -> int:
    """`hldm demo`."""
    parser = argparse.ArgumentParser(
        prog="hldm demo",
        description="Train both stages and the twin, evaluate both, write three continuations, print a table.",
    )
    parser.add_argument(
        "--config", default="configs/tiny.yaml", help="its twin is <name>-twin.yaml beside it"
    )
    parser.add_argument("--name", help="run folder (default: demo, or demo-<config> for other sizes)")
    arguments = parser.parse_args(argv)

    def work() -> int:
        run_demo(Path(arguments.config), arguments.name)
        return 0

    return guarded(work)


def run_demo(path: Path, name: str | None = None, root: Path = Path("runs")) -> None:
    """Train what is not trained yet, evaluate, write. Leaves runs/<name>, runs/<name>-twin."""
    began = time.monotonic()
    name = name or ("demo" if path.stem == "tiny" else f"demo-{path.stem}")
    config = replace(load_config([path]), name=name)
    twin = replace(load_config([path.with_name(f"{path.stem}-twin.yaml")]), name=f"{name}-twin")

    from hldm.training.sizes import require_room
    from hldm.training.stages import train_run

    for planned, stage in ((config, "autoencoder"), (config, "prior"), (twin, "autoencoder")):
        require_room(planned, stage, root)  # before the first of them takes an hour
    train_run(config, root=root)
    train_run(twin, root=root)

    from hldm.evaluation.evaluate import evaluate_run
    from hldm.runs.reports import save_report

    columns = {}
    for label, run in (("model", name), ("twin", twin.name)):
        print(f"evaluating {root / run} on the test text", flush=True)
        columns[label] = evaluate_run(root / run)
        save_report(root / run / "evaluation.json", columns[label])
    _write_samples(config, root / name)
    show(compare(columns))
    minutes = (time.monotonic() - began) / 60
    print(f"\n{minutes:.1f} minutes. Everything is in {root / name} and {root / twin.name}.")
    print(f'Next: python generate.py --run {root / name} --prompt "And the king said"')


def _write_samples(config: Config, folder: Path) -> None:
    """Three continuations of held-out prompts."""
    from hldm.evaluation.prompts import held_out_prompts, prompt_chunker
    from hldm.generation.pipeline import HLDMPipelineOutput, read_pipeline
    from hldm.text.bytes import printable

    pipeline = read_pipeline(folder / "pipeline")
    chunker = prompt_chunker(pipeline.autoencoder)
    prompts = [
        prompt for prompt, _ in held_out_prompts(config, chunker, "test", DEMO_PROMPTS, prompt_characters=80)
    ]
    output = pipeline(prompts, max_characters=240, seed=config.seed)
    assert isinstance(output, HLDMPipelineOutput)
    for prompt, text in zip(prompts, output.texts, strict=True):
        print(printable(f"\n{prompt.decode(errors='replace')} >>>{text}"))
    print()
