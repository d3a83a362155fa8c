"""Bad input ends in one line on standard error and exit code 2, never in a traceback, and loses nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from hldm import cli
from hldm.config import to_yaml
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.ranks import RankLost
from hldm.training import stages
from hldm.training.trainer import Interrupted, TrainingDiverged

SCRIPTS = ("train_autoencoder.py", "train_diffusion.py", "generate.py")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config_file(small_config) -> str:
    """small.yaml in the current folder."""
    Path("small.yaml").write_text(to_yaml(small_config))
    return "small.yaml"


@pytest.fixture
def run_copy(trained_run) -> Path:
    """A trained runs/small in the current folder, to be spoiled."""
    return Path(shutil.copytree(trained_run, "runs/small"))


@pytest.fixture
def refused(capsys):
    """Check that a command ends with code 2 and one line on standard error, and return the line."""

    def check(code: int) -> str:
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("hldm: ") and error.count("\n") == 1, (code, error)
        return error

    return check


# --- what costs no torch


@pytest.mark.parametrize(
    "start",
    [
        *(f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')" for script in SCRIPTS),
        "runpy.run_module('hldm.evaluation', run_name='__main__')",
        "from hldm.cli import main; main()",
        *(f"from hldm.cli import main; main(['{command}', '--help'])" for command in ("doctor", "demo")),
    ],
)
def test_help_is_quick_and_imports_no_torch(start):
    code = (
        "import runpy, sys, time\n"
        "sys.argv = ['hldm', '--help']\n"
        f"try:\n    {start}\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    code, has_torch, seconds = done.stdout.splitlines()[-1].split()
    assert done.stdout.startswith("usage: ") and (code, has_torch) == ("0", "False") and float(seconds) < 1


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2 and "invalid choice: 'trian'" in capsys.readouterr().err


def test_the_resolved_config_can_be_printed_and_read_back(config_file, capsys):
    arguments = ["--config", config_file, "--print-config", "training.prior.learning_rate=1e-3"]
    assert cli.train_diffusion([*arguments, "--steps", "7", "--name", "other"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    config = stages_config("printed.yaml")
    assert (config.training.prior.learning_rate, config.training.prior.steps) == (1e-3, 7)
    assert config.name == "other" and config.training.autoencoder.steps == 12
    assert not Path("runs").exists()


def stages_config(path: str):
    from hldm.config import load_config

    return load_config([path])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.path=nowhere.txt"], "nowhere.txt: no such file"),
        (["data.path=empty.txt"], "empty.txt"),
        (["data.path=image.png"], "must end in .txt"),
        (["data.dataset=some/where"], "exclude each other"),
        (["data.lane=4"], "unknown key 'data.lane'; the nearest known is 'data.lanes'"),
        (["data.lanes=four"], "data.lanes"),
        (["data.lanes=0"], "data.lanes must be positive"),
        (["data.lanes=1.5"], "data.lanes"),
        (["lanes"], "expected key=value"),
        (["autoencoder.encoder.width=18"], "autoencoder.encoder.heads, got 18 and 4"),
        (["prior.width=30"], "prior.width must be divisible by"),
        (["training.autoencoder.learning_rate=nan"], "learning_rate"),
        (["training.autoencoder.accumulation=3"], "divisible by processes x accumulation"),
        (["logging.trackers=[tensorbored]"], "tensorbored"),
        (["--steps", "0"], "training.steps must be positive, got 0"),
        (["--minutes", "0"], "--minutes must be positive and finite, got 0"),
        (["--minutes", "nan"], "--minutes must be positive and finite, got nan"),
        (["--minutes", "inf"], "--minutes must be positive and finite, got inf"),
        (["--name", "../elsewhere"], "name must be a folder name"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "broken.yaml"], "broken.yaml:1:"),
    ],
)
def test_training_refuses(arguments, says, config_file, refused):
    Path("empty.txt").touch()
    Path("image.png").touch()
    Path("broken.yaml").write_text("data: {lanes: 4")
    assert says in refused(cli.train_autoencoder(["--config", config_file, *arguments]))


@pytest.mark.parametrize("wrong", ["data.path=nowhere.txt", "data.path=empty.txt"])
def test_a_mistake_in_the_path_does_not_use_up_the_name(wrong, config_file, refused):
    Path("empty.txt").touch()
    refused(cli.train_autoencoder(["--config", config_file, wrong]))
    assert cli.train_autoencoder(["--config", config_file, "--steps", "1"]) == 0


# --- runs that are there already


def test_a_finished_run_is_not_trained_over(run_copy, config_file, refused):
    before = contents(run_copy)
    for train in (cli.train_autoencoder, cli.train_diffusion):
        assert "has a checkpoint at step 12; pass --resume" in refused(train(["--config", config_file]))
    assert contents(run_copy) == before


def test_a_run_is_not_resumed_with_other_settings(run_copy, config_file, refused):
    before = contents(run_copy)
    error = refused(cli.train_autoencoder(["--config", config_file, "--resume", "data.lanes=8"]))
    assert "data.lanes 4 -> 8" in error
    assert contents(run_copy) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# the save that replaces the damaged checkpoint says so by a warning
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_a_truncated_checkpoint_is_said_and_the_one_before_it_continued_to_the_same_weights(
    stage, run_copy, config_file, trained_run, capsys
):
    truncate(run_copy / stage / "checkpoints/step-000000012/model.safetensors")
    train = cli.train_autoencoder if stage == "autoencoder" else cli.train_diffusion
    assert train(["--config", config_file, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors is damaged" in said and "falling back" in said and "at step 9" in said
    saved = [newest_checkpoint(run / stage) for run in (trained_run, run_copy)]
    assert saved[0] is not None and saved[1] is not None and saved[1].step == 12
    torch.testing.assert_close(saved[0].tensors, saved[1].tensors, rtol=0, atol=0)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(run_copy, config_file, refused):
    for path in (run_copy / "autoencoder/checkpoints").glob("*/model.safetensors"):
        truncate(path)
    before = contents(run_copy / "autoencoder/checkpoints")
    error = refused(cli.train_autoencoder(["--config", config_file, "--resume"]))
    assert "no valid checkpoint left; choose another --name" in error
    assert contents(run_copy / "autoencoder/checkpoints") == before


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# --- stage two


def test_stage_two_names_the_command_of_stage_one(config_file, refused):
    assert "run train_autoencoder.py with the same" in refused(cli.train_diffusion(["--config", config_file]))
    assert not Path("runs").exists()


def test_stage_two_refuses_a_twin(refused):
    error = refused(cli.train_diffusion(["--config", str(ROOT / "configs/tiny-twin.yaml")]))
    assert "the twin has no latents and so no second stage" in error


def test_stage_two_refuses_an_autoencoder_of_another_config(run_copy, config_file, refused):
    error = refused(cli.train_diffusion(["--config", config_file, "autoencoder.latent_dim=8"]))
    assert "autoencoder.latent_dim is 8 here" in error and "was trained with 4" in error


def test_stage_two_refuses_a_damaged_autoencoder(run_copy, config_file, refused):
    shutil.rmtree(run_copy / "prior")
    truncate(run_copy / "autoencoder/model" / WEIGHTS)
    assert "autoencoder/model" in refused(cli.train_diffusion(["--config", config_file]))


# --- how a run ends


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (Interrupted(signal.SIGTERM, "runs/a"), 128 + signal.SIGTERM, "go on with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (stages.ConfigError("one\n  two"), 2, "one two"),
        (PermissionError(13, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "lower data.lanes"),
        (MemoryError(), 4, "out of memory"),
        (TrainingDiverged("4 steps in a row"), 3, "4 steps in a row"),
        (RankLost("rank 1 of 2 has died or hangs"), 5, "rank 1 of 2"),
    ],
)
def test_what_users_can_mend_is_one_line(error, code, says, capsys):
    def work() -> int:
        raise error

    assert cli.guarded(work) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_slip_of_ours_keeps_its_traceback():
    def work() -> int:
        raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match="shapes disagree"):
        cli.guarded(work)


# --- generation


@pytest.fixture
def write(trained_run, capsysbinary):
    """Run generate.py's main function on the trained run; returns what it wrote."""

    def run(*arguments: str) -> bytes:
        code = cli.generate(["--run", str(trained_run), "--max-chars", "20", *arguments])
        out, error = capsysbinary.readouterr()
        assert (code, error) == (0, b"")
        return out

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "nowhere", "--prompt", "a"], "nowhere/pipeline holds no trained model: run train_auto"),
        ([], "no prompt given: pass --prompt TEXT"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompt-file", "."], "Is a directory"),
        (["--prompt", "a", "--max-chars", "0"], "--max-chars must be at least 1, got 0"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--prompt", "a", "--steps", "-1"], "generation.steps must lie in 0..10000, got -1"),
        (["--prompt", "a", "--steps", "0"], "this prior has no mixture to draw from"),
        (["--prompt", "a", "--temperature", "-1"], "generation.temperature must lie in 0..100, got -1"),
        (["--prompt", "a", "--guidance", "nan"], "generation.guidance must lie in 0..100, got nan"),
        (["--prompt", "a", "--guidance", "inf"], "generation.guidance must lie in 0..100, got inf"),
        (["--prompt", "a", "--guidance", "1e20"], "generation.guidance must lie in 0..100, got 1e+20"),
        (["--prompt", "a", "--decoder-temperature", "1e-308"], "must be 0 or at least 1e-6, got 1e-308"),
        (["--prompt", "a", "--top-p", "0"], "generation.top_p must be positive, got 0"),
        (["--prompt", "a", "--seed", str(2**64)], "--seed"),
        (["--prompt", "a", "--seed", "-1"], "--seed"),
    ],
)
def test_generation_refuses(arguments, says, trained_run, refused):
    assert says in refused(cli.generate(["--run", str(trained_run), *arguments]))


