"""Every chunking strategy under one protocol: equal minutes, equal bytes a latent, the same measurements.

    hldm chunkers --config configs/small.yaml --minutes 10

Each entry is a run like any other, so a league that was stopped goes on. The twin stands beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from hldm.config import ChunkingConfig, Config, ConfigError, Strategy, changed, config_of_run, to_dict
from hldm.evaluation.tables import Table, cell
from hldm.plugins import allow, allow_named
from hldm.runs.files import atomic_write
from hldm.runs.identity import MAY_CHANGE_ONCE_TRAINED, differences, say_other_code, text_fingerprint
from hldm.runs.pairs import load_pair
from hldm.runs.provenance import code_fingerprint
from hldm.runs.reports import save_report
from hldm.settings import dotted, is_own
from hldm.sources.corpora import load_corpora
from hldm.studies.rate_curve import BITS, measure_once, read_base, timed

# the last is fixed chunks again, their latents by autoencoder.pooling=strided
STRATEGIES = (*get_args(Strategy), "strided")
TARGETS = (6, 12)  # bytes a latent
FITTED_BYTES = 200_000  # of training text, on which the limits of strategies without a threshold are set
CORRUPTED_BYTES = 30_000  # of test text whose bound is taken once clean and once for each corruption
PROMPTS = 16  # written on from, for speed and for the agreement of what is written
COLUMNS: Mapping[str, tuple[str, str]] = {  # of the table: key and format
    "chunker": ("name", ""),
    "bound": ("bound", ".3f"),
    "±": ("standard_error", ".3f"),
    "latents": ("latent", ".3f"),
    "decoder": ("decoder", ".3f"),
    "of it ends": ("ends", ".3f"),
    "bytes right": ("reconstruction", ".1%"),
    "characters a latent": ("characters_per_chunk", ".2f"),
    "variation": ("variation", ".2f"),
    "kinds": ("kinds", ".1%"),
    "at words": ("word", ""),  # precision/recall
    "at sentences": ("sentence", ""),
    "at verses": ("verse", ""),
    "written alike": ("written_agreement", ".0%"),
    "latents/s": ("latents_per_second", ".0f"),
    "trained, characters/s": ("training_characters_per_second", ",.0f"),
    **{kind: (kind, "+.2f") for kind in ("typos", "case", "spaces")},  # bits more than of the clean text
}


class Entry(NamedTuple):
    """One strategy at one length."""

    name: str  # of its run, below the league's folder
    strategy: str
    target: int | None  # None: the twin
    config: Config


def entries(
    path: Path,
    minutes: float,
    only: Sequence[str] = (),
    targets: Sequence[int] = TARGETS,
    clock: str = "wall",
    overrides: Sequence[str] = (),
) -> list[Entry]:
    """A run a strategy and target, all of the same minutes. Raises ConfigError.

    only: by name, or module:Class of one's own, whose code is run
    """
    own = [name for name in only if is_own(name)]
    base = read_base(path, only, (*STRATEGIES, *own), overrides)
    allow_named(base)
    allow(own)
    if not all(2 <= target <= 4096 for target in targets):
        raise ConfigError(f"--targets must lie in 2..4096, got {', '.join(map(str, targets))}")
    found = []
    for target in targets:
        for strategy in only or STRATEGIES:
            chunking = chunking_for(base, strategy, target)
            autoencoder = changed(base.autoencoder, pooling="strided" if strategy == "strided" else "mean")
            config = changed(timed(base, minutes, clock), chunking=chunking, autoencoder=autoencoder)
            name = f"{strategy.replace(':', '.')}-{target}"
            found.append(Entry(name, strategy, target, config))
    return found


def chunking_for(base: Config, strategy: str, target: int) -> ChunkingConfig:
    """Settings under which chunks of training text hold `target` bytes on average, or as near as it goes.

    Chunks hold at most twice as many. A strategy that asks a model has a threshold and sets it, for chunks of at least
    two thirds as many, as words have here; for words and spaces the least bytes move, for sentences and paragraphs,
    which are longer, the most bytes.
    """
    settings: dict[str, Any] = {"strategy": strategy, "target_bytes": target, "max_bytes": 2 * target}
    if strategy in ("fixed", "strided"):
        limits = {"strategy": "fixed", "min_bytes": target, "max_bytes": target}
        return changed(base.chunking, **{**settings, **limits})
    chunking = changed(base.chunking, **settings, min_bytes=max(1, 2 * target // 3))
    if chunking.needs_segmenter:
        return chunking
    from hldm.chunking.chunker import make_chunker
    from hldm.chunking.strategies import sample_of
    from hldm.sources.corpora import load_corpus

    sample = sample_of(load_corpus(base.data, "train"), FITTED_BYTES)

    def miss(tried: ChunkingConfig) -> float:
        return abs(sum(map(len, sample)) / int(make_chunker(tried).chunk_starts(sample).sum()) - target)

    least = [changed(chunking, min_bytes=length) for length in range(1, 2 * target + 1)]
    most = [changed(chunking, min_bytes=1, max_bytes=length) for length in range(target, 2 * target + 1)]
    return min(least + most, key=miss)


def run_league(
    path: Path,
    minutes: float,
    *,
    only: Sequence[str] = (),
    targets: Sequence[int] = TARGETS,
    clock: str = "wall",
    overrides: Sequence[str] = (),
    root: Path = Path("runs"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and measure what is not there yet; returns the results.

    overrides: of all of them, the twin as well (hldm.runs.pairs); chunking is each entry's own
    Leaves root/<name>-league/<entry>/, by the config's name, and beside them league.json and league.md, rewritten
    after each. Rows of earlier calls, of the same minutes, stay in them. Raises ValueError or OSError.
    """
    model, twin = load_pair(path, overrides)
    todo = entries(path, minutes, only, targets, clock, overrides)
    twin = timed(twin, minutes, clock)
    folder = root / f"{model.name}-league"
    league: dict[str, Any] = {"config": str(path), "name": model.name, "overrides": list(overrides)}
    league |= {"minutes": minutes, "clock": clock, "split": "test"}
    text = text_fingerprint(load_corpora(twin.data))
    names = {"twin", *(entry.name for entry in todo)}
    others, left_out = _earlier_rows(folder, names, text, (twin, todo[0].config))
    for line in left_out:
        say(line)
    rows: list[dict[str, Any]] = []
    for entry in [Entry("twin", "twin", None, twin), *todo]:
        say(f"{entry.name}: {minutes:g} minutes")

        def found(run: Path, entry: Entry = entry) -> dict[str, Any]:
            return {"name": entry.name, "strategy": entry.strategy, "target": entry.target, **measure(run)}

        target = folder / entry.name / "league.json"
        rows.append(measure_once(entry.name, entry.config, target, text, found, say))
        league["chunkers"] = sorted([*others, *rows], key=lambda row: str(row["name"]))
        save_report(folder / "league.json", league)
        atomic_write(folder / "league.md", f"{table(league)}\n")
    say_other_code(league["chunkers"], say)
    return league


