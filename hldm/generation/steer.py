"""Text steered to a value y of an attribute, by a classifier of latents or of what the trunk knows.

    mixture     w_k(h) p(y | m_k, h)^s                      the weights of the prior's components: exact, one row a text
    particles   p(x) prod_c p(y | known after chunk c)^s    N rows a text, resampled: sequential Monte Carlo

The prior's latents are a mixture, and so is p(z | y, h) where the classifier sees which component a latent is of: no
gradient is needed. A classifier that sees what the trunk knows of the text written (FUDGE, arXiv 2104.05218) needs
chunks that are written, hence particles (twisted sequential Monte Carlo, arXiv 2404.17546). Fits none: `hldm.studies`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.branches import make_branches
from hldm.generation.writer import Continuation, LatentWriter
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.files import atomic_write, fingerprint

Method = Literal["mixture", "particles"]
MAX_STRENGTH = 100.0
MAX_PARTICLES = 256
KIND = "hldm steering classifier"


@dataclass(frozen=True)
class Guide:
    """Two linear classifiers of an attribute, and the model whose latents they read."""

    attribute: str
    values: tuple[str, ...]
    model: str  # fingerprint of the autoencoder's weights
    tensors: dict[str, Tensor]  # see SHAPES
    accuracy: dict[str, float]  # on held-out text, by classifier

    def value(self, name: str) -> int:
        """The index of a value. Raises ValueError for an unknown one."""
        if name not in self.values:
            raise ValueError(f"{self.attribute} is one of {', '.join(self.values)}, got {name!r:.40}")
        return self.values.index(name)

    def after(self, known: Tensor) -> Tensor:
        """log p(y | what the trunk knows after a chunk). (... w) -> (... v)"""
        logits = known @ self.tensors["after.weight"].T + self.tensors["after.bias"]
        return logits.log_softmax(dim=-1)

    def next(self, known: Tensor) -> Tensor:
        """log p(y | summary before a chunk, component of its latent). (... w) -> (... k v)"""
        logits = known @ self.tensors["next.weight"].T + self.tensors["next.bias"]
        return (logits[..., None, :] + self.tensors["next.component"]).log_softmax(dim=-1)

    def save(self, path: Path) -> None:
        """Write it as one file. Raises OSError, or ValueError for one that is there and is something else."""
        check_guide_path(path)
        facts = {
            "kind": KIND,
            "attribute": self.attribute,
            "values": json.dumps(self.values),
            "model": self.model,
        }
        facts["accuracy"] = json.dumps(self.accuracy)
        atomic_write(path, save(self.tensors, metadata=facts))


def shapes(autoencoder: Autoencoder, prior: Prior, values: int) -> dict[str, tuple[int, ...]]:
    """Of a guide's tensors, by name. Raises ValueError for a model without a mixture."""
    if prior.mixture is None:
        raise ValueError(
            "this model's prior has no mixture (autoencoder.components=0), so no components to weigh"
        )
    known, components = autoencoder.settings.known_width, len(prior.mixture.prototypes)
    linear = {"weight": (values, known), "bias": (values,)}
    found = {f"{part}.{name}": shape for part in ("after", "next") for name, shape in linear.items()}
    return {**found, "next.component": (components, values)}


def check_guide_path(path: Path) -> None:
    """Raise OSError or ValueError, one line, unless a guide may be written there, over another guide at most."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: no folder {folder} to write it to")
    if path.exists():
        _read_header(path)


def check_strength(strength: float) -> None:
    """Raise ValueError for one that is negative, not finite or beyond all use."""
    if not (math.isfinite(strength) and 0 <= strength <= MAX_STRENGTH):
        raise ValueError(f"strength must lie in 0..{MAX_STRENGTH:g}, got {strength:g}")


def _read_header(path: Path) -> dict[str, str]:
    """What a guide's file says of itself. Raises ValueError for any other file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; hldm steer fit makes one") from None
        raise ValueError(
            f"{path} is no steering classifier ({type(error).__name__}): hldm steer fit makes one"
        ) from None
    if facts.get("kind") != KIND:
        raise ValueError(f"{path} is no steering classifier: hldm steer fit makes one")
    return facts


