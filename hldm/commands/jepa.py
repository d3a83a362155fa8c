"""Commands of the JEPA family: `hldm jepa train` and `hldm jepa decoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from hldm.commands.options import Configs, Overrides
from hldm.commands.training import Limit, Name, PrintConfig, Resume, Steps
from hldm.config import changed, to_yaml

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
