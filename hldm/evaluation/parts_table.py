"""The parts table of a run: what each part is worth, hidden and retrained without, and what samplers and latents do.

`parts_of_run` measures, `tables` prints. Every figure stands in the JSON that both share.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hldm.config import GenerationConfig
from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.evaluation.parts import SHORT, SHORT_DRAWS, Costs, hidden_rows, measure, parts_in
from hldm.evaluation.reconstruction import ENOUGH_CHUNKS
from hldm.evaluation.sampled import STEPS, agreement, deviations, finite_steps, share_sure
from hldm.evaluation.tables import Table, cell
from hldm.evaluation.worth import clusters_of, from_json, least, paired_worth
from hldm.generation.pipeline import read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.doing import doing
from hldm.runs.folder import corpora_of_run, read_totals
from hldm.runs.identity import require_shared_text
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import corpus_of_file
from hldm.text.corpus import Corpus, Split
from hldm.text.windows import Windows

LEGEND = (
    "bits lost: what a character costs more where the model does not get the part, ± standard error; about 0: it is "
    "not used. The mixture is what the prior knows without denoising, the trunk the recurrent net that remembers "
    "earlier chunks. Row by row: docs/parts.md"
)
STEPS_LEGEND = (
    "bits in latents: what a character's latents cost when drawn in so few steps, and how far that lies above "
    "endlessly many; spread: of drawn latents by that of true ones, for each of a latent's numbers (1: alike)"
)
EQUAL_MINUTES = 0.05  # by how much the minutes of two runs that are compared may differ before it is said


def parts_of_run(
    folder: Path,
    *,
    split: Split = "test",
    text: Path | None = None,
    twin: Path | None = None,
    without: Mapping[str, Path] | None = None,
    draws: int = 8,
    seed: int = 0,
    short: bool = False,
) -> dict[str, Any]:
    """What each part of a run is worth, on a split of its data or on the file `text`, as JSON.

    twin: a run of the twin, to compare the share of bytes that the decoder is sure of
    without: runs that were trained without a part, by the part's name
    draws: noise levels a chunk;  short: the rows of SHORT alone, and of the first chunks
    Raises ValueError or OSError, one line: for a twin, an unknown part, or runs of another text.
    """
    began, began_computing = time.monotonic(), time.process_time()
    if draws < 2 or draws % 2:
        raise ValueError(f"draws must be even and at least 2, got {draws}")
    autoencoder, prior, settings = _read_models(folder)
    if prior is None:
        raise ValueError(f"{folder} is a twin: it has no parts to hide; pass the run of a latent model")
    without = without or {}
    names = [part.name for part in parts_in(autoencoder, prior) if part.name in SHORT or not short]
    for name, other in without.items():
        if name not in names:
            raise ValueError(f"{folder} has no part {name!r:.80} in this table: it has {', '.join(names)}")
        _check_other(folder, other)
    if twin is not None:
        _check_other(folder, twin)
    corpus = corpora_of_run(folder)[split] if text is None else corpus_of_file(text)
    windows = held_out_windows(autoencoder, corpus)
    other_twin = None if twin is None else _read_models(twin)
    if other_twin is not None and other_twin[1] is not None:
        raise ValueError(f"{twin} has latents: --twin takes the run of a plain autoregressive model")

    # runs are compared by all of the text: they cut it into other chunks
    enough = ENOUGH_CHUNKS if short and not without else None
    with doing(f"hiding each part of {folder.resolve().name} in turn"):
        found, costs = _measured(autoencoder, prior, windows, draws, seed, short, enough)
    rows = found["rows"]
    for name, other in without.items():
        with doing(f"measuring {other.resolve().name}, trained without {name}"):
            again = _retrained(costs, corpus, windows, other, draws, seed)
        worth = least(from_json(rows[name]["hidden"]), from_json(again))
        rows[name] |= {"retrained": again, "worth": worth.as_json()}
    found |= {"run": folder.resolve().name, "split": split if text is None else str(text)}
    found |= {"text": corpus.fingerprint, "minutes": _minutes(folder)}
    if not short:
        with doing("measuring few denoising steps, and what a latent tells the decoder"):
            found |= _of_latents(autoencoder, prior, windows, settings, seed)
        if twin is not None and other_twin is not None:
            plain = other_twin[0]
            sure = share_sure(plain, None, held_out_windows(plain, corpus), torch.Generator())
            found["sure"] |= {"twin": sure, "twin_run": twin.resolve().name}
    spent = {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - began_computing,
    }
    return {**found, **spent}


def short_parts(autoencoder: Autoencoder, prior: Prior, windows: Windows, seed: int) -> dict[str, Any]:
    """The short table of a loaded model, as JSON: part of every evaluation."""
    return _measured(autoencoder, prior, windows, SHORT_DRAWS, seed, True, ENOUGH_CHUNKS)[0]


def _measured(
    autoencoder: Autoencoder,
    prior: Prior,
    windows: Windows,
    draws: int,
    seed: int,
    short: bool,
    enough: int | None,
) -> tuple[dict[str, Any], Costs]:
    """The rows of the table, with what the whole model costs on the same chunks."""
    parts = [part for part in parts_in(autoencoder, prior) if part.name in SHORT or not short]
    costs = measure(autoencoder, prior, windows, parts, draws=draws, seed=seed, enough=enough)
    clusters = costs.clusters
    terms = [clusters.sums(term) for term in costs.whole]
    nothing = np.zeros_like(terms[0])
    latent, decoder = (paired_worth(term, nothing, clusters.characters).bits for term in terms)
    found = {
        "seed": seed,
        "draws": draws,
        "characters": int(clusters.characters.sum()),
        "chunks": int((clusters.of_chunk >= 0).sum()),
        "bits_per_character": {"bound": latent + decoder, "latent": latent, "decoder": decoder},
        "rows": hidden_rows(costs, parts),
    }
    return found, costs


def _of_latents(
    autoencoder: Autoencoder, prior: Prior, windows: Windows, settings: GenerationConfig, seed: int
) -> dict[str, Any]:
    """What samplers of few steps cost, and what the decoder makes of a latent."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "steps": finite_steps(autoencoder, prior, windows, generator),
        "deviation": deviations(autoencoder, prior, windows, (0, settings.steps, max(STEPS)), generator),
        "sure": {"model": share_sure(autoencoder, prior, windows, generator), "twin": None, "twin_run": None},
        "agreement": agreement(autoencoder, prior, windows, settings, seed),
        "default_steps": settings.steps,
    }


