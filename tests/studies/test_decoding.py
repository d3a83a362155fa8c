"""Rules of decoding: a contrast is a distribution; early exit at a threshold of 0 is plain denoising."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_pipeline

from hldm import cli
from hldm.config import changed
from hldm.generation.writer import LatentWriter, row_generators
from hldm.studies.decoding import compare
from hldm.studies.decoding_rules import ContrastingWriter, EarlyWriter, contrast
from hldm.text.bytes import END_OF_CHUNK

PROMPTS = [b"And the king said to ", b"", b"Let them come to "]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(make, pieces: int = 12, seed: int = 0, **changes):
    """What each row writes in so many rounds, with the ends of documents."""
    pipeline = tiny_pipeline()
    settings = changed(pipeline.settings, **{"scheduler": "ancestral", "steps": 6, **changes})
    with torch.no_grad():
        writer = make(
            pipeline.autoencoder, pipeline.prior, PROMPTS, settings, row_generators(seed, len(PROMPTS))
        )
        return [writer.write() for _ in range(pieces)], writer


def test_a_contrast_is_a_distribution_that_keeps_how_likely_the_ends_are():
    own, other = torch.randn(2, 5, 258, generator=torch.Generator().manual_seed(0)).double() * 3
    p = contrast(own, other, 0.7).exp()
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(p[:, END_OF_CHUNK:], own.softmax(dim=-1)[:, END_OF_CHUNK:])
    byte = own[:, :END_OF_CHUNK].softmax(dim=-1)
    is_there = byte >= 0.1 * byte.amax(dim=-1, keepdim=True)
    assert torch.equal(p[:, :END_OF_CHUNK] > 0, is_there)
    ratio = (p[:, :END_OF_CHUNK] / byte)[is_there].log()  # = weight (log p - log p') + what normalises a row
    lift = 0.7 * (byte / other[:, :END_OF_CHUNK].softmax(dim=-1))[is_there].log()
    row = is_there.nonzero()[:, 0]
    for index in range(5):
        rest = (ratio - lift)[row == index]
        torch.testing.assert_close(rest, rest[:1].expand_as(rest))


def test_against_oneself_a_contrast_bars_and_does_no_more():
    """The zeros' rival is the decoder itself where the latent is zeros, whatever the weight."""
    own = torch.randn(4, 258, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contrast(own, own, 0.0), contrast(own, own, 2.0))


@pytest.mark.parametrize("rival", ["zeros", "twin"])
def test_without_a_weight_the_rival_is_not_heard_and_with_one_it_is(rival):
    twin = tiny_pipeline(latent_dim=0).autoencoder if rival == "twin" else None

    def against(weight, other):
        return lambda *parts: ContrastingWriter(*parts, weight=weight, twin=other)

    silent, _ = write(against(0.0, twin))
    assert silent == write(against(0.0, None))[0]
    assert silent != write(against(3.0, twin))[0]


def test_the_twin_reads_what_is_written_and_nothing_else():
    """After some chunks the rival knows what it knows that has read the same text as a prompt."""
    twin = tiny_pipeline(latent_dim=0).autoencoder
    pieces, writer = write(lambda *parts: ContrastingWriter(*parts, weight=0.5, twin=twin))
    texts = [bytearray(prompt) for prompt in PROMPTS]
    for round_ in pieces:
        for text, piece in zip(texts, round_, strict=True):
            text += piece.text
            if piece.ends_document:
                text.clear()
    kept = [row for row, text in enumerate(texts) if text]
    assert kept
    with torch.no_grad():
        _, other = write(
            lambda a, p, _, s, g: ContrastingWriter(
                a, p, [bytes(texts[row]) for row in kept], s, row_generators(0, len(kept)), 0.5, twin
            ),
            pieces=0,
        )
    found, wanted = writer.decoder.griffin.logits[kept], other.decoder.griffin.logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_early_exit_at_a_threshold_of_0_is_plain_denoising_and_stops_sooner_at_a_higher_one():
    plain, _ = write(LatentWriter)
    same, all_steps = write(lambda *parts: EarlyWriter(*parts, threshold=0.0))
    assert same == plain and all_steps.calls == 6 * 12 * len(PROMPTS)
    _, some = write(lambda *parts: EarlyWriter(*parts, threshold=0.5))
    _, two = write(lambda *parts: EarlyWriter(*parts, threshold=1e9))
    assert two.calls == 2 * 12 * len(PROMPTS) <= some.calls <= all_steps.calls


def test_early_exit_is_refused_where_it_has_nothing_to_watch():
    for changes in ({"steps": 0}, {"scheduler": "ddim"}, {"guidance": 2.0}):
        with pytest.raises(ValueError, match="denoising stops early with steps"):
            write(lambda *parts: EarlyWriter(*parts, threshold=0.1), **changes)


def test_what_is_saved_is_counted_from_plain_decoding_at_the_same_entropy():
    def row(name, *each):
        entropy = np.mean([entropy for _, entropy in each])
        return {"name": name, "entropy": entropy, "each": np.array(each)}

    rows = [row("plain", (2.0 + at + at**2, 7 + at), (2.0 + at + at**2, 7 + at)) for at in (0, 0.5, 1.0)]
    rows.append(row("rule", (2.5, 7.5), (2.7, 7.5)))
    compare(rows, 7.6)
    assert [round(each["saved"], 9) for each in rows[:3]] == [0, 0, 0]
    assert rows[3]["saved"] == pytest.approx(2.75 - 2.6) and rows[3]["saved_error"] == pytest.approx(0.1)
    assert [each["is_near"] for each in rows] == [False, True, False, True]


@pytest.mark.slow
def test_the_command_prints_every_rule(trained_run, capsys):
    tiny_pipeline(latent_dim=0).save_pretrained("twin")
    small = ["--prompts", "2", "--max-characters", "12", "--seeds", "2", "--json", "d.json"]
    assert cli.main(["decoding", "--run", str(trained_run), *small]) == 0
    out = capsys.readouterr().out
    for name in ("plain", "against zeros, 0.5", "16 steps", "early exit below 0.1", "guidance 1.5"):
        assert f"| {name}" in out
    rows = json.loads(Path("d.json").read_text())["decoded"]
    assert rows[0]["name"] == "true text" and all("each" not in row for row in rows)
    assert sum(row["ngram_error"] > 0 for row in rows[1:]) == len(rows) - 1  # seeds write different texts
    steps = {row["name"]: row["steps"] for row in rows[1:]}
    assert steps["16 steps"] == 16 and steps["guidance 2"] == 4 and 2 <= steps["early exit below 0.3"] <= 16


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--run", "twin"], "has no mixture over latents"),
        (["--run", "small", "--twin", "small"], "is no twin"),
        (["--run", "small", "--seeds", "1"], "--seeds"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(refused, arguments, told):
    tiny_pipeline(latent_dim=0).save_pretrained("twin")
    assert told in refused(cli.main(["decoding", *arguments]))
