"""Evaluation of a run: every key in its place, one table for all, errors in one line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hldm.cli import evaluate
from hldm.config import Config, section_from_dict, to_yaml
from hldm.evaluation import evaluate as evaluation
from hldm.evaluation.evaluate import evaluate_run
from hldm.evaluation.tables import compare
from hldm.generation.pipeline import HLDMPipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.files import fingerprint

GRIFFIN = {"width": 32, "blocks": ["recurrent"], "heads": 2}
PRIOR = {"width": 32, "layers": 1, "heads": 2, "denoiser_layers": 1}
FEW = ["--prompts", "3", "--max-characters", "20", "--draws", "2"]

KEYS = {  # of every evaluation: the latent model's and the twin's
    "": "run split measured_on text model commit seed draws samples characters bits_per_character perplexity "
    "characters_per_chunk reconstruction alive parts prompts rouge diversity rechunked speed cost by_distance context",
    "bits_per_character": "bound standard_error standard_error_text latent decoder end answer importance",
    "perplexity": "character word",
    "rouge": "rouge1 rouge2 rougeL baselines",
    "rouge.baselines": "repeat_prompt random_passage",
    "rouge.baselines.random_passage": "rouge1 rouge2 rougeL",
    "diversity": "distinct1 distinct2 entropy repetition reference",
    "diversity.reference": "distinct1 distinct2 entropy repetition",
    "speed": "characters_per_second denoising_calls",
    "by_distance": "0 100 1000 10000",
    "by_distance.100": "characters bits_per_character standard_error",
    "context": "100",
    "context.100": "characters bits_per_character whole saved standard_error",
    "cost": "parameters train_seconds train_characters",
}
RECONSTRUCTION_KEYS = {
    "reconstruction": "byte_accuracy chunk_accuracy noisy clean chunks",
    "reconstruction.clean": "byte_accuracy chunk_accuracy",
    "alive": "rank dimensions dead_dimensions weights_bits prototypes largest_bin complaints",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two untrained runs, `model` and `twin`, as training leaves them."""
    root = tmp_path_factory.mktemp("runs")
    text = root / "text.txt"
    words = np.random.default_rng(0).choice(["sun", "naïve", "river", "of", "stone", "light"], 3000)
    text.write_text(" ".join(words))
    for name, latent_dim in (("model", 4), ("twin", 0)):
        torch.manual_seed(0)
        config = section_from_dict(
            Config,
            {
                "name": name,
                "data": {"path": str(text), "held_out": 0.1},
                "autoencoder": {"latent_dim": latent_dim, "encoder": GRIFFIN, "decoder": GRIFFIN},
                "prior": PRIOR,
                "generation": {"steps": 2},
            },
        )
        autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
        torch.nn.init.zeros_(autoencoder.outputs.weight)
        prior = None
        if latent_dim:
            prior = Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
            prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
        whole = HLDMPipeline.assemble(autoencoder, prior, config.generation)
        whole.save_pretrained(str(root / name / "pipeline"))
        for seconds, stage in enumerate(["autoencoder", "prior"][: 2 if latent_dim else 1], start=10):
            folder = root / name / stage
            folder.mkdir()
            (folder / "config.yaml").write_text(to_yaml(config))
            totals = {"steps": 1, "seconds": float(seconds), "characters": 1000}
            (folder / "totals.json").write_text(json.dumps(totals))
            (folder / "environment.json").write_text(json.dumps([{"commit": f"{stage} commit"}]))
    return root


def look_up(found, key):
    for part in filter(None, key.split(".")):
        found = found[part]
    return found


