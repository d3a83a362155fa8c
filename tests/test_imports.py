"""The shape of the code, read from its source: floors, heavy packages in their place, nothing unsafe."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("hldm/*.py"), *ROOT.glob("*.py")])

# A file imports only from floors below its own. A new file takes its place here.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("kernels", "clock", "tables"),
    ("operators", "triton_scan"),
    (
        "strict_yaml",
        "text",
        "scan",
        "derivatives",
        "rows",
        "muon",
        "average",
        "step",
        "carry",
        "checkpoints",
        "health",
        "progress",
        "ranks",
        "signals",
        "weights",
        "machine",
    ),
    ("config", "runs", "plots", "reports", "write_step", "close_step", "memory"),
    ("shapes",),
    ("griffin", "chunking", "events", "hierarchy", "diffusion", "corpus", "metrics", "sizes"),
    (
        "samplers",
        "mixture",
        "parallel_decoder",
        "data",
        "doctor",
        "segmenter",
        "chunk_writer",
        "readouts",
        "chunk_level",
        "corruption",
        "bench_layers",
        "contextualiser",
    ),
    (
        "denoiser",
        "energy",
        "prompts",
        "entropy_segmenter",
        "state_segmenter",
        "learned_segmenter",
        "policy_segmenter",
        "select_segmenter",
    ),
    ("autoencoder", "prior", "context_step", "denoise_step"),
    ("objectives", "writing", "training", "segmenting", "model_segmenters"),
    ("generation",),
    (
        "pipeline",
        "bound",
        "context_length",
        "reconstruction",
        "exits",
        "chunk_view",
        "border_agreement",
        "bench_training",
        "bench_writing",
    ),
    ("stages", "bench_processes"),
    ("evaluation", "bench", "diagnosis", "judge"),
    ("demo", "rate_curve"),
    ("league",),
    ("commands",),
    ("cli",),
    ("__init__", "__main__", "train_autoencoder", "train_diffusion", "generate"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# A package that is slow to import or that everything could come to depend on, and who may use it.
ALLOWED_IN = {
    "diffusers": {
        "diffusion",
        "samplers",
        "mixture",
        "autoencoder",
        "prior",
        "pipeline",
        "weights",
        "segmenter",
    },
    "accelerate": {"training", "stages"},
    "datasets": {"corpus", "metrics"},
    "evaluate": {"metrics"},
    "rouge_score": {"metrics"},
    "transformers": {"pipeline", "bench_layers", "bench_writing"},
    "omegaconf": {"strict_yaml"},
    "triton": {"triton_scan"},
    "matplotlib": {"plots"},
    "yaml": {"strict_yaml", "config", "runs"},
}

FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.load",
    "torch.jit.load",
    "np.load",
    "numpy.load",
    "os.system",
    "os.popen",
}
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}  # when given as True


def faults(name: str, source: str) -> list[str]:
    """What is wrong with the source of module `name`, one line each."""
    return list(_faults(name, ast.parse(source)))


def _faults(name: str, tree: ast.Module) -> Iterator[str]:
    if name not in FLOOR:
        yield f"{name}: give it a place in FLOORS of tests/test_imports.py"
        return
    for node in ast.walk(tree):
        for module in _imported(node):
            package, _, rest = module.partition(".")
            part = rest.partition(".")[0]
            if package == "hldm" and part not in FLOOR:
                yield f"{name}:{node.lineno} imports {module}, which has no place in FLOORS"
            elif package == "hldm" and FLOOR[part] >= FLOOR[name]:
                yield f"{name}:{node.lineno} imports {module}, which is not on a floor below"
            if package in FORBIDDEN_MODULES:
                yield f"{name}:{node.lineno} imports {package}, which can run what it reads"
            if name not in ALLOWED_IN.get(package, {name}):
                yield f"{name}:{node.lineno} imports {package}, which belongs in {sorted(ALLOWED_IN[package])}"
        if isinstance(node, ast.ImportFrom):
            for called in FORBIDDEN_CALLS & {f"{node.module}.{alias.name}" for alias in node.names}:
                yield f"{name}:{node.lineno} imports {called}"
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{name}:{node.lineno} imports relatively: write from hldm.x import y"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                yield f"{name}:{node.lineno} calls {called}"
            for argument in node.keywords:
                is_true = isinstance(argument.value, ast.Constant) and argument.value.value is True
                if argument.arg in FORBIDDEN_ARGUMENTS and is_true:
                    yield f"{name}:{node.lineno} passes {argument.arg}=True"


def _imported(node: ast.AST) -> list[str]:
    """Dotted modules that this statement imports; `from hldm import x` is hldm.x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        if node.module == "hldm":
            return [f"hldm.{alias.name}" for alias in node.names]
        return [node.module or ""]
    return []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_imports_downward_only_and_does_nothing_unsafe(path):
    assert faults(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("prior", "from hldm.autoencoder import Autoencoder", "prior:1 imports hldm.autoencoder"),
        ("scan", "def f():\n    from hldm import griffin", "scan:2 imports hldm.griffin"),
        ("scan", "import hldm.training as t", "scan:1 imports hldm.training"),
        ("scan", "from . import config", "scan:1 imports relatively"),
        ("scan", "from hldm.nowhere import x", "scan:1 imports hldm.nowhere, which has no place"),
        ("utils", "x = 1", "utils: give it a place"),
        ("griffin", "import diffusers.schedulers", "griffin:1 imports diffusers"),
        ("objectives", "from accelerate import Accelerator", "objectives:1 imports accelerate"),
        ("runs", "import pickle", "runs:1 imports pickle"),
        ("runs", "x = torch.load('a', weights_only=True)", "runs:1 calls torch.load"),
        ("runs", "from torch import load", "runs:1 imports torch.load"),
        ("data", "np.load(path)", "data:1 calls np.load"),
        ("config", "yaml.load(text, Loader)", "config:1 calls yaml.load"),
        ("runs", "subprocess.run('ls', shell=True)", "runs:1 passes shell=True"),
        ("corpus", "load_dataset(x, trust_remote_code=True)", "corpus:1 passes trust_remote_code=True"),
        ("text", "eval('1')", "text:1 calls eval"),
    ],
)
def test_the_reader_of_sources_finds_what_it_should(name, source, fault):
    assert [found for found in faults(name, source) if found.startswith(fault)]


def test_the_reader_of_sources_lets_ordinary_code_pass():
    source = "import torch\nfrom hldm.config import Config\nmodel.eval()\nrun(shell=False)\n"
    assert faults("griffin", source) == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("hldm.config", ("torch", "omegaconf", "numpy")),
        ("hldm.cli", ("torch", "transformers", "datasets")),
        ("hldm.griffin", ("diffusers", "accelerate", "transformers", "datasets")),
        ("hldm.metrics", ("evaluate", "datasets", "transformers")),
        ("hldm.doctor", ("torch", "datasets")),
    ],
)
def test_an_import_stays_light(module, unwanted):
    if not (ROOT / f"{module.replace('.', '/')}.py").exists():
        pytest.skip(f"{module} is not there")
    code = f"import sys, {module}; print(*(set(sys.modules) & set({unwanted})))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
