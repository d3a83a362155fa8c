"""Commands that write text, and that show where a text is cut."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from typer import Option

from hldm.commands.drafting import DRAFT
from hldm.commands.options import AllowCode, MaxCharacters, RunOrShipped, Seed, check_minutes
from hldm.config import ChunkingConfig, GenerationConfig, Strategy, changed
from hldm.runs.folder import shipped_run
from hldm.runs.location import find_model, pipeline_of
from hldm.runs.signals import Stopped
from hldm.sources.corpora import typed_bytes
from hldm.sources.encodings import read_text
from hldm.text.bytes import MAX_PROMPT_BYTES, shows_colour

if TYPE_CHECKING:
    from hldm.generation.draft import Draft
    from hldm.generation.pipeline import HLDMPipeline

Scheduler = Literal["ancestral", "ddim", "dpm"]
STRATEGY_HELP = "or your own, module:Class; may repeat (default: all of ours)"
OWN_SEGMENTERS = "train a segmenter for each strategy that takes one (default: ask those that come with hldm)"


def generate(
    *,
    run: RunOrShipped = None,
    prompt: Annotated[list[str] | None, Option(help="may repeat; '' starts a document")] = None,
    prompt_file: Annotated[list[str] | None, Option(help="may repeat; - is standard input")] = None,
    max_characters: MaxCharacters = 400,
    num_samples: Annotated[int, Option(min=1, help="continuations of each prompt")] = 1,
    steps: Annotated[int | None, Option(help="denoising steps of each latent")] = None,
    scheduler: Annotated[Scheduler | None, Option(help="sampler")] = None,
    guidance: Annotated[float | None, Option(help="weight of the context; 1 is none")] = None,
    temperature: Annotated[float | None, Option(help="scale of the latents' noise")] = None,
    decoder_temperature: Annotated[float | None, Option(help="of the bytes; 0 takes the likeliest")] = None,
    top_p: Annotated[float | None, Option(help="nucleus of the bytes")] = None,
    stop: Annotated[
        list[str] | None, Option(help=r"end before the first of these, e.g. \n; may repeat")
    ] = None,
    seed: Seed = 0,
    show_chunks: Annotated[bool, Option("--show-chunks", help="tint chunks, or mark them with |")] = False,
    as_json: Annotated[bool, Option("--json", help="one JSON object a continuation")] = False,
    draft: Annotated[
        Path | None, Option(metavar="FOLDER", help="of hldm draft (default: RUN/draft, if any)")
    ] = None,
    no_draft: Annotated[bool, Option("--no-draft", help="write without one")] = False,
    raw: Annotated[bool, Option("--raw", help="send a terminal control characters as they are")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Write on from prompts."""
    if sys.stdout is None:
        raise ValueError("standard output is closed: there is nowhere to write to")
    if draft is not None and no_draft:
        raise ValueError("--draft and --no-draft contradict each other: give one")
    found = shipped_run() if run is None else find_model(run)
    folder = pipeline_of(found)
    asked: dict[str, Any] = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
    asked |= {"temperature": temperature, "decoder_temperature": decoder_temperature, "top_p": top_p}
    given = {name: value for name, value in asked.items() if value is not None}
    changed(GenerationConfig(), **given)  # refuses what is out of range
    # argv that is not UTF-8 arrives with surrogate escapes; fsencode gives the bytes back
    prompts = [os.fsencode(text) for text in prompt or []]
    prompts += [read_text(name, MAX_PROMPT_BYTES).removesuffix(b"\n") for name in prompt_file or []]
    if not prompts:
        raise ValueError("no prompt given: pass --prompt TEXT, --prompt-file FILE or --prompt-file -")
    from hldm.generation.draft import read_draft
    from hldm.generation.footprint import require_room_to_write
    from hldm.generation.pipeline import read_pipeline
    from hldm.generation.streams import stop_bytes

    pipeline = read_pipeline(folder)
    if draft is None and (found / DRAFT).is_dir():
        draft = found / DRAFT
    guesses = None if no_draft or draft is None else read_draft(draft, pipeline.autoencoder)
    require_room_to_write(pipeline.autoencoder, pipeline.prior, prompts, num_samples, max_characters)
    wanted = [text for text in prompts for _ in range(num_samples)]
    settings = changed(pipeline.settings, **given)
    stops = stop_bytes([typed_bytes(text) for text in stop or []])
    _write(pipeline, wanted, settings, max_characters, stops, seed, show_chunks, as_json, raw, guesses)