def _read_models(folder: Path) -> tuple[Autoencoder, Prior | None, GenerationConfig]:
    """The models of a run, on CUDA where there is one."""
    pipeline = read_pipeline(pipeline_of(folder))
    if torch.cuda.is_available():
        pipeline.to("cuda")
    return pipeline.autoencoder, pipeline.prior, pipeline.settings


def _check_other(folder: Path, other: Path) -> None:
    """Raise ConfigError or ValueError for a run that is not to be compared with this one."""
    if other.resolve() == folder.resolve():
        raise ValueError(f"{other} is the run itself: pass another one to compare it with")
    read_pipeline(pipeline_of(other))  # says what is missing before settings are compared
    require_shared_text(folder, other)


def _retrained(
    costs: Costs, corpus: Corpus, windows: Windows, other: Path, draws: int, seed: int
) -> dict[str, Any]:
    """What a model that was trained without a part costs more on the same text, paired by stretches of it."""
    autoencoder, prior, _ = _read_models(other)
    cut = held_out_windows(autoencoder, corpus)
    bound = evaluate_bound(
        autoencoder, prior, cut, draws=draws, generator=torch.Generator().manual_seed(seed)
    )
    whole = clusters_of(windows)
    worth = paired_worth(
        clusters_of(cut).sums(bound.by_chunk), whole.sums(costs.whole.sum(axis=0)), whole.characters
    )
    return {**worth.as_json(), "run": other.resolve().name, "minutes": _minutes(other)}


