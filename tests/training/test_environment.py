"""What the environment asks of accelerate and torch is followed, refused by name or said: never silent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, SMALL, segmenters_of

from hldm.cli import main
from hldm.config import ConfigError, LoggingConfig, TrainingConfig, changed, stage_training
from hldm.evaluation.evaluate import evaluate_run
from hldm.kernels import library
from hldm.runs.export import export_run
from hldm.runs.files import fingerprint
from hldm.sources.notes import TextNote, note
from hldm.training.environment import SHARDING, SIZES, check_launch, rounding_variables
from hldm.training.sizes import require_room
from hldm.training.stage import make_accelerator
from hldm.training.stages import train_autoencoder, train_diffusion, train_run

# What `accelerate launch` sets for a launch that asks for nothing special.
LAUNCH = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_USE_CPU": "True",
}
REFUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_FP8_BACKEND": "TE",
    **dict.fromkeys(SHARDING, "true"),
}
# Read by accelerate or torch, and of no effect on this trainer's results.
HARMLESS = {
    "ACCELERATE_DEBUG_MODE": "1",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "1234",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": "1",
}

TRAIN = """
import sys
from hldm import cli
sys.exit(cli.train_autoencoder(sys.argv[1:]))
"""


def train(folder, overrides, **environment):
    """Weights of a short training in a process of its own, or what it says where it fails."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))
    }
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--name", "x", "--steps", "3", *overrides]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return done.returncode, done.stderr.strip()
    from safetensors.torch import load_file

    path = folder / "runs/x/autoencoder/model/diffusion_pytorch_model.safetensors"
    return 0, fingerprint(load_file(path))


@pytest.fixture(scope="module")
def usual(tmp_path_factory, corpus_path):
    overrides = [*SMALL, f"data.path={corpus_path}", 'data.separator="\\n\\n"']
    return overrides, train(tmp_path_factory.mktemp("usual"), overrides)


@pytest.fixture
def fresh_accelerate():
    """accelerate's states are of the process: none before, none left."""
    states = (AcceleratorState, GradientState)
    for state in states:
        state._reset_state()
    PartialState._reset_state()
    yield
    for state in states:
        state._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "abc"),
        ("ACCELERATE_DYNAMO_BACKEND", "junk"),
        ("ACCELERATE_TORCH_DEVICE", "junk"),
        ("ACCELERATE_DEBUG_MODE", "maybe"),
        ("FORK_LAUNCHED", "maybe"),
    ],
)
def test_what_accelerate_cannot_read_is_refused_by_name(name, value, fresh_accelerate, monkeypatch, tmp_path):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        make_accelerator(TrainingConfig(), LoggingConfig(), str(tmp_path))


@pytest.mark.parametrize("name", [*SIZES, "LOCAL_RANK"])
def test_half_of_what_a_launcher_sets_is_refused_by_name(name):
    for value in ("2", "junk", "-3"):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            check_launch({name: value})


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_no_processes_are_refused_by_name(name, small_config, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match=f"{name}=0"):
        require_room(small_config, "autoencoder", tmp_path)


def test_a_note_is_no_error_where_warnings_are():
    program = "from hldm.sources.notes import note\nnote('the text is short')"
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0 and ran.stderr.endswith("the text is short\n")


def test_a_rank_that_a_shell_exports_silences_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.warns(TextNote, match="something"):
        note("something")
    assert main(["sizes", "--config", "nowhere.yaml"]) == 2 and "nowhere.yaml" in capsys.readouterr().err


@pytest.fixture
def kernels_off(monkeypatch):
    """As with HLDM_KERNELS=0, and with nothing remembered before or after."""
    monkeypatch.setenv("HLDM_KERNELS", "0")
    library.kernels.cache_clear()
    yield
    library.kernels.cache_clear()


def test_a_training_without_kernels_says_so(kernels_off, small_config, tmp_path, capsys):
    train_autoencoder(stage_training(small_config, "autoencoder", steps=1), root=tmp_path)
    assert "C++ kernels: off (HLDM_KERNELS=0); sums round otherwise" in capsys.readouterr().out


@pytest.mark.slow
def test_python_that_strips_docstrings_and_libraries_that_cannot_be_imported_are_told_in_one_line(tmp_path):
    for name, value in (("PYTHONOPTIMIZE", "2"), ("ACCELERATE_LOG_LEVEL", "junk")):
        code, said = train(tmp_path, SMALL, **{name: value})
        assert code == 2 and "\n" not in said and "Failed to import" in said, said


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_otherwise_is_refused_by_name(name, fresh_accelerate, monkeypatch, tmp_path):
    for variable, value in {**LAUNCH, name: REFUSED[name]}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=name):
        make_accelerator(TrainingConfig(), LoggingConfig(), str(tmp_path))


