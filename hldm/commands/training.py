"""Commands that train, and what belongs to it: memory and disk beforehand."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from hldm.commands.options import Configs, Overrides, Paired, PairOverrides, check_minutes
from hldm.commands.train import next_commands
from hldm.config import Config, changed, load_config, stage_training, to_yaml
from hldm.evaluation.tables import READING, compare, measured_on, show
from hldm.plugins import allow_named, named
from hldm.runs.doing import loading
from hldm.runs.identity import inherited
from hldm.runs.pairs import load_pair
from hldm.runs.signals import is_first_rank

DEMO_PROMPTS = 3  # continued by `hldm demo`

Name = Annotated[str | None, Option(help="run folder below runs/ (default: the config file's name)")]
Steps = Annotated[int | None, Option(help="optimizer steps")]
Limit = Annotated[
    float | None,
    Option(callback=check_minutes, help="minutes of training; the schedule is fitted to them"),
]
Resume = Annotated[bool, Option("--resume", help="continue from the newest good checkpoint")]
PrintConfig = Annotated[bool, Option("--print-config", help="print the resolved config and stop")]


def _train(stage: str, name: str, summary: str) -> Callable[..., None]:
    """The command that trains a stage."""

    def train(
        context: Context,
        *,
        config: Configs,
        overrides: Overrides = None,
        name: Name = None,
        steps: Steps = None,
        minutes: Limit = None,
        resume: Resume = False,
        print_config: PrintConfig = False,
    ) -> None:
        resolved = load_config(config, overrides or [])
        if stage == "prior":
            run = name or resolved.name
            resolved, taken = inherited(resolved, config, overrides or [], run)
            if taken and not print_config and is_first_rank():
                print(f"as in runs/{run}/autoencoder: {', '.join(taken)}", flush=True)
        changes: dict[str, float] = {}
        if steps is not None:
            # the one that is given alone lifts the config's other limit
            changes |= {"steps": steps, "minutes": 0.0}
        if minutes is not None:
            changes |= {"minutes": minutes, "steps": changes.get("steps", 10**9)}
        resolved = changed(resolved, name=name or resolved.name or config[-1].stem)
        resolved = stage_training(resolved, stage, **changes)
        if print_config:
            print(to_yaml(resolved), end="")
            return
        from hldm.evaluation.validation import validation_on
        from hldm.training import stages

        (stages.train_autoencoder if stage == "autoencoder" else stages.train_diffusion)(
            resolved, resume=resume, validation=validation_on
        )
        if not is_first_rank():
            return
        if stage == "prior" or resolved.is_twin:
            print("\n".join(next_commands([Path("runs") / resolved.name], named(resolved))))
        else:
            print(f"Next: {_stage_two(context.command_path, config, overrides or [], resolved.name)}")

    launch = f"accelerate launch --multi_gpu --num_processes 2 {name}.py ... (on CPU, too)"
    train.__name__, train.__doc__ = name, f"{summary}\n\nSeveral processes: {launch}"
    return train


def _stage_two(stage_one: str, files: Sequence[Path], overrides: Sequence[str], name: str) -> str:
    """The command that trains stage two. stage_one: how the one before it was called, a script or a command."""
    command = stage_one.replace("autoencoder", "diffusion")
    script = ["python"] if command.endswith(".py") else []
    configs = [word for file in files for word in ("--config", str(file))]
    return shlex.join([*script, *command.split(), *configs, "--name", name, *overrides])


train_autoencoder = _train("autoencoder", "train_autoencoder", "Stage one: train the autoencoder, or a twin.")
train_diffusion = _train("prior", "train_diffusion", "Stage two: train the diffusion prior on its latents.")


def sizes(
    *,
    config: Configs,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, Option(min=1, help="what each of this many processes needs, on any machine")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="the same as one JSON object, in bytes")] = False,
) -> int:
    """What a config needs in memory and on disk.

    Stage by stage; exit code 2 when it does not fit here. With --processes it plans for another machine.
    """
    from hldm.training.sizes import planned, report, report_plan, survey

    if processes is not None:
        plan = planned(load_config(config, overrides or []), processes)
        print(json.dumps(plan, indent=1) if as_json else report_plan(plan))
        return 0
    found = survey(load_config(config, overrides or []))
    print(json.dumps(found, indent=1) if as_json else report(found))
    return 0 if found["fits"] else 2


def demo(
    *,
    config: Paired = Path("configs/tiny.yaml"),
    overrides: PairOverrides = None,
    name: Annotated[str | None, Option(help="run folder (default: demo, or demo-CONFIG)")] = None,
) -> None:
    """Train a model and its twin, evaluate both, write text.

    Finished stages are not trained again. Everything is left in runs/NAME and runs/NAME-twin.
    """
    began = time.monotonic()
    model, twin = load_pair(config, overrides or [])
    allow_named(model)
    if name is None:
        default = "demo" if config.stem == "tiny" else f"demo-{config.stem}"
        name = default if model.name == config.stem else model.name
    model, twin = changed(model, name=name), changed(twin, name=f"{name}-twin")
    folders = {"model": Path("runs") / name, "twin": Path("runs") / twin.name}

    with loading():
        from hldm.evaluation.validation import validation_on
        from hldm.training.sizes import require_room
        from hldm.training.stages import plan, train_run

    for planned, stage in ((model, "autoencoder"), (model, "prior"), (twin, "autoencoder")):
        require_room(planned, stage)  # before the first of them takes an hour
    parts = plan(model, twin)
    train_run(model, parts=parts[:-1], validation=validation_on)
    train_run(twin, parts=parts[-1:], validation=validation_on)

    from hldm.evaluation.evaluate import evaluate_run
    from hldm.evaluation.parts_table import short_tables
    from hldm.runs.reports import save_report

    columns = {}
    for label, folder in folders.items():
        print(f"evaluating {folder} on the test text", flush=True)
        columns[label] = evaluate_run(folder)
        save_report(folder / "evaluation.json", columns[label])
    _write_samples(model, folders["model"])
    show(*measured_on(columns), compare(columns), READING, *short_tables(columns["model"].get("parts")))
    minutes = (time.monotonic() - began) / 60
    print(f"\n{minutes:.1f} minutes. Everything is in {folders['model']} and {folders['twin']}.")
    print("\n".join(next_commands([*folders.values()], named(model), "And the king said")))


def _write_samples(config: Config, folder: Path) -> None:
    """Three continuations of held-out prompts."""
    from hldm.evaluation.prompts import choose_prompts, prompt_chunker
    from hldm.generation.pipeline import HLDMPipelineOutput, read_pipeline
    from hldm.sources.corpora import load_corpus
    from hldm.text.bytes import printable

    pipeline = read_pipeline(folder / "pipeline")
    corpus, chunker = load_corpus(config.data, "test"), prompt_chunker(pipeline.autoencoder)
    prompts = [prompt for prompt, _ in choose_prompts(corpus, chunker, DEMO_PROMPTS, prompt_characters=80)]
    output = pipeline(prompts, max_characters=240, seed=config.seed)
    assert isinstance(output, HLDMPipelineOutput)
    for prompt, text in zip(prompts, output.texts, strict=True):
        print(printable(f"\n{prompt.decode(errors='replace')} >>>{text}"))
    print()
