"""A run with parts of one's own is trained, saved by name, loaded with consent and measured like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from hldm import plugins
from hldm.config import Config, ConfigError, changed, load_config
from hldm.evaluation.evaluate import evaluate_run
from hldm.generation.pipeline import read_pipeline
from hldm.sources.notes import TextNote
from hldm.studies.league import chunking_for, entries, measure
from hldm.training.stages import train_autoencoder, train_diffusion, train_run

STEPS = ["training.autoencoder.steps=3", "training.prior.steps=3", "training.ema_decay=0"]
CHUNKER = "clauses:ClauseChunker"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    for example in ("own_chunker", "own_denoiser"):
        monkeypatch.syspath_prepend(ROOT / "examples" / example)
    monkeypatch.setattr(plugins, "_allowed", set())


def own_config(overrides: list[str], *more: str) -> Config:
    return load_config([ROOT / "configs/tiny.yaml"], [*overrides, *STEPS, "name=own", *more])


@pytest.fixture
def cut_config(small_overrides) -> Config:
    return own_config(small_overrides, f"chunking.strategy={CHUNKER}", "chunking.max_bytes=24")


def test_a_run_with_an_own_chunker_goes_all_the_way(cut_config, tmp_path):
    with plugins.scope():
        run = train_run(cut_config, root=tmp_path)
    saved = json.loads((run / "pipeline/autoencoder/config.json").read_text())
    assert saved["chunking"]["strategy"] == CHUNKER and len(saved["segmenter"]) == 33
    for load in (lambda: read_pipeline(run / "pipeline"), lambda: evaluate_run(run), lambda: measure(run)):
        with pytest.raises(ConfigError, match="clauses:ClauseChunker, which is not run unasked"):
            load()
    pipeline = read_pipeline(run / "pipeline", allow_code=True)
    assert len(pipeline("one, two", max_characters=20).texts[0]) > 0
    found = measure(run)  # as the league does
    assert found["bound"] > 0 and found["written_agreement"] >= 0
    pipeline.save_pretrained(tmp_path / "again")
    again = read_pipeline(tmp_path / "again")
    assert again("one, two", max_characters=20).texts == pipeline("one, two", max_characters=20).texts


def test_what_was_trained_on_other_chunks_is_refused(cut_config, tmp_path, monkeypatch):
    with plugins.scope():
        run = train_autoencoder(cut_config, root=tmp_path / "runs")
    config = json.loads((run / "autoencoder/model/config.json").read_text())
    done, _ = config["segmenter"].split("-")
    for mark, raised in ((f"{done}-other", pytest.warns(TextNote)), ("other-x", pytest.raises(ValueError))):
        (run / "autoencoder/model/config.json").write_text(json.dumps(config | {"segmenter": mark}))
        with raised:
            train_diffusion(cut_config, root=tmp_path / "runs")
        shutil.rmtree(run / "prior", ignore_errors=True)


def test_an_own_chunker_is_an_entry_of_the_league(cut_config, small_overrides):
    given = [override for override in small_overrides if not override.startswith("chunking")]
    tiny = ROOT / "configs/tiny.yaml"
    first, words = entries(tiny, 6, [CHUNKER, "words"], [12], overrides=given)
    assert (first.name, first.strategy) == ("clauses.ClauseChunker-12", CHUNKER)
    assert first.config.chunking == chunking_for(cut_config, CHUNKER, 12)
    assert first.config.training == words.config.training
    with pytest.raises(ConfigError, match="no module nowhere"):
        entries(tiny, 6, ["nowhere:Mine"], overrides=given)


def test_a_run_stays_bound_to_its_own_part(cut_config, tmp_path):
    train_autoencoder(cut_config, root=tmp_path)
    words = changed(cut_config, chunking=changed(cut_config.chunking, strategy="words"))
    with pytest.raises(ValueError, match=f"chunking.strategy {CHUNKER} -> words"):
        train_diffusion(words, root=tmp_path)
    assert Path(tmp_path / "own/autoencoder/config.yaml").read_text().count(CHUNKER) == 1


@pytest.mark.parametrize("setting", ["prior.denoiser=film:FilmDenoiser", "prior.plugin=own_half:HalfPrior"])
def test_a_run_with_an_own_denoiser_or_prior_goes_all_the_way(
    setting, small_overrides, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("own_half.py").write_text(
        "from hldm.model.prior import Prior\n\nclass HalfPrior(Prior):\n"
        "    def denoise(self, z, gamma, conditioning):\n"
        "        return 0.5 * super().denoise(z, gamma, conditioning)\n"
    )
    config = own_config(small_overrides, setting)
    with plugins.scope():
        run = train_run(config, root=Path("runs"))
    name = setting.partition("=")[2]
    for load in (lambda: read_pipeline(run / "pipeline"), lambda: evaluate_run(run)):
        with pytest.raises(ConfigError, match=f"{name}, which is not run unasked"):
            load()
    pipeline = read_pipeline(run / "pipeline", allow_code=True)
    text = pipeline("one", max_characters=20).texts
    assert evaluate_run(run, prompts=0)["bits_per_character"]["bound"] > 0
    pipeline.save_pretrained("again")
    assert read_pipeline("again")("one", max_characters=20).texts == text
    config_path = Path("again/prior/config.json")
    saved = json.loads(config_path.read_text())
    assert len(saved["code"]) == 16
    config_path.write_text(json.dumps(saved | {"code": "other"}))
    with pytest.warns(TextNote, match="has changed since this prior was trained"):
        read_pipeline("again")
