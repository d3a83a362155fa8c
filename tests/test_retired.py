"""Few settings, and what becomes of those that older runs, models and files still say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hldm.config import (
    ChunkingConfig,
    Config,
    ConfigError,
    PriorConfig,
    StackConfig,
    changed,
    config_of_run,
    load_config,
    section_from_dict,
    to_dict,
)
from hldm.jepa.config import load_jepa_config
from hldm.runs.folder import check_settings
from hldm.settings import dotted

# All that training and the sections said of the constants and of what the stages share now.
STAGE = {
    "clock": "wall",
    "optimizer": "muon",
    "weight_decay": 0.01,
    "warmup": 0.05,
    "final_learning_rate": 0.05,
    "clip_norm": 1.0,
    "accumulation": 2,
    "ema_decay": 0.9,
    "mixed_precision": "bf16",
    "gradient_checkpointing": False,
    "patience": 3,
    "timeout_s": 300.0,
}
OLD = {
    "data.shuffle_bytes": 16_777_216,
    "chunking.segmenter.width": 64,
    "chunking.segmenter.layers": 2,
    "chunking.segmenter.lanes": 16,
    "chunking.segmenter.window_bytes": 256,
    "chunking.segmenter.steps": 2000,
    "chunking.segmenter.minutes": 1.0,
    "chunking.segmenter.learning_rate": 0.004,
    "chunking.segmenter.sample_bytes": 65_536,
    "autoencoder.encoder.mlp_ratio": 2.0,
    "autoencoder.encoder.conv_width": 4,
    "autoencoder.encoder.dropout": 0.0,
    "autoencoder.decoder.conv_width": 4,
    "autoencoder.decoder.dropout": 0.0,
    "autoencoder.rate_anneal": 0.5,
    "diffusion.gamma_1": 5.0,
    "diffusion.target": "v",
    "prior.denoiser_width": 64,
    "prior.draws": 4,
    "prior.context_dropout": 0.1,
    "prior.dropout": 0.0,
    "logging.validate_every": 250,
    "logging.validation_bytes": 8192,
    **{
        f"training.{stage}.{name}": value
        for stage in ("autoencoder", "prior")
        for name, value in STAGE.items()
    },
}
NOW = [  # what OLD says that is not the default
    "training.accumulation=2",
    "training.ema_decay=0.9",
    "training.mixed_precision=bf16",
    "training.patience=3",
]


def write(path: Path, settings: dict[str, object], name: str = "old") -> Path:
    """A config.yaml of an older version, of every setting that is there and these."""
    tree = to_dict(changed(Config(), name=name))
    for key in STAGE:
        tree["training"].pop(key, None)
    for key, value in settings.items():
        section = tree
        *above, last = key.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def test_there_are_few_settings():
    assert len(dotted(to_dict(Config()))) <= 70


def test_an_older_config_that_says_the_constants_is_the_same_config(tmp_path):
    path = write(tmp_path / "autoencoder/config.yaml", OLD)
    expected = changed(load_config([], NOW), name="old")
    assert load_config([path]) == config_of_run(tmp_path) == expected
    check_settings(path.parent, to_dict(expected))
    with pytest.raises(ValueError, match="training.patience 3 -> 4"):
        check_settings(
            path.parent, to_dict(changed(expected, training=changed(expected.training, patience=4)))
        )
    check_settings(path.parent, to_dict(load_config([], ["name=old"])), may_change=("training.",))


@pytest.mark.parametrize("key", sorted(OLD))
def test_any_of_them_on_the_command_line_is_told_what_became_of_it(key):
    value = str(OLD[key]).replace("False", "false")
    if key == "diffusion.target":  # a form, which says what is left
        assert load_config([], [f"{key}={value}"]) == Config()
        return
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"{key}={value}"])
    said = str(caught.value)
    assert said.startswith(f"command line: {key}") and "\n" not in said
    name = key.rpartition(".")[2]
    moved = f"training.{name}" in dotted(to_dict(Config()))
    assert re.search(rf"is training\.{name} now" if moved else "is no setting any more, it is", said) or (
        name == "gradient_checkpointing" and "training.gradient_checkpointing" in said
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.prior.clip_norm", 2.0),
        ("training.autoencoder.optimizer", "adamw"),
        ("autoencoder.encoder.dropout", 0.1),
        ("prior.draws", 8),
        ("chunking.segmenter.steps", 10),
        ("training.prior.patience", 0),
    ],
)
def test_what_mattered_in_training_alone_is_refused_in_a_file_and_read_in_a_run(key, value, tmp_path):
    path = write(tmp_path / "autoencoder/config.yaml", OLD | {key: value})
    assert config_of_run(tmp_path) == changed(load_config([], NOW), name="old")
    with pytest.raises(
        ConfigError, match=re.escape(str(path)) + r".* (is no setting any more|now, of every)"
    ):
        load_config([path])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("autoencoder.encoder.conv_width", 3, "it is 4 taps"),
        ("autoencoder.encoder.mlp_ratio", 3.0, "it is 2, but for autoencoder.decoder.mlp_ratio"),
        ("diffusion.gamma_1", 6.0, "it is 5"),
        ("diffusion.target", "x0", "a form that was removed"),
        ("prior.denoiser_width", 128, "the width of the whole prior, prior.width"),
        ("chunking.segmenter.width", 128, "a constant of hldm/chunking/segmenter.py"),
    ],
)
def test_what_a_model_of_now_cannot_be_is_refused_even_of_a_run(key, value, says, tmp_path):
    write(tmp_path / "autoencoder/config.yaml", OLD | {key: value})
    with pytest.raises(ConfigError, match=says):
        config_of_run(tmp_path)


def test_saved_sections_of_models_load_as_they_were_saved():
    assert (
        section_from_dict(StackConfig, {"width": 64, "mlp_ratio": 2.0, "conv_width": 4, "dropout": 0.1}).width
        == 64
    )
    saved = {"width": 128, "denoiser_width": 128, "draws": 8, "context_dropout": 0.2, "dropout": 0.1}
    assert section_from_dict(PriorConfig, saved) == PriorConfig(width=128)
    segmenter = {"width": 64, "layers": 2, "minutes": 0.25}
    assert section_from_dict(ChunkingConfig, {"segmenter": segmenter}) == ChunkingConfig()
    with pytest.raises(ConfigError, match=r"^settings: prior\.denoiser_width=64 is no setting any more"):
        section_from_dict(PriorConfig, {"width": 128, "denoiser_width": 64})


def test_one_stage_alone_cannot_say_what_both_share(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("training: {prior: {accumulation: 2}}")
    with pytest.raises(
        ConfigError, match=r"x.yaml:1:\d+: training.prior.accumulation is training.accumulation now"
    ):
        load_config([path])
    path.write_text("training: {autoencoder: {gradient_checkpointing: true}}")
    assert load_config([path]).training.of("autoencoder").gradient_checkpointing
    assert not load_config([path]).training.of("prior").gradient_checkpointing


def test_the_family_of_jepa_understands_them_too(tmp_path):
    path = tmp_path / "x.yaml"
    stages = ("jepa", "decoder")
    path.write_text(yaml.safe_dump({"training": {s: {"clock": "cpu", "optimizer": "adamw"} for s in stages}}))
    training = load_jepa_config([path]).training
    assert (training.of("jepa").clock, training.of("decoder").optimizer) == ("cpu", "adamw")
    with pytest.raises(ConfigError, match="training.jepa.optimizer=muon is no setting any more"):
        load_jepa_config([], ["training.jepa.optimizer=muon"])
