"""A store of what followed which context, on disk: query vector, next latent, its text; searched by faiss or exactly.

    manifest.json     model, gates, sizes of the files
    keys.npy          (n d) float16, queries before each chunk, projected
    latents.npy       (n z) float32, mu of the chunk
    prints.npy        (n) uint64, fingerprint of its bytes;  text.npy, starts.npy: its bytes
    documents.npy     (documents + 1), first entry of each;  digests.npy: fingerprints of whole documents
    projection.npy    (d + 1 w), the mean and principal directions of queries
    index.faiss       inverted lists, if faiss was there to make them

Files are memory-mapped: a store may be larger than memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.generation.memory import NEIGHBOURS, Gate, Neighbours, count_matched
from hldm.runs.files import atomic_write, naming, sync

MANIFEST = "manifest.json"
FORMAT = 1
DIRECTIONS = 64  # kept of a query, those of most variance; not tuned
BLOCK = 65_536  # entries that an exact search compares at once
LISTS, PROBES = 1024, 32  # of the index: see docs/steering.md for what that finds
ARRAYS = {  # name: dtype, dimensions
    "keys": (np.float16, 2),
    "latents": (np.float32, 2),
    "prints": (np.uint64, 1),
    "text": (np.uint8, 1),
    "starts": (np.int64, 1),
    "documents": (np.int64, 1),
    "digests": (np.uint64, 1),
    "projection": (np.float32, 2),
}


def fingerprint_of(text: bytes) -> int:
    """64 bits of a chunk or a document; never 0, which stands for none."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") or 1


def load_faiss() -> Any | None:
    """faiss, kept to one thread as torch is; None where it is not installed (`pip install hldm[memory]`)."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class Entries(NamedTuple):
    """What a store is written from."""

    keys: np.ndarray
    latents: np.ndarray
    prints: np.ndarray
    text: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    digests: np.ndarray
    projection: np.ndarray


@contextmanager
def new_folder(target: Path) -> Any:
    """A folder that becomes `target` when all went well, and nothing otherwise. Raises FileExistsError, one line."""
    target = Path(target)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already: delete it or choose another name")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {target.absolute().parent} to write {target.name} to")
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with naming(target):
        try:
            temporary.mkdir()
            yield temporary
            os.replace(temporary, target)
            sync(target.absolute().parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_store(folder: Path, entries: Entries, model: str, source: str) -> None:
    """Write the arrays and, where faiss is there, its index. folder: from `new_folder`; gates come by `write_gates`."""
    for name, array in entries._asdict().items():
        np.save(folder / f"{name}.npy", array)
    faiss = load_faiss()
    index = None
    if faiss is not None and len(entries.keys) >= 64 * LISTS:  # fewer entries are searched exactly as fast
        width = entries.keys.shape[1]
        made = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatL2(width), width, LISTS, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2, False
        )
        made.cp.niter = 8
        made.train(np.ascontiguousarray(entries.keys[:: max(1, len(entries.keys) // 65_536)], np.float32))
        for first in range(0, len(entries.keys), BLOCK):
            made.add(entries.keys[first : first + BLOCK].astype(np.float32))
        faiss.write_index(made, str(folder / "index.faiss"))
        index = {"library": f"faiss {faiss.__version__}", "lists": LISTS, "probes": PROBES}
    manifest = {
        "format": FORMAT,
        "model": model,
        "source": source,
        "entries": len(entries.keys),
        "index": index,
        "gates": {},
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def write_gates(folder: Path, gates: Mapping[str, Gate]) -> None:
    """Put fitted gates, by the name of their sources, into a store's manifest."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["gates"] = {name: gate.as_dict() for name, gate in gates.items()}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


