"""What every part of a latent model is worth: what the bound loses when the part is hidden.

    hldm diagnose --parts --run runs/demo --twin runs/demo-twin

Everything is measured in one pass over held-out text: each part is hidden in turn, and the same chunks are read with
the same noise, so that only the part differs. The model was not trained to do without most of its parts, and misses
whatever it was trained with: that a part is missed does not show that it is needed. A model trained without it for as
long shows that, and the lesser of both is the part's worth (`hldm.evaluation.worth.least`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hldm.evaluation.reconstruction import read_windows
from hldm.evaluation.sampled import sampled_latents
from hldm.evaluation.worth import Clusters, clusters_of, paired_worth
from hldm.model.autoencoder import Autoencoder
from hldm.model.contextualiser import Context, Contextualiser, RelativeBias
from hldm.model.denoiser import BlockContext
from hldm.model.diffusion import diffuse, end_term, stratified
from hldm.model.likelihood import read_chunks
from hldm.model.ops import take_rows
from hldm.model.prior import Prior
from hldm.model.readouts import pool_by_chunk
from hldm.model.state import ContextState, DecoderState, Encoding
from hldm.runs.doing import reached
from hldm.text.windows import Batch, Windows, draw_normal, draw_uniform

NEAREST = 4  # chunks that are left when all farther ones are hidden
SAMPLER_STEPS = (
    16  # of the latents that are drawn in place of true ones, where there is no mixture to draw from
)
UNSEEN = -1e9  # a bias that leaves nothing of a weight, and unlike -inf no NaN where nothing else is seen
SHORT = ("denoiser", "context", "far", "text", "trunk", "latent", "bytes")  # of the table that is cheap
SHORT_DRAWS = 4


class Cost(NamedTuple):
    """Nats of every chunk without a part (b n); None: what it costs with it."""

    latent: Tensor | None = None  # latent and end term
    decoder: Tensor | None = None


@dataclass
class Reading:
    """A window, and the noise that every reading of it shares. What is carried to the next window is kept by name."""

    autoencoder: Autoencoder
    prior: Prior
    batch: Batch
    encoding: Encoding
    u: Tensor  # (b n m) stratified, which noise levels
    noise: Tensor  # (b n m z) of the diffusion
    noise_0: Tensor  # (b n z) of the decoder's latents
    generator: torch.Generator  # of what single parts draw
    memories: dict[str, ContextState]
    decoders: dict[str, DecoderState]
    known: dict[str, Tensor]

    @cached_property
    def context(self) -> Context:
        """What the whole model knows before each chunk."""
        return self.context_of("")

    def context_of(
        self,
        name: str,
        *,
        latents: Tensor | None = None,
        after: Tensor | None = None,
        contextualiser: Contextualiser | None = None,
    ) -> Context:
        """The context of each chunk, as this contextualiser sees these latents (b n z) and features (b n w).

        Each is the model's own where it is None.  name: under which its state is carried
        """
        encoding, rows = self.encoding, len(self.batch.length)
        if name not in self.memories:
            self.memories[name] = self.prior.initial_state(rows, encoding.latents.device)
        context, self.memories[name] = (contextualiser or self.prior.contextualiser)(
            encoding.latents if latents is None else latents,
            encoding.mask,
            encoding.doc_start,
            self.memories[name],
            encoding.after if after is None else after,
        )
        return context.first(self.batch.chunks)

    def latent(self, context: Context, prior: Prior | None = None) -> Tensor:
        """Latent and end term (b n) given such a context, under a prior of the same schedule."""
        prior, encoding = prior or self.prior, self.encoding
        paid = prior.latent_term(encoding.latents, encoding.mask, context, self.u, self.noise)
        return (paid + end_term(encoding.latents, prior.diffusion.gamma_1)) * encoding.mask

    def z_0(self, latents: Tensor) -> Tensor:
        """What the decoder reads of latents (b n z)."""
        gamma = latents.new_full(latents.shape[:-1], self.prior.diffusion.gamma_0)
        return diffuse(latents, gamma, self.noise_0)

    def decoder(self, name: str, z_0: Tensor | None = None, encoding: Encoding | None = None) -> Tensor:
        """The decoder's term (b n) given z_0 (b n z) and its conditioning on the text before: the model's own if None.

        name: under which its state is carried
        """
        before = self.decoders.get(name)
        if before is None:
            before = self.autoencoder.decoder_state(len(self.batch.length), self.encoding.latents.device)
        z_0 = self.z_0(self.encoding.latents) if z_0 is None else z_0
        reading, self.decoders[name] = read_chunks(
            self.autoencoder, self.batch, z_0, before, encoding or self.encoding
        )
        return reading.nats


class Part(NamedTuple):
    """A part of the model, and what the text costs without it."""

    name: str
    hidden: str  # what is hidden, in words
    cost: Callable[[Reading], Cost]


# ---- how each part is hidden


class Silence(nn.Module):
    """A denoiser that leaves the mixture's estimate as it is."""

    def read(self, context: Context) -> tuple[BlockContext, ...]:
        """Nothing."""
        return ()

    def forward(
        self, z: Tensor, gamma: Tensor, conditioning: tuple[BlockContext, ...], estimate: Tensor
    ) -> Tensor:
        """No correction."""
        return torch.zeros_like(z)