def read_guide(path: Path, autoencoder: Autoencoder, prior: Prior | None) -> Guide:
    """A guide from its file, for this model. Raises FileNotFoundError or ValueError, one line."""
    facts = _read_header(path)
    if prior is None or facts.get("model") != fingerprint(autoencoder.state_dict()):
        raise ValueError(f"{path} was fitted to another model's latents: run hldm steer fit with this one")
    try:
        values = tuple(map(str, json.loads(facts["values"])))
        accuracy = {str(key): float(value) for key, value in json.loads(facts["accuracy"]).items()}
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): run hldm steer fit again") from None
    expected = shapes(autoencoder, prior, len(values))
    if {name: tuple(x.shape) for name, x in tensors.items()} != expected or len(values) < 2:
        raise ValueError(
            f"{path} has tensors of other shapes than this model needs: run hldm steer fit again"
        )
    if not all(bool(x.isfinite().all()) and x.dtype == torch.float32 for x in tensors.values()):
        raise ValueError(f"{path} holds numbers that are not finite: run hldm steer fit again")
    device = next(autoencoder.parameters()).device
    tensors = {name: x.to(device) for name, x in tensors.items()}
    return Guide(str(facts["attribute"]), values, facts["model"], tensors, accuracy)


# ---- writing


@torch.no_grad()
def write_steered(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    guide: Guide,
    value: str,
    *,
    strength: float = 1.0,
    method: Method = "mixture",
    particles: int = 16,
    max_characters: int = 400,
    seed: int = 0,
    through_ends: bool = False,
) -> list[Continuation]:
    """Continue each prompt toward a value; at strength 0 what is written without a guide, byte for byte.

    particles: rows a text, of which one is drawn by its weight in the end; method "mixture" takes one
    Raises ValueError, one line.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r:.40}")
    check_strength(strength)
    if not 1 <= particles <= MAX_PARTICLES:
        raise ValueError(f"particles must lie in 1..{MAX_PARTICLES}, got {particles}")
    if max_characters < 1:
        raise ValueError(f"max_characters must be at least 1, got {max_characters}")
    wanted = guide.value(value)
    count = particles if method == "particles" and strength else 1
    seeds = [
        [(seed + row + 1_000_003 * each) % 2**32 for each in range(count)] for row in range(len(prompts))
    ]
    writer = make_branches(autoencoder, prior, prompts, settings, seeds)
    rows = [_Row(max_characters, through_ends) for _ in range(len(prompts) * count)]
    if count == 1:
        while any(row.goes_on for row in rows):
            if strength:
                pieces = writer.write(_steered_latents(writer, guide, wanted, strength))
            else:
                pieces = writer.write()
            for row, piece in zip(rows, pieces, strict=True):
                row.add(piece.text, piece.ends_document)
        chosen = list(range(len(rows)))
    else:
        chosen, rows = _write_particles(writer, rows, guide, wanted, strength, count, seed)
    return [rows[row].continuation(prompt) for row, prompt in zip(chosen, prompts, strict=True)]


class _Row:
    """The chunks of one row, which may be copied; what `Continuation` makes of them comes in the end."""

    def __init__(self, left: int, through_ends: bool):
        self.chunks: list[bytes] = []
        self.left, self.through_ends = left, through_ends
        self.ended = False
        self._most = left

    @property
    def goes_on(self) -> bool:
        return self.left > 0 and not self.ended

    def add(self, text: bytes, ends_document: bool) -> None:
        """One chunk more, unless this row is done."""
        if not self.goes_on:
            return
        self.chunks.append(text)
        self.left -= sum(byte & 0xC0 != 0x80 for byte in text)
        self.ended = ends_document and not self.through_ends and self.left > 0

    def copy(self) -> _Row:
        other = _Row(self._most, self.through_ends)
        other.chunks, other.left, other.ended = [*self.chunks], self.left, self.ended
        return other

    def continuation(self, prompt: bytes) -> Continuation:
        found = Continuation(prompt, left=self._most, ended=self.ended)
        for chunk in self.chunks:
            found.add(chunk)
        return found


def _steered_latents(writer: LatentWriter, guide: Guide, wanted: int, strength: float) -> Tensor:
    """z_0 of the next chunks (b z), components weighed by w_k p(y | m_k, h)^s from the noised mixture on."""
    mixture, settings = writer.prior.mixture, writer.settings
    assert mixture is not None
    known = writer.encoder.known * ~torch.tensor(writer.opens, device=writer.device)[:, None]
    push = strength * guide.next(known)[..., wanted]  # (b k)
    if writer.plan is None:
        log_weights = (mixture.log_weights(known) + push).log_softmax(dim=-1)
        gamma_0 = writer.prior.diffusion.gamma_0
        return mixture.sample(gamma_0, log_weights, writer.generators, settings.temperature)
    conditioning = writer.conditioning
    assert conditioning.log_weights is not None
    writer.conditioning = conditioning._replace(
        log_weights=(conditioning.log_weights + push[:, None, None]).log_softmax(dim=-1)
    )
    latents = writer.sample_latents()
    writer.conditioning = conditioning
    return latents


def _write_particles(
    writer: LatentWriter,
    rows: list[_Row],
    guide: Guide,
    wanted: int,
    strength: float,
    count: int,
    seed: int,
) -> tuple[list[int], list[_Row]]:
    """Write all rows to their ends, `count` a text; which of them is drawn of each text, and the rows.

    Rows that are done keep the gain of their last chunk in every later step, so that one of few long chunks has no
    advantage over one of many short ones. Resampled (systematically) where the effective number falls below a half.
    """
    texts = len(rows) // count
    generator = torch.Generator().manual_seed((seed + 7_919) % 2**32)
    log_w = torch.zeros(texts, count, dtype=torch.float64)
    gain = torch.zeros(len(rows), dtype=torch.float64)
    while any(row.goes_on for row in rows):
        live = torch.tensor([row.goes_on for row in rows])
        pieces = writer.write()
        for row, piece in zip(rows, pieces, strict=True):
            row.add(piece.text, piece.ends_document)
        new = strength * guide.after(writer.encoder.known)[:, wanted].double().cpu()
        gain = torch.where(live, new, gain)
        log_w = (log_w + gain.view(texts, count)).log_softmax(dim=-1)
        weak = (2 * log_w).exp().sum(dim=-1) > 2 / count  # 1 / (effective number)
        if bool(weak.any()) and any(row.goes_on for row in rows):
            index = torch.arange(len(rows)).view(texts, count)
            for text in weak.nonzero()[:, 0].tolist():
                index[text] = text * count + _systematic(log_w[text].exp(), generator)
                log_w[text] = -math.log(count)
            index = index.flatten()
            writer = writer.pick(index.tolist(), writer.generators)
            rows = [rows[row].copy() for row in index.tolist()]
            gain = gain[index]
    u = torch.rand(texts, generator=generator, dtype=torch.float64)
    cdf = log_w.exp().cumsum(dim=-1)
    drawn = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=count - 1)
    return [text * count + int(each) for text, each in enumerate(drawn)], rows


def _systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """As many indices as weights (n,), each drawn about n times its weight (Kitagawa 1996)."""
    count = len(weights)
    at = (
        torch.arange(count, dtype=torch.float64) + torch.rand((), generator=generator, dtype=torch.float64)
    ) / count
    cdf = weights.cumsum(dim=0)
    return torch.searchsorted(cdf, at * cdf[-1], right=True).clamp(max=count - 1)