def test_without_a_run_the_shipped_one_writes_if_there_is_one(trained_run, monkeypatch, capsysbinary):
    def nowhere(twin=False):
        raise FileNotFoundError("pretrained is not there: pass --run")

    monkeypatch.setattr(cli, "shipped_run", nowhere)
    assert cli.generate(["--prompt", "a"]) == 2
    assert b"pass --run" in capsysbinary.readouterr().err
    monkeypatch.setattr(cli, "shipped_run", lambda: trained_run)
    assert cli.generate(["--prompt", "a", "--max-chars", "5"]) == 0
    assert capsysbinary.readouterr().out.startswith(b"a")


def test_an_exported_run_writes_and_evaluates_like_the_run(trained_run, capsys, refused):
    assert cli.main(["export", "--run", str(trained_run), "--to", "slim"]) == 0
    assert {path.name for path in Path("slim").iterdir()} == {"autoencoder", "prior", "pipeline"}
    assert not list(Path("slim").rglob("checkpoints")) and not list(Path("slim").rglob("metrics.jsonl"))
    capsys.readouterr()
    tables = []
    for run in (str(trained_run), "slim"):
        assert cli.main(["evaluate", "--run", run, "--draws", "2", "--prompts", "0"]) == 0
        tables.append(capsys.readouterr().out.splitlines()[1:])
    assert tables[0] == tables[1]
    assert "is there already" in refused(cli.main(["export", "--run", str(trained_run), "--to", "slim"]))
    assert "no finished run" in refused(cli.main(["export", "--run", "nowhere", "--to", "other"]))