def test_a_latent_model_and_its_twin_have_the_same_keys_in_json_and_table(runs, tmp_path, capsys):
    columns = {}
    for name in ("model", "twin"):
        path = tmp_path / f"{name}.json"
        assert evaluate(["--run", str(runs / name), "--json", str(path), "--context", "100", *FEW]) == 0
        columns[name] = json.loads(path.read_text())
        for key, names in (KEYS | (RECONSTRUCTION_KEYS if name == "model" else {})).items():
            assert set(look_up(columns[name], key)) == set(names.split()), key
        table = capsys.readouterr().out
        assert ("dimensions of the latents do not vary" in table) == (name == "model")  # untrained
        for words in (
            "bits per character",
            "perplexity",
            "ROUGE-L",
            "diversity",
            "speed",
            "cost",
            "cut every 100",
        ):
            assert words in table

    model, twin = columns["model"], columns["twin"]
    for key in ("rouge1", "rouge2", "rougeL"):  # the baselines look at prompts and text, not at the model
        assert model["rouge"]["baselines"]["repeat_prompt"][key] == pytest.approx(
            twin["rouge"]["baselines"]["repeat_prompt"][key]
        )
    assert model["run"] == "model" and model["split"] == "test"
    assert model["commit"] == "prior commit" and twin["commit"] == "autoencoder commit"
    assert model["cost"]["train_seconds"] == 21 and model["cost"]["train_characters"] == 2000
    assert 0 <= model["rechunked"] <= 1 and twin["rechunked"] is None
    assert model["speed"]["denoising_calls"] > 0 == twin["speed"]["denoising_calls"]
    bits = twin["bits_per_character"]
    assert (bits["latent"], bits["end"], bits["decoder"]) == (0, 0, bits["bound"])
    assert twin["reconstruction"] is None and twin["characters_per_chunk"] is None
    assert twin["perplexity"]["character"] == pytest.approx(2 ** bits["bound"])
    bits = model["bits_per_character"]
    assert bits["bound"] == pytest.approx(bits["latent"] + bits["decoder"] + bits["end"])

    table = compare(columns)
    assert table.head == ["", "model", "twin"]
    [(_, share, none)] = [row for row in table.rows if row[0] == "reconstruction, chunks right"]
    assert none == "-" and share.endswith("%")


def test_any_text_can_be_measured(runs, tmp_path):
    path = tmp_path / "any"
    path.write_bytes(b"twenty characters of" * 10)
    found = evaluate_run(runs / "twin", text=path, prompts=2, max_characters=10)
    assert found["split"] == str(path)
    assert found["characters"] == 200
    assert found["bits_per_character"]["bound"] == pytest.approx(201 / 200 * math.log2(258))  # one end
    assert found["bits_per_character"]["standard_error_text"] is None


def test_one_seed_gives_one_result(runs):
    first, again, other = (
        evaluate_run(runs / "model", draws=2, prompts=2, max_characters=10, seed=seed) for seed in (1, 1, 2)
    )
    for found in (first, again, other):
        found["speed"].pop("characters_per_second")
    assert first == again
    assert first["bits_per_character"]["bound"] != other["bits_per_character"]["bound"]


def test_no_prompts_leave_their_entries_empty(runs):
    found = evaluate_run(runs / "twin", split="validation", prompts=0)
    assert found["prompts"] == 0
    assert [found[name] for name in ("rouge", "diversity", "rechunked", "speed")] == [None] * 4
    assert "ROUGE" not in str(compare({"twin": found}))  # a row of nothing is none


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "{runs}/model", "--text", "{tmp}/empty"], "empty is empty"),
        (["--run", "{runs}/model", "--text", "{tmp}/missing"], "missing"),
        (["--run", "{runs}/nowhere"], "is no folder here"),
        (["--run", "{runs}/model", "--json", "{tmp}/no/such/folder.json"], "no folder"),
        (["--run", "{runs}/model", "--text", "{tmp}/blank", "--split", "test"], "not both"),
        (["--run", "{runs}/model", "--draws", "3"], "draws must be even"),
        (["--run", "{runs}/model", "--max-characters", "0"], "--max-characters"),
        (["--run", "{runs}/twin", "--text", "{tmp}/blank"], "nothing but white space"),
        (["--run", "{runs}/twin", "--context", "100", "--context", "1"], "context must be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(runs, tmp_path, capsys, arguments, says):
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text("  \u3000\xa0 ")
    assert evaluate([argument.format(runs=runs, tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_weights_that_are_not_finite_are_told_from_a_result(runs, monkeypatch, capsys):
    read = evaluation.read_pipeline

    def broken(folder):
        model = read(folder)
        model.autoencoder.outputs.bias.data[0] = float("nan")
        return model

    monkeypatch.setattr(evaluation, "read_pipeline", broken)
    assert evaluate(["--run", str(runs / "twin"), *FEW]) == 2
    assert "not finite" in capsys.readouterr().err


def test_a_text_of_several_documents_is_said_to_be_read_as_one(runs, tmp_path):
    (tmp_path / "two.txt").write_text("the sun%the river")
    config = runs / "twin/autoencoder/config.yaml"
    kept = config.read_text()
    for separator, said in (("'%'", "stands in it 1 times"), ("''", "(17 characters, as one document)")):
        config.write_text(kept.replace("separator: ''", f"separator: {separator}"))
        assert said in evaluate_run(runs / "twin", text=tmp_path / "two.txt", prompts=0)["measured_on"]
    config.write_text(kept)
