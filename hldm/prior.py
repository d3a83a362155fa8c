"""Two towers over latents: a causal contextualiser and a denoiser of the next latent.

The contextualiser reads the pyramid of `hldm.hierarchy` once per chunk; the denoiser, an MLP with
adaptive layer norm (DiT, arXiv 2212.09748) and cross-attention into the context, runs once per noise
draw, so several draws share the expensive part (MAR, arXiv 2406.11838). Two-tower diffusion over
latents of text follows the Large Concept Model (arXiv 2412.08821). Knows latents, and if `reads_text` the
encoder's features beside them, never bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from hldm.config import (
    AutoencoderConfig,
    DiffusionConfig,
    GriffinConfig,
    HierarchyConfig,
    PriorConfig,
    section_from_dict,
)
from hldm.diffusion import Schedule, alpha_sigma, bound_integrand, diffuse, x0_from
from hldm.griffin import Griffin, GriffinState
from hldm.hierarchy import (
    Entries,
    capacity,
    distance_in_blocks,
    still_needed,
    summaries,
    visible,
    walk,
)
from hldm.mixture import MixturePredictor
from hldm.weights import SavedModel


class ContextState(NamedTuple):
    """What generation remembers of the chunks written so far: O(log n) entries."""

    hidden: Tensor  # (b c layers+1 d) input of each layer, and the output, of every kept entry
    entries: Entries  # where the kept entries stand
    written: Tensor  # (b) chunks of the open document
    partial: Tensor  # (b levels z) sums of the blocks still open
    latest: Tensor  # (b d) output at the newest chunk
    griffin: GriffinState  # state of the recurrent contextualiser; () for a transformer
    feature: Tensor  # (b f) of the text so far, if it is read


class Context(NamedTuple):
    """What the denoiser is told about the past of each chunk."""

    summary: Tensor  # (b n d) output at the chunk before
    memory: Tensor  # (b c d) outputs of all entries; the first is the document start
    visible: Tensor  # (b n c) bool
    level: Tensor  # (b c) of each entry
    distance: Tensor  # (b n c) in blocks of the entry's own size
    feature: Tensor  # (b n f) of the text before the chunk, if it is read

    def of(self, chunk: Tensor) -> Context:
        """The context of some chunks only. chunk: (b k) positions in the window."""
        wide = chunk[..., None].expand(-1, -1, self.visible.shape[2])
        return self._replace(
            summary=self.summary.gather(1, chunk[..., None].expand(-1, -1, self.summary.shape[2])),
            visible=self.visible.gather(1, wide),
            distance=self.distance.gather(1, wide),
            feature=self.feature.gather(1, chunk[..., None].expand(-1, -1, self.feature.shape[2])),
        )

    def first(self, chunks: int) -> Context:
        """The context of the first chunks of the window."""
        return self._replace(
            summary=self.summary[:, :chunks],
            visible=self.visible[:, :chunks],
            distance=self.distance[:, :chunks],
            feature=self.feature[:, :chunks],
        )


class RelativeBias(nn.Module):
    """A learned bias for each (head, level, distance in blocks): exact near, bounded far."""

    def __init__(self, heads: int, hierarchy: HierarchyConfig):
        super().__init__()
        self.distances = capacity(hierarchy) + 1
        self.table = nn.Parameter(torch.zeros((hierarchy.levels + 1) * self.distances, heads))

    def forward(self, level: Tensor, distance: Tensor) -> Tensor:
        """level (b c), distance (b q c) -> (b h q c)."""
        index = level[:, None, :] * self.distances + distance.clamp(max=self.distances - 1)
        return rearrange(F.embedding(index, self.table), "b q c h -> b h q c")


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(e) + bias) v over the visible entries. (b q d), (b c d) -> (b q d)."""
    q, k, v = (rearrange(x, "b t (h e) -> b h t e", h=heads) for x in (query, key, value))
    bias = bias.masked_fill(~mask[:, None], float("-inf"))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h t e -> b t (h e)")


def after_start(kept: Tensor, new: Tensor) -> Tensor:
    """Order entries as [document start, kept ones, new ones]; `new` holds the start first."""
    return torch.cat([new[:, :1], kept, new[:, 1:]], dim=1)