def test_generation_refuses_a_run_without_its_second_stage(run_copy, refused):
    shutil.rmtree(run_copy / "pipeline")
    assert "train_diffusion.py" in refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))


@pytest.mark.parametrize("part", ["autoencoder", "prior"])
def test_generation_refuses_damaged_weights(part, run_copy, refused):
    truncate(run_copy / "pipeline" / part / WEIGHTS)
    assert "cannot be loaded" in refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))


def test_generation_refuses_a_damaged_index(run_copy, refused):
    truncate(run_copy / "pipeline/model_index.json")
    assert "cannot be loaded" in refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))


def test_generation_refuses_a_prior_with_another_autoencoder(run_copy, refused):
    path = run_copy / "pipeline/autoencoder" / WEIGHTS
    weights = load_file(path)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
    error = refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))
    assert "trained on another autoencoder's latents" in error


def test_the_same_seed_writes_the_same_text(write):
    first = write("--prompt", "And the king said", "--seed", "3")
    assert first.startswith(b"And the king said") and first.endswith(b"\n")
    assert first == write("--prompt", "And the king said", "--seed", "3")
    assert first != write("--prompt", "And the king said", "--seed", "4")


def test_prompts_of_any_bytes_are_gone_on_from(write):
    out = write("--prompt", os.fsdecode(b"caf\xc3\xa9 \xff\x00\xfe"))
    assert out.startswith(b"caf\xc3\xa9 \xff\x00\xfe")


