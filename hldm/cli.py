"""The command line: `hldm COMMAND`, and what the top-level scripts call. Imports no torch by itself.

Bad input ends in one line on standard error and exit code 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hldm.config import (
    ChunkingConfig,
    Config,
    ConfigError,
    GenerationConfig,
    load_config,
    stage_training,
    to_yaml,
)
from hldm.exits import guarded
from hldm.runs import export_run, shipped_run
from hldm.signals import Stopped
from hldm.sizes import read_model_settings, report, require_room, require_room_to_write, survey

MAX_PROMPT_BYTES = 2**20  # 300 pages; more takes minutes to read, and a device such as /dev/zero never ends
STAGES = {
    "autoencoder": "Stage one: train the autoencoder, or a twin, from a config.",
    "prior": "Stage two: train the diffusion prior on the latents of the same run's autoencoder.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """`hldm COMMAND ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
        "demo": (demo, "train a model and its twin, evaluate both, write some text"),
        "train-autoencoder": (train_autoencoder, "stage one, or the twin"),
        "train-diffusion": (train_diffusion, "stage two"),
        "generate": (generate, "write on from prompts"),
        "evaluate": (evaluate, "bits per character, reconstruction, ROUGE"),
        "diagnose": (diagnose, "what a run's latents hold, and what the decoder does with them"),
        "rate-curve": (rate_curve, "what latents carry against what they cost, a run a point"),
        "chunkers": (chunkers, "every chunking strategy, trained and measured alike"),
        "judge": (judge, "how good written text is, by sampler setting, beside the true text"),
        "chunk": (chunk, "where a text is cut, by one strategy or all"),
        "bench": (bench, "speed of training and generation, and where the time goes"),
        "export": (export, "copy a trained run, without what only training needs"),
        "sizes": (sizes, "what a config needs in memory and on disk, and whether it fits here"),
        "doctor": (doctor, "check this machine and installation"),
    }
    parser = argparse.ArgumentParser(
        prog="hldm",
        description="A latent-diffusion hierarchical language model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<18} {says}" for name, (_, says) in commands.items()),
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see hldm COMMAND --help")
    chosen = parser.parse_args(arguments[:1])
    return commands[chosen.command][0](arguments[1:])


# --- training ----------------------------------------------------------------------------------


def _training_parser(stage: str) -> argparse.ArgumentParser:
    script = "train_autoencoder.py" if stage == "autoencoder" else "train_diffusion.py"
    parser = argparse.ArgumentParser(
        prog=script,
        description=STAGES[stage],
        epilog=f"Several processes: accelerate launch --multi_gpu --num_processes 2 {script} ... (on CPU, too)",
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML; may repeat")
    parser.add_argument("--name", help="run folder below runs/ (default: the config file's name)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    parser.add_argument("--minutes", type=float, metavar="M", help="wall clock limit, schedule included")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="any setting, e.g. checkpoint.every=100"
    )
    return parser


def resolve_config(arguments: argparse.Namespace, stage: str) -> Config:
    """Files, then overrides, then the flags of the stage."""
    config = load_config(arguments.config, arguments.overrides)
    changes: dict[str, float] = {}
    if arguments.steps is not None:
        # the one that is given alone lifts the config's other limit
        changes |= {"steps": arguments.steps, "minutes": 0.0}
    if arguments.minutes is not None:
        if not 0 < arguments.minutes < math.inf:
            raise ConfigError(f"--minutes must be positive and finite, got {arguments.minutes:g}")
        changes |= {"minutes": arguments.minutes, "steps": changes.get("steps", 10**9)}
    name = arguments.name or config.name or Path(arguments.config[-1]).stem
    return stage_training(replace(config, name=name), stage, **changes)


def _train(stage: str, argv: Sequence[str] | None) -> int:
    arguments = _training_parser(stage).parse_intermixed_args(argv)  # overrides may stand between flags

    def work() -> int:
        config = resolve_config(arguments, stage)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        require_room(config, stage)  # here, too: before torch is imported
        from hldm import stages

        train = stages.train_autoencoder if stage == "autoencoder" else stages.train_diffusion
        train(config, resume=arguments.resume)
        return 0

    return guarded(work)


def train_autoencoder(argv: Sequence[str] | None = None) -> int:
    """`train_autoencoder.py`."""
    return _train("autoencoder", argv)


def train_diffusion(argv: Sequence[str] | None = None) -> int:
    """`train_diffusion.py`."""
    return _train("prior", argv)


# --- generation --------------------------------------------------------------------------------


def _generation_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate.py", description="Write on from prompts.")
    parser.add_argument("--run", help="trained run, e.g. runs/demo (default: the one that comes with hldm)")
    parser.add_argument("--prompt", action="append", default=[], help="may repeat; '' starts a document")
    parser.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE", help="may repeat; - is standard input"
    )
    parser.add_argument("--max-chars", type=int, default=400, help="characters to write (default 400)")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--steps", type=int, help="denoising steps of each latent")
    parser.add_argument("--scheduler", choices=["ancestral", "ddim", "dpm", "flow"], help="sampler")
    parser.add_argument("--guidance", type=float, help="weight of the context; 1 is none")
    parser.add_argument("--temperature", type=float, help="scale of the latents' noise")
    parser.add_argument("--decoder-temperature", type=float, help="of the bytes; 0 takes the likeliest")
    parser.add_argument("--top-p", type=float, help="nucleus of the bytes")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    parser.add_argument(
        "--show-chunks", action="store_true", help="tint chunks on a terminal, else mark them with |"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a continuation")
    parser.add_argument(
        "--raw", action="store_true", help="send control characters to the terminal as they are"
    )
    return parser


def _prompts(arguments: argparse.Namespace) -> list[bytes]:
    # argv that is not UTF-8 arrives with surrogate escapes; fsencode gives the bytes back
    prompts = [os.fsencode(prompt) for prompt in arguments.prompt]
    for name in arguments.prompt_file:
        prompts.append(_read_prompt(name).removesuffix(b"\n"))
    if not prompts:
        raise ValueError("no prompt given: pass --prompt TEXT, --prompt-file FILE or --prompt-file -")
    return [prompt for prompt in prompts for _ in range(arguments.num_samples)]


def _read_prompt(name: str) -> bytes:
    from hldm.text import read_up_to

    if name == "-":
        if sys.stdin is None:
            raise ValueError("--prompt-file -: standard input is closed")
        return read_up_to(sys.stdin.buffer, MAX_PROMPT_BYTES, "standard input")
    with open(name, "rb") as file:
        return read_up_to(file, MAX_PROMPT_BYTES, name)


def generate(argv: Sequence[str] | None = None) -> int:
    """`generate.py`."""
    arguments = _generation_parser().parse_args(argv)

    def work() -> int:
        for name in ("max_chars", "num_samples"):
            if getattr(arguments, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}"
                )
        if not 0 <= arguments.seed < 2**63 - arguments.num_samples:
            raise ValueError(f"--seed must lie in 0..2^63-1, got {arguments.seed}")
        if sys.stdout is None:
            raise ValueError("standard output is closed: there is nowhere to write to")
        folder = shipped_run() if arguments.run is None else Path(arguments.run)
        folder = folder if (folder / "model_index.json").exists() else folder / "pipeline"
        replace(GenerationConfig(), **_given(arguments))  # refuses what is out of range
        _require_room_to_write(folder, arguments)
        prompts = _prompts(arguments)
        from hldm.pipeline import read_pipeline

        pipeline = read_pipeline(folder)
        _write(pipeline, prompts, arguments)
        return 0

    return guarded(work)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that the command line names."""
    names = ("steps", "scheduler", "guidance", "temperature", "decoder_temperature", "top_p")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _require_room_to_write(pipeline: Path, arguments: argparse.Namespace) -> None:
    """Refuse what cannot fit into memory, before a prompt is read or torch imported."""
    config = read_model_settings(pipeline)
    if config is not None:
        files = [Path(name) for name in arguments.prompt_file if name != "-"]
        prompts = [len(os.fsencode(prompt)) for prompt in arguments.prompt]
        prompts += [file.stat().st_size if file.is_file() else 0 for file in files]
        rows = (len(arguments.prompt) + len(arguments.prompt_file)) * arguments.num_samples
        require_room_to_write(config, rows, arguments.max_chars, max(prompts, default=0))


def _write(pipeline: object, prompts: list[bytes], arguments: argparse.Namespace) -> None:
    """Write to standard output: streamed for one continuation, each whole for several."""
    from hldm.generation import Continuation, write_on
    from hldm.pipeline import HLDMPipeline
    from hldm.text import StreamDecoder, count_characters, printable, tinted

    assert isinstance(pipeline, HLDMPipeline)
    settings = replace(pipeline.settings, **_given(arguments))
    safe = sys.stdout.isatty() and not arguments.raw
    decoder = StreamDecoder()

    def send(data: bytes, is_last: bool = True, chunk: int | None = None) -> None:
        """A terminal gets whole, harmless characters, chunks in tints by turns; anything else the very bytes."""
        if safe:
            text = printable(decoder.push(data) + (decoder.finish() if is_last else ""))
            data = (text if chunk is None else tinted(text, chunk)).encode()
        elif chunk is not None:
            data = b"|" + data
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    streams = len(prompts) == 1 and not arguments.json
    if streams:
        send(prompts[0])
    began = time.monotonic()
    rows: list[Continuation] = []
    calls = written = 0
    stopped: Stopped | None = None
    try:
        for rows, news, calls in write_on(  # noqa: B007 - the last yield is the finished text
            pipeline.autoencoder,
            pipeline.prior,
            prompts,
            settings,
            max_characters=arguments.max_chars,
            seed=arguments.seed,
        ):
            if streams and news[0]:
                send(news[0], is_last=False, chunk=written if arguments.show_chunks else None)
                written += 1
    except Stopped as signal:  # what is written so far is worth showing
        stopped = signal
    seconds = time.monotonic() - began
    if streams:
        send(b"\n")
    total = sum(count_characters(row.text) for row in rows)
    for index, row in enumerate([] if streams else rows):
        if arguments.json:
            spans, at = [], 0
            for chunk in row.chunks:
                spans.append([at, at + len(chunk)])
                at += len(chunk)
            record = {
                "prompt": row.prompt.decode("utf-8", "replace"),
                "text": row.text.decode("utf-8", "replace"),
                "chunk_spans": spans,
                "ended": row.ended,
                "seed": arguments.seed + index,
                "seconds": round(seconds, 3),
                "characters_per_second": round(total / max(seconds, 1e-9), 1),
                "denoising_calls": calls,
            }
            send(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        else:
            send(f"[{index + 1}] ".encode() + row.prompt)
            for number, part in enumerate(row.chunks if arguments.show_chunks else [row.text]):
                send(part, is_last=False, chunk=number if arguments.show_chunks else None)
            send(b"\n")
    if stopped is not None:
        raise stopped


# --- the rest ----------------------------------------------------------------------------------


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`hldm evaluate`, the same as `python -m hldm.evaluation`."""
    from hldm import evaluation

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
        from hldm.diagnosis import diagnose_run, summary
        from hldm.reports import check_picture_path, check_report_path, save_report

        if arguments.json is not None:
            check_report_path(arguments.json, "latent_by_dimension")
        if arguments.png is not None:
            check_picture_path(arguments.png)
        diagnosis = diagnose_run(
            arguments.run, split=arguments.split, draws=arguments.draws, seed=arguments.seed
        )
        print(summary(diagnosis))
        if arguments.json is not None:
            save_report(arguments.json, diagnosis)
        if arguments.png is not None:
            from hldm.plots import plot_diagnosis

            plot_diagnosis(diagnosis, arguments.png)
        return 0

    return guarded(work)


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
    arguments = parser.parse_args(argv)

    def work() -> int:
        from hldm.plots import plot_rate_curve
        from hldm.rate_curve import run_curve, table

        curve = run_curve(arguments.config, arguments.minutes, only=arguments.only)
        target = Path("runs") / f"{arguments.config.stem}-curve" / "rate-curve.png"
        plot_rate_curve(curve, target)
        print(f"{table(curve)}\n\nrate-curve.json and rate-curve.png are in {target.parent}")
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
    arguments = parser.parse_args(argv)

    def work() -> int:
        from hldm.league import run_league, table
        from hldm.plots import plot_league

        league = run_league(
            arguments.config, arguments.minutes, only=arguments.only, targets=arguments.targets
        )
        folder = Path("runs") / f"{arguments.config.stem}-league"
        plot_league(league, folder / "league.png")
        print(f"{table(league)}\n\nleague.json, league.md and league.png are in {folder}")
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
        from hldm.judge import judge_run, table
        from hldm.reports import check_report_path, save_report

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
        print(table(found))
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
        help="may repeat (default: all that read text alone)",
    )
    parser.add_argument(
        "--run", action="append", default=[], type=Path, help="cut as this run does; may repeat"
    )
    parser.add_argument("--min-bytes", type=int, default=4, metavar="N", help="of a chunk (default 4)")
    parser.add_argument("--max-bytes", type=int, default=12, metavar="N", help="of a chunk (default 12)")
    parser.add_argument(
        "--target-bytes", type=float, default=6.0, metavar="N", help="mean, of strategies with a model"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        metavar="M",
        help="train a model for each strategy that takes one",
    )
    parser.add_argument("--json", action="store_true", help="bytes of each chunk, as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page there instead")
    arguments = parser.parse_args(argv)

    def work() -> int:
        limits = ("min_bytes", "max_bytes", "target_bytes")
        chunking = ChunkingConfig(**{name: getattr(arguments, name) for name in limits})
        if not 0 <= arguments.minutes < math.inf:
            raise ConfigError(f"--minutes must not be negative, got {arguments.minutes:g}")
        text = _read_prompt(arguments.text)
        from hldm.checkpoints import atomic_write
        from hldm.chunk_view import PAGE_MARK, as_json, as_page, as_text, cut_text
        from hldm.chunking import TEXT_STRATEGIES
        from hldm.reports import check_page_path

        if arguments.html is not None:
            check_page_path(arguments.html, PAGE_MARK)
        names = arguments.strategy or ([] if arguments.run else list(TEXT_STRATEGIES))
        cuts = cut_text(text, names, arguments.run, chunking=chunking, minutes=arguments.minutes)
        if arguments.html is not None:
            atomic_write(arguments.html, as_page(cuts))
        else:
            print(as_json(cuts) if arguments.json else as_text(cuts, sys.stdout.isatty()))
        return 0

    return guarded(work)


def bench(argv: Sequence[str] | None = None) -> int:
    """`hldm bench`."""

    def work() -> int:
        from hldm import bench as benchmark

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
        from hldm.demo import run_demo

        run_demo(Path(arguments.config), arguments.name)
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
