"""A memory inside the prior: retrieved latents as further components of the mixture that predicts the next one.

    p'(z_0 | h) = (1 - l) p(z_0 | h) + l sum_j pi_j N(z_0; alpha_0 nu_j, (alpha_0^2 tau^2 + sigma_0^2) I)

nu_j are latents that followed contexts like this one, in the training text or earlier in the document. The share l and
the weights pi_j are functions of earlier text alone, so p' is a density and the bound stays a bound:
-log p(x | h) <= decoder nats + KL(q(z_0 | x) || p'(z_0 | h)). The decoder is unchanged. After kNN-LM (Khandelwal et
al., arXiv 1911.00172), with the neighbours weighed in latent space. Where they come from:
`hldm.generation.memory_store` and `hldm.generation.remembering`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.model.diffusion import alpha_sigma

NEIGHBOURS = 64  # of each source; by hand, 16 of a document's own saved 0.001 bits a character less
MOST_MATCHED = 8  # chunks: longer repeats are certain enough
ABSENT = -1e9  # score of a neighbour that is not there; finite, so that gradients are


class Neighbours(NamedTuple):
    """What was retrieved before each of some chunks. Absent ones have an infinite distance."""

    latents: Tensor  # (b j z) mu of the chunk that followed
    distance: Tensor  # (b j) squared, of its query from this one
    matched: Tensor  # (b j) how many chunks just before are the same text, up to MOST_MATCHED

    @classmethod
    def of(cls, latents: Tensor, distance: Tensor, matched: Tensor) -> Neighbours:
        """The same with zeros where nothing was found, whatever stands there."""
        is_there = distance.isfinite()
        return cls(latents * is_there[..., None], distance, matched * is_there)


def query_of(known: Tensor) -> Tensor:
    """What is looked up before a chunk: the context's summary (b w), standardised, of length 1: distances <= 4."""
    return F.layer_norm(known.float(), known.shape[-1:]) / math.sqrt(known.shape[-1])


@dataclass(frozen=True)
class SourceGate:
    """How one source's neighbours are scored: s_j = bias + match m_j - exp(log_sharpness) d_j."""

    bias: float
    log_sharpness: float
    match: float
    log_deviation: float  # log tau, how far a latent lies from its neighbour


START = SourceGate(bias=-4.0, log_sharpness=1.5, match=1.0, log_deviation=-2.0)
# Of a document's own earlier chunks, for models without a store: fitted on the validation books by
# `hldm memory build --run small`.
DOCUMENT = SourceGate(bias=-4.29, log_sharpness=1.70, match=1.17, log_deviation=-2.16)
DOCUMENT_EVIDENCE = -0.83


@dataclass(frozen=True)
class Gate:
    """l = sigmoid(e^log_evidence logsumexp_j s_j) and pi = softmax_j s_j: at most nine fitted numbers."""

    log_evidence: float
    sources: Mapping[str, SourceGate]

    @classmethod
    def of_document(cls) -> Gate:
        """The gate of a document's own memory for a model that has none of its own."""
        return cls(DOCUMENT_EVIDENCE, {"document": DOCUMENT})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Gate:
        """What `as_dict` gave. Raises ValueError for anything else."""
        try:
            sources = {name: SourceGate(**values) for name, values in record["sources"].items()}
            gate = cls(float(record["log_evidence"]), sources)
            numbers = [
                gate.log_evidence,
                *(x for source in sources.values() for x in asdict(source).values()),
            ]
            if not sources or not all(math.isfinite(number) for number in numbers):
                raise ValueError
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"a memory's gate holds finite numbers by name, got {record!r:.80}") from None
        return gate

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {"log_evidence": self.log_evidence, "sources": {k: asdict(v) for k, v in self.sources.items()}}

    def weigh(self, found: Mapping[str, Neighbours]) -> Weighed:
        """The extra components before each chunk, and what they are worth."""
        return _weigh(
            found, {k: _tensors(v) for k, v in self.sources.items()}, torch.tensor(self.log_evidence)
        )


