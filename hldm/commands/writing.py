"""Commands that write text, and that show where a text is cut."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from typer import Option

from hldm import plugins
from hldm.commands import options
from hldm.commands.drafting import DRAFT
from hldm.config import ChunkingConfig, GenerationConfig, Strategy, changed
from hldm.runs.doing import loading
from hldm.runs.folder import shipped_run
from hldm.runs.location import find_model, pipeline_of
from hldm.runs.signals import Stopped
from hldm.settings import is_own
from hldm.sources.corpora import typed_bytes
from hldm.sources.encodings import read_text
from hldm.text.bytes import MAX_PROMPT_BYTES, shows_colour

if TYPE_CHECKING:
    from hldm.generation.streams import Writing

Scheduler = Literal["ancestral", "ddim", "dpm"]
STRATEGY_HELP = "one strategy, or your own, module:Class; may repeat (default: all of hldm)"
RANK_HELP = "the best by moments, bound, mbr, agreement or pairwise, or your own function, module:function"
OWN_SEGMENTERS = "train a segmenter for each strategy that takes one (default: ask those that come with hldm)"


def generate(
    *,
    run: options.RunOrShipped = None,
    prompt: Annotated[list[str] | None, Option(help="may repeat; '' starts a document")] = None,
    prompt_file: Annotated[list[str] | None, Option(help="may repeat; - is standard input")] = None,
    max_characters: options.MaxCharacters = 400,
    num_samples: Annotated[int, Option(min=1, help="continuations of each prompt")] = 1,
    steps: Annotated[int | None, Option(help="denoising steps of each latent")] = None,
    scheduler: Annotated[Scheduler | None, Option(help="sampler")] = None,
    guidance: Annotated[float | None, Option(help="guidance: weight of the context; 1 is none")] = None,
    temperature: options.Temperature = None,
    decoder_temperature: options.DecoderTemperature = None,
    top_p: Annotated[float | None, Option(help="of the bytes: nucleus sampling")] = None,
    candidates: Annotated[int, Option(help="continuations to choose from at each place; 1: no choice")] = 1,
    rank: Annotated[str, Option(help=RANK_HELP)] = "mbr",
    keep: Annotated[int, Option(help="candidates that go on from each place")] = 1,
    depth: Annotated[int, Option(help="chunks of a candidate")] = 16,
    show_candidates: Annotated[bool, Option("--show-candidates", help="print them, by place")] = False,
    stop: Annotated[
        list[str] | None, Option(help=r"end before the first of these, e.g. \n; may repeat")
    ] = None,
    memory: Annotated[
        str | None, Option(metavar="DIR", help="folder made by hldm memory build, document, or pyramid")
    ] = None,
    seed: options.Seed = 0,
    show_chunks: Annotated[bool, Option("--show-chunks", help="tint chunks, or mark them with |")] = False,
    as_json: Annotated[bool, Option("--json", help="one JSON object a continuation")] = False,
    draft: Annotated[
        Path | None, Option(metavar="FOLDER", help="made by hldm draft (default: RUN/draft, if there is one)")
    ] = None,
    no_draft: Annotated[bool, Option("--no-draft", help="write without a draft")] = False,
    raw: Annotated[bool, Option("--raw", help="print control characters as they are")] = False,
    allow_code: options.AllowCode = False,
) -> None:
    """Continue prompts."""
    if sys.stdout is None:
        raise ValueError("standard output is closed: there is nowhere to write to")
    _check_together(candidates, memory, draft, no_draft)
    found = shipped_run() if run is None else find_model(run)
    folder = pipeline_of(found)
    asked: dict[str, Any] = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
    asked |= {"temperature": temperature, "decoder_temperature": decoder_temperature, "top_p": top_p}
    given = {name: value for name, value in asked.items() if value is not None}
    changed(GenerationConfig(), **given)  # refuses what is out of range
    prompts = _prompts(prompt or [], prompt_file or [])
    with loading():
        from hldm.generation.candidates import Search, write_best
        from hldm.generation.draft import read_draft
        from hldm.generation.footprint import require_room_to_write
        from hldm.generation.pipeline import read_pipeline
        from hldm.generation.remembering import check_remembers, open_memory
        from hldm.generation.streams import stop_at, stop_bytes
        from hldm.generation.writer import write_on

    search = Search(candidates=candidates, rank=_ranker(rank), keep=keep, depth=depth)
    pipeline = read_pipeline(folder)
    parts = pipeline.autoencoder, pipeline.prior
    search.rule(pipeline.prior)
    require_room_to_write(*parts, prompts, num_samples * search.stubs, max_characters)
    wanted = [text for text in prompts for _ in range(num_samples)]
    settings = changed(pipeline.settings, **given)
    stops = stop_bytes([typed_bytes(text) for text in stop or []])
    limits: dict[str, Any] = {"max_characters": max_characters, "seed": seed}
    places: list[dict[str, Any]] | None = [] if show_candidates else None
    writing: Iterator[Writing]
    if candidates == 1:
        through = None
        if memory is not None:
            prior = check_remembers(pipeline.prior)
            through = open_memory(memory, pipeline.autoencoder, prior.hierarchy).through
        if draft is None and (found / DRAFT).is_dir():
            draft = found / DRAFT
        guesses = None if no_draft or draft is None else read_draft(draft, pipeline.autoencoder)
        writing = write_on(*parts, wanted, settings, **limits, through=through, draft=guesses)
    else:
        watch = None if places is None else places.append
        writing = write_best(*parts, wanted, settings, search, **limits, watch=watch)
    waits = show_chunks and bool(stops)  # bytes held back would come with the next chunk's
    _write(stop_at(writing, stops), wanted, seed, waits, show_chunks, as_json, raw, places)


def _check_together(candidates: int, memory: str | None, draft: Path | None, no_draft: bool) -> None:
    """Raise ValueError for options that exclude each other: none is left out unsaid."""
    if draft is not None and no_draft:
        raise ValueError("--draft and --no-draft contradict each other: give one")
    if memory is not None and candidates > 1:
        raise ValueError(f"--memory writes one candidate at a place: leave out --candidates {candidates}")
    if draft is not None and (memory is not None or candidates > 1):
        raise ValueError("--draft does not go with --candidates or --memory: leave it out")


def _prompts(typed: list[str], files: list[str]) -> list[bytes]:
    """Prompts as bytes. Raises ValueError where there is none."""
    # argv that is not UTF-8 arrives with surrogate escapes; fsencode gives the bytes back
    prompts = [os.fsencode(text) for text in typed]
    prompts += [read_text(name, MAX_PROMPT_BYTES).removesuffix(b"\n") for name in files]
    if not prompts:
        raise ValueError("no prompt given: pass --prompt TEXT, --prompt-file FILE or --prompt-file -")
    return prompts


def _ranker(rank: str) -> str | Callable[..., Any]:
    """A rule's name as it is; the function that `module:function` names, its errors in one line."""
    if not is_own(rank):
        return rank
    function = plugins.load_function(rank, "rank")
    return partial(plugins.called, f"rank={rank}", function)


