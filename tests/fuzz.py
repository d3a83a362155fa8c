"""Random and mutated bytes into everything of hldm that reads: what comes out is a result or one line.

    python -m tests.fuzz 100000 0        count, seed

A fault is an error that `hldm.runs.exits.guarded` would show as a traceback, a message of several lines, more than
SECONDS for one input, or more than BYTES of memory in all. Each is reported with the input that did it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from hldm.config import Config, DataConfig, load_config, section_from_dict, to_yaml
from hldm.evaluation.metrics import rouge_scores
from hldm.evaluation.tables import CELL_WIDTH, short, width
from hldm.evaluation.words import split_words
from hldm.generation.pipeline import read_pipeline
from hldm.kernels import library as kernels
from hldm.runs.checkpoints import load_checkpoint, save_checkpoint
from hldm.settings import parse_override
from hldm.sources.corpora import load_corpora
from hldm.sources.encodings import read_text
from hldm.sources.files import matching_files
from hldm.text.bytes import count_characters, printable, stream_decoder, to_bytes, to_ids
from tests.mutations import Damaged, mutated, some_bytes
from tests.tiny_model import tiny_pipeline

SECONDS, BYTES = 10.0, 2**30
ROOT = Path(__file__).parent.parent


class Targets:
    """What is fuzzed, each a function of (rng); `last` is the input that it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: Any = None
        self.pipeline = tiny_pipeline()
        self.pipeline.save_pretrained(folder / "pipeline")
        weight = torch.arange(6.0).reshape(2, 3)
        self.checkpoint = save_checkpoint(
            folder, 3, {"model": {"w": weight}, "optimizer": {"m": weight}}, {"a": [1.5]}, keep=1
        )
        self.configs = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
        self.configs.append(to_yaml(load_config(ROOT / "configs/tiny.yaml")).encode())
        self.corpora = _corpora()

    def text(self, rng: random.Random) -> None:
        """Bytes -> ids -> bytes; a stream however it is cut; what a terminal is shown."""
        data = self.last = some_bytes(rng)
        assert bytes(to_ids(data).tolist()) == data
        text = data.decode("utf-8", "surrogateescape")
        assert to_bytes(text) == data and count_characters(data) == len(text)
        decoder, cut = stream_decoder(), rng.randrange(len(data) + 1)
        shown = decoder.decode(data[:cut]) + decoder.decode(data[cut:], final=True)
        assert shown == data.decode("utf-8", "replace")
        safe = printable(text + shown)
        safe.encode()
        assert not [
            letter for letter in safe if not letter.isprintable() and letter in "\x1b\x07\x9b\x7f\r\u202e"
        ]

    def yaml_config(self, rng: random.Random) -> None:
        """A config file, near a real one or far from any."""
        data = self.last = mutated(rng.choice(self.configs), rng) if rng.random() < 0.8 else some_bytes(rng)
        path = self.folder / "config.yaml"
        path.write_bytes(data)
        load_config(path)

    def override(self, rng: random.Random) -> None:
        """`a.b=c` of a command line."""
        key = rng.choice(["data.lanes", "name", "training.prior.steps", "autoencoder.encoder.blocks", ""])
        self.last = key + "=" + some_bytes(rng).decode("utf-8", "surrogateescape")
        load_config((), [self.last])
        parse_override(self.last)

    def config_of_a_dict(self, rng: random.Random) -> None:
        """Settings from JSON, as a saved model holds them."""
        data = self.last = mutated(b'{"data": {"lanes": 4}, "autoencoder": {"encoder": {"blocks": []}}}', rng)
        try:
            settings = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(settings, dict):
            section_from_dict(Config, settings)

    def corpus(self, rng: random.Random) -> None:
        """Files of every format, damaged."""
        name = rng.choice(list(self.corpora))
        data = self.last = (name, mutated(self.corpora[name], rng) if rng.random() < 0.8 else some_bytes(rng))
        path = self.folder / f"corpus{name}"
        path.write_bytes(data[1])
        try:
            load_corpora(DataConfig(path=str(path), max_bytes=100_000, separator=rng.choice(["", "\n\n"])))
        finally:
            path.unlink()

    def folder_of_texts(self, rng: random.Random) -> None:
        """Folders with links, loops and names of any kind; a folder and its glob name the same files."""
        place = self.folder / "texts"
        place.mkdir()
        names = [
            "a.txt",
            "b.TXT",
            ".hidden.txt",
            "._a.txt",
            "c.txt~",
            "__MACOSX",
            ".git",
            "sub",
            "d.jsonl.gz",
            "e.md",
        ]
        made = [place]
        try:
            for _ in range(rng.randint(1, 12)):
                path = rng.choice(made) / rng.choice([*names, "\x1b[2J.txt", "x\n.txt", "[a].txt", "*.txt"])
                if os.path.lexists(path):
                    continue
                match rng.randrange(4):
                    case 0:
                        path.mkdir()
                        made.append(path)
                    case 1:
                        path.symlink_to(rng.choice([*made, *place.iterdir(), Path("nowhere")]))
                    case _:
                        path.write_bytes(b"some text")
            self.last = sorted(str(path) for path in place.rglob("*"))
            found = []
            for ending in ("", "/**", "/**/*", "/*"):
                try:
                    found.append(matching_files(f"{place}{ending}"))
                except FileNotFoundError:
                    found.append([])
            # of two links to one file either may be the one that is read
            texts = [[file.stat().st_ino for file in files] for files in found]
            assert all(set(files) == set(texts[0]) for files in texts), found
            assert all(len(set(files)) == len(files) for files in texts), found
        finally:
            shutil.rmtree(place)

    def text_file(self, rng: random.Random) -> None:
        """A file of any encoding or packing, damaged: UTF-8 comes out, or a line."""
        text = "some wörds 世界\r\n" * rng.randint(1, 50)
        data = text.encode(
            rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1", "gbk"]), "ignore"
        )
        data = gzip.compress(data) if rng.random() < 0.3 else data
        data = self.last = data if rng.random() < 0.3 else mutated(data, rng)
        path = self.folder / "any.txt"
        path.write_bytes(data)
        read = read_text(path, 100_000)
        assert b"\0" not in read and b"\r\n" not in read
        read.decode()

    def words(self, rng: random.Random) -> None:
        """Words of any text: none is lost, and ROUGE finds a text in itself."""
        text = self.last = some_bytes(rng).decode("utf-8", "replace")
        assert "".join(split_words(text)) == "".join(text.split())
        assert rouge_scores([text], [text])["rouge1"] in (None, 1.0)
        assert width(short(text)) <= CELL_WIDTH

    def damaged_library(self, rng: random.Random) -> None:
        """A compiled library that is not what it was: never loaded."""
        good = b"\x7fELF and more" * 9
        data = self.last = mutated(good, rng)
        path = self.folder / f"kernels-0-{hashlib.sha256(good).hexdigest()[:16]}.so"
        path.write_bytes(data)
        assert (kernels._whole(self.folder, "kernels-0") is None) == (data != good)
        path.unlink(missing_ok=True)

    def checkpoint_folder(self, rng: random.Random) -> None:
        """A checkpoint with a file damaged: never taken for the one that was saved."""
        file = rng.choice(sorted(self.checkpoint.iterdir()))
        with self._damaged(file, rng) as is_changed:
            load_checkpoint(self.checkpoint)
            assert not is_changed, "a damaged checkpoint was loaded"

    def pipeline_folder(self, rng: random.Random) -> None:
        """A saved pipeline with a file damaged; the tensors of what loads are those of a model."""
        files = [path for path in sorted((self.folder / "pipeline").rglob("*")) if path.is_file()]
        with self._damaged(rng.choice(files), rng):
            loaded = read_pipeline(self.folder / "pipeline")
            for part in (loaded.autoencoder, loaded.prior):
                assert all(tensor.isfinite().all() for tensor in part.state_dict().values())

    def tensors(self, rng: random.Random) -> None:
        """Weights with tensors missing, added, cast, reshaped or not finite."""
        path = self.folder / "pipeline" / "autoencoder" / "diffusion_pytorch_model.safetensors"
        state = dict(self.pipeline.autoencoder.state_dict())
        name = rng.choice(sorted(state))
        kind = self.last = (rng.choice(["missing", "added", "cast", "reshaped", "nan", "inf"]), name)
        match kind[0]:
            case "missing":
                del state[name]
            case "added":
                state["another"] = torch.zeros(2)
            case "cast":
                state[name] = state[name].to(torch.float64)
            case "reshaped":
                state[name] = state[name][None].clone()
            case _:
                state[name] = torch.full(state[name].shape, float(kind[0]))
        self._refused(path, save({key: value.contiguous() for key, value in state.items()}))

    def prompt(self, rng: random.Random) -> None:
        """Prompts into the model that writes."""
        prompts = self.last = [some_bytes(rng) for _ in range(rng.randint(1, 3))]
        output = self.pipeline(prompts, max_characters=rng.randint(1, 3), seed=rng.randrange(2**20))
        for text in output.texts:
            printable(text).encode()

    def _damaged(self, file: Path, rng: random.Random) -> Damaged:
        good = file.read_bytes()
        data = mutated(good, rng) if rng.random() < 0.8 else some_bytes(rng)
        self.last = (str(file.relative_to(self.folder)), data)
        return Damaged(file, good, data)

    def _refused(self, path: Path, data: bytes) -> None:
        with Damaged(path, path.read_bytes(), data):
            try:
                read_pipeline(self.folder / "pipeline")
            except ValueError as error:
                assert "cannot be loaded" in str(error), error
                return
            raise AssertionError("weights that are not the model's were loaded")


