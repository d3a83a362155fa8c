"""A decoder of sentences learns to write from concepts, and its scores say so."""

from __future__ import annotations

import pytest
import torch
from jepa_small import small, validation_text

from hldm.chunking.chunker import make_chunker
from hldm.jepa.concepts import ConceptObjective, concept_decoder, edit_similarity, score_concepts, score_texts
from hldm.jepa.objective import letters_of
from hldm.jepa.sentences import SentenceObjective
from hldm.jepa.text_pairs import pairs_of
from hldm.text.corpus import make_corpus

NEXT = [
    "task=sentences",
    "views.kind=none",
    "objective.option=latents",
    "sentences.min_bytes=4",
    "sentences.max_bytes=40",
]


@pytest.mark.parametrize(
    ("a", "b", "edits", "longest"),
    [
        ("kitten", "sitting", 3, 7),
        ("flaw", "lawn", 2, 4),
        ("", "abc", 3, 3),
        ("same", "same", 0, 4),
        ("abcdef", "badcfe", 4, 6),
    ],
)
def test_edit_similarity_of_known_pairs(a, b, edits, longest):
    assert edit_similarity(a, b) == edit_similarity(b, a) == pytest.approx(1 - edits / longest)


def test_nothing_equals_nothing():
    assert edit_similarity("", "") == 1


def test_right_texts_score_one_and_other_texts_less():
    right = ["the king said to the men of the city", "and the water of the river was turned to blood"]
    best = score_texts(right, right)
    for name in ("edit_similarity", "bleu", "chrf", "rougeL", "tfidf_cosine"):
        assert best[name] == pytest.approx(1, abs=1e-6)
        assert score_texts(right[::-1], right)[name] < 0.6
        assert score_texts(["", ""], right)[name] < 0.1


def test_a_decoder_writes_true_concepts_back_and_shuffled_ones_not():
    config = small(*NEXT, "decoder.width=32")
    torch.manual_seed(0)
    jepa = SentenceObjective(config, letters_of(validation_text().text), 1.0)
    document = b"He went up. She sat down. They ate bread. We drink water."
    corpus = make_corpus("four", [document])
    batch = pairs_of(config, corpus, corpus, make_chunker(config.chunking), 3).batch(0)
    objective = ConceptObjective(jepa, concept_decoder(config)).train()
    optimizer = torch.optim.AdamW(objective.decoder.parameters(), lr=2e-2)
    for _ in range(60):
        out = objective(batch, objective.initial_carry(3, torch.device("cpu")), torch.Generator(), 0.0)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in jepa.parameters())
    records = {record["concepts"]: record for record in score_concepts(jepa, objective.decoder, batch)}
    assert records["true"]["edit_similarity"] > 0.9 > 0.5 > records["shuffled"]["edit_similarity"]
    assert records["true"]["bits_per_character"] < 0.5 < records["shuffled"]["bits_per_character"]
