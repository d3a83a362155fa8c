"""What is reused or set side by side is of one origin: code, text and model; anything else is said or refused."""

from __future__ import annotations

import json
import shutil

import pytest

from hldm.chunking.strategies import cached_starts
from hldm.commands import training
from hldm.config import Config, ConfigError, changed, load_config, to_yaml
from hldm.evaluation.tables import compare
from hldm.runs.identity import check_pair, measured_once, origin_of, require_shared_text
from hldm.runs.provenance import code_fingerprint
from hldm.sources.corpora import load_corpora
from hldm.studies.judge import judge_run
from hldm.training.segmenters import train_segmenter
from hldm.training.stages import train_autoencoder, train_run


@pytest.fixture
def own_text(small_config, corpus_path, tmp_path) -> Config:
    """The small config on a copy of its text, which a test may change."""
    path = tmp_path / "own.txt"
    path.write_bytes(corpus_path.read_bytes())
    return changed(small_config, data=changed(small_config.data, path=str(path)))


def spoil(config: Config) -> None:
    """Another text under the same name."""
    with open(config.data.path, "r+b") as file:
        file.write(b"XYZ")


# ---- measurements


def test_a_measurement_is_read_again_only_for_the_same_code_text_and_model(trained_run, tmp_path):
    calls, said = [], []

    def measure():
        calls.append(1)
        return {"bits": len(calls)}

    target, origin = tmp_path / "found.json", origin_of(trained_run, "text A")
    for _ in range(2):
        assert measured_once(target, origin, measure, said.append)["bits"] == 1
    assert not said
    for key in ("code", "text", "model"):
        before, origin = origin, {**origin, key: f"new {key}"}
        measured_once(target, origin, measure, said.append)
        assert said[-1] == f"{target} was made of {key} {before[key][:12]}, not new {key}: measured again"
    target.write_text("{")
    assert measured_once(target, origin, measure, said.append)["bits"] == 5 and len(said) == 4


def test_the_origin_of_a_run_knows_its_weights(trained_run, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(trained_run, run)
    before = origin_of(run, "text")
    assert before == origin_of(trained_run, "text") and before["trained"] == code_fingerprint()
    weights = run / "pipeline/prior/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    assert origin_of(run, "text")["model"] != before["model"]


def test_evaluations_of_different_texts_share_no_table():
    columns = {"model": {"text": "a" * 64}, "twin": {"text": "b" * 64}}
    with pytest.raises(ValueError, match="model on aaaaaaaaaaaa, twin on bbbbbbbbbbbb"):
        compare(columns)


# ---- pairs


def test_a_model_and_a_twin_that_read_different_texts_are_refused_by_name(
    small_config, small_twin, tmp_path, monkeypatch, capsys
):
    check_pair(small_config, tmp_path / "a", small_twin, tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    other = changed(small_twin, data=changed(small_twin.data, held_out=0.3))
    (tmp_path / "own.yaml").write_text(to_yaml(small_config))
    (tmp_path / "own-twin.yaml").write_text(to_yaml(other))
    with pytest.raises(ConfigError, match=r"own.yaml has data.held_out=0.2, own-twin.yaml has 0.3"):
        training.demo(config=(tmp_path / "own.yaml").relative_to(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_judge_or_twin_of_another_text_is_refused_by_name(trained_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained_run, other)
    require_shared_text(trained_run, other)
    totals = other / "autoencoder/totals.json"
    totals.write_text(json.dumps(json.loads(totals.read_text()) | {"corpus": "0" * 64}))
    for name in ("judge", "twin"):
        with pytest.raises(ConfigError, match="other on 000000000000"):
            judge_run(trained_run, prompts=1, **{name: other})
    # a run of before fingerprints were kept is known by its settings
    totals.write_text(json.dumps(json.loads(totals.read_text()) | {"corpus": ""}))
    require_shared_text(trained_run, other)
    config = other / "autoencoder/config.yaml"
    config.write_text(to_yaml(changed(load_config([config]), data={"path": ""})))
    with pytest.raises(ValueError, match="data.path"):
        require_shared_text(trained_run, other)


# ---- what is trained already


def test_a_finished_run_is_not_reused_for_another_text(own_text, tmp_path, capsys):
    train_run(own_text, root=tmp_path)
    train_run(own_text, root=tmp_path)
    assert capsys.readouterr().out.count("reusing") == 2
    spoil(own_text)
    with pytest.raises(ConfigError, match=r"autoencoder was trained on a text of fingerprint \w+, .* is now"):
        train_run(own_text, root=tmp_path)


def test_stage_two_of_another_stage_one_is_not_reused(small_config, trained_run, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(trained_run, run)
    shutil.rmtree(run / "autoencoder")
    train_autoencoder(changed(small_config, seed=1), root=tmp_path)
    config = (run / "autoencoder/config.yaml").read_text().replace("seed: 1", "seed: 0")
    (run / "autoencoder/config.yaml").write_text(config)
    with pytest.raises(
        ConfigError, match=r"prior was trained on a stage one of fingerprint \w+, .* has \w+: remove"
    ):
        train_run(small_config, root=tmp_path)


def test_a_run_trained_by_other_code_is_reused_and_said(
    small_config, trained_run, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "small"
    shutil.copytree(trained_run, run)
    for stage in ("autoencoder", "prior"):
        path = run / stage / "environment.json"
        path.write_text(json.dumps([start | {"code": "c0de" * 16} for start in json.loads(path.read_text())]))
    train_run(small_config, root=tmp_path)
    assert f"was trained by code c0dec0dec0de, this is {code_fingerprint()[:12]}" in capsys.readouterr().out


def test_a_segmenter_of_another_text_is_refused_and_its_cuts_are_known_by_settings_and_code(
    own_text, tmp_path, monkeypatch, small_segmenters
):
    chunking = changed(own_text.chunking, strategy="entropy", min_bytes=2)
    config = changed(own_text, chunking=chunking)
    train_autoencoder(config, root=tmp_path)
    shutil.rmtree(tmp_path / "small/autoencoder")  # a stage that was stopped before its first checkpoint
    spoil(config)
    with pytest.raises(ConfigError, match=r"segmenter was trained on a text of fingerprint \w+, .* has"):
        train_autoencoder(config, root=tmp_path)

    corpus = load_corpora(config.data)["train"]
    made, folder = train_segmenter(chunking, corpus), tmp_path / "cuts"
    for code in ("a", "b", "b"):
        monkeypatch.setattr("hldm.chunking.strategies.code_fingerprint", lambda code=code: code)
        cached_starts(folder, made, corpus)
    assert len(list(folder.iterdir())) == 2


def test_the_fingerprint_of_code_is_that_of_its_sources(monkeypatch, tmp_path):
    (tmp_path / "hldm/runs").mkdir(parents=True)
    monkeypatch.setattr("hldm.runs.provenance.__file__", str(tmp_path / "hldm/runs/provenance.py"))
    found = []
    for text in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "hldm/model.py").write_text(text)
        code_fingerprint.cache_clear()
        found.append(code_fingerprint())
    code_fingerprint.cache_clear()
    assert found[0] == found[2] != found[1]