class Weighed(NamedTuple):
    """The extended mixture before each chunk, but for the part that the model had already."""

    log_kept: Tensor  # (b) log(1 - l)
    log_weights: Tensor  # (b j) log l pi_j
    latents: Tensor  # (b j z)
    log_deviation: Tensor  # (b j) log tau

    def log_density(self, plain: Tensor, z_0: Tensor, gamma_0: float) -> Tensor:
        """log p'(z_0 | h) from log p(z_0 | h). z_0: (b m z); plain, result: (b m)."""
        alpha, _ = alpha_sigma(torch.tensor(gamma_0, dtype=z_0.dtype))
        return self.log_density_at(plain, _squares(z_0, self.latents, float(alpha)), z_0.shape[-1], gamma_0)

    def log_density_at(self, plain: Tensor, squares: Tensor, width: int, gamma_0: float) -> Tensor:
        """The same from ||z_0 - alpha_0 nu_j||^2 (b m j), which no gate changes."""
        log_variance = self.log_variance(gamma_0)[:, None]  # (b 1 j)
        normal = -0.5 * (squares / log_variance.exp() + width * (log_variance + math.log(2 * math.pi)))
        recalled = (self.log_weights[:, None] + normal).logsumexp(dim=-1)
        return torch.logaddexp(self.log_kept[:, None] + plain, recalled)

    def log_variance(self, gamma_0: float) -> Tensor:
        """log(alpha_0^2 tau^2 + sigma_0^2) of every component (b j)."""
        level = torch.tensor(gamma_0, dtype=self.log_deviation.dtype)
        return torch.logaddexp(F.logsigmoid(-level) + 2 * self.log_deviation, F.logsigmoid(level))

    def draw(
        self, z_0: Tensor, generators: Sequence[torch.Generator], gamma_0: float, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """z_0 of the model's own prior (b z), replaced by a draw around a neighbour with probability l.

        Returns the latents, and which rows were recalled (b) bool. temperature: scales the noise, sharpens pi
        """
        width = z_0.shape[1]
        drawn = [
            (torch.rand(2, generator=g, dtype=torch.float64), torch.randn(width, generator=g))
            for g in generators
        ]
        u, noise = (torch.stack(numbers) for numbers in zip(*drawn, strict=True))
        is_recalled = u[:, 0] >= self.log_kept.double().exp()
        cdf = (self.log_weights.double() / max(temperature, 1e-6)).softmax(dim=-1).cumsum(dim=-1)
        chosen = torch.searchsorted(cdf, u[:, 1:] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        nu = self.latents.gather(1, chosen[..., None].expand(-1, 1, width))[:, 0]
        deviation = (0.5 * self.log_variance(gamma_0)).exp().gather(1, chosen)
        alpha, _ = alpha_sigma(torch.tensor(gamma_0))
        recalled = alpha * nu + temperature * deviation * noise
        return torch.where(is_recalled[:, None], recalled.to(z_0), z_0), is_recalled


Numbers = dict[str, Tensor]


def _tensors(source: SourceGate) -> Numbers:
    return {name: torch.tensor(value) for name, value in asdict(source).items()}


def _weigh(found: Mapping[str, Neighbours], sources: Mapping[str, Numbers], log_evidence: Tensor) -> Weighed:
    """See `Gate`; its numbers as tensors, which may want gradients."""
    scores, latents, deviations = [], [], []
    for name, numbers in sources.items():
        near = found[name]
        is_there = near.distance.isfinite()
        distance = near.distance.masked_fill(~is_there, 0)
        score = numbers["bias"] + numbers["match"] * near.matched - numbers["log_sharpness"].exp() * distance
        scores.append(score.masked_fill(~is_there, ABSENT))
        latents.append(near.latents)
        deviations.append(numbers["log_deviation"].expand_as(score))
    score = torch.cat(scores, dim=1)
    evidence = log_evidence.exp() * score.logsumexp(dim=1)  # (b)
    log_weights = F.logsigmoid(evidence)[:, None] + score.log_softmax(dim=1)
    return Weighed(
        F.logsigmoid(-evidence), log_weights, torch.cat(latents, dim=1), torch.cat(deviations, dim=1)
    )


def _squares(z_0: Tensor, latents: Tensor, alpha: float) -> Tensor:
    """||z_0 - alpha nu_j||^2. (b m z), (b j z) -> (b m j)."""
    return torch.cdist(z_0, alpha * latents, compute_mode="donot_use_mm_for_euclid_dist").square()


def fit_gate(found: Mapping[str, Neighbours], plain: Tensor, z_0: Tensor, gamma_0: float) -> Gate:
    """The gate of these sources under which held-out latents are likeliest.

    plain: (b m) log p of z_0 (b m z), m draws from the posterior of each chunk. Raises ValueError for no neighbours.
    """
    alpha, _ = alpha_sigma(torch.tensor(gamma_0))
    squares = torch.cat([_squares(z_0, near.latents, float(alpha)) for near in found.values()], dim=-1)
    return fit_numbers(found, lambda weighed: weighed.log_density_at(plain, squares, z_0.shape[-1], gamma_0))


def fit_numbers(
    found: Mapping[str, Neighbours], log_density: Callable[[Weighed], Tensor], rounds: int = 30
) -> Gate:
    """The gate of these sources under which `log_density` of held-out text is highest in the mean, by L-BFGS.

    Raises ValueError for no neighbours.
    """
    if not any(bool(near.distance.isfinite().any()) for near in found.values()):
        raise ValueError("a gate is fitted on text that has neighbours: this has none")
    sources = {name: _tensors(START) for name in found}
    log_evidence = torch.tensor(-0.5)
    free = [log_evidence, *(number for numbers in sources.values() for number in numbers.values())]
    for number in free:
        number.requires_grad_(True)
    optimizer = torch.optim.LBFGS(free, max_iter=rounds, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = -log_density(_weigh(found, sources, log_evidence)).mean()
        # keeps numbers finite that the text says nothing of, such as the sharpness of a source that is never used
        nats = nats + 1e-5 * sum(number.square() for number in free)
        nats.backward()
        return nats.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    names = [field.name for field in fields(SourceGate)]
    made = {
        name: SourceGate(**{k: float(numbers[k].detach()) for k in names})
        for name, numbers in sources.items()
    }
    return Gate(float(log_evidence.detach()), made)


# ---- how far back two places are the same text


def count_matched(
    history: np.ndarray, entry: np.ndarray, before: Callable[[np.ndarray, int], np.ndarray]
) -> Tensor:
    """How many chunks in a row just before are the same text as just before each entry. (b j).

    history: (b most) fingerprints of the chunks before, the last one first; 0 where the document begins
    before: (entries, i) -> fingerprint of the chunk i places before each, 0 where its document begins
    """
    matched = np.zeros(entry.shape, np.int64)
    goes_on = np.ones(entry.shape, bool)
    for back in range(1, history.shape[1] + 1):
        own = history[:, back - 1, None]
        goes_on &= (own != 0) & (before(entry, back) == own)
        matched += goes_on
    return torch.from_numpy(matched)
