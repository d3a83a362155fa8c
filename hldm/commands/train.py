"""`hldm train`: a text to a trained model in one command, both stages, and the twin beside it when asked."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from hldm.commands.options import Configs, Overrides, check_minutes
from hldm.config import Config, ConfigError, changed, load_config, stage_training, to_yaml
from hldm.plugins import named
from hldm.runs.doing import loading
from hldm.runs.folder import last_sample, last_validation, validations_of
from hldm.runs.identity import inherited
from hldm.runs.progress import in_minutes
from hldm.runs.signals import is_first_rank
from hldm.text.bytes import END_MARK, printable

PRIOR_SHARE = 0.1  # of the minutes, where the config gives none: that of configs/small.yaml
SAME = 0.005  # bits a character: validations that differ by less are alike
PROMPT_WORDS, PROMPT_LETTERS = 6, 60  # of the sample at most, in the command that is proposed

Minutes = Annotated[
    float | None,
    Option(
        callback=check_minutes,
        help="for both stages together, divided as in the config; --twin takes as many again",
    ),
]
Steps = Annotated[int | None, Option(min=1, help="optimizer steps of each stage")]
PriorSteps = Annotated[int | None, Option(min=1, help="optimizer steps of stage two, if not --steps")]


def train(
    *,
    config: Configs,
    overrides: Overrides = None,
    name: Annotated[str | None, Option(help="run folder below runs/ (default: the config's name)")] = None,
    twin: Annotated[
        bool,
        Option("--twin", help="also train the autoregressive baseline, for as long: twice the time in all"),
    ] = False,
    minutes: Minutes = None,
    steps: Steps = None,
    prior_steps: PriorSteps = None,
    resume: Annotated[bool, Option("--resume", help="continue a run that was stopped")] = False,
    print_config: Annotated[
        bool, Option("--print-config", help="print the resolved config and stop")
    ] = False,
) -> None:
    """Train both stages of a model on a text.

    Finished stages are not trained again. Everything is left in runs/NAME, the twin's in runs/NAME-twin.
    """
    given = overrides or []
    model = load_config(config, given)
    name, taken = name or model.name, list[str]()
    if resume:
        model, taken = inherited(model, config, given, name)
    model = with_limits(changed(model, name=name), minutes, steps, prior_steps)
    if twin and model.is_twin:
        raise ConfigError("--twin: this config is a twin itself (autoencoder.latent_dim is 0)")
    if print_config:
        print(to_yaml(model), end="")
        return
    if taken and is_first_rank():
        print(f"as in runs/{name}/autoencoder: {', '.join(taken)}", flush=True)

    with loading():
        from hldm.evaluation.validation import validation_on
        from hldm.training.sizes import require_room
        from hldm.training.stages import plan, stages_of, train_run
        from hldm.training.twin import twin_of

    runs = [model, *([twin_of(model, config[-1], [*taken, *given])] if twin else [])]
    for run in runs:  # before the first of them takes an hour
        for stage in stages_of(run):
            require_room(run, stage)
    parts = plan(*runs)
    if is_first_rank():
        print(outline(runs), flush=True)
    for run in runs:
        own, parts = parts[: len(stages_of(run))], parts[len(stages_of(run)) :]
        train_run(run, resume=resume, parts=own, validation=validation_on)
    if is_first_rank():
        print("\n".join(summary([Path("runs") / run.name for run in runs], named(model))))


def outline(runs: Sequence[Config]) -> str:
    """What will be trained, and for how long."""
    from hldm.training.stage import limit_of, plan, stages_of

    told = []
    for run in runs:
        limits = (f"{stage} {limit_of(getattr(run.training, stage))}" for stage in stages_of(run))
        told.append(f"runs/{run.name}: {', then '.join(limits)}")
    minutes, later = runs[0].training.autoencoder.minutes, plan(*runs)[0].later_minutes
    in_all = f"; {in_minutes(minutes + later)} in all" if minutes and later else ""
    return f"to train: {'; '.join(told)}{in_all}"


def with_limits(config: Config, minutes: float | None, steps: int | None, prior_steps: int | None) -> Config:
    """The config with other limits of its stages. minutes: of both; the one that is given alone lifts the other."""
    share = _prior_share(config)
    wanted = {"autoencoder": (1 - share, steps), "prior": (share, prior_steps or steps)}
    for stage, (part, most) in wanted.items():
        changes: dict[str, Any] = {}
        if most is not None:
            changes = {"steps": most, "minutes": 0.0}
        if minutes is not None:
            changes = {"minutes": part * minutes or minutes, "steps": most or 10**9}
        config = stage_training(config, stage, **changes)
    return config


def _prior_share(config: Config) -> float:
    """Of a run's minutes, those of stage two."""
    if config.is_twin:
        return 0.0
    first, second = config.training.autoencoder.minutes, config.training.prior.minutes
    return second / (first + second) if first and second else PRIOR_SHARE


def summary(folders: Sequence[Path], own: Sequence[str] = ()) -> list[str]:
    """What there is now, and what to type next. own: classes of the user's own that the first of them names."""
    sample = printable(last_sample(folders[0]))
    ends = f" ({END_MARK}: a document ends)" if END_MARK in sample else ""
    lines = [f"{folder}: {found}" for folder in folders if (found := _validated(folder))]
    return [
        "",
        f"Held-out text, and after >>> what {folders[0]} writes{ends}:",
        "",
        sample,
        "",
        *lines,
        f"Everything is in {' and '.join(map(str, folders))}.",
        *next_commands(folders, own, _first_words(sample)),
    ]


def next_commands(folders: Sequence[Path], own: Sequence[str] = (), prompt: str = "And so") -> list[str]:
    """What to type once a run is trained, and its twin if there is one. own: classes of the user's own."""
    flag = " --allow-code" if own else ""
    against = f" --against {folders[1]}" if folders[1:] else ""
    commands = [
        f"hldm generate --run {folders[0]}{flag} --prompt {shlex.quote(prompt)}",
        *(f"hldm evaluate --run {folder}{flag}" for folder in folders),
        f"hldm report {folders[0]}{flag}{against}",
        f"hldm score --run {folders[0]}{flag} --prompt {shlex.quote(prompt)}",
        f"hldm export --run {folders[0]}{flag} --to {folders[0].name}-to-share",
    ]
    return [f"{'Next:' if not number else '':6}{command}" for number, command in enumerate(commands)]


def _first_words(text: str) -> str:
    """How a text begins: a few words, up to the first mark of punctuation."""
    begin = next((at for at, letter in enumerate(text) if letter.isalnum()), len(text))
    end = next(
        (
            at
            for at, letter in enumerate(text)
            if at > begin and letter not in "'’-" and unicodedata.category(letter)[0] in "PSC"
        ),
        len(text),
    )
    return " ".join(text[begin:end].split()[:PROMPT_WORDS])[:PROMPT_LETTERS] or "And so"


def _validated(run: Path) -> str:
    """The last validation of a run's last stage, in words; "" where there was none."""
    found = last_validation(run)
    if not found:
        return ""
    names = {"latent": "latents", "decoder": "bytes", "end": "the end term"}
    terms = [f"{found[name]:.3f} for {told}" for name, told in names.items() if found[name]]
    split = f" ({', '.join(terms)})" if terms[1:] else ""
    told = f"{found['bound']:.3f} bits a character of validation text{split}, on 8,000 bytes of it at most"
    begun = validations_of(run, "prior")
    if begun and begun[0]["bound"] < found["bound"] - SAME:
        told += f"; stage two began at {begun[0]['bound']:.3f}, so its training did not help"
    return f"{told}; hldm evaluate reads the whole test text"