class ContextLayer(nn.Module):
    """Pre-norm attention over the visible entries and itself, then a GELU MLP."""

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm = nn.LayerNorm(d)
        self.query, self.key_value = nn.Linear(d, d), nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, d)
        self.bias = RelativeBias(config.heads, hierarchy)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, kept: Tensor, mask: Tensor, level: Tensor, distance: Tensor) -> Tensor:
        """x: (b q d) new entries; kept: (b c d) older ones; mask, distance: (b q c+q)."""
        new = self.norm(x)
        key, value = self.key_value(after_start(self.norm(kept), new)).chunk(2, dim=-1)
        attended = attend(self.query(new), key, value, self.bias(level, distance), mask, self.heads)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.mlp(x))


class Contextualiser(nn.Module):
    """Latents and their summaries -> one context per chunk, causal, state in and state out."""

    def __init__(
        self, config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int, feature_dim: int = 0
    ):
        """feature_dim: of what the encoder knows after each chunk; 0: latents are all there is."""
        super().__init__()
        self.config, self.hierarchy, self.feature_dim = config, hierarchy, feature_dim
        d = config.width
        self.embed = nn.Linear(latent_dim, d)
        self.embed_feature = nn.Linear(feature_dim, d, bias=False) if config.reads_text else None
        self.level = nn.Embedding(hierarchy.levels + 1, d)
        self.start = nn.Parameter(torch.randn(d) * 0.02)  # what every document begins with
        recurrent = config.contextualiser == "griffin"
        stack = GriffinConfig(
            width=d,
            blocks=("recurrent",) * config.layers,
            heads=config.heads,
            dropout=config.dropout,
        )
        self.griffin = Griffin(stack, window=1) if recurrent else None
        layers = 0 if recurrent else config.layers
        self.layers = nn.ModuleList(ContextLayer(config, hierarchy) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def initial_state(self, batch: int, device: torch.device | None = None) -> ContextState:
        """Nothing written yet."""
        c, levels = capacity(self.hierarchy), self.hierarchy.levels
        d, z = self.config.width, self.embed.in_features
        empty = torch.zeros(batch, c, dtype=torch.long, device=device)
        return ContextState(
            hidden=torch.zeros(batch, c, len(self.layers) + 1, d, device=device),
            entries=Entries(empty, empty, empty - 1),
            written=torch.zeros(batch, dtype=torch.long, device=device),
            partial=torch.zeros(batch, levels, z, device=device),
            latest=torch.zeros(batch, d, device=device),
            griffin=() if self.griffin is None else self.griffin.initial_state(batch, device=device),
            feature=torch.zeros(batch, self.feature_dim, device=device),
        )

    def forward(
        self,
        latents: Tensor,
        mask: Tensor,
        doc_start: Tensor,
        state: ContextState,
        features: Tensor | None = None,
    ) -> tuple[Context, ContextState]:
        """Context of each chunk of a window, and of the one that follows it.

        latents: (b n z) clean and normalised; mask, doc_start: (b n);
        features: (b n f) of the text up to the end of each chunk, where feature_dim is not 0.
        Context i is a function of latents before i alone; there are n + 1 of them, the last for the
        chunk after the window. Padded chunks get a finite context that means nothing.
        """
        b, n, _ = latents.shape
        if mask.shape != (b, n) or doc_start.shape != (b, n):
            raise ValueError(
                f"mask and doc_start must be (b n) = {(b, n)}, got {tuple(mask.shape)} and {tuple(doc_start.shape)}"
            )
        steps = walk(doc_start, mask, state.written)
        means, blocks, partial = summaries(latents, mask, steps, state.partial, self.hierarchy)

        # New entries, in the order [document start, latents, summaries]; each is born when complete.
        x = self.embed(latents) + self.level.weight[0]
        if features is None or not self.feature_dim:
            features = latents.new_zeros(b, n, self.feature_dim)
        if self.embed_feature is not None:
            x = x + self.embed_feature(features)
        griffin = state.griffin
        if self.griffin is not None and n:
            chunk_start = torch.ones_like(mask)
            x, griffin = self.griffin(x, state.griffin, doc_start, chunk_start, mask.sum(dim=1))
        start = self.start.expand(b, 1, -1)
        x = torch.cat([start, x, self.embed(means) + self.level(blocks.level)], dim=1)
        zero = steps.written.new_zeros(b, 1)
        new = Entries(
            level=torch.cat([zero, torch.zeros_like(steps.position), blocks.level], dim=1),
            end=torch.cat([zero, steps.position + 1, blocks.end], dim=1),
            document=torch.cat([zero - 1, torch.where(mask, steps.document, -1), blocks.document], dim=1),
        )
        keys = Entries(*(after_start(kept, born) for kept, born in zip(state.entries, new, strict=True)))
        sees = visible(new.end, new.document, keys, self.hierarchy) & (keys.document >= 0)[:, None]
        # Everyone sees itself and the document start, which sees itself alone.
        itself = torch.eye(new.end.shape[1], dtype=torch.bool, device=x.device)
        itself[0, 0] = False  # the start stands in column 0, before the kept entries
        sees[:, :, state.entries.end.shape[1] :] |= itself
        sees[:, :, 0] = True
        distance = distance_in_blocks(new.end, keys, self.hierarchy)

        hidden = [x]
        for index, layer in enumerate(self.layers):
            x = layer(x, state.hidden[:, :, index], sees, keys.level, distance)
            hidden.append(x)
        hidden[-1] = self.norm(x)
        stacked = torch.stack(hidden, dim=2)  # (b q layers+1 d)

        # The context of chunk i is the output at chunk i-1 of its document, or at its start.
        outputs = stacked[:, :, -1]
        opening = outputs[:, :1]
        carried = torch.where((state.written > 0)[:, None], state.latest, opening[:, 0])
        before = torch.cat([carried[:, None], outputs[:, 1 : n + 1]], dim=1)
        fresh = torch.cat([doc_start & mask, doc_start.new_zeros(b, 1)], dim=1)
        summary = torch.where(fresh[..., None], opening, before)
        text = torch.cat([state.feature[:, None], features], dim=1)
        # Slot `count` speaks of the chunk that follows the window; beyond it is padding.
        count = mask.sum(dim=1, keepdim=True)
        follows = torch.arange(n + 1, device=x.device) == count
        written = torch.cat([steps.position, zero], dim=1)
        written = torch.where(follows, steps.written[:, None], written)
        document = torch.cat([torch.where(mask, steps.document, -1), zero - 1], dim=1)
        document = torch.where(follows, steps.open_document[:, None], document)
        known = visible(written, document, keys, self.hierarchy) & (keys.document >= 0)[:, None]
        known[:, :, 0] = True
        context = Context(
            summary=summary,
            memory=after_start(state.hidden[:, :, -1], outputs),
            visible=known,
            level=keys.level,
            distance=distance_in_blocks(written, keys, self.hierarchy),
            feature=text * ~fresh[..., None],
        )

        # Keep what may still be looked at; the open document becomes document 0 of the next window.
        needed = still_needed(steps.written, steps.open_document, keys, self.hierarchy)
        needed &= keys.document >= 0
        order = (~needed).to(torch.int8).argsort(dim=1, stable=True)[:, : capacity(self.hierarchy)]
        kept = needed.gather(1, order)
        everything = after_start(state.hidden, stacked)
        rows = order[..., None, None].expand(-1, -1, *everything.shape[2:])
        next_state = ContextState(
            hidden=everything.gather(1, rows) * kept[..., None, None],
            entries=Entries(
                level=keys.level.gather(1, order) * kept,
                end=keys.end.gather(1, order) * kept,
                document=torch.where(kept, 0, -1),
            ),
            written=steps.written,
            partial=partial,
            latest=before.gather(1, count[..., None].expand(-1, -1, before.shape[2]))[:, 0],
            griffin=griffin,
            feature=text.gather(1, count[..., None].expand(-1, -1, self.feature_dim))[:, 0],
        )
        return context, next_state


class BlockContext(NamedTuple):
    """What a block of the denoiser makes of the context: the same for every draw and every step."""

    shared: Tensor  # (b n 1 4d) shifts and scales of both halves
    gates: Tensor  # (b n 1 2d)
    key: Tensor  # (b h c e)
    value: Tensor  # (b h c e)
    bias: Tensor  # (b h n c) -inf at what is not visible


class DenoiserBlock(nn.Module):
    """Cross-attention and MLP under adaptive layer norm; one latent is one position."""

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig, time_width: int):
        super().__init__()
        d = config.denoiser_width
        self.heads = config.heads
        self.query = nn.Linear(d, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.attended = nn.Linear(config.width, d)
        self.bias = RelativeBias(config.heads, hierarchy)
        self.mlp = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))
        # Shift and scale of both halves, and their gates. What depends on the context alone is shared by the
        # draws; gates depend on it alone, which keeps the part that runs once a draw small.
        self.from_context = nn.Linear(config.width, 6 * d)
        self.from_gamma = nn.Linear(time_width, 4 * d, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.from_context, self.from_gamma):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.from_context.bias)

    def read(self, context: Context) -> BlockContext:
        """What `forward` needs of the context."""
        d = self.query.in_features
        shared, gates = self.from_context(context.summary)[:, :, None].split([4 * d, 2 * d], dim=-1)
        pairs = rearrange(self.key_value(context.memory), "b c (two h e) -> two b h c e", two=2, h=self.heads)
        bias = self.bias(context.level, context.distance)
        bias = bias.masked_fill(~context.visible[:, None], float("-inf"))
        return BlockContext(shared, gates, key=pairs[0], value=pairs[1], bias=bias)

    def forward(self, x: Tensor, time: Tensor, told: BlockContext) -> Tensor:
        """x: (b n m d); time: (b n m e)."""
        m, d = x.shape[2:]
        shift_a, scale_a, shift_b, scale_b = (told.shared + self.from_gamma(time)).chunk(4, dim=-1)
        gate_a, gate_b = told.gates.chunk(2, dim=-1)
        y = F.layer_norm(x, (d,)) * (1 + scale_a) + shift_a
        # All draws of a chunk see the same entries: fold them into the query axis.
        query = rearrange(self.query(y), "b n m (h e) -> b h (n m) e", h=self.heads)
        bias = told.bias if m == 1 else told.bias.repeat_interleave(m, dim=2)
        y = F.scaled_dot_product_attention(query, told.key, told.value, attn_mask=bias)
        y = self.attended(rearrange(y, "b h (n m) e -> b n m (h e)", m=m))
        x = x + self.dropout((1 + gate_a) * y)
        y = F.layer_norm(x, (d,)) * (1 + scale_b) + shift_b
        return x + self.dropout((1 + gate_b) * self.mlp(y))