def _earlier_rows(
    folder: Path, names: Collection[str], text: str, configs: Sequence[Config]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of earlier calls, beside these names, that may stand in one table, and a line for each that may not.

    They were trained on this text by one of these configs, whatever it cuts and pools, and measured by this code.
    """
    alike = [_compared(config) for config in configs]
    now = {"code": code_fingerprint(), "text": text}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for path in sorted(folder.glob("*/league.json")):
        if path.parent.name in names:
            continue
        settings = _compared(config_of_run(path.parent))
        row = json.loads(path.read_text(encoding="utf-8"))
        if settings not in alike:
            nearest = min((sorted(set(settings.items()) ^ set(one.items())) for one in alike), key=len)
            left_out.append(
                f"{path.parent} is left out: other settings of {', '.join({key: 0 for key, _ in nearest})}"
            )
        elif wrong := differences(row.get("origin", {}), now):
            left_out.append(f"{path.parent} is left out, made of {wrong}: ask for it to measure it again")
        else:
            rows.append(row)
    return rows, left_out


def _compared(config: Config) -> dict[str, str]:
    """The settings that all entries of a league share, by dotted key."""
    apart = ("chunking.", "autoencoder.pooling", *MAY_CHANGE_ONCE_TRAINED)
    return {key: str(value) for key, value in dotted(to_dict(config)).items() if not key.startswith(apart)}


def measure(run: Path) -> dict[str, Any]:
    """All figures of a trained run on its test text."""
    import torch

    from hldm.chunking.strategies import chunker_of
    from hldm.evaluation.bound import evaluate_bound, held_out_windows
    from hldm.evaluation.evaluate import evaluate_run
    from hldm.evaluation.reconstruction import bits_of_ends
    from hldm.generation.pipeline import read_pipeline
    from hldm.sources.corpora import bible_verse_starts, load_corpus
    from hldm.studies.borders import describe_chunks
    from hldm.studies.corruptions import CORRUPTIONS, corrupt
    from hldm.text.corpus import make_corpus

    evaluation = evaluate_run(run, prompts=PROMPTS)
    pipeline = read_pipeline(run / "pipeline")
    autoencoder, prior = pipeline.autoencoder, pipeline.prior
    config = config_of_run(run)
    corpus = load_corpus(config.data, "test")

    def bound(text: Any) -> float:
        windows = held_out_windows(autoencoder, text)
        generator = torch.Generator().manual_seed(0)
        found = evaluate_bound(autoencoder, prior, windows, draws=4, generator=generator).bits_per_character()
        return float(found["bound"] or math.nan)

    share = max(1, CORRUPTED_BYTES * len(corpus) // len(corpus.text))
    part = make_corpus("part", (corpus.document(index).tobytes() for index in range(min(share, len(corpus)))))
    bits, cost, speed = evaluation["bits_per_character"], evaluation["cost"], evaluation["speed"]
    found: dict[str, Any] = {
        **{key: bits[key] for key in BITS},
        "reconstruction": evaluation["reconstruction"]
        and evaluation["reconstruction"]["noisy"]["byte_accuracy"],
        "training_characters_per_second": cost["train_characters"] / max(cost["train_seconds"], 1e-9),
        "parameters": cost["parameters"],
        "robustness": {"clean": bound(part), **{kind: bound(corrupt(part, kind)) for kind in CORRUPTIONS}},
    }
    if prior is None:
        return found
    documents = [corpus.document(index) for index in range(len(corpus))]
    is_built_in = not (config.data.path or config.data.dataset)
    verses = bible_verse_starts("test", config.data.documents) if is_built_in else None
    chunks = describe_chunks(documents, chunker_of(autoencoder).chunk_starts(documents), verses)
    generator = torch.Generator().manual_seed(0)
    return found | {
        **chunks,
        "ends": bits_of_ends(autoencoder, held_out_windows(autoencoder, part), generator),
        "latents_per_second": speed["characters_per_second"] / chunks["characters_per_chunk"],
        "written_agreement": evaluation["rechunked"],
    }


def table(league: Mapping[str, Any]) -> Table:
    """The league, least bits first within a length."""
    ordered = sorted(league["chunkers"], key=lambda row: (row["target"] or 0, row["bound"]))
    return Table.of_records(map(_record, ordered), COLUMNS)


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its values for COLUMNS at the top: borders as precision/recall, robustness as a difference."""
    borders = {
        name: "/".join(cell(found[key], ".0%") for key in ("precision", "recall"))
        for name, found in row.get("borders", {}).items()
    }
    robustness = row["robustness"]
    return {**row, **borders, **{kind: bits - robustness["clean"] for kind, bits in robustness.items()}}
