"""A choice between the truth and candidates: the places are whole chunks, and the bits are those of a softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hldm.generation.fill import split_text
from hldm.generation.pipeline import read_pipeline
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.studies import filling


def test_the_bits_of_a_choice():
    assert filling.bits_of_first(np.zeros(64)) == pytest.approx(6)
    assert filling.bits_of_first(np.array([0.0, -1.0])) == pytest.approx(math.log2(1.5))
    assert filling.bits_of_first(np.array([-3000.0, 0.0])) == pytest.approx(3000)


def test_places_are_whole_chunks_of_the_text(trained_run):
    pipe, corpus = read_pipeline(pipeline_of(trained_run)), corpora_of_run(trained_run)["test"]
    places = filling.places_of(corpus, pipe, 6, 3)
    assert len(places) >= 2
    for place in places:
        whole = place.left + b"".join(place.middle) + place.right
        assert whole in corpus.text.tobytes() and len(place.middle) == 3 and place.right
        before = split_text(pipe.autoencoder, place.left)
        after = split_text(pipe.autoencoder, place.right)
        assert split_text(pipe.autoencoder, whole)[: len(before) + 3] == [*before, *place.middle]
        assert len(place.right) <= filling.RIGHT + 4 and after


def test_a_run_is_measured_and_refused(trained_run, monkeypatch):
    monkeypatch.setattr(filling, "CHOICES", 8)
    found = filling.measure_filling(trained_run, places=3, chunks=2)
    rows = {row["name"]: row for row in found["filling"]}
    assert found["places"] >= 2 and found["choices"] <= 8
    gain = np.mean([row["left"] - row["both"] for row in found["by_place"]])
    assert rows["left less both"]["bits"] == pytest.approx(gain)
    assert "given both" in str(filling.table(found))
    for wrong in (dict(places=1), dict(chunks=0)):
        with pytest.raises(ValueError, match="2 places or more"):
            filling.measure_filling(trained_run, **wrong)
