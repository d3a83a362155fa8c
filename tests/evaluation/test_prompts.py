"""Prompts: places inside documents, whole chunks, with what follows."""

from __future__ import annotations

import numpy as np
import pytest

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig, Config, section_from_dict
from hldm.evaluation.prompts import Prompt, choose_prompts
from hldm.sources.corpora import load_corpus
from hldm.text.corpus import make_corpus

WORDS = ChunkingConfig()


def choose(*documents: str, count: int, chunking: ChunkingConfig = WORDS, **lengths: int) -> list[Prompt]:
    corpus = make_corpus("text", (document.encode() for document in documents))
    return choose_prompts(corpus, make_chunker(chunking), count, **lengths)


def make_document(seed: int, words: int = 200) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["naïve", "river", "日本", "of", "stone"], words)) + f" {seed}"


def test_prompt_and_continuation_are_neighbours_in_one_document():
    documents = [make_document(seed) for seed in range(4)]
    prompts = choose(*documents, count=8, prompt_characters=100, max_characters=50)
    assert len(prompts) == 8
    homes = set()
    for prompt in prompts:
        text = prompt.text.decode()
        [home] = [index for index, document in enumerate(documents) if text + prompt.continuation in document]
        homes.add(home)
        assert abs(len(text) - 100) < WORDS.max_bytes
        assert len(prompt.continuation) == 50
    assert homes == {0, 1, 2, 3}  # spread evenly


def test_a_prompt_is_chunked_alone_as_it_was_in_its_document():
    text, chunker = make_document(0), make_chunker(WORDS)
    whole = chunker.chunk_start(text.encode())
    for prompt in choose(text, count=5, prompt_characters=60, max_characters=20):
        start = text.encode().index(prompt.text + prompt.continuation.encode())
        chunk_start = whole[start : start + len(prompt.text) + 1]
        assert chunk_start[-1]  # cut at a chunk's end
        np.testing.assert_array_equal(chunk_start[:-1], chunker.chunk_start(prompt.text))


def test_models_that_chunk_differently_go_on_from_nearly_the_same_places():
    text = make_document(0, 2000)
    fixed = ChunkingConfig(strategy="fixed", max_bytes=10)
    for one, other in zip(choose(text, count=6), choose(text, count=6, chunking=fixed), strict=True):
        at, other_at = (text.index(prompt.continuation) for prompt in (one, other))
        assert abs(at - other_at) <= 12


@pytest.mark.parametrize(
    ("text", "found"), [("some words in a short text", True), ("word", False), ("a", False)]
)
def test_short_texts_give_what_they_have(text, found):
    prompts = choose(text, count=3)
    assert len(prompts) <= 3 and bool(prompts) == found
    assert all(text == prompt.text.decode() + prompt.continuation for prompt in prompts)
    assert choose(text, count=0) == []


def test_prompts_come_from_the_split_of_a_config(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_document(1, 3000))
    config = section_from_dict(Config, {"data": {"path": str(path), "held_out": 0.1}})
    corpus = load_corpus(config.data, "test")
    prompts = choose_prompts(corpus, make_chunker(WORDS), 3, prompt_characters=40)
    at = [path.read_bytes().index(prompt.text) for prompt in prompts]
    assert len(at) == 3 and min(at) >= 0.9 * path.stat().st_size - 1000


def test_more_prompts_than_a_text_has_places_are_those_it_has():
    corpus = make_corpus("short", [b"some words in a row " * 4])
    chunker = make_chunker(ChunkingConfig())
    found = choose_prompts(corpus, chunker, 10**12, prompt_characters=10, max_characters=10)
    assert 0 < len(found) <= 80
