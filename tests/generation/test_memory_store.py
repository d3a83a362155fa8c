"""A store on disk: what was put in is found again, and whatever is wrong with it is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_pipeline

from hldm.chunking.reading import held_out_windows
from hldm.generation import memory_store
from hldm.generation.memory import Gate
from hldm.generation.memory_store import Store, new_folder, write_gates, write_store
from hldm.generation.remembering import entries_of, open_memory, own_entries, read_past, stored_neighbours
from hldm.runs.files import fingerprint
from hldm.text.corpus import make_corpus

TEXTS = [b"And the king said to the men, Go up. " * 3, b"Let them come again, and be glad. " * 4, b"Come."]


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def store(tmp_path, pipeline) -> Store:
    model = fingerprint(pipeline.autoencoder.state_dict())
    with new_folder(tmp_path / "store") as folder:
        write_store(folder, entries_of(pipeline.autoencoder, make_corpus("texts", TEXTS)), model, "texts")
        write_gates(folder, {"both": Gate.of_document()})
    return Store(tmp_path / "store", model)


def past_of(pipeline, corpus):
    return read_past(pipeline.autoencoder, held_out_windows(pipeline.autoencoder, corpus))


def test_entries_are_the_chunks_of_the_text(store, pipeline):
    corpus = make_corpus("texts", TEXTS)
    past = past_of(pipeline, corpus)
    assert b"".join(store.text_of(entry) for entry in range(len(store))) == b"".join(TEXTS)
    np.testing.assert_allclose(store.entries.latents, past.latents.numpy(), atol=1e-6)
    np.testing.assert_allclose(store.entries.keys, store.project(past.query).numpy(), atol=2e-3)  # float16
    assert np.array_equal(store.entries.prints, past.prints)


def test_the_nearest_are_those_of_brute_force(store, pipeline, monkeypatch):
    monkeypatch.setattr(memory_store, "BLOCK", 7)  # several blocks
    keys = store.project(past_of(pipeline, make_corpus("other", [b"And they said to the men"])).query).numpy()
    distance, entry = store.search(keys, None, 5)
    square = ((keys[:, None] - store.entries.keys[None].astype(np.float32)) ** 2).sum(axis=-1)
    np.testing.assert_allclose(distance, np.sort(square, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(square, entry, axis=1), distance, atol=1e-5)


def test_a_training_document_never_retrieves_itself(store, pipeline):
    corpus = make_corpus("again", [TEXTS[1], b"A new one, Let them come again."])
    past = past_of(pipeline, corpus)
    own = own_entries(store, corpus, past.document)
    first, last = store.own_entries(int(store.entries.digests[1]))
    assert {tuple(span) for span in own.tolist()} == {(first, last), (0, 0)} and last > first
    _, entry = store.search(store.project(past.query).numpy(), own, 20)
    itself = (entry >= first) & (entry < last)
    is_old = past.document == 0
    assert not itself[is_old].any() and itself[~is_old].any()
    near = stored_neighbours(store, corpus, past)
    others = len(store) - (last - first)
    assert others < near.distance.shape[1]  # there is room for all of them
    assert (near.distance[is_old].isfinite().sum(dim=1) == others).all()


def test_matches_end_where_an_entry_s_document_begins(store, pipeline):
    corpus = make_corpus("again", [b"x " + TEXTS[0]])
    past = past_of(pipeline, corpus)
    near = stored_neighbours(store, corpus, past)
    assert near.matched[0].max() == 0 and near.matched.max() == 8


def test_faiss_finds_most_of_what_exact_search_finds(store, pipeline, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(memory_store, "LISTS", 1)
    rng = np.random.default_rng(0)
    entries = memory_store.Entries(
        keys=rng.normal(size=(100, 4)).astype(np.float16),
        latents=rng.normal(size=(100, 2)).astype(np.float32),
        prints=np.arange(1, 101, dtype=np.uint64),
        text=np.zeros(100, np.uint8),
        starts=np.arange(101),
        documents=np.array([0, 100]),
        digests=np.array([7], np.uint64),
        projection=np.zeros((5, 8), np.float32),
    )
    with new_folder(tmp_path / "indexed") as folder:
        write_store(folder, entries, "model", "noise")
    indexed = Store(tmp_path / "indexed", "model")
    assert indexed.index is not None
    keys = rng.normal(size=(20, 4)).astype(np.float32)
    found, exact = (
        s.search(keys, None, 5) for s in (indexed, Store(tmp_path / "indexed", "model", exact=True))
    )
    np.testing.assert_allclose(found[0], exact[0], atol=1e-2)


def test_what_fails_halfway_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new") as folder:
        (folder / "keys.npy").write_bytes(b"x")
        raise RuntimeError
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(store):
    with pytest.raises(FileExistsError, match="is there already"), new_folder(store.folder):
        pass


# ---- spoiled stores


def set_manifest(folder: Path, **values) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))


def spoil_latents(folder: Path) -> None:
    latents = np.load(folder / "latents.npy")
    latents[3] = np.nan
    np.save(folder / "latents.npy", latents)


def truncate(folder: Path) -> None:
    data = (folder / "keys.npy").read_bytes()
    (folder / "keys.npy").write_bytes(data[: len(data) // 2])


def truncate_and_hide_it(folder: Path) -> None:
    truncate(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["keys.npy"] = (folder / "keys.npy").stat().st_size
    set_manifest(folder, files=manifest["files"])


SPOILED = {
    "another model": (lambda folder: set_manifest(folder, model="0" * 64), "a memory of another model"),
    "empty": (lambda folder: set_manifest(folder, entries=0), "an empty memory"),
    "NaN": (spoil_latents, "not finite"),
    "truncated": (truncate, "bytes, not"),
    "truncated, as the manifest says": (truncate_and_hide_it, "cannot be read"),
    "a file is missing": (lambda folder: (folder / "prints.npy").unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is no memory"),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1,'),
        "is no manifest",
    ),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "is no manifest"),
    "fewer entries": (lambda folder: set_manifest(folder, entries=3), "different sizes"),
    "no gates": (lambda folder: set_manifest(folder, gates={}), "no gate"),
    "a gate of words": (
        lambda folder: set_manifest(folder, gates={"both": {"sources": "x"}}),
        "a memory's gate",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_store_is_refused_in_one_line(store, pipeline, what):
    spoil, told = SPOILED[what]
    spoil(store.folder)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as error:
        open_memory(str(store.folder), pipeline.autoencoder, pipeline.prior.hierarchy)
    assert "\n" not in str(error.value)


def test_a_whole_store_is_opened(store, pipeline):
    memory = open_memory(str(store.folder), pipeline.autoencoder, pipeline.prior.hierarchy)
    assert memory.store is not None and memory.gate == Gate.of_document()
    assert torch.isfinite(
        memory.store.neighbours(torch.zeros(1, 8), np.zeros((1, 8), np.uint64)).latents
    ).all()
