"""hldm as a model of EleutherAI's lm-evaluation-harness, for the benchmarks that it holds.

    hldm lm-eval --model hldm --model_args run=small --tasks lambada_openai

The harness finds models that have been registered with it, and looks for none of other packages: the command
registers this one, then is `lm_eval` itself. Likelihoods are `HLDMPipeline.score`'s, in nats: of a model with
latents they are lower bounds. This module imports the harness only to register with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from hldm.generation.pipeline import HLDMPipeline, HLDMPipelineOutput

WRITTEN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}  # what may be asked of writing
MAX_CHARACTERS = 256  # written where a task sets no limit, as the harness' own models do in tokens
SLICE = 512  # requests at a time: progress is shown, and caches filled, after each


class Request(Protocol):
    """What is used of lm_eval.api.instance.Instance."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Adapter:
    """The three questions of the harness, answered by a pipeline."""

    def __init__(
        self,
        run: str = "small",
        draws: int = 8,
        samples: int = 0,
        seed: int = 0,
        greedy: bool = False,
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ):
        """run: a folder, small or small-twin;  draws, samples, seed: of `HLDMPipeline.score`

        greedy: whether to find out if the likeliest writing is the one asked about, which a few tasks count; it
        takes writing as much again, and without it the answer is always no
        batch_size: continuations written at once;  max_batch_size: the harness passes it, unused
        Raises ValueError for others, one line.
        """
        super().__init__()
        if others:
            raise ValueError(
                f"model_args: hldm knows run, draws, samples, seed, greedy, got {next(iter(others))!r}"
            )
        self.pipeline = HLDMPipeline.from_pretrained(run)
        # the harness asks for CUDA unless another device is given
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            self.pipeline.to(torch.device(device))
        self.options = {"draws": draws, "samples": samples, "seed": seed}
        self.greedy = greedy
        # the harness says 1 unless another size is given, and "auto" to leave it to the model
        self.rows = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 1 else 64

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, the document open after it, and whether writing gives it."""
        found: list[tuple[float, bool]] = []
        for part in self._slices(requests, disable_tqdm):
            pairs = [request.args for request in part]
            wanted = [pair for pair in pairs if pair[1]]  # nothing costs nothing
            nats = iter(
                self._log_p([text for _, text in wanted], [before for before, _ in wanted], ends=False)
            )
            written = iter(self._likeliest(wanted)) if self.greedy else None
            for pair in pairs:
                log_p = next(nats) if pair[1] else 0.0
                is_greedy = not pair[1] or (written is not None and next(written).startswith(pair[1]))
                found.append((log_p, is_greedy))
                self._remember("loglikelihood", pair, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """log p of whole documents in nats, their ends included, as `hldm evaluate` counts them."""
        found: list[float] = []
        for part in self._slices(requests, disable_tqdm):
            log_p = self._log_p([request.args[0] for request in part], None, ends=True)
            for request, value in zip(part, log_p, strict=True):
                self._remember("loglikelihood_rolling", request.args, value)
            found += log_p
        return found

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop texts; max_gen_toks counts characters.

        Without do_sample the latent is the middle of where it would be drawn, and every byte the likeliest.
        """
        settings = [_writing(request.args[1]) for request in requests]  # refuses before any time is spent
        found = [""] * len(requests)
        done: list[int] = []
        by_setting: dict[str, list[int]] = {}
        for index, one in enumerate(settings):
            by_setting.setdefault(repr(sorted(one.items())), []).append(index)
        for indices in by_setting.values():
            for start in range(0, len(indices), self.rows):
                rows = indices[start : start + self.rows]
                one = settings[rows[0]]
                stops = one["until"]
                texts = self._write([requests[i].args[0] for i in rows], one)
                for index, text in zip(rows, texts, strict=True):
                    at = [text.find(stop) for stop in stops if stop and stop in text]
                    found[index] = text[: min(at, default=len(text))]
                    self._remember("generate_until", requests[index].args, found[index])
                done += rows
        return found

    def get_model_info(self) -> dict[str, Any]:
        """For the harness' report."""
        parts = filter(None, (self.pipeline.autoencoder, self.pipeline.prior))
        count = sum(weight.numel() for part in parts for weight in part.parameters())
        return {"model_num_parameters": count, "is_bound": self.pipeline.prior is not None}

    @property
    def tokenizer_name(self) -> str:
        """Names the harness' cache of requests: text is its bytes."""
        return "bytes"

    def _log_p(self, texts: list[str], prefixes: list[str] | None, *, ends: bool) -> list[float]:
        if not texts:
            return []
        scores = self.pipeline.score(texts, prefixes, ends_document=ends, **self.options)
        bits = [score.bits if score.importance is None else score.importance for score in scores]
        return [-value * math.log(2) for value in bits]

    def _likeliest(self, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
        for start in range(0, len(pairs), self.rows):
            rows = pairs[start : start + self.rows]
            length = max(len(text) for _, text in rows)
            yield from self._write([before for before, _ in rows], _writing({"max_gen_toks": length}))

    def _write(self, prompts: list[str], settings: Mapping[str, Any]) -> list[str]:
        options = {name: value for name, value in settings.items() if name != "until"}
        written = self.pipeline(prompts, seed=self.options["seed"], **options)
        assert isinstance(written, HLDMPipelineOutput)
        return written.texts

    def _slices(self, requests: Sequence[Request], quiet: bool) -> Iterable[Sequence[Request]]:
        from tqdm import tqdm

        starts = range(0, len(requests), SLICE)
        parts = [requests[start : start + SLICE] for start in starts]
        return tqdm(parts, disable=quiet or len(parts) < 2, desc=f"{SLICE} requests at a time")

    def _remember(self, kind: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Into the harness' cache, where there is one."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(kind, arguments, answer)


def _writing(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A call's settings from the harness' gen_kwargs. Raises ValueError for what writing does not know."""
    if unknown := sorted(set(asked) - WRITTEN):
        raise ValueError(f"gen_kwargs: hldm knows {', '.join(sorted(WRITTEN))}, got {unknown[0]!r}")
    until = asked.get("until") or []
    temperature = float(asked.get("temperature", 1.0)) if asked.get("do_sample") else 0.0
    return {
        "until": [until] if isinstance(until, str) else list(until),
        "max_characters": int(asked.get("max_gen_toks", MAX_CHARACTERS)),
        "temperature": temperature,
        "decoder_temperature": temperature,
        "top_p": float(asked.get("top_p", 1.0)),
    }


def register() -> type:
    """Make `--model hldm` known to the harness in this process; the class is also an lm_eval.api.model.LM.

    Raises ImportError, one line, where the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ImportError(f'{error}: pip install "hldm[lm-eval]" brings the harness') from None
    if "hldm" in model_registry:
        return model_registry.get("hldm")
    model: type = type("HLDM", (Adapter, LM), {"__doc__": Adapter.__doc__})
    model_registry.register("hldm", target=model)
    return model


def run_harness(arguments: Sequence[str]) -> None:
    """The harness' own command with these arguments, this model registered."""
    import sys

    register()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
        logging.getLogger("lm_eval").handlers.clear()  # its own, on a stream that may be gone
