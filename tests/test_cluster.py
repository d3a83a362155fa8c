"""What docs/cluster.md promises: a plan for other machines, launches that agree with their configs, a job on Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import typer
from conftest import ROOT, SMALL

from hldm import cli
from hldm.config import ConfigError, load_config, stage_training
from hldm.runs.machine import human
from hldm.training.sizes import planned, stage_sizes

JOB = ROOT / "configs/accelerate/8_nodes.sbatch"
HEADED = {"base": 1, "base-twin": 1, "large": 8, "large-twin": 8}  # and the GPUs that their headers are about


def gpu_memory(name: str, processes: int) -> list[str]:
    """Of each stage, as it is printed."""
    config = load_config(ROOT / f"configs/{name}.yaml")
    stages = ("autoencoder",) if config.is_twin else ("autoencoder", "prior")
    return [human(sum(stage_sizes(config, stage, processes).device.values())) for stage in stages]


@pytest.mark.parametrize("name", HEADED)
def test_the_memory_in_a_header_is_what_sizes_says(name):
    text = (ROOT / f"configs/{name}.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    told = re.findall(r"[0-9.]+ GiB", header)
    expected = gpu_memory(name, HEADED[name]) + (gpu_memory(name, 64) if name == "large" else [])
    assert told == expected


def test_a_plan_is_for_each_of_so_many_processes(capsys):
    words = ["sizes", "--config", str(ROOT / "configs/large.yaml"), "--processes", "8"]
    assert cli.main(words) == 0  # wherever that is
    table = capsys.readouterr().out
    assert table.startswith("large in 8 processes, each on a GPU of its own\n")
    assert table.splitlines()[2] == "  GPU memory           36 GiB each"
    assert "without GPUs 36.6 GiB each" in table and "39 GiB in all" in table
    guide = (ROOT / "docs/cluster.md").read_text()
    shown = guide.split("```")[3].strip().splitlines()
    assert [line for line in shown if line.strip() != "..." and line not in table.splitlines()] == []
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = load_config(ROOT / "configs/large.yaml")
    assert found["stages"]["prior"]["device"] == stage_sizes(config, "prior", 8).device


def test_processes_that_cannot_share_the_lanes_are_refused(small_config, capsys):
    with pytest.raises(ConfigError, match="got 4 lanes and 3 x 1"):
        planned(small_config, 3)
    with pytest.raises(ConfigError, match=r"training.accumulation, got 4 lanes and 2 x 4"):
        planned(stage_training(small_config, "prior", accumulation=4), 2)
    assert cli.main(["sizes", "--config", str(ROOT / "configs/tiny.yaml"), "--processes", "0"]) == 2
    assert "--processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launch", "names"),
    [
        ("8_gpus", ["base", "large", "large-twin"]),
        ("8_nodes", ["base", "large", "large-twin"]),
        ("two_processes", ["tiny", "small", "tiny-twin"]),
    ],
)
def test_a_launch_file_asks_for_the_precision_of_its_configs(launch, names):
    from accelerate.commands.config.config_args import load_config_from_file

    asked = load_config_from_file(str(ROOT / f"configs/accelerate/{launch}.yaml")).mixed_precision
    for name in names:
        assert load_config(ROOT / f"configs/{name}.yaml").training.mixed_precision == asked


@pytest.mark.parametrize("train", [cli.train_autoencoder, cli.train_diffusion])
def test_a_tracker_that_is_missing_is_refused_before_anything_is_read(
    train, small_config, monkeypatch, tmp_path, refused
):
    from accelerate import tracking

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "_available_trackers", [])
    words = ["--config", str(ROOT / "configs/tiny.yaml"), "data.path=nowhere.txt"]
    for said, tracker in (("tensorboard, which is not installed", "tensorboard"), ("got 'wand'", "wand")):
        # the room is looked at first, which asks how long the text is
        monkeypatch.setattr("hldm.training.stages.require_room", lambda *where: None)
        assert said in refused(train([*words, f"logging.trackers=[{tracker}]"]))
    assert not list(tmp_path.iterdir())


# ---- Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> dict[str, str]:
    """Commands of Slurm for one machine, and the environment to find them in."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in {
        "scontrol": 'echo "127.0.0.1"\n',
        "srun": 'SLURM_NODEID=0 exec "$@"\n',
        "accelerate": f'exec {sys.executable} -m accelerate.commands.launch "${{@:2}}"\n',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}")
        (tools / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = f"{tools}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "SLURM_JOB_NODELIST": "one",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def test_the_job_launches_what_accelerate_and_hldm_understand(slurm, tmp_path):
    from accelerate.commands.launch import launch_command_parser

    (tmp_path / "tools/accelerate").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    given = ["--config", "configs/large.yaml", "--name", "mine", "data.separator=a b"]
    done = subprocess.run(["bash", str(JOB), *given], env=slurm, capture_output=True, text=True, check=True)
    command, *words = done.stdout.splitlines()
    asked = launch_command_parser().parse_args(words)
    assert command == "launch" and asked.module and asked.training_script == "hldm"
    assert (asked.machine_rank, asked.main_process_ip) == (0, "127.0.0.1")
    name, *rest = asked.training_script_args
    parsed = typer.main.get_command(cli.app).commands[name].make_context(name, rest).params
    assert parsed["resume"] and parsed["overrides"] == ["data.separator=a b"]
    assert {line.split()[1].split("=")[0] for line in JOB.read_text().splitlines() if "#SBATCH" in line} >= {
        *("--nodes", "--gpus-per-node", "--signal", "--dependency")
    }


def test_the_job_has_the_machines_of_its_launch_file():
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(ROOT / "configs/accelerate/8_nodes.yaml"))
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", JOB.read_text(), re.M))
    assert int(asked["nodes"]) == launch.num_machines and asked["ntasks-per-node"] == "1"
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == launch.num_processes
    needed = planned(load_config(ROOT / "configs/large.yaml"), launch.num_processes)["stages"]
    each = max(sum(stage["host"].values()) for stage in needed.values())
    assert int(asked["gpus-per-node"]) * each < int(asked["mem"].removesuffix("G")) * 2**30


