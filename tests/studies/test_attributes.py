"""Passages tile their documents, and labels are what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig
from hldm.sources.corpora import bible_books
from hldm.studies.attributes import ATTRIBUTES, attribute_of, feeling, passages_of, sentences, speech
from hldm.text.corpus import make_corpus


def test_passages_are_whole_chunks_of_one_document_each():
    documents = [b"word " * 100, "caf\u00e9 \u00fcber ".encode() * 60, b"short"]
    corpus = make_corpus("x", documents)
    start = make_chunker(ChunkingConfig(strategy="words", min_bytes=4, max_bytes=10)).chunk_starts(
        list(corpus)
    )
    found = passages_of(corpus, start, characters=100)
    assert len(found.texts) == 5 + 6 and found.document.tolist() == [0] * 5 + [1] * 6
    edges = np.append(np.flatnonzero(start), len(corpus.text))
    for number, text in enumerate(found.texts):
        own = np.flatnonzero(found.of_chunk == number)
        assert (np.diff(own) == 1).all()
        assert corpus.text[edges[own[0]] : edges[own[-1] + 1]].tobytes() == text
        assert 80 <= len(text.decode()) <= 120
    assert (found.of_chunk[-1:] == -1).all()  # the short document is in none


def test_labels_by_words():
    assert speech(b"And I said to you, Give me my bread.") == 1
    assert speech(b"And he went out of the town to the river.") == 0
    assert feeling(b"Give praise and be glad with songs of joy") == 0
    assert feeling(b"The wrath and the sword and death came") == 1
    assert feeling(b"And they went to the town") == -1
    assert sentences(b"He went. He came. He saw.") == 0
    assert sentences(b"and " * 30 + b".") == 1


def test_genres_are_known_of_the_built_in_books_alone():
    genre = attribute_of("genre")
    books = bible_books("test")
    corpus = make_corpus("x", [b"word " * 50 for _ in books])
    start = make_chunker(ChunkingConfig(strategy="words", min_bytes=4, max_bytes=10)).chunk_starts(
        list(corpus)
    )
    passages = passages_of(corpus, start)
    labels = genre.label(passages, len(books), "test")
    by_book = {books[d]: genre.values[label] for d, label in zip(passages.document, labels, strict=True)}
    assert by_book == {8: "history", 21: "poetry", 27: "prophets", 59: "letters"}
    with pytest.raises(ValueError, match="built-in text alone"):
        genre.label(passages, 3, "test")
    with pytest.raises(ValueError, match=f"is one of {', '.join(ATTRIBUTES)}, got 'colour'"):
        attribute_of("colour")
