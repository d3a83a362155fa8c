"""Drafts are made from text, kept in a file, and refused where they are damaged or another model's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from hldm.generation.draft import FILE, ChunkDraft, TextDraft, make_draft, read_draft, save_draft
from hldm.text.corpus import make_corpus
from tests.generation.test_chunk import make_autoencoder

CORPUS = make_corpus(
    "psalm", [b"the earth is the lord and the earth is full " * 8, b"lift up the gates " * 6]
)


def made(latent_dim: int):
    autoencoder = make_autoencoder(latent_dim, carry_state=True, reads_text=latent_dim > 0)
    return autoencoder, make_draft(autoencoder, -2.0, CORPUS, minutes=1.0)


def test_the_dictionary_finds_a_chunk_by_its_latent():
    autoencoder, draft = made(3)
    assert isinstance(draft, ChunkDraft)
    strings = draft.strings
    assert all(text in b"".join(CORPUS_TEXTS) for text in strings) and strings == sorted(strings)
    centre = -draft.terms[1::2] / (2 * draft.terms[2::2])  # (z strings) mean of each
    # at its own mean a string's quadratic is the largest it can be
    best = draft.scores(centre[:, 0])[0]
    assert best >= draft.scores(centre[:, 0] + 0.5)[0]


CORPUS_TEXTS = [document.tobytes() for document in CORPUS]


def test_contexts_know_what_follows_most_often():
    _, draft = made(0)
    assert isinstance(draft, TextDraft)
    assert draft.guess(b"the ear") == ord("t") and draft.guess(b"gat") == ord("e")
    assert draft.guess(b"\x00") is None


@pytest.mark.parametrize("latent_dim", [0, 3])
def test_a_draft_is_read_as_it_was_saved(tmp_path, latent_dim):
    autoencoder, draft = made(latent_dim)
    save_draft(draft, tmp_path / "draft")
    again = read_draft(tmp_path / "draft", autoencoder)
    for name, value in vars(draft).items():
        same = (
            torch.equal(value, vars(again)[name])
            if isinstance(value, torch.Tensor)
            else value == vars(again)[name]
        )
        assert same


def test_a_draft_of_another_model_is_refused(tmp_path):
    autoencoder, draft = made(3)
    save_draft(draft, tmp_path)
    with torch.no_grad():
        autoencoder.outputs.bias += 1
    with pytest.raises(ValueError, match="made for another model"):
        read_draft(tmp_path, autoencoder)
    with pytest.raises(ValueError, match="no draft of this model"):
        read_draft(tmp_path, made(0)[0])


@pytest.mark.parametrize("damage", ["nan", "order", "type", "cut"])
def test_a_damaged_draft_is_refused(tmp_path, damage):
    autoencoder, draft = made(3)
    path = save_draft(draft, tmp_path)
    tensors = load_file(path)
    if damage == "nan":
        tensors["terms"][0, 0] = float("nan")
    if damage == "order":
        tensors["at"] = tensors["at"].flip(0)
    if damage == "type":
        tensors["text"] = tensors["text"].float()
    save_file(tensors, path, metadata={"model": draft.model})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"no draft of this model|damaged"):
        read_draft(path, autoencoder)
    with pytest.raises(FileNotFoundError, match="hldm draft"):
        read_draft(tmp_path / "none", autoencoder)
    assert path.name == FILE
