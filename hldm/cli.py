"""The command line: `hldm COMMAND`, and what the top-level scripts call. Imports no torch by itself.

Bad input ends in one line on standard error and exit code 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hldm.config import Config, ConfigError, load_config, stage_training, to_yaml

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
        "bench": (bench, "speed of training and generation, and where the time goes"),
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


def guarded(work: Callable[[], int]) -> int:
    """Run, turning what users can mend into one line: 2 for bad input, 3 diverged, 4 memory, 128+n signals."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # LANG=C must not stop a report that names a file
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = work()
        if sys.stdout is not None:  # None: closed by the caller
            sys.stdout.flush()  # a full disk is to be met here, not at exit
        return code
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        _drop_output()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # it is standard output that is full or closed
            _drop_output()
        return _fail(_one_line(error), 2)
    except MemoryError as error:
        return _fail(f"out of memory ({_one_line(error)}): lower data.lanes or the widths", 4)
    except RuntimeError as error:
        from hldm.training import Interrupted, TrainingDiverged

        if isinstance(error, TrainingDiverged):
            return _fail(str(error), 3)
        if isinstance(error, Interrupted):
            return _fail(str(error), 128 + error.signum)
        if "can't allocate memory" in str(error) or "out of memory" in str(error).lower():
            return _fail(f"out of memory ({_one_line(error)}): lower data.lanes or the widths", 4)
        raise


def _drop_output() -> None:
    """Send what is still buffered nowhere: at exit it would fail once more, loudly."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> int:
    from hldm.text import printable

    if sys.stderr is not None:
        print(f"hldm: {printable(message)}", file=sys.stderr, flush=True)
    return code


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
    parser.add_argument("--run", required=True, help="trained run, e.g. runs/demo")
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
    parser.add_argument("--show-chunks", action="store_true", help="mark chunk borders with |")
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
        prompts = _prompts(arguments)
        from hldm.pipeline import read_pipeline

        folder = Path(arguments.run)
        pipeline = read_pipeline(folder if (folder / "model_index.json").exists() else folder / "pipeline")
        _write(pipeline, prompts, arguments)
        return 0

    return guarded(work)


def _write(pipeline: object, prompts: list[bytes], arguments: argparse.Namespace) -> None:
    """Write to standard output: streamed for one continuation, each whole for several."""
    from hldm.generation import Continuation, write_on
    from hldm.pipeline import HLDMPipeline
    from hldm.text import StreamDecoder, count_characters, printable

    assert isinstance(pipeline, HLDMPipeline)
    names = ("steps", "scheduler", "guidance", "temperature", "decoder_temperature", "top_p")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    settings = replace(pipeline.settings, **given)
    safe = sys.stdout.isatty() and not arguments.raw
    decoder = StreamDecoder()

    def send(data: bytes, is_last: bool = True) -> None:
        """A terminal gets whole, harmless characters, anything else the very bytes."""
        if safe:
            text = decoder.push(data) + (decoder.finish() if is_last else "")
            data = printable(text).encode()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    streams = len(prompts) == 1 and not arguments.json
    if streams:
        send(prompts[0])
    began = time.monotonic()
    rows: list[Continuation] = []
    calls = 0
    for rows, news, calls in write_on(  # noqa: B007 - the last yield is the finished text
        pipeline.autoencoder,
        pipeline.prior,
        prompts,
        settings,
        max_characters=arguments.max_chars,
        seed=arguments.seed,
    ):
        if streams and news[0]:
            send((b"|" if arguments.show_chunks else b"") + news[0], is_last=False)
    seconds = time.monotonic() - began
    if streams:
        send(b"\n")
        return
    total = sum(count_characters(row.text) for row in rows)
    for index, row in enumerate(rows):
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
            text = b"|" + b"|".join(row.chunks) if arguments.show_chunks else row.text
            send(f"[{index + 1}] ".encode() + row.prompt + text + b"\n")


# --- the rest ----------------------------------------------------------------------------------


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`hldm evaluate`, the same as `python -m hldm.evaluation`."""
    from hldm import evaluation

    return guarded(lambda: evaluation.main(argv))


def bench(argv: Sequence[str] | None = None) -> int:
    """`hldm bench`."""
    from hldm import bench as benchmark

    return guarded(lambda: benchmark.main(argv))


def doctor(argv: Sequence[str] | None = None) -> int:
    """`hldm doctor`."""
    from hldm import doctor as checks

    return guarded(lambda: checks.main(argv))


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
