"""Prompts: places inside documents, whole chunks, with what follows."""

from __future__ import annotations

import numpy as np
import pytest

from hldm.chunking import make_chunker
from hldm.config import ChunkingConfig, config_from_dict
from hldm.corpus import make_corpus
from hldm.data import Windows
from hldm.prompts import choose_prompts, held_out_prompts


def lay_out(*documents: str) -> Windows:
    corpus = make_corpus("text", (document.encode() for document in documents))
    return Windows(corpus, make_chunker(ChunkingConfig()), lanes=1, window_bytes=64, shuffle=False)


def make_document(seed: int, words: int = 200) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["naïve", "river", "日本", "of", "stone"], words)) + f" {seed}"


def test_prompt_and_continuation_are_neighbours_in_one_document():
    documents = [make_document(seed) for seed in range(4)]
    prompts = choose_prompts(lay_out(*documents), 8, prompt_characters=100, max_characters=50)
    assert len(prompts) == 8
    homes = set()
    for prompt in prompts:
        text = prompt.text.decode()
        [home] = [index for index, document in enumerate(documents) if text + prompt.continuation in document]
        homes.add(home)
        assert 100 <= len(text) < 100 + ChunkingConfig().max_bytes
        assert len(prompt.continuation) == 50
    assert homes == {0, 1, 2, 3}  # spread evenly


def test_a_prompt_is_chunked_alone_as_it_was_in_its_document():
    windows = lay_out(make_document(0))
    chunker = make_chunker(ChunkingConfig())
    text = windows.corpus.text.tobytes()
    for prompt in choose_prompts(windows, 5, prompt_characters=60, max_characters=20):
        start = text.index(prompt.text + prompt.continuation.encode())
        chunk_start = windows.chunk_start[start : start + len(prompt.text) + 1]
        assert chunk_start[-1]  # cut at a chunk's end
        np.testing.assert_array_equal(chunk_start[:-1], chunker.chunk_start(prompt.text))


@pytest.mark.parametrize(("text", "found"), [("some words in a short text", 1), ("word", 0)])
def test_short_texts_give_what_they_have(text, found):
    prompts = choose_prompts(lay_out(text), 1)
    assert len(prompts) == found
    assert all(text == prompt.text.decode() + prompt.continuation for prompt in prompts)
    assert choose_prompts(lay_out(text), 0) == []


def test_prompts_come_from_the_split_of_a_config(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_document(1, 3000))
    config = config_from_dict({"data": {"path": str(path), "held_out": 0.1}})
    prompts = held_out_prompts(config, "test", 3, prompt_characters=40)
    at = [path.read_bytes().index(prompt.text) for prompt in prompts]
    assert len(at) == 3 and min(at) >= 0.9 * path.stat().st_size - 1000