def _minutes(folder: Path) -> float:
    """Of training, over all stages."""
    stages = [folder / name for name in ("autoencoder", "prior") if (folder / name / "totals.json").is_file()]
    return sum(read_totals(stage).seconds for stage in stages) / 60


# ---- tables


def tables(parts: Mapping[str, Any]) -> list[str | Table]:
    """What `parts_of_run` or `short_parts` found, as texts and tables for `hldm.evaluation.tables.show`."""
    bits = parts["bits_per_character"]
    head = (
        f"parts of {parts.get('run', 'the model')} on {parts['characters']:,} characters: {bits['bound']:.4f} bits a "
        f"character ({bits['latent']:.4f} in latents), and how many more with a part hidden"
    )
    shown: list[str | Table] = [head, _worth_table(parts), LEGEND, *_remarks(parts)]
    if "steps" in parts:
        shown += [_steps_table(parts), STEPS_LEGEND, _latents_table(parts)]
    if "run" in parts:
        shown.append(
            f"measured in {parts['seconds']:.0f} seconds, {parts['cpu_seconds']:.0f} of one CPU core's"
        )
    return shown


def short_tables(parts: Mapping[str, Any] | None) -> list[str | Table]:
    """The same of an evaluation's block; nothing for a twin, whose block is None."""
    return [] if parts is None else tables(parts)


def signed(worth: Mapping[str, Any] | None) -> str:
    """A worth and its standard error."""
    if worth is None:
        return "-"
    bits = round(worth["bits"], 4) or 0.0  # no -0.0000
    return f"{bits:.4f} ± {cell(worth['standard_error'], '.4f')}"


def _worth_table(parts: Mapping[str, Any]) -> Table:
    """A row a part; the columns of retrained models only where there are any."""
    rows = parts["rows"]
    has_others = any(row["retrained"] for row in rows.values())
    head = ["hidden", "name", "bits lost"]
    head += ["retrained", "worth"] if has_others else []
    cells = []
    for name, row in rows.items():
        line = [row["part"], name, signed(row["hidden"])]
        if has_others:
            line += [signed(row["retrained"]), signed(row["worth"]) if row["retrained"] else "-"]
        cells.append(line)
    return Table(head, cells)


def _remarks(parts: Mapping[str, Any]) -> list[str]:
    """Retrained models whose minutes were not the model's."""
    said = []
    for name, row in parts["rows"].items():
        again = row["retrained"]
        if again and abs(again["minutes"] - parts["minutes"]) > EQUAL_MINUTES * parts["minutes"]:
            said.append(
                f"{again['run']} was trained for {again['minutes']:.1f} minutes, {parts['run']} for "
                f"{parts['minutes']:.1f}: the retrained worth of {name} is not at equal minutes"
            )
    return said


def _steps_table(parts: Mapping[str, Any]) -> Table:
    """L_S of every S, and the deviation of its latents where they were sampled."""
    rows = []
    for row in parts["steps"]:
        name = f"{row['steps']}{' (default)' if row['steps'] == parts['default_steps'] else ''}"
        over = signed({"bits": row["over"], "standard_error": row["standard_error"]})
        ratios = parts["deviation"].get(str(row["steps"]))
        shown = "-" if ratios is None else " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        rows.append([name, f"{row['bits']:.4f}", over, shown])
    head = ["denoising steps", "bits in latents", "above endlessly many", "spread of drawn latents"]
    return Table(head, rows)


def _latents_table(parts: Mapping[str, Any]) -> Table:
    """What the decoder knows once it has a latent."""
    sure, agreed = parts["sure"], parts["agreement"]
    agreement_shown = "-" if agreed["share"] is None else f"{agreed['share']:.1%}"
    if agreed["standard_error"] is not None:
        agreement_shown += f" ± {agreed['standard_error']:.1%}"
    return Table(
        ["what a latent tells the decoder", "share"],
        [
            ["bytes it is sure of (p > 0.9)", cell(sure["model"], ".1%")],
            *([] if sure["twin"] is None else [["  the twin, without latents", cell(sure["twin"], ".1%")]]),
            ["two writings of one latent that agree", agreement_shown],
        ],
    )
