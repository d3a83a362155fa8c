"""A twin's cache: every byte of a corpus in order, a distribution over symbols, nothing that looks ahead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_pipeline

from hldm import cli
from hldm.chunking.reading import held_out_windows
from hldm.generation.bound import bound_chunks
from hldm.generation.memory import Gate, SourceGate
from hldm.generation.remembering import Past
from hldm.studies.byte_cache import Events, cached, fit_cache, log_density, read_cached, read_events
from hldm.text.bytes import END_OF_DOCUMENT, OUTPUTS
from hldm.text.corpus import make_corpus

TEXTS = [b"And the king said to Esther, Go up. " * 6, b"Let them come to Vashti, and be glad. " * 5, b"x"]
GATE = Gate(0.2, {"document": SourceGate(bias=0.5, log_sharpness=1.0, match=0.7, log_deviation=0.0)})


def twin():
    return tiny_pipeline(latent_dim=0).autoencoder


def test_events_are_the_bytes_and_ends_of_every_document_in_order():
    corpus = make_corpus("t", TEXTS)
    events = read_events(twin(), corpus)
    symbols = [symbol for text in TEXTS for symbol in (*text, END_OF_DOCUMENT)]
    assert events.past.latents[:, 0].tolist() == symbols
    is_end = np.array(symbols) == END_OF_DOCUMENT
    assert events.byte[~is_end].tolist() == list(range(len(corpus.text)))
    assert events.byte[is_end].tolist() == (corpus.offsets[1:] - 1).tolist()
    bound = bound_chunks(
        twin(), None, held_out_windows(twin(), corpus), generator=torch.Generator().manual_seed(0)
    )
    assert -events.log_p.double().sum().item() == pytest.approx(bound.nats.sum(), rel=1e-6)


def test_what_the_cache_says_is_a_distribution_over_symbols():
    generator = torch.Generator().manual_seed(0)
    n, small = 40, 5  # an alphabet so small that much is remembered
    p = torch.randn(n, OUTPUTS, generator=generator).double().softmax(dim=-1)
    symbol = torch.randint(small, (n,), generator=generator)
    query = torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=-1)
    prints, document = symbol.numpy().astype(np.uint64) + np.uint64(1), np.arange(n) // 25
    events = Events(Past(query, symbol[:, None].float(), prints, document), p[:, 0].log(), np.arange(n))
    weighed = GATE.weigh({"document": cached(events)})
    assert 0.2 < 1 - weighed.log_kept.exp().mean() < 1
    total = torch.zeros(n, dtype=torch.float64)
    for value in range(OUTPUTS):
        other = events.past._replace(latents=torch.full((n, 1), float(value)))
        total += log_density(weighed, events._replace(past=other, log_p=p[:, value].log())).exp()
    torch.testing.assert_close(total, torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-5)


def test_nothing_looks_ahead_and_documents_know_nothing_of_each_other():
    def log_p(*texts):
        events = read_events(twin(), make_corpus("t", texts))
        return log_density(GATE.weigh({"document": cached(events)}), events)

    before, after = log_p(*TEXTS), log_p(TEXTS[0][:100] + b"Z" + TEXTS[0][101:], *TEXTS[1:])
    size = len(TEXTS[0]) + 1
    torch.testing.assert_close(after[:100], before[:100], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[size:], before[size:], rtol=1e-5, atol=1e-5)
    assert (after[100:size] - before[100:size]).abs().max() > 0.1


def test_a_latent_model_s_decoder_is_read_as_the_bound_reads_it_and_remembers_the_past_alone():
    pipeline = tiny_pipeline()
    autoencoder, gamma_0 = pipeline.autoencoder, pipeline.prior.diffusion.gamma_0

    def events(*texts):
        return read_events(autoencoder, make_corpus("t", texts), gamma_0, seed=3)

    read = events(*TEXTS)
    windows = held_out_windows(autoencoder, make_corpus("t", TEXTS))
    is_byte = read.past.latents[:, 0].numpy() < 256
    assert bytes(read.past.latents[is_byte, 0].int().tolist()) == b"".join(TEXTS)
    assert (np.diff(read.byte) >= 0).all() and set(read.byte) == set(np.flatnonzero(windows.chunk_start))
    nats = read_cached(autoencoder, GATE, windows, gamma_0, seed=3).nats
    assert nats["plain"].sum() == pytest.approx(-read.log_p.double().sum().item(), rel=1e-6)
    later = events(TEXTS[0], TEXTS[1][:-20] + b"entirely different ", TEXTS[2])
    said, otherwise = (log_density(GATE.weigh({"document": cached(each)}), each) for each in (read, later))
    same = int((read.past.document == 0).sum())
    torch.testing.assert_close(otherwise[:same], said[:same], rtol=1e-4, atol=1e-4)


def test_a_text_that_repeats_itself_gets_cheaper_in_every_model_s_chunks():
    corpus = make_corpus("t", TEXTS)
    windows = held_out_windows(tiny_pipeline().autoencoder, corpus)
    nats = read_cached(twin(), fit_cache(twin(), corpus), windows).nats
    assert nats["plain"].shape == (windows.chunks,)
    assert nats["cache"].sum() < 0.7 * nats["plain"].sum()
    assert nats["plain"].sum() == pytest.approx(-read_events(twin(), corpus).log_p.sum().item(), rel=1e-5)


def test_the_command_sets_both_side_by_side(trained_run, tmp_path, monkeypatch, capsys, corpus_path):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(latent_dim=0).save_pretrained("twin")
    Path("some.txt").write_text(corpus_path.read_text()[:2000])
    text = ["--text", "some.txt", "--draws", "1", "--json", "m.json"]
    measure = ["memory", "measure", "--run", str(trained_run), "--twin"]
    monkeypatch.setattr(
        "hldm.studies.memory.require_shared_text", lambda *_: None
    )  # this twin was never trained
    assert cli.main([*measure, "twin", *text]) == 0
    out = capsys.readouterr().out
    assert "saved by its cache" in out and "bytes a second with the twin" in out
    found = json.loads(Path("m.json").read_text())
    rows, speeds = found["rows"], found["bytes_a_second"]
    assert all(0 < speeds[name]["cache"] < speeds[name]["plain"] for name in ("twin", "decoder"))
    assert all(row["cache"]["bits"] > 0 and row["twin"] > 0 for row in rows)
    for row in rows:
        apart = row["document"]["bits"] + row["bytes"]["bits"]
        assert (
            row["document and bytes"]["bits"] == pytest.approx(apart, abs=1e-6) and row["bytes"]["bits"] > 0
        )


def test_a_latent_model_is_no_twin(trained_run, refused):
    measure = ["memory", "measure", "--run", str(trained_run), "--twin", str(trained_run)]
    assert "is no twin" in refused(cli.main(measure))
