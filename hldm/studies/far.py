"""What earlier chunks of a document can still say of the next latent, and how much of it a pyramid finds.

    hldm far --run small --documents books

The document's own memory (`hldm.generation.memory`) beside a frozen model, its neighbours searched among the nearest
chunks alone, among those that a pyramid of mean-pooled blocks leads to (`hldm.generation.pyramid`), and among all. The
few numbers of each gate are fitted on the validation split; savings are measured on the test split, paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hldm.config import Documents, changed, config_of_run
from hldm.evaluation.parts_table import signed
from hldm.evaluation.tables import Table
from hldm.evaluation.worth import clusters_of, paired_worth
from hldm.generation.memory import fit_gate
from hldm.generation.pipeline import read_pipeline
from hldm.generation.pyramid import BEAM, NEAREST, Index
from hldm.generation.remembering import check_remembers, compared_with, document_neighbours
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import load_corpora
from hldm.studies.memory import Costs, read_costs
from hldm.text.corpus import Corpus, Split


def far_context(
    folder: Path,
    *,
    documents: Documents | None = None,
    beams: Sequence[int] = (BEAM,),
    draws: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Bits a character of the test split that each way of seeking saves, as JSON.

    documents: of the built-in text, in place of the run's own;  beams: blocks of each level that are opened
    Raises ValueError or OSError, one line.
    """
    pipeline = read_pipeline(pipeline_of(folder))
    autoencoder, prior = pipeline.autoencoder, check_remembers(pipeline.prior)
    corpora = _corpora(folder, documents)
    fitted, held = (
        read_costs(autoencoder, prior, corpora[split], draws=draws, seed=seed, decodes=False)
        for split in ("validation", "test")
    )
    pyramid = Index.of(prior.hierarchy)
    ways: dict[str, Index | None] = {"nearest": pyramid._replace(beam=0)}
    ways |= {f"pyramid, {beam}": pyramid._replace(beam=beam) for beam in beams}
    ways["all"] = None
    clusters = clusters_of(held.windows)
    plain = clusters.sums(held.latent_nats(held.plain))
    nearest, rows = None, []
    for name, index in ways.items():
        cost = clusters.sums(_nats(fitted, held, index))
        nearest = cost if nearest is None else nearest
        rows.append(
            {
                "name": name,
                "saved": paired_worth(plain, cost, clusters.characters).as_json(),
                "beyond": paired_worth(nearest, cost, clusters.characters).as_json(),
                "compared": compared_with(held.past, index),
            }
        )
    return {
        "run": folder.resolve().name,
        "documents": documents or "as trained",
        "ratio": pyramid.ratio,
        "levels": pyramid.levels,
        "chunks": len(held.plain),
        "chunks_a_document": len(held.plain) / (int(held.past.document[-1]) + 1),
        "characters": int(clusters.characters.sum()),
        "plain": paired_worth(plain, np.zeros_like(plain), clusters.characters).bits,
        "rows": rows,
    }


@torch.no_grad()
def _nats(fitted: Costs, held: Costs, index: Index | None) -> np.ndarray:
    """Of every held-out latent with what is found in this way. (n)"""
    found = {"document": document_neighbours(fitted.past, index=index)}
    gate = fit_gate(found, fitted.plain, fitted.z_0, fitted.gamma_0)
    weighed = gate.weigh({"document": document_neighbours(held.past, index=index)})
    return held.latent_nats(weighed.log_density(held.plain, held.z_0, held.gamma_0))


def _corpora(folder: Path, documents: Documents | None) -> Mapping[Split, Corpus]:
    corpora = corpora_of_run(folder)
    if documents is None:
        return corpora
    data = config_of_run(folder).data
    if data.path or data.dataset:
        raise ValueError(f"{folder} was trained on text of its own: --documents is of the built-in text")
    return load_corpora(changed(data, documents=documents))


def table(found: Mapping[str, Any]) -> Table:
    """A row for each way of seeking."""
    ratio, levels = found["ratio"], found["levels"]
    names = {"nearest": f"the nearest {NEAREST} chunks", "all": "all chunks of the document"}
    head = ["searched", "bits saved", f"beyond the nearest {NEAREST}", "comparisons a chunk"]
    rows = []
    for row in found["rows"]:
        beam = row["name"].partition(", ")[2]
        pyramid = f"those that the {beam} best blocks of {levels} levels of {ratio} lead to"
        beyond = "-" if row["name"] == "nearest" else signed(row["beyond"])
        rows.append(
            [names.get(row["name"], pyramid), signed(row["saved"]), beyond, f"{row['compared']:,.0f}"]
        )
    return Table(head, rows)
