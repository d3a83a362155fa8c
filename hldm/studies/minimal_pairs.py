"""Minimal pairs: how often the better of two texts is the likelier one (BLiMP, arXiv 1912.00582).

Both texts of a pair are scored whole, under one seed: where they are alike so is their noise, and it cancels. Of a
model with latents two bounds are compared, not two likelihoods.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hldm.evaluation.tables import Table
from hldm.generation.pipeline import HLDMPipeline
from hldm.runs.doing import doing
from hldm.sources.encodings import read_text

MAX_FILE_BYTES = 2**26  # 64 MiB: BLiMP has 67,000 pairs in 15
NAMES = (
    ("good", "bad"),
    ("sentence_good", "sentence_bad"),
)  # of the two texts: the second as the authors have it
Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations

COLUMNS: Mapping[str, tuple[str, str]] = {
    "": ("name", ""),
    "pairs": ("pairs", ",d"),
    "right": ("accuracy", ".1%"),
    "from": ("low", ".1%"),
    "to": ("high", ".1%"),
    "uncertain": ("uncertain", ".1%"),
}


LEGEND = (
    "right: pairs whose good text is the likelier one, from ... to its 95 % interval; uncertain: pairs whose "
    "difference is within two standard errors of the noise drawn"
)


class Pair(NamedTuple):
    """Two texts, of which the first is the better one."""

    good: str
    bad: str
    group: str


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `count` (Wilson 1927, score interval)."""
    if count < 1 or not 0 <= right <= count:
        raise ValueError(
            f"a share needs 0 <= right <= count and a count of at least 1, got {right} of {count}"
        )
    share, spread = right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def read_pairs(path: Path, group: str) -> list[Pair]:
    """The pairs of a JSONL file, packed or not. group: the key whose values form the groups, where pairs have it.

    Raises ValueError, one line with file and number, for a row without two texts.
    """
    pairs = []
    for number, line in enumerate(read_text(path, MAX_FILE_BYTES).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}:{number}: not a row of JSON; remove or mend it") from None
        texts = [[row.get(name) for name in names] for names in NAMES] if isinstance(row, dict) else []
        for good, bad in texts:
            if isinstance(good, str) and isinstance(bad, str) and good and bad:
                pairs.append(Pair(good, bad, str(row.get(group, "-"))))
                break
        else:
            raise ValueError(f"{path}:{number}: a row must hold two texts, good and bad")
    if not pairs:
        raise ValueError(f"{path} holds no pairs: a row is an object with two texts, good and bad")
    return pairs


def judge_pairs(
    path: Path, run: str, *, group: str = "term", draws: int = 32, samples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Accuracy over a file's pairs, by group and over all; two equal texts count as half right.

    samples: compare the importance-weighted bounds. Raises ValueError or OSError, one line.
    """
    pairs = read_pairs(path, group)
    pipeline = HLDMPipeline.from_pretrained(run)
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    with doing(f"scoring {len(pairs):,} pairs"):
        scores = pipeline.score(texts, draws=draws, samples=samples, seed=seed, ends_document=False)
    ahead, is_sure = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    for index, (good, bad) in enumerate(zip(scores[::2], scores[1::2], strict=True)):
        bits, error = bad.minus(good)
        if good.importance is not None and bad.importance is not None:
            bits = bad.importance - good.importance
            # draws at one place are common, too, so this is on the safe side
            error = math.hypot(good.importance_error or math.inf, bad.importance_error or math.inf)
            error = error if pipeline.prior is not None else 0.0
        if (
            pairs[index].good == pairs[index].bad
        ):  # rounding, which their places in a batch decide, is no choice
            bits = 0.0
        ahead[index], is_sure[index] = bits, abs(bits) > 2 * error
    names = sorted({pair.group for pair in pairs})
    of_group = np.array([names.index(pair.group) for pair in pairs])
    rows = [_row(name, ahead[of_group == k], is_sure[of_group == k]) for k, name in enumerate(names)]
    rows.append(_row("all", ahead, is_sure))
    return {"run": run, "file": path.name, "draws": draws, "samples": samples, "seed": seed, "groups": rows}


def _row(name: str, ahead: np.ndarray, is_sure: np.ndarray) -> dict[str, Any]:
    """Of pairs whose worse text costs `ahead` bits more. is_sure: where that is beyond twice its standard error"""
    right = float((ahead > 0).sum() + (ahead == 0).sum() / 2)
    low, high = wilson(right, len(ahead))
    return {
        "name": name,
        "pairs": len(ahead),
        "accuracy": right / len(ahead),
        "low": low,
        "high": high,
        "uncertain": 1 - float(is_sure.mean()),
    }


def table(found: Mapping[str, Any]) -> Table:
    """A row a group, the last one all of them."""
    groups: Sequence[Mapping[str, Any]] = found["groups"]
    return Table.of_records(groups, COLUMNS)