# of a hundred inputs, how many go where: what is quick gets more
SHARES: dict[str, int] = {
    "text": 24,
    "yaml_config": 10,
    "override": 8,
    "config_of_a_dict": 8,
    "corpus": 18,
    "folder_of_texts": 5,
    "text_file": 5,
    "words": 4,
    "damaged_library": 2,
    "checkpoint_folder": 9,
    "pipeline_folder": 2,
    "tensors": 1,
    "prompt": 1,
}


def fuzz(count: int, seed: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run `count` inputs; returns how many came to which end, the slowest, memory, and every fault."""
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    faults: list[dict[str, str]] = []
    slowest, began = (0.0, ""), time.monotonic()
    folder = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            targets = Targets(folder)
            memory_before = _peak_bytes()
            for index in range(count):
                name = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
                start = time.monotonic()
                fault = ""
                try:
                    getattr(targets, name)(rng)
                    ends["read"] += 1
                except (ValueError, OSError) as error:  # what guarded tells in one line, with exit code 2
                    ends["refused"] += 1
                    if len(str(error)) > 2000 or isinstance(error, (UnicodeError, json.JSONDecodeError)):
                        fault = f"{type(error).__name__}, told without saying of what: {error}"
                except Exception as error:  # anything else is what is looked for
                    fault = f"{type(error).__name__}: {error}"
                seconds = time.monotonic() - start
                spent[name] += seconds
                slowest = max(slowest, (seconds, name))
                if seconds > SECONDS:
                    fault = f"took {seconds:.1f} s"
                if _peak_bytes() - memory_before > BYTES:
                    fault, memory_before = f"took {BYTES} bytes of memory", _peak_bytes()
                if fault:
                    faults.append({"target": name, "input": repr(targets.last)[:2000], "fault": fault[:500]})
                    say(json.dumps(faults[-1]))
                if index % 5000 == 4999:
                    say(f"{index + 1:,} inputs, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    finally:
        shutil.rmtree(folder)
    return {
        "inputs": count,
        "seed": seed,
        **ends,
        "faults": faults,
        "seconds": round(time.monotonic() - began, 1),
        "seconds_by_target": {name: round(seconds, 1) for name, seconds in spent.most_common()},
        "slowest": (round(slowest[0], 3), slowest[1]),
        "memory_growth_bytes": _peak_bytes() - memory_before,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _corpora() -> dict[str, bytes]:
    """A small good file of every format, by ending."""
    import pyarrow
    from pyarrow import parquet

    texts = [f"document {i} é\n\nand more" for i in range(20)]
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), sink)
    plain = {
        ".txt": "\n\n".join(texts).encode(),
        ".jsonl": b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts),
        ".parquet": sink.getvalue(),
    }
    return plain | {f"{ending}.gz": gzip.compress(data) for ending, data in plain.items()}


if __name__ == "__main__":
    figures = fuzz(int(sys.argv[1]), int(sys.argv[2]), say=lambda line: print(line, flush=True))
    print(json.dumps(figures, indent=1))
    sys.exit(bool(figures["faults"]))