@pytest.mark.slow
def test_a_job_that_is_told_to_leave_saves_and_the_next_goes_on(slurm, tmp_path, corpus_path):
    """SIGUSR1 to every process of the step, as Slurm sends it."""
    launch = tmp_path / "configs/accelerate"
    launch.mkdir(parents=True)
    port = f"main_process_port: {29_500 + os.getpid() % 1000}\n"
    two = (ROOT / "configs/accelerate/two_processes.yaml").read_text()
    (launch / "8_nodes.yaml").write_text(two + port)
    settings = [*SMALL, f"data.path={corpus_path}", 'data.separator="\\n\\n"']
    words = ["bash", str(JOB), "--config", str(ROOT / "configs/tiny.yaml"), "--name", "mine", *settings]
    steps = "training.autoencoder.steps=200"
    job = subprocess.Popen(
        [*words, steps],
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = tmp_path / "runs/mine/autoencoder/checkpoints"
    deadline = time.monotonic() + 240
    while not (saved.is_dir() and any(saved.glob("step-*"))):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # the shell that waits for srun is no part of the step
    (launcher,) = psutil.Process(job.pid).children()
    for process in (launcher, *launcher.children(recursive=True)):
        process.send_signal(signal.SIGUSR1)
    out, error = job.communicate(timeout=120)
    assert job.returncode and "stopped by SIGUSR1; saved runs/mine/autoencoder/checkpoints/step-" in error
    done = subprocess.run([*words, steps], env=slurm, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming runs/mine/autoencoder at step" in done.stdout and "Next: " in done.stdout