def _write(
    writing: Iterator[Writing],
    prompts: list[bytes],
    seed: int,
    waits: bool,
    show_chunks: bool,
    as_json: bool,
    raw: bool,
    places: list[dict[str, Any]] | None,
) -> None:
    """Write to standard output: streamed for one continuation, each whole for several.

    waits: until the text is finished;  places: where `writing` notes what it chose from; None: that is not shown
    """
    from hldm.generation.writer import Continuation
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
    if streams:
        send(prompts[0])
    began = time.monotonic()
    rows: list[Continuation] = []
    calls = written = 0
    stopped: Stopped | None = None
    try:
        for rows, news, calls in writing:  # noqa: B007 - the last yield is the finished text
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
        _show_tree(send, places, 0)
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
            if places is not None:
                record["candidates"] = [place for place in places if place["row"] == index]
            send(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        else:
            send(f"[{index + 1}] ".encode() + row.prompt)
            for number, part in enumerate(row.chunks if show_chunks else [row.text]):
                send(part, is_last=False, chunk=number if show_chunks else None)
            send(b"\n")
            _show_tree(send, places, index)
    if stopped is not None:
        raise stopped


def _show_tree(send: Callable[[bytes], None], places: list[dict[str, Any]] | None, row: int) -> None:
    """What stood at each place of a row, where that is asked for and there was a choice."""
    from hldm.generation.candidates import as_tree

    if found := [place for place in places or [] if place["row"] == row]:
        send(as_tree(found).encode() + b"\n")


def chunk(
    *,
    text: Annotated[str, Option(metavar="FILE", help="file; - is standard input")],
    strategy: Annotated[list[str] | None, Option(metavar="NAME", help=STRATEGY_HELP)] = None,
    run: Annotated[list[Path] | None, Option(metavar="RUN", help="cut as this run does; may repeat")] = None,
    min_bytes: Annotated[int, Option(help="minimum of a chunk")] = 4,
    max_bytes: Annotated[
        int | None, Option(help="maximum of a chunk (default: 12; for sentence and paragraph 1024)")
    ] = None,
    target_bytes: Annotated[float, Option(help="mean of a chunk, for strategies with a model")] = 6.0,
    minutes: Annotated[float | None, Option(callback=options.check_minutes, help=OWN_SEGMENTERS)] = None,
    as_json: Annotated[bool, Option("--json", help="print the bytes of each chunk as JSON")] = False,
    html: Annotated[Path | None, Option(metavar="FILE", help="file for a page, instead of printing")] = None,
    allow_code: options.AllowCode = False,
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
        if not (strategy or run or as_json):
            print("Every strategy in turn; --strategy NAME shows one, --run RUN how that run cuts.\n")
        print(view.as_json(cuts) if as_json else view.as_text(cuts, shows_colour(sys.stdout)))