class Denoiser(nn.Module):
    """(z_gamma, gamma, context) -> the regression target F, zero at initialisation."""

    frequencies: Tensor

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int):
        super().__init__()
        d, time_width = config.denoiser_width, 32
        self.inputs = nn.Linear(2 * latent_dim, d)
        # Periods from 40 (the whole range of log SNR) down to 0.5: smooth in gamma, yet resolving it.
        frequencies = 2 * math.pi / torch.logspace(math.log10(40), math.log10(0.5), time_width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(time_width, time_width), nn.SiLU())
        self.blocks = nn.ModuleList(
            DenoiserBlock(config, hierarchy, time_width) for _ in range(config.denoiser_layers)
        )
        self.outputs = nn.Linear(d, latent_dim)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def read(self, context: Context) -> tuple[BlockContext, ...]:
        """What `forward` needs of the context: as much again as a step, once for all of them."""
        return tuple(block.read(context) for block in cast("Iterable[DenoiserBlock]", self.blocks))

    def by_level(self, gamma: Tensor) -> Tensor:
        """Features of a noise level. (...) -> (... e)."""
        angle = gamma[..., None] * self.frequencies
        return self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))

    def forward(self, z: Tensor, gamma: Tensor, told: tuple[BlockContext, ...], estimate: Tensor) -> Tensor:
        """z, estimate: (b n m z); gamma: (b n m). Returns (b n m z)."""
        time = self.by_level(gamma)
        x = self.inputs(torch.cat([z, estimate], dim=-1))
        for block, part in zip(self.blocks, told, strict=True):
            x = block(x, time, part)
        return self.outputs(F.layer_norm(x, x.shape[-1:]))


