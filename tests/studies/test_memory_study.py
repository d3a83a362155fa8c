"""`hldm memory` and `hldm codebook`: build, measure, write; and one line for whatever is wrong."""

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
from hldm.generation.memory import Gate
from hldm.studies import codebook
from hldm.studies.memory import (
    fit_gates,
    most_repeating,
    nats_with,
    rare_chunks,
    read_costs,
    read_twice,
    repeated_phrases,
)
from hldm.studies.memory_samples import longest_copy
from hldm.text.corpus import make_corpus

TEXTS = [b"And the king said to Esther, Go up. " * 6, b"Let them come to Vashti, and be glad. " * 5]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def memory(trained_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "store"
    assert cli.main(["memory", "build", "--run", str(trained_run), "--out", str(out)]) == 0
    return out


def costs_of(texts=TEXTS, draws: int = 3):
    pipeline = tiny_pipeline()
    return read_costs(pipeline.autoencoder, pipeline.prior, make_corpus("t", texts), draws=draws, seed=0)


def test_plain_costs_are_those_of_the_bound():
    """Latent and decoder terms are, but for noise, what evaluation says of the mixture as a prior."""
    pipeline = tiny_pipeline()
    pipeline.prior.denoiser.requires_grad_(False)
    for parameter in pipeline.prior.denoiser.parameters():
        parameter.zero_()  # the mixture's own estimate is left
    windows = held_out_windows(pipeline.autoencoder, make_corpus("t", TEXTS))
    bound = bound_chunks(
        pipeline.autoencoder, pipeline.prior, windows, draws=256, generator=torch.Generator().manual_seed(1)
    )
    costs = costs_of(draws=64)
    latent = costs.latent_nats(costs.plain).sum()
    assert latent == pytest.approx((bound.latent + bound.end).sum(), rel=0.02)
    assert costs.decoder.sum() == pytest.approx(bound.decoder.sum(), rel=0.01)


def test_a_text_that_repeats_itself_gets_cheaper_by_a_fitted_gate():
    costs = costs_of()
    gates = fit_gates(None, costs)
    nats = nats_with(costs, None, gates)
    assert nats["document"].sum() < nats["plain"].sum()
    assert np.array_equal(nats["plain"][:1], nats["document"][:1])  # nothing is known before the first chunk


def test_rare_words_and_names_are_found():
    pipeline = tiny_pipeline()
    corpus = make_corpus("t", [b"Now Baal came and Baal sat, while men ran."])
    windows = held_out_windows(pipeline.autoencoder, corpus)
    training = b"now came and sat men ran Now " * 9 + b"Baal Baal while"
    flags = list(rare_chunks(windows, training, 2).values())
    text, starts = corpus.text.tobytes(), [*np.flatnonzero(windows.chunk_start), len(corpus.text)]
    chunks = [text[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    found = [b"".join(chunk for chunk, is_in in zip(chunks, flag, strict=True) if is_in) for flag in flags]
    assert found[0].count(b"Baal") == 2 and b"while" in found[0] and b"ran" not in found[0]
    assert found[1].count(b"Baal") == 2 and b"while" not in found[1]
    assert found[2].count(b"Baal") == 1


def test_repeats_are_counted_and_made():
    assert repeated_phrases("a b c d e") == 0 and repeated_phrases("a b c d a b c d a b c d") > 0.5
    plain = " ".join(f"word{index}" for index in range(300)).encode()
    assert most_repeating(make_corpus("t", [plain, b"come to me now " * 90, b"a b"])) == 1
    assert most_repeating(make_corpus("t", [b"short"])) is None
    twice, seconds = read_twice(make_corpus("t", [b"one", b"second"]))
    assert [document.tobytes() for document in twice] == [b"one one", b"second second"]
    assert seconds.tolist() == [4, 7]


def test_the_longest_copy_is_found():
    training = b"In the beginning God made the heaven and the earth."
    assert longest_copy([b"xx God made the heaven of brass", b"beginning"], training) == len(
        b"God made the heaven "
    )
    assert longest_copy([b"zzz"], training) == 0


def test_build_measure_and_write(memory, trained_run, capsys):
    arguments = ["--run", str(trained_run), "--memory", str(memory)]
    measure = ["memory", "measure", *arguments, "--prompts", "2", "--max-chars", "60", "--json", "m.json"]
    assert cli.main(measure) == 0
    out = capsys.readouterr().out
    assert "saved by training" in out and "read twice" in out and "recalled chunks" in out
    found = json.loads(Path("m.json").read_text())
    assert {"training", "document", "both"} <= set(found["rows"][0])
    assert [row["name"] for row in found["samples"]["rows"]] == ["plain", "training", "document", "both"]
    generate = ["generate", "--run", str(trained_run), "--prompt", "And the", "--max-chars", "40", "--json"]
    texts = []
    for extra in ([], ["--memory", str(memory)], ["--memory", "document"], ["--memory", str(memory)]):
        assert cli.main([*generate, *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[1] == texts[3] and all(texts)


@pytest.mark.slow
def test_a_document_s_memory_is_sought_through_the_pyramid_just_as_well_where_it_is_short(
    trained_run, corpus_path, capsys
):
    found = {}
    for memory in ("document", "pyramid"):
        measure = ["memory", "measure", "--run", str(trained_run), "--memory", memory, "--draws", "1"]
        assert cli.main([*measure, "--text", str(corpus_path), "--prompts", "1", "--json", "m.json"]) == 0
        found[memory] = json.loads(Path("m.json").read_text())
        Path("m.json").unlink()
        generate = ["generate", "--run", str(trained_run), "--prompt", "And the", "--max-chars", "40"]
        assert cli.main([*generate, "--memory", memory, "--json"]) == 0
        found[memory]["text"] = json.loads(capsys.readouterr().out.splitlines()[-1])["text"]
    assert found["document"]["text"] == found["pyramid"]["text"]  # every chunk is among the nearest
    saved, all_of_it = (found[memory]["rows"][0]["document"]["bits"] for memory in ("pyramid", "document"))
    assert saved == pytest.approx(all_of_it, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["memory", "measure", "--memory", "nowhere"], "is no memory"),
        (["memory", "build", "--out", "there"], "is there already"),
        (["memory", "build", "--out", "new", "--text", "empty.txt"], "is empty"),
        (["memory", "build", "--out", "no/folder"], "no folder"),
        (["memory", "measure", "--text", "missing.txt"], "missing.txt"),
        (["generate", "--prompt", "x", "--memory", "nowhere"], "is no memory"),
        (["codebook", "--memory", "nowhere"], "is no memory"),
    ],
)
def test_bad_input_ends_in_one_line(trained_run, refused, arguments, told):
    Path("there").mkdir()
    Path("empty.txt").write_bytes(b"")
    assert told in refused(cli.main([*arguments, "--run", str(trained_run)]))
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "command", [["memory", "measure"], ["generate", "--prompt", "x", "--memory", "document"]]
)
def test_a_twin_has_nothing_to_remember(refused, command):
    tiny_pipeline(latent_dim=0).save_pretrained("twin")
    assert "the twin has none" in refused(cli.main([*command, "--run", "twin"]))


# ---- codebooks


def test_a_codebook_s_prior_is_a_distribution_and_its_nearest_entry_is_nearest():
    mixture = tiny_pipeline().prior.mixture
    latents = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    for book in codebook.codebooks_of(mixture, latents, seed=0):
        log_weights = torch.randn(6, 4).log_softmax(dim=-1)
        torch.testing.assert_close(book.log_prior(log_weights).exp().sum(dim=-1), torch.ones(6))
        mu = torch.randn(2, 5, 2)
        square = (mu[:, :, None] - book.entries).square().sum(dim=-1)
        assert torch.equal(book.nearest(mu), square.argmin(dim=-1))


def test_centres_are_where_the_points_are():
    points = torch.cat([torch.randn(50, 2) * 0.01 + torch.tensor([x, 1.0]) for x in (-3.0, 0.0, 3.0)])
    centres, counts = codebook.kmeans(points, 12, torch.Generator().manual_seed(0))
    assert counts.sum() == 150
    assert torch.cdist(points, centres).amin(dim=1).max() < 0.2


def test_hashing_finds_near_vectors_and_more_with_more_planes():
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(40, 16))
    vectors = (centre.repeat(100, axis=0) + 0.3 * rng.normal(size=(4000, 16))).astype(np.float16)
    shares = []
    for count in (64, 512):
        planes = rng.normal(size=(16, count)).astype(np.float32)
        codes = codebook.hash_codes(vectors, planes)
        assert codes.shape == (4000, count // 64)
        found = 0
        for query in vectors[::400].astype(np.float32):
            square = np.square(vectors.astype(np.float32) - query).sum(axis=1)
            near = codebook.nearest_by_hash(query, codes, planes, vectors)
            found += len(np.intersect1d(near, np.argsort(square)[: codebook.NEAREST]))
        shares.append(found / (10 * codebook.NEAREST))
    assert 0.5 < shares[0] <= shares[1] and shares[1] > 0.95


def test_the_study_prints_its_tables(memory, trained_run, capsys, monkeypatch):
    monkeypatch.setattr(codebook, "SIZES", (8,))
    arguments = ["--run", str(trained_run), "--memory", str(memory), "--prompts", "2", "--max-chars", "60"]
    assert cli.main(["codebook", *arguments, "--json", "c.json"]) == 0
    out = capsys.readouterr().out
    assert "8 centres, drawn" in out and "noise" in out and "hyperplanes" in out
    found = json.loads(Path("c.json").read_text())
    assert [row["snap"] for row in found["judged"]] == ["no", "end", "steps", "noise"]
    plain = found["codebooks"][0]
    assert plain["more"] == 0 and plain["total"] == pytest.approx(plain["latent"] + plain["decoder"])
    assert Gate.from_dict(json.loads((memory / "manifest.json").read_text())["gates"]["both"])
