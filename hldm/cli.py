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

from hldm import commands
from hldm.config import Config, ConfigError, GenerationConfig, load_config, stage_training, to_yaml
from hldm.runs.exits import guarded
from hldm.runs.folder import shipped_run
from hldm.runs.signals import Stopped
from hldm.text.bytes import MAX_PROMPT_BYTES
from hldm.text.encodings import read_text

STAGES = {
    "autoencoder": "Stage one: train the autoencoder, or a twin, from a config.",
    "prior": "Stage two: train the diffusion prior on the latents of the same run's autoencoder.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """`hldm COMMAND ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    table: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
        "demo": (commands.demo, "train a model and its twin, evaluate both, write some text"),
        "train-autoencoder": (train_autoencoder, "stage one, or the twin"),
        "train-diffusion": (train_diffusion, "stage two"),
        "generate": (generate, "write on from prompts"),
        "evaluate": (commands.evaluate, "bits per character, reconstruction, ROUGE"),
        "diagnose": (commands.diagnose, "what a run's latents hold, and what the decoder does with them"),
        "rate-curve": (commands.rate_curve, "what latents carry against what they cost, a run a point"),
        "chunkers": (commands.chunkers, "every chunking strategy, trained and measured alike"),
        "judge": (commands.judge, "how good written text is, by sampler setting, beside the true text"),
        "chunk": (commands.chunk, "where a text is cut, by one strategy or all"),
        "bench": (commands.bench, "speed of training and generation, and where the time goes"),
        "export": (commands.export, "copy a trained run, without what only training needs"),
        "sizes": (commands.sizes, "what a config needs in memory and on disk, and whether it fits here"),
        "doctor": (commands.doctor, "check this machine and installation"),
    }
    parser = argparse.ArgumentParser(
        prog="hldm",
        description="A latent-diffusion hierarchical language model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<18} {says}" for name, (_, says) in table.items()),
    )
    parser.add_argument("command", choices=table, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see hldm COMMAND --help")
    chosen = parser.parse_args(arguments[:1])
    return table[chosen.command][0](arguments[1:])


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
        from hldm.training import stages

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
    parser.add_argument("--scheduler", choices=["ancestral", "ddim", "dpm"], help="sampler")
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
        prompts.append(read_text(name, MAX_PROMPT_BYTES).removesuffix(b"\n"))
    if not prompts:
        raise ValueError("no prompt given: pass --prompt TEXT, --prompt-file FILE or --prompt-file -")
    return prompts


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
        prompts = _prompts(arguments)
        from hldm.generation.footprint import require_room_to_write
        from hldm.generation.pipeline import read_pipeline

        pipeline, samples = read_pipeline(folder), arguments.num_samples
        require_room_to_write(pipeline.autoencoder, pipeline.prior, prompts, samples, arguments.max_chars)
        _write(pipeline, [prompt for prompt in prompts for _ in range(samples)], arguments)
        return 0

    return guarded(work)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that the command line names."""
    names = ("steps", "scheduler", "guidance", "temperature", "decoder_temperature", "top_p")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _write(pipeline: object, prompts: list[bytes], arguments: argparse.Namespace) -> None:
    """Write to standard output: streamed for one continuation, each whole for several."""
    from hldm.generation.pipeline import HLDMPipeline
    from hldm.generation.writer import Continuation, write_on
    from hldm.text.bytes import StreamDecoder, count_characters, printable, shows_colour, tinted

    assert isinstance(pipeline, HLDMPipeline)
    settings = replace(pipeline.settings, **_given(arguments))
    safe = sys.stdout.isatty() and not arguments.raw
    has_colour = safe and shows_colour(sys.stdout)
    decoder = StreamDecoder()

    def send(data: bytes, is_last: bool = True, chunk: int | None = None) -> None:
        """A terminal gets whole, harmless characters, chunks in tints by turns; anything else the very bytes."""
        if safe:
            text = printable(decoder.push(data) + (decoder.finish() if is_last else ""))
            marked = tinted(text, chunk or 0) if has_colour else f"|{text}"
            data = (text if chunk is None else marked).encode()
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


if __name__ == "__main__":
    sys.exit(main())