def test_an_empty_prompt_starts_a_document(write):
    assert len(write("--prompt", "")) > 1


def test_a_prompt_far_longer_than_any_context_is_read(write):
    text = ("In the beginning God made the heaven and the earth. " * 1000)[:50_000]
    Path("long.txt").write_text(text)
    assert write("--prompt-file", "long.txt").startswith(text.encode())


def test_a_prompt_is_read_from_standard_input(write, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"In the beginning\n")))
    assert write("--prompt-file", "-") == write("--prompt", "In the beginning")


def test_json_is_one_object_a_continuation(write):
    lines = write("--prompt", "And", "--prompt", "caf\xe9", "--num-samples", "2", "--json").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == ["And", "And", "caf\xe9", "caf\xe9"]
    assert [record["seed"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert set(record) == {
            *("prompt", "text", "chunk_spans", "ended", "seed"),
            *("seconds", "characters_per_second", "denoising_calls"),
        }
        spans = record["chunk_spans"]
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
        assert 0 < len(record["text"]) <= 20 and record["denoising_calls"] >= 2


def test_several_continuations_are_what_their_seeds_write_alone(write):
    both = write("--prompt", "And", "--num-samples", "2")
    alone = [write("--prompt", "And", "--seed", seed) for seed in ("0", "1")]
    assert both == b"[1] " + alone[0] + b"[2] " + alone[1]


def test_chunk_borders_can_be_shown(write):
    arguments = ("--prompt", "And", "--num-samples", "6", "--max-chars", "60")
    plain, marked = write(*arguments), write(*arguments, "--show-chunks")
    records = [json.loads(line) for line in write(*arguments, "--json").splitlines()]
    chunks = [len(record["chunk_spans"]) for record in records]
    assert marked.startswith(b"[1] And|") and max(chunks) > 1
    assert marked.count(b"|") == plain.count(b"|") + sum(chunks)
    assert write("--prompt", "And", "--show-chunks").startswith(b"And|")


def test_a_reader_that_leaves_early_ends_it_quietly(trained_run):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), "--run", str(trained_run), "--prompt", "And"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(3) == b"And"
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(timeout=60), error) == (0, b"")
    process.stderr.close()


# --- trackers


def test_a_training_goes_on_when_nobody_reads_its_output_any_more(config_file):
    command = (
        f"{sys.executable} {ROOT / 'train_autoencoder.py'} --config {config_file} --name piped | head -n 1"
    )
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert Path("runs/piped/autoencoder/totals.json").is_file()


def test_tensorboard_gets_its_events(config_file):
    pytest.importorskip("tensorboard")
    arguments = ["--config", config_file, "--steps", "2", "logging.trackers=[tensorboard]"]
    assert cli.train_autoencoder(arguments) == 0
    events = list(Path("runs").rglob("events.out.tfevents*"))
    assert events and all(path.stat().st_size for path in events)
