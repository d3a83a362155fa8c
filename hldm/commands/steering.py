"""`hldm steer`: a classifier fitted to a model's latents, text steered by it, and what that costs."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from hldm.commands import options
from hldm.commands.editing import load
from hldm.evaluation.tables import legend, show
from hldm.runs.doing import doing
from hldm.runs.folder import shipped_run
from hldm.runs.location import find_model
from hldm.runs.reports import check_report_path, save_report
from hldm.text.bytes import printable

app = typer.Typer(help="Text steered by a classifier of latents.", rich_markup_mode=None)
# of a guide's two classifiers, what each is asked
ASKED = {
    "after": "passages, once they are read (method particles)",
    "next": "chunks, before they are written (method mixture)",
}
Attribute = Annotated[str, Option(help="genre, speech, feeling or sentences")]
GuideFile = Annotated[Path, Option("--guide", metavar="FILE", help="made by hldm steer fit")]
Method = Annotated[
    Literal["mixture", "particles"],
    Option(help="weigh the prior's components, or write several texts and resample them"),
]
Particles = Annotated[int, Option(help="texts written at once for each that is kept, of --method particles")]


@app.callback()
def _steer() -> None:
    """Text steered by a classifier of latents (docs/steering.md)."""


@app.command()
def fit(
    *,
    run: options.RunOrShipped = None,
    attribute: Attribute,
    to: Annotated[Path, Option("--to", metavar="FILE", help="file for the classifier")],
    characters: Annotated[int, Option(min=10_000, help="characters of training text to fit it to")] = 800_000,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
) -> None:
    """Fit a classifier of an attribute to the latents of a run's training text."""
    from hldm.generation.steer import check_guide_path
    from hldm.studies import steering
    from hldm.studies.attributes import attribute_of

    attribute_of(attribute)
    check_guide_path(to)
    with doing("reading the training text, and fitting a classifier to its latents"):
        ground = steering.read_ground(shipped_run() if run is None else find_model(run), characters)
        guide = steering.fit(ground, attribute, seed=seed)
    guide.save(to)
    accuracy = ", ".join(f"{value:.1%} of {ASKED[name]}" for name, value in guide.accuracy.items())
    print(f"wrote {to}: {attribute} is one of {', '.join(guide.values)}")
    if accuracy:
        guessed = f"the mean over values, {1 / len(guide.values):.1%} by guessing"
        print(f"right on held-out text ({guessed}): {accuracy}")
    named, flag = "small" if run is None else run, " --allow-code" if allow_code else ""
    begin = f"hldm steer write --run {named}{flag} --guide {shlex.quote(str(to))}"
    print(f"Next: {begin} --to {shlex.quote(guide.values[-1])}")


@app.command()
def write(
    *,
    run: options.RunOrShipped = None,
    guide: GuideFile,
    to: Annotated[str, Option("--to", metavar="VALUE", help="value of the classifier's attribute")],
    prompt: Annotated[
        list[str] | None, Option(help="text to continue; may repeat (default: '', which starts a document)")
    ] = None,
    strength: Annotated[float, Option(help="strength; 0: not steered")] = 1.0,
    method: Method = "mixture",
    particles: Particles = 16,
    max_characters: options.MaxCharacters = 400,
    temperature: options.Temperature = None,
    decoder_temperature: options.DecoderTemperature = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    allow_code: options.AllowCode = False,
) -> None:
    """Continue prompts, toward a value of an attribute."""
    from hldm.generation.footprint import require_room_to_write

    pipeline, settings = load(run, temperature=temperature, decoder_temperature=decoder_temperature)
    prompts = [os.fsencode(text) for text in prompt or [""]]
    rows = particles if method == "particles" else 1
    require_room_to_write(pipeline.autoencoder, pipeline.prior, prompts, max(rows, 1), max_characters)
    found = pipeline.steer(
        prompts,
        guide,
        to,
        strength=strength,
        method=method,
        particles=particles,
        max_characters=max_characters,
        seed=seed,
        settings=settings,
    )
    for row in found:
        before, text = (data.decode("utf-8", "replace") for data in (row.prompt, row.text))
        if as_json:
            print(json.dumps({"prompt": before, "text": text, "ended": row.ended, "seed": seed}))
        else:
            print(printable(before + text))


@app.command()
def measure(
    *,
    run: options.RunOrShipped = None,
    guide: GuideFile,
    to: Annotated[
        list[str] | None,
        Option("--to", metavar="VALUE", help="value of the attribute; may repeat (default: all)"),
    ] = None,
    method: Method = "mixture",
    strength: Annotated[
        list[float] | None, Option(help="strength; may repeat (default: 0, 0.5, 1, 2, 4)")
    ] = None,
    particles: Particles = 16,
    prompts: Annotated[int, Option(min=1, help="prompts from the test text")] = 24,
    seeds: Annotated[int, Option(min=2, help="seeds that everything is written with")] = 3,
    measured: options.Measured = None,
    allow_code: options.AllowCode = False,
) -> None:
    """What steering does to text, by a judge that sees characters only.

    Writes at every strength, and asks a classifier of character n-grams, fitted to the training text.
    """
    if measured is not None:
        check_report_path(measured, "steering")
    for each in strength or []:
        _check_strength(each)
    pipeline, _ = load(run)
    from hldm.generation.steer import read_guide
    from hldm.studies import steering

    with doing("fitting the judge, then writing at every strength"):
        found = steering.measure_steering(
            shipped_run() if run is None else find_model(run),
            read_guide(guide, pipeline.autoencoder, pipeline.prior),
            values=to or [],
            method=method,
            strengths=strength or (0, 0.5, 1, 2, 4),
            particles=particles,
            prompts=prompts,
            seeds=seeds,
        )
    shown = steering.table(found)
    guides = ", ".join(f"{share:.1%} of {ASKED[name]}" for name, share in found["guide_accuracy"].items())
    show(
        f"{found['attribute']}: the judge is right of {found['judge_accuracy']:.1%} of held-out passages, "
        f"{found['judge_mean_accuracy']:.1%} in the mean over values; the guide is right of {guides}",
        shown,
        legend(steering.MEANINGS, shown.head),
    )
    if measured is not None:
        save_report(measured, found)


def _check_strength(strength: float) -> None:
    from hldm.generation.steer import check_strength

    check_strength(strength)