def test_a_refusal_is_one_line_and_leaves_no_folder(
    fresh_accelerate, small_overrides, monkeypatch, tmp_path, refused
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    words = ["train-autoencoder", "--config", str(ROOT / "configs/tiny.yaml"), *small_overrides]
    assert "training.accumulation" in refused(main(words))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_has_no_effect_changes_no_weight(usual, tmp_path):
    overrides, expected = usual
    assert expected[0] == 0
    assert train(tmp_path, overrides, **HARMLESS) == expected
    launched = tmp_path / "launched"
    launched.mkdir()
    assert train(launched, overrides, **LAUNCH) == expected


def test_a_tracker_that_is_not_installed_is_refused(fresh_accelerate, tmp_path):
    with pytest.raises(ConfigError, match="trackers names swanlab"):
        make_accelerator(TrainingConfig(), LoggingConfig(trackers=("swanlab",)), str(tmp_path))
    made = make_accelerator(TrainingConfig(), LoggingConfig(trackers=("tensorboard",)), str(tmp_path))
    assert len(made.log_with) == 1


def test_mixed_precision_of_launch_and_config_may_agree(fresh_accelerate, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = make_accelerator(TrainingConfig(mixed_precision="bf16"), LoggingConfig(), str(tmp_path))
    assert made.mixed_precision == "bf16"


def test_a_launcher_that_started_one_of_several_processes_is_refused_and_a_clusters_shell_is_not():
    check_launch({"MASTER_ADDR": "10.0.0.1"})
    check_launch({"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "2", **LAUNCH})
    with pytest.raises(ConfigError, match="--multi_gpu"):
        check_launch({"MASTER_ADDR": "127.0.0.1", **LAUNCH})


def test_variables_that_change_rounding_are_said():
    assert list(rounding_variables({"MKL_CBWR": "COMPATIBLE", "HOME": "/"})) == ["MKL_CBWR=COMPATIBLE"]


# ---- stage two reads the text of stage one


def test_stage_two_refuses_another_text_by_name(small_config, tmp_path):
    train_autoencoder(small_config, root=tmp_path)
    for other, named in (({"path": ""}, "data.path"), ({"held_out": 0.3}, "data.held_out")):
        config = changed(small_config, data=changed(small_config.data, **other))
        with pytest.raises(ValueError, match=named):
            train_diffusion(config, root=tmp_path)
    assert not (tmp_path / "small" / "prior").exists()


def test_stage_two_and_evaluation_refuse_a_text_that_changed_since(small_config, tmp_path, corpus_path):
    text = tmp_path / "own.txt"
    text.write_bytes(corpus_path.read_bytes())
    config = changed(small_config, data=changed(small_config.data, path=str(text)))
    train_autoencoder(config, root=tmp_path)
    text.write_bytes(corpus_path.read_bytes().replace(b"the", b"teh"))
    with pytest.raises(ConfigError, match="fingerprint"):
        train_diffusion(config, root=tmp_path)
    text.write_bytes(corpus_path.read_bytes())
    run = train_diffusion(config, root=tmp_path)
    text.write_bytes(corpus_path.read_bytes().replace(b"and", b"dna"))
    with pytest.raises(ConfigError, match="fingerprint"):
        evaluate_run(run, prompts=0)


def test_other_lanes_are_the_same_text(small_config, tmp_path):
    train_autoencoder(small_config, root=tmp_path)
    train_diffusion(changed(small_config, data=changed(small_config.data, lanes=2)), root=tmp_path)


# ---- nothing untrained is saved


def test_a_run_without_a_step_is_refused(small_config, tmp_path):
    chunking = changed(small_config.chunking, strategy="entropy", min_bytes=2)
    training = changed(small_config.training.autoencoder, minutes=1e-4, steps=10**6)
    config = changed(
        small_config, chunking=chunking, training=changed(small_config.training, autoencoder=training)
    )
    small = segmenters_of(width=16, layers=1, lanes=2, window_bytes=64, steps=10**6)
    with small, pytest.raises(ConfigError, match="no step was taken"):
        train_autoencoder(config, root=tmp_path)
    assert not (tmp_path / "small" / "autoencoder" / "totals.json").exists()


def test_a_run_saved_without_a_step_is_not_reused_measured_or_exported(small_config, trained_run, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(trained_run, run)
    totals = run / "prior/totals.json"
    totals.write_text(json.dumps(json.loads(totals.read_text()) | {"steps": 0}))
    for use in (
        lambda: train_run(small_config, root=tmp_path),
        lambda: evaluate_run(run, prompts=0),
        lambda: export_run(run, tmp_path / "copy"),
    ):
        with pytest.raises(ConfigError, match="prior was saved without a step"):
            use()
    assert not (tmp_path / "copy").exists()