def _without_network(prior: Prior) -> Callable[[Reading], Cost]:
    bare = copy.deepcopy(prior)
    bare.denoiser = Silence()  # type: ignore[assignment]  # which has what `Prior` asks of one
    return lambda reading: Cost(latent=reading.latent(reading.context, bare))


def _in_closed_form(reading: Reading) -> Cost:
    prior, mu = reading.prior, reading.encoding.latents
    assert prior.mixture is not None
    log_weights = prior.mixture.log_weights(reading.context.feature)[:, :, None]
    x0 = mu[:, :, None].expand_as(reading.noise)
    rate = prior.mixture.rate(x0, reading.noise, prior.diffusion.gamma_0, log_weights)
    return Cost(latent=rate.mean(dim=-1) * reading.encoding.mask)


def _without_context(reading: Reading) -> Cost:
    context = reading.context
    nothing = reading.prior.hide(context, torch.ones_like(context.visible[..., 0]))
    return Cost(latent=reading.latent(nothing._replace(feature=context.feature)))


def _without_entries(prior: Prior, name: str, hides: Callable[[Tensor, Tensor], Tensor]) -> Part:
    """Some entries of the pyramid hidden, from those that come after them, too.

    hides: (level, distance in blocks of the level's size) -> bool. The document's start stays visible to the denoiser.
    """
    contextualiser = copy.deepcopy(prior.contextualiser)
    for bias in contextualiser.modules():
        if isinstance(bias, RelativeBias):
            row = torch.arange(len(bias.table), device=bias.table.device)
            hidden = hides(row // bias.distances, row % bias.distances)
            bias.table.data[hidden] = UNSEEN

    def cost(reading: Reading) -> Cost:
        context = reading.context_of(name, contextualiser=contextualiser)
        shown = context.visible & ~hides(context.level[:, None], context.distance)
        shown[:, :, 0] = True
        return Cost(latent=reading.latent(context._replace(visible=shown)))

    return Part(name, "", cost)


def _is_of_level(hidden: int, level: Tensor, distance: Tensor) -> Tensor:
    return (level == hidden).expand_as(distance)


def _is_far(level: Tensor, distance: Tensor) -> Tensor:
    return (level > 0) | (distance >= NEAREST)


def _without_latents_of_entries(reading: Reading) -> Cost:
    none = torch.zeros_like(reading.encoding.latents)
    return Cost(latent=reading.latent(reading.context_of("entry-latents", latents=none)))


def _without_features_of_entries(reading: Reading) -> Cost:
    none = torch.zeros_like(reading.encoding.after)
    context = reading.context_of("entry-text", after=none)
    return Cost(latent=reading.latent(context._replace(feature=reading.context.feature)))


def _without_features_of_mixture(reading: Reading) -> Cost:
    none = torch.zeros_like(reading.context.feature)
    return Cost(latent=reading.latent(reading.context._replace(feature=none)))


def _without_features_in_prior(reading: Reading) -> Cost:
    none = torch.zeros_like(reading.encoding.after)
    return Cost(latent=reading.latent(reading.context_of("prior-text", after=none)))


def _without_anything_in_prior(reading: Reading) -> Cost:
    context = reading.context
    return Cost(latent=reading.latent(reading.prior.hide(context, torch.ones_like(context.visible[..., 0]))))


def _without_memory_of_trunk(reading: Reading) -> Cost:
    """The trunk starts anew at every chunk: it knows the last one, and what the encoder makes of the text before."""
    autoencoder, batch, encoding = reading.autoencoder, reading.batch, reading.encoding
    y = encoding.features[:, 1:]  # at each byte
    ending = take_rows(y, batch.last_byte) * encoding.mask[..., None]
    summary = autoencoder.to_trunk(torch.cat([ending, pool_by_chunk(y, batch)], dim=-1))
    fresh = autoencoder.trunk.initial_state(len(y), y.device)
    always = torch.ones_like(encoding.mask)
    after, _ = autoencoder.trunk(summary, fresh, always, always, batch.count)
    after = after * encoding.mask[..., None]
    carried = reading.known.get("trunk", torch.zeros_like(after[:, 0]))
    known = torch.cat([carried[:, None], after], dim=1)
    reading.known["trunk"] = take_rows(known, batch.count[:, None])[:, 0]
    before = known[:, : batch.chunks] * (encoding.mask & ~encoding.doc_start)[..., None]
    forgetful = encoding._replace(after=after, before=before)
    latent = reading.latent(reading.context_of("trunk", after=after))
    return Cost(latent, reading.decoder("trunk", encoding=forgetful))


def _without_latent(reading: Reading) -> Cost:
    return Cost(decoder=reading.decoder("latent", reading.z_0(torch.zeros_like(reading.encoding.latents))))


def _latent_of_another(reading: Reading) -> Cost:
    mu, mask = reading.encoding.latents, reading.encoding.mask
    shuffled = mu.clone()
    shuffled[mask] = mu[mask][torch.randperm(int(mask.sum()), generator=reading.generator).to(mu.device)]
    return Cost(decoder=reading.decoder("latent-shuffled", reading.z_0(shuffled)))


def _latent_of_prior(reading: Reading) -> Cost:
    steps = SAMPLER_STEPS if reading.prior.mixture is None else 0
    drawn = sampled_latents(reading.prior, reading.context, steps, reading.generator)
    return Cost(decoder=reading.decoder("latent-sampled", drawn))


def _without_bytes(reading: Reading) -> Cost:
    encoding = reading.encoding
    silent = encoding._replace(features=torch.zeros_like(encoding.features))
    return Cost(decoder=reading.decoder("bytes", encoding=silent))


def parts_in(autoencoder: Autoencoder, prior: Prior) -> list[Part]:
    """The parts that this model has, in the order of the table."""
    found = []
    if prior.mixture is not None:
        found += [
            Part("denoiser", "the denoiser: a mixture of typical latents instead", _without_network(prior)),
            Part("diffusion", "diffusion: the same mixture by its formula instead", _in_closed_form),
        ]
    found.append(Part("context", "all that the denoiser sees of earlier chunks", _without_context))
    for level in range(1, prior.hierarchy.levels + 1):
        chunks = prior.hierarchy.ratio**level
        part = _without_entries(prior, f"level-{level}", partial(_is_of_level, level))
        found.append(part._replace(hidden=f"  means of {chunks:,} chunks"))
    part = _without_entries(prior, "far", _is_far)
    found.append(part._replace(hidden=f"  all but the {NEAREST} nearest chunks"))
    found.append(Part("entry-latents", "  the latents of earlier chunks", _without_latents_of_entries))
    if prior.settings.reads_text:
        found.append(Part("entry-text", "  the text of earlier chunks", _without_features_of_entries))
    if prior.mixture is not None:
        found.append(Part("text", "the text before, to the mixture", _without_features_of_mixture))
    if prior.mixture is not None and prior.settings.reads_text:
        found.append(Part("prior-text", "the text before, to all of the prior", _without_features_in_prior))
    found.append(
        Part("everything", "text and latents before, to all of the prior", _without_anything_in_prior)
    )
    if autoencoder.settings.trunk_layers:
        found.append(Part("trunk", "the trunk's memory beyond the last chunk", _without_memory_of_trunk))
    found += [
        Part("latent", "the chunk's latent, to the decoder", _without_latent),
        Part("latent-shuffled", "  the latent of another chunk instead", _latent_of_another),
        Part("latent-sampled", "  a latent drawn from the prior instead", _latent_of_prior),
    ]
    if autoencoder.settings.reads_text:
        found.append(Part("bytes", "the text before each byte, to the decoder", _without_bytes))
    return found


# ---- the measurement


class Costs(NamedTuple):
    """Nats of every chunk: latent and end term, then the decoder's. (2 chunks) each."""

    whole: np.ndarray
    without: dict[str, np.ndarray]  # by the part that is hidden
    clusters: Clusters


@torch.no_grad()
def measure(
    autoencoder: Autoencoder,
    prior: Prior,
    windows: Windows,
    parts: Sequence[Part],
    *,
    draws: int,
    seed: int,
    enough: int | None = None,
) -> Costs:
    """Read held-out text with every part hidden in turn, on Windows(..., shuffle=False).

    draws: noise levels a chunk;  enough: stop after the window in which so many chunks are read
    """
    noise_generator, own = (torch.Generator().manual_seed(seed + k) for k in range(2))
    nats = {name: np.zeros((2, windows.chunks)) for name in ("", *(part.name for part in parts))}
    is_measured = np.zeros(windows.chunks, dtype=bool)
    memories: dict[str, ContextState] = {}
    decoders: dict[str, DecoderState] = {}
    known: dict[str, Tensor] = {}
    for batch, encoding in read_windows(autoencoder, windows):
        b, n, z = encoding.latents.shape
        reading = Reading(
            autoencoder,
            prior,
            batch,
            encoding,
            u=stratified(draws, draw_uniform(batch, (n,), noise_generator)),
            noise=draw_normal(batch, (n, draws, z), noise_generator),
            noise_0=draw_normal(batch, (n, z), noise_generator),
            generator=own,
            memories=memories,
            decoders=decoders,
            known=known,
        )
        whole = Cost(reading.latent(reading.context), reading.decoder(""))
        chunk = batch.chunk_index[batch.is_chunk].cpu().numpy()
        is_measured[chunk] = True
        for name, cost in (("", whole), *((part.name, part.cost(reading)) for part in parts)):
            for term, (own_cost, default) in enumerate(zip(cost, whole, strict=True)):
                found = default if own_cost is None else own_cost
                assert found is not None
                nats[name][term, chunk] = found[batch.is_chunk].double().cpu().numpy()
        reached(is_measured.sum(), min(enough or windows.chunks, windows.chunks))
        if enough is not None and is_measured.sum() >= enough:
            break
    return Costs(nats.pop(""), nats, clusters_of(windows, is_measured))


def hidden_rows(costs: Costs, parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """What the bound loses without each part, in bits a character: its terms, their sum, the paired error of that."""
    clusters = costs.clusters
    whole = np.stack([clusters.sums(term) for term in costs.whole])  # (2 k)
    rows = {}
    for part in parts:
        without = np.stack([clusters.sums(term) for term in costs.without[part.name]])
        latent, decoder, both = (
            paired_worth(a, b, clusters.characters)
            for a, b in ((without[0], whole[0]), (without[1], whole[1]), (without.sum(0), whole.sum(0)))
        )
        hidden = {**both.as_json(), "latent": latent.bits, "decoder": decoder.bits}
        rows[part.name] = {"part": part.hidden, "hidden": hidden, "retrained": None, "worth": both.as_json()}
    return rows