class Told(NamedTuple):
    """What denoising needs of a context, however many steps it takes."""

    log_weights: Tensor | None  # (b n 1 k) of the mixture, if there is one
    blocks: tuple[BlockContext, ...]


class Prior(SavedModel):
    """p(next latent | latents before): contextualiser, denoiser and noise schedule."""

    @register_to_config
    def __init__(
        self,
        latent_dim: int,
        prior: dict,
        hierarchy: dict,
        diffusion: dict,
        feature_dim: int = 0,
        components: int = 0,
        autoencoder: str = "",
    ):
        """feature_dim: width of what is known before a chunk, if anything here reads text;

        components: of the mixture that the denoiser corrects, 0 for none;
        autoencoder: fingerprint of the weights whose latents these are; '' while both train.
        """
        super().__init__()
        self.settings = section_from_dict(PriorConfig, prior)
        self.hierarchy = section_from_dict(HierarchyConfig, hierarchy)
        self.diffusion = section_from_dict(DiffusionConfig, diffusion)
        self.latent_dim = latent_dim
        self.contextualiser = Contextualiser(self.settings, self.hierarchy, latent_dim, feature_dim)
        self.denoiser = Denoiser(self.settings, self.hierarchy, latent_dim)
        self.mixture = MixturePredictor(feature_dim, latent_dim, components) if components else None
        self.schedule = Schedule(self.diffusion)
        self.nothing = nn.Parameter(torch.zeros(self.settings.width))  # the context, when it is hidden

    @classmethod
    def from_settings(
        cls,
        autoencoder: AutoencoderConfig,
        prior: PriorConfig,
        hierarchy: HierarchyConfig,
        diffusion: DiffusionConfig,
    ) -> Prior:
        """Build from config sections."""
        components = autoencoder.components if autoencoder.rate == "mixture" else 0
        feature_dim = autoencoder.known_width if prior.reads_text or components else 0
        sections = (asdict(prior), asdict(hierarchy), asdict(diffusion))
        return cls(autoencoder.latent_dim, *sections, feature_dim, components)

    def initial_state(self, batch: int, device: torch.device | None = None) -> ContextState:
        """State at the start of a document."""
        return self.contextualiser.initial_state(batch, device)

    def hide(self, context: Context, hidden: Tensor) -> Context:
        """Replace the context of some chunks by nothing: only the document start stays visible.

        hidden: (b n) bool.
        """
        summary = torch.where(hidden[..., None], self.nothing, context.summary)
        shown = context.visible & ~hidden[..., None]
        shown[:, :, 0] = True
        feature = context.feature * ~hidden[..., None]
        return context._replace(summary=summary, visible=shown, feature=feature)

    def tell(self, context: Context) -> Told:
        """The part of `denoise` that does not depend on the noise."""
        log_weights = None
        if self.mixture is not None:
            log_weights = self.mixture.log_weights(context.feature)[:, :, None]
        return Told(log_weights, self.denoiser.read(context))

    def denoise(
        self, z: Tensor, gamma: Tensor, context: Context | Told, estimate: Tensor | None = None
    ) -> Tensor:
        """x0_hat(z_gamma, gamma, context). z: (b n m z); gamma: (b n m); estimate: an earlier x0_hat.

        context: as it is or, over several steps, as `tell` reads it.
        With a mixture: its own estimate, corrected by sigma times what the network says.
        """
        told = self.tell(context) if isinstance(context, Context) else context
        if self.mixture is not None and told.log_weights is not None:
            estimate = self.mixture.denoise(z, gamma, told.log_weights)
            _, sigma = alpha_sigma(gamma.unsqueeze(-1))
            return estimate + sigma * self.denoiser(z, gamma, told.blocks, estimate)
        estimate = torch.zeros_like(z) if estimate is None else estimate
        prediction = self.denoiser(z, gamma, told.blocks, estimate)
        return x0_from(prediction, z, gamma, self.diffusion.target)

    def estimate(
        self, x0: Tensor, gamma: Tensor, noise: Tensor, context: Context, self_condition: bool = False
    ) -> Tensor:
        """x0_hat from x0 made noisy. x0, noise and result: (b n m z); gamma: (b n m)."""
        z = diffuse(x0, gamma, noise)
        earlier = None
        if self_condition:
            with torch.no_grad():
                earlier = self.denoise(z, gamma, context)
        return self.denoise(z, gamma, context, earlier)

    def latent_term(
        self,
        latents: Tensor,
        mask: Tensor,
        context: Context,
        u: Tensor,
        noise: Tensor,
        self_condition: bool = False,
    ) -> Tensor:
        """The diffusion term of the bound, 1/2 E_gamma[(d gamma/du) e^-gamma ||x0 - x0_hat||^2].

        Continuous time (VDM, arXiv 2107.00630, equation 15), an unbiased estimate from m draws.
        latents: (b n z) x0; mask: (b n); u: (b n m) stratified in [0, 1); noise: (b n m z).
        Returns nats per chunk, summed over dimensions, the mean over the draws (b n).
        """
        gamma = self.schedule.gamma(u)
        x0 = latents[:, :, None].expand_as(noise)
        x0_hat = self.estimate(x0, gamma, noise, context, self_condition)
        terms = bound_integrand(x0, x0_hat, gamma) / self.schedule.density(gamma)  # (b n m)
        if self.training:
            squared_error = (x0 - x0_hat).detach().square().sum(dim=-1)
            self.schedule.observe(gamma[mask], squared_error[mask])
        return terms.mean(dim=-1)