class Store:
    """A store on disk, opened for searching. Raises FileNotFoundError or ValueError, one line, for a spoiled one."""

    def __init__(self, folder: Path, model: str, *, exact: bool = False):
        """model: fingerprint of the encoder that asks;  exact: do without the index"""
        self.folder, self.model = Path(folder), model
        manifest = _read_manifest(self.folder)
        if manifest["model"] != model:
            raise ValueError(
                f"{folder} is a memory of another model ({manifest['model']:.12}, not {model:.12}): "
                "build one by hldm memory build"
            )
        if not manifest["entries"]:
            raise ValueError(f"{folder} is an empty memory: build it of some text")
        arrays = {name: _open(self.folder, name, manifest["files"]) for name in ARRAYS}
        self.entries = Entries(**arrays)
        self.gates = {name: Gate.from_dict(gate) for name, gate in manifest["gates"].items()}
        self.bytes = sum(manifest["files"].values())
        self._check(manifest["entries"])
        self._by_digest = {int(digest): at for at, digest in enumerate(self.entries.digests)}
        self.index = None
        if manifest["index"] is not None and not exact and (faiss := load_faiss()) is not None:
            try:
                self.index = faiss.read_index(str(self.folder / "index.faiss"), faiss.IO_FLAG_MMAP)
            except RuntimeError as error:
                raise ValueError(f"{folder}/index.faiss cannot be read: build the memory again") from error
            self.index.nprobe = PROBES

    def _check(self, count: int) -> None:
        """Raise ValueError unless the arrays belong together and are finite."""
        keys, latents, prints, text, starts, documents, digests, projection = self.entries
        agree = (
            len(keys) == len(latents) == len(prints) == len(starts) - 1 == count
            and len(documents) - 1 == len(digests)
            and documents[-1] == count
            and starts[-1] == len(text)
            and len(projection) == keys.shape[1] + 1
        )
        if not agree:
            raise ValueError(f"{self.folder} holds files of different sizes: build the memory again")
        for name, array in (("keys", keys), ("latents", latents), ("projection", projection)):
            if not all(np.isfinite(array[i : i + BLOCK]).all() for i in range(0, len(array), BLOCK)):
                raise ValueError(
                    f"{self.folder}/{name}.npy holds numbers that are not finite: build it again"
                )

    def __len__(self) -> int:
        return len(self.entries.keys)

    def text_of(self, entry: int) -> bytes:
        """The bytes of an entry's chunk."""
        return self.entries.text[self.entries.starts[entry] : self.entries.starts[entry + 1]].tobytes()

    def own_entries(self, document: int) -> tuple[int, int]:
        """The first entry of the document with this fingerprint and the one after its last; (0, 0): not in here."""
        at = self._by_digest.get(document)
        return (
            (0, 0) if at is None else (int(self.entries.documents[at]), int(self.entries.documents[at + 1]))
        )

    def project(self, query: Tensor) -> Tensor:
        """Queries (b w) in the store's directions (b d)."""
        projection = torch.from_numpy(np.array(self.entries.projection))
        return (query.cpu() - projection[0]) @ projection[1:].T

    def neighbours(
        self, query: Tensor, history: np.ndarray, own: np.ndarray | None = None, count: int = NEIGHBOURS
    ) -> Neighbours:
        """The nearest entries of queries (b w).

        history: (b MOST_MATCHED), see `count_matched`
        own: (b 2) entries that a query may not retrieve, from one up to another: those of its own document
        """
        keys = self.project(query).numpy()
        distance, entry = self.search(keys, own, min(count, len(self)))
        found = torch.from_numpy(self.entries.latents[entry.clip(min=0)])
        matched = count_matched(history, entry.clip(min=0), self._print_before)
        return Neighbours.of(found, torch.from_numpy(distance), matched)

    def search(self, keys: np.ndarray, own: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances and entries (b count) of projected queries (b d), the nearest first; inf and -1: none."""
        barred = np.zeros(len(keys), bool) if own is None else own[:, 1] > own[:, 0]
        if self.index is None or barred.any():
            return self._search_exactly(keys, own, count)
        distance, entry = self.index.search(np.ascontiguousarray(keys, np.float32), count)
        distance = np.where(entry < 0, np.inf, distance.clip(min=0)).astype(np.float32)
        return distance, entry

    def _search_exactly(
        self, keys: np.ndarray, own: np.ndarray | None, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        query = torch.from_numpy(np.ascontiguousarray(keys, np.float32))
        best = query.new_full((len(query), count), torch.inf)
        where = torch.full(best.shape, -1)
        for first in range(0, len(self), BLOCK):
            block = torch.from_numpy(self.entries.keys[first : first + BLOCK].astype(np.float32))
            square = torch.cdist(query, block, compute_mode="use_mm_for_euclid_dist").square()
            if own is not None:
                place = torch.arange(first, first + len(block))
                bars = torch.from_numpy(own)
                square.masked_fill_((place >= bars[:, :1]) & (place < bars[:, 1:]), torch.inf)
            near, at = square.topk(min(count, len(block)), dim=1, largest=False)
            best, order = torch.cat([best, near], dim=1).topk(count, dim=1, largest=False)
            where = torch.cat([where, at + first], dim=1).gather(1, order)
        where = where.masked_fill(best.isinf(), -1)
        return best.numpy(), where.numpy()

    def _print_before(self, entry: np.ndarray, back: int) -> np.ndarray:
        documents = self.entries.documents
        first = documents[np.searchsorted(documents, entry, side="right") - 1]
        return np.where(entry - back >= first, self.entries.prints[(entry - back).clip(min=0)], 0)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError, one line."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no memory, it has no {MANIFEST}: build one by hldm memory build"
        )
    kinds = {"format": int, "model": str, "entries": int, "gates": dict, "files": dict}
    try:
        manifest = json.loads(path.read_bytes())
        is_ours = all(isinstance(manifest[key], kind) for key, kind in kinds.items()) and "index" in manifest
    except (ValueError, KeyError, TypeError, RecursionError):
        is_ours = False
    if not is_ours or manifest["format"] != FORMAT:
        raise ValueError(f"{path} is no manifest of a memory of format {FORMAT}: build it again")
    return manifest


def _open(folder: Path, name: str, sizes: Mapping[str, Any]) -> np.ndarray:
    """A file of a store, memory-mapped. Raises FileNotFoundError or ValueError, one line."""
    path, (dtype, dimensions) = folder / f"{name}.npy", ARRAYS[name]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: build the memory again")
    if path.stat().st_size != sizes.get(path.name):
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, not {sizes.get(path.name)}: build it again"
        )
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error!s:.60}): build the memory again") from None
    if array.dtype != dtype or array.ndim != dimensions:
        raise ValueError(f"{path} holds {array.dtype} of {array.ndim} dimensions: build the memory again")
    return array


def principal_directions(sample: Iterable[Tensor]) -> np.ndarray:
    """The mean of queries (b w) and their DIRECTIONS directions of most variance, below it. (d + 1 w)."""
    queries = torch.cat(list(sample)).double()
    mean = queries.mean(dim=0)
    _, directions = torch.linalg.eigh((queries - mean).T @ (queries - mean))
    kept = directions.flip(dims=(1,)).T[: min(DIRECTIONS, queries.shape[1])]
    return torch.cat([mean[None], kept]).float().numpy()