def _write(
    pipeline: HLDMPipeline,
    prompts: list[bytes],
    settings: GenerationConfig,
    max_characters: int,
    stops: list[bytes],
    seed: int,
    show_chunks: bool,
    as_json: bool,
    raw: bool,
    draft: Draft | None,
) -> None:
    """Write to standard output: streamed for one continuation, each whole for several."""
    from hldm.generation.streams import stop_at
    from hldm.generation.writer import Continuation, write_on
    from hldm.text.bytes import count_characters, printable, stream_decoder, tinted

    safe = sys.stdout.isatty() and not raw
    has_colour = safe and shows_colour(sys.stdout)
    decoder = stream_decoder()

    def send(data: bytes, is_last: bool = True, chunk: int | None = None) -> None:
        """A terminal gets whole, harmless characters, chunks in tints by turns; anything else the very bytes."""
        if safe:
            text = printable(decoder.decode(data, final=is_last))
            marked = tinted(text, chunk or 0) if has_colour else f"|{text}"
            data = (text if chunk is None else marked).encode()
        elif chunk is not None:
            data = b"|" + data
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    streams = len(prompts) == 1 and not as_json
    waits = show_chunks and bool(stops)  # bytes held back would come with the next chunk's
    if streams:
        send(prompts[0])
    began = time.monotonic()
    rows: list[Continuation] = []
    calls = written = 0
    stopped: Stopped | None = None
    try:
        parts = pipeline.autoencoder, pipeline.prior, prompts, settings
        writing = write_on(*parts, max_characters=max_characters, seed=seed, draft=draft)
        for rows, news, calls in stop_at(writing, stops):  # noqa: B007 - the last yield is the finished text
            if streams and news[0] and not waits:
                send(news[0], is_last=False, chunk=written if show_chunks else None)
                written += 1
    except Stopped as signal:  # what is written so far is worth showing
        stopped = signal
    seconds = time.monotonic() - began
    for number, part in enumerate(rows[0].chunks if streams and waits and rows else []):
        send(part, is_last=False, chunk=number)
    if streams:
        send(b"\n")
    total = sum(count_characters(row.text) for row in rows)
    for index, row in enumerate([] if streams else rows):
        if as_json:
            record = {
                "prompt": row.prompt.decode("utf-8", "replace"),
                "text": row.text.decode("utf-8", "replace"),
                "chunk_spans": row.chunk_spans,
                "ended": row.ended,
                "seed": seed + index,
                "seconds": round(seconds, 3),
                "characters_per_second": round(total / max(seconds, 1e-9), 1),
                "denoising_calls": calls,
            }
            send(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        else:
            send(f"[{index + 1}] ".encode() + row.prompt)
            for number, part in enumerate(row.chunks if show_chunks else [row.text]):
                send(part, is_last=False, chunk=number if show_chunks else None)
            send(b"\n")
    if stopped is not None:
        raise stopped


def chunk(
    *,
    text: Annotated[str, Option(metavar="FILE", help="- is standard input")],
    strategy: Annotated[list[str] | None, Option(metavar="NAME", help=STRATEGY_HELP)] = None,
    run: Annotated[list[Path] | None, Option(metavar="RUN", help="cut as this run does; may repeat")] = None,
    min_bytes: Annotated[int, Option(help="of a chunk")] = 4,
    max_bytes: Annotated[int | None, Option(help="default: 12, of a sentence or paragraph 1024")] = None,
    target_bytes: Annotated[float, Option(help="mean, of strategies with a model")] = 6.0,
    minutes: Annotated[float | None, Option(callback=check_minutes, help=OWN_SEGMENTERS)] = None,
    as_json: Annotated[bool, Option("--json", help="bytes of each chunk, as JSON")] = False,
    html: Annotated[Path | None, Option(metavar="FILE", help="write a page there instead")] = None,
    allow_code: AllowCode = False,
) -> None:
    """Where a text is cut, by one strategy or all."""
    chunking = ChunkingConfig(
        min_bytes=min_bytes, max_bytes=12 if max_bytes is None else max_bytes, target_bytes=target_bytes
    )
    given = read_text(text, MAX_PROMPT_BYTES)
    from hldm.chunking import view
    from hldm.runs.files import atomic_write
    from hldm.runs.reports import check_page_path
    from hldm.training.segmenters import train_for_minutes

    if html is not None:
        check_page_path(html, view.PAGE_MARK)
    cuts = view.cut_text(
        given,
        strategy or ([] if run else get_args(Strategy)),
        run or [],
        chunking=chunking,
        whole_bytes=1024 if max_bytes is None else None,
        train=None if minutes is None else partial(train_for_minutes, minutes),
    )
    if html is not None:
        atomic_write(html, view.as_page(cuts))
        print(f"wrote {html}")
    else:
        print(view.as_json(cuts) if as_json else view.as_text(cuts, shows_colour(sys.stdout)))
