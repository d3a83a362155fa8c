"""Guides are fitted to what a run makes of its text, and judged by what did not fit them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hldm.generation.steer import read_guide
from hldm.studies import attributes, steering
from hldm.studies.attributes import Attribute


@pytest.fixture
def ground(trained_run, monkeypatch):
    """A run whose passages are of two kinds: those with more than the usual number of t, and the others."""

    def label(passages, documents, split):
        return np.array([int(text.count(b"t") > 14) for text in passages.texts])

    monkeypatch.setitem(attributes.ATTRIBUTES, "teas", Attribute("teas", ("few", "many"), label))
    monkeypatch.setattr(steering, "FEWEST", 2)
    return steering.read_ground(trained_run)


def test_chunks_are_read_in_their_order_and_a_guide_is_fitted_saved_and_judged(ground, trained_run, tmp_path):
    read = ground.read["train"]
    assert len(read.passages.of_chunk) == len(read.before) == len(read.latents)
    own = np.flatnonzero(read.passages.of_chunk == 1)  # one document
    torch.testing.assert_close(read.after[own[:-1]], read.before[own[1:]])
    guide = steering.fit(ground, "teas")
    assert set(guide.accuracy) == {"after", "next"} and all(0 <= x <= 1 for x in guide.accuracy.values())
    labels = ground.labels(attributes.attribute_of("teas"), "train")
    fitted = steering.guide_accuracy(ground.pipeline, guide, read, labels)
    assert fitted["after"] > 0.55  # of what it was fitted to, better than chance
    guide.save(tmp_path / "teas.steer")
    again = read_guide(tmp_path / "teas.steer", ground.pipeline.autoencoder, ground.pipeline.prior)
    torch.testing.assert_close(again.tensors, guide.tensors)

    options = dict(values=["many"], strengths=(0, 2), prompts=2, max_characters=40, seeds=2)
    for method in ("mixture", "particles"):
        found = steering.measure_steering(trained_run, guide, method=method, particles=2, **options)
        assert [row["strength"] for row in found["steering"]] == [0, 2]
        assert found["steering"][0]["ratio"] == 1 and "many" in str(steering.table(found))


def test_what_cannot_be_fitted_or_measured_is_refused(ground, trained_run, monkeypatch):
    guide = steering.fit(ground, "teas")
    with pytest.raises(ValueError, match="teas is one of few, many, got 'none'"):
        steering.measure_steering(trained_run, guide, values=["none"])
    with pytest.raises(ValueError, match="2 seeds or more"):
        steering.measure_steering(trained_run, guide, seeds=1)
    monkeypatch.setattr(steering, "FEWEST", 10_000)
    with pytest.raises(ValueError, match="10000 are needed"):
        steering.fit(ground, "teas")
