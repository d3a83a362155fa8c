"""Text written back from summaries: the stretches and their means are the text's, and what is written is scored."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from hldm.cli import main
from hldm.generation.encode import encode_texts
from hldm.generation.pipeline import read_pipeline
from hldm.jepa import uncompress
from hldm.jepa.uncompress import stretches_of, train_decoder
from hldm.text.corpus import make_corpus

TEXTS = [
    "In the beginning there was a word, and the word was long enough to hold some chunks of it.",
    "So be it, amen.",
]


def test_stretches_tile_each_document_and_their_means_are_those_of_its_chunks(trained_run):
    autoencoder = read_pipeline(trained_run / "pipeline").autoencoder
    corpus = make_corpus("texts", [text.encode() for text in TEXTS])
    stretches = stretches_of(autoencoder, corpus, 2)
    first = 0
    for text in TEXTS:
        latents, trunk = (
            encode_texts(autoencoder, [text], kind=kind, pooled=False)[0] for kind in ("latents", "summaries")
        )
        count = len(latents) // 2
        own = stretches.some(torch.arange(first, first + count))
        assert text.startswith("".join(own.texts()))  # a last chunk that has no pair is left out
        for name, chunks in (("latents", latents), ("trunk", trunk)):
            expected = torch.stack([chunks[2 * i : 2 * i + 2].mean(dim=0) for i in range(count)])
            torch.testing.assert_close(own.means[name], expected, rtol=1e-4, atol=1e-5)
        first += count
    assert first == len(stretches.text)


def test_no_document_with_so_many_chunks_is_one_line(trained_run):
    autoencoder = read_pipeline(trained_run / "pipeline").autoencoder
    with pytest.raises(ValueError, match="no document holds 1000 chunks: take fewer"):
        stretches_of(autoencoder, make_corpus("texts", [b"a few words"]), 1000)


@pytest.mark.slow
def test_a_decoder_learns_what_its_vectors_say(monkeypatch):
    """Two texts and a number that says which: true vectors cost less than swapped ones."""
    texts = [b"the first of them", b"and another one"] * 20
    text = np.zeros((40, 17), np.int64)
    for row, line in enumerate(texts):
        text[row, : len(line)] = np.frombuffer(line, np.uint8)
    length = torch.tensor([len(line) for line in texts])
    vectors = torch.tensor([[1.0], [-1.0]] * 20)
    stretches = uncompress.Stretches(torch.from_numpy(text), length, {"sign": vectors})
    seconds = itertools.count()  # a step a second, on any machine
    monkeypatch.setattr(uncompress, "clock_named", lambda name: lambda: next(seconds))
    decoder = train_decoder(vectors, stretches, 20, 3.0, seed=0)
    true, swapped = (
        float(decoder.nats(v, stretches.text, length).detach().sum()) for v in (vectors, -vectors)
    )
    assert true < 0.8 * swapped


def test_the_command_prints_every_decoder_beside_its_control(trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(uncompress, "STRETCHES", 6)
    report = tmp_path / "found.json"
    options = ["--run", str(trained_run), "--minutes", "0.005", "--chunks", "2", "--json", str(report)]
    assert main(["uncompress", *options]) == 0
    shown = capsys.readouterr().out
    found = json.loads(report.read_text())
    names = [record["summary"] for record in found["summaries"]]
    assert names == ["nothing", "latents", "latents, shuffled", "trunk", "trunk, shuffled"]
    assert all(f"| {name} " in shown for name in names) and "bits/char" in shown
    assert found["stretches"] == 6 and all(0 <= record["chrf"] <= 1 for record in found["summaries"])


def test_the_twin_is_refused(refused):
    assert "is a twin, which has no summaries" in refused(main(["uncompress", "--run", "small-twin"]))
