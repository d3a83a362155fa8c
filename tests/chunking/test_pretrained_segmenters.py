"""A trained run can be asked where to cut, and what it says keeps to what every strategy keeps to."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest
import torch

from hldm.chunking.pretrained import ASKED, AskedModel
from hldm.chunking.segmenter import ChunkStream
from hldm.cli import main
from hldm.config import AutoencoderConfig, ChunkingConfig, GriffinConfig
from hldm.model.autoencoder import Autoencoder
from hldm.text.bytes import START

every_strategy = pytest.mark.parametrize("strategy", ASKED)
TEXT = ("It was. Was it? 世界和平 😀😀\n\ndef f(x):\n    return x\n" * 4).encode()


@lru_cache
def asked(strategy: str) -> AskedModel:
    """An untrained model, and a threshold in the middle of what it gives."""
    torch.manual_seed(0)
    stack = GriffinConfig(width=24, heads=2, blocks=("recurrent", "attention", "recurrent"))
    settings = AutoencoderConfig(latent_dim=0 if strategy == "entropy" else 4, encoder=stack, decoder=stack)
    chunking = ChunkingConfig(strategy=strategy, min_bytes=1, max_bytes=12, target_bytes=5)
    model = Autoencoder.from_settings(settings, ChunkingConfig()).eval()
    segmenter = AskedModel(chunking, model)
    segmenter.calibrate([np.frombuffer(TEXT, np.uint8)])
    return segmenter


@every_strategy
def test_a_model_cuts_within_limits_to_the_wanted_length_and_causally(strategy):
    chunker = asked(strategy).chunker(1, 12)
    is_start = chunker.chunk_start(TEXT)
    length = np.diff([*np.flatnonzero(is_start), len(TEXT)])
    assert is_start[0] and length.max() <= 12 and length.mean() == pytest.approx(5, rel=0.15)
    for part in np.split(np.frombuffer(TEXT, np.uint8), np.flatnonzero(is_start)[1:]):
        part.tobytes().decode()  # no character is split
    stream = ChunkStream(chunker)
    piecewise = [stream.push(TEXT[t : t + 7], [] if t else [0]) for t in range(0, 70, 7)]
    assert np.concatenate(piecewise).tolist() == is_start[:70].tolist()
    assert chunker.chunk_start(TEXT[:50]).tolist() == is_start[:50].tolist()


@every_strategy
def test_documents_in_a_row_are_cut_as_one_by_one(strategy):
    chunker = asked(strategy).chunker(2, 9)
    documents = [np.frombuffer(text, np.uint8) for text in (TEXT[:60], b"a", TEXT[40:80])]
    one_by_one = [chunker.chunk_start(document) for document in documents]
    assert chunker.chunk_starts(documents).tolist() == np.concatenate(one_by_one).tolist()


def test_the_signals_are_the_models_own():
    symbols = torch.from_numpy(np.frombuffer(TEXT[:40], np.uint8).astype(np.int64))[None]
    doc_start = torch.zeros_like(symbols, dtype=torch.bool)
    doc_start[0, [0, 25]] = True
    twin = asked("entropy")
    with torch.no_grad():
        entropy, _ = twin.signal(symbols, doc_start, twin.initial_state(1))
        # a document's first byte from nothing but START, its third from two bytes
        for opens, at in ((0, 0), (0, 2), (25, 25), (25, 27)):
            read = torch.cat([torch.tensor([[START]]), symbols[:, opens:at]], dim=1)
            is_first = torch.arange(read.shape[1])[None] == 0
            state = twin.model.decoder_state(1).griffin
            logits, _ = twin.model.decode_symbols(read, is_first, is_first, state)
            p = logits[0, -1, :256].softmax(dim=0)
            torch.testing.assert_close(entropy[0, at, 0], -(p * p.log2()).sum())

        states, gates = asked("state_change"), asked("gate")
        moved, _ = states.signal(symbols, doc_start, states.initial_state(1))
        _, griffin = states.model.encoder(
            states.model.read(symbols), states.initial_state(1).griffin, doc_start, doc_start
        )
        torch.testing.assert_close(moved[:, -1], griffin[-1].hidden)
        fall, after = gates.signal(symbols, doc_start, gates.initial_state(1))
        torch.testing.assert_close(-fall.sum(), after.carry.sum())  # from nothing to what the last byte keeps


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ASKED)
def test_the_shipped_run_is_asked_by_default(strategy, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(b"And the king said to his servants, Let them go in peace. " * 5)
    limits = ["--target-bytes", "7", "--min-bytes", "2", "--max-bytes", "16"]
    assert main(["chunk", "--text", str(path), "--strategy", strategy, "--json", *limits]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["strategy"] == strategy and sum(found["bytes"]) == path.stat().st_size
    assert max(found["bytes"]) <= 16 and found["mean_bytes"] == pytest.approx(7, rel=0.5)


def test_a_copy_without_the_shipped_run_says_so(tmp_path, monkeypatch, capsys):
    def missing(twin: bool = False) -> None:
        raise FileNotFoundError("pretrained/small is not there: pass --run with a run that you have trained")

    monkeypatch.setattr("hldm.chunking.pretrained.shipped_run", missing)
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    assert main(["chunk", "--text", str(path), "--strategy", "gate"]) == 2
    assert "is not there: pass --run" in capsys.readouterr().err
