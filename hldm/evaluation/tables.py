"""Tables: by rich on a terminal, in Markdown anywhere else; `-` where there is no value.

`compare` holds the rows of an evaluation; the studies make their own. Knows no model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hldm.text.bytes import printable

CELL_WIDTH = 24  # columns of a terminal that a name may take: two of them beside a label fit into 80


class Table(NamedTuple):
    """Formatted cells below a head. The first column is a label, at the left; values stand at the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Markdown, its columns of one width each, so that it can be read as it is."""
        table = [[printable(" ".join(text.split("\n"))) for text in line] for line in (self.head, *self.rows)]
        widths = [max(map(width, column)) for column in zip(*table, strict=True)]
        rule = ["-" * (widths[0] + 2), *("-" * (most + 1) + ":" for most in widths[1:])]
        lines = []
        for label, *values in table:
            cells = [
                " " * (most - width(value)) + value for value, most in zip(values, widths[1:], strict=True)
            ]
            lines.append(f"| {' | '.join([label + ' ' * (widths[0] - width(label)), *cells])} |")
        return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])

    @classmethod
    def of_records(
        cls, records: Iterable[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]
    ) -> Table:
        """A row a record. columns: head of each, with the key and the format of its values."""
        rows = [[cell(record.get(key), form) for key, form in columns.values()] for record in records]
        return cls(list(columns), rows)


def legend(meanings: Mapping[str, str], heads: Iterable[str]) -> str:
    """What columns mean, a line each, of those among the heads."""
    shown = [head for head in heads if head in meanings]
    return "\n".join(f"{head:<{max(map(len, shown))}}  {meanings[head]}" for head in shown)


def show(*parts: str | Table) -> None:
    """Print texts and tables on standard output, an empty line between any two."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    for number, part in enumerate(parts):
        if number:
            print()
        if on_terminal and isinstance(part, Table):
            _print_richly(part)
        else:
            print(part)
    print(end="", flush=True)


def _print_richly(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, emoji=False, highlight=False)

    def drawn(columns: Sequence[int]) -> RichTable:
        found = RichTable(box=box.SIMPLE_HEAD)
        for column in columns:
            found.add_column(
                printable(table.head[column]), justify="right" if column else "left", no_wrap=True
            )
        for cells in table.rows:
            found.add_row(*(printable(cells[column]) for column in columns))
        return found

    def needed(columns: Sequence[int]) -> int:
        return console.measure(drawn(columns), options=console.options.update(width=10**6)).maximum

    # what is wider than the terminal goes on below, after the label again; no column is cut
    blocks = [[0]]
    for column in range(1, len(table.head)):
        if len(blocks[-1]) > 1 and needed([*blocks[-1], column]) > console.width:
            blocks.append([0])
        blocks[-1].append(column)
    console.width = max(console.width, *map(needed, blocks))
    for block in blocks:
        console.print(drawn(block))


def cell(value: Any, form: str, scale: float = 1) -> str:
    """A formatted value: a name short and harmless, a huge number as a power of ten."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return short(value)
    value *= scale
    if form.endswith("f") and "," not in form and 1e7 <= abs(value) < math.inf:
        digits, power = format(value, ".1e").split("e")
        return f"{digits} x 10^{int(power)}"
    return format(value, form)


def short(text: str) -> str:
    """A name for a table: one line, harmless, with its middle left out where it is long."""
    shown = printable(" ".join(text.split()))
    if width(shown) <= CELL_WIDTH:
        return shown
    room, begin, end = CELL_WIDTH - 1, "", ""
    while True:  # a letter from either end by turns
        letter = shown[len(begin)] if len(begin) <= len(end) else shown[-1 - len(end)]
        room -= width(letter)
        if room < 0:
            return f"{begin}…{end}"
        begin, end = (begin + letter, end) if len(begin) <= len(end) else (begin, letter + end)


def width(text: str) -> int:
    """Columns that a text takes on a terminal: two for a wide character, none for a mark."""
    from rich.cells import cell_len

    return cell_len(text)


def row(label: str, form: str, columns: Mapping[str, Any], *keys: str, scale: float = 1) -> list[str]:
    """A label and, for every column, the formatted value below these keys; `-` where the path ends early."""
    cells = [label]
    for value in columns.values():
        for key in keys:
            value = None if value is None else value.get(key)
        cells.append(cell(value, form, scale))
    return cells


# ---- evaluations

# below a table of evaluations
READING = (
    "bits per character: lower is better; of it latents: the prior's share, for what comes next; of it bytes and "
    "ends: the decoder's, for spelling it (a twin has no latents). Every line: docs/reading.md"
)
# label, dotted key, format
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("characters", "characters", ",.0f"),
    ("bits per character (an upper bound)", "bits_per_character.bound", ".4f"),
    ("  standard error, Monte Carlo", "bits_per_character.standard_error", ".4f"),
    ("  standard error, another text", "bits_per_character.standard_error_text", ".4f"),
    ("  of it latents", "bits_per_character.latent", ".4f"),
    ("  of it bytes and ends", "bits_per_character.decoder", ".4f"),
    ("  of it the end term", "bits_per_character.end", ".4f"),
    ("  by importance-weighted draws", "bits_per_character.importance", ".4f"),
    ("    how many", "samples", ".0f"),
    ("  of the answers alone", "bits_per_character.answer", ".4f"),
    ("perplexity, character", "perplexity.character", ".3f"),
    ("characters per chunk", "characters_per_chunk", ".2f"),
    ("reconstruction, bytes right", "reconstruction.noisy.byte_accuracy", ".2%"),
    ("  from latents without noise", "reconstruction.clean.byte_accuracy", ".2%"),
    ("reconstruction, chunks right", "reconstruction.noisy.chunk_accuracy", ".2%"),
    ("  from latents without noise", "reconstruction.clean.chunk_accuracy", ".2%"),
    ("latents, independent directions (rank)", "alive.rank", ".2f"),
    ("  dimensions that never vary", "alive.dead_dimensions", ".0f"),
    ("prior, prototypes in use", "alive.prototypes", ",.0f"),
    ("  uncertainty which of them is next, bits", "alive.weights_bits", ".2f"),
    *(
        (f"bits lost without {label}", f"parts.rows.{name}.hidden.bits", ".4f")
        for label, name in (
            ("the denoiser", "denoiser"),
            ("the denoiser's context", "context"),
            ("the trunk's memory", "trunk"),
            ("the latent", "latent"),
        )
    ),
    *(
        row
        for kind in ("1", "2", "L")
        for row in (
            (f"ROUGE-{kind} of continuations", f"rouge.rouge{kind}", ".3f"),
            ("  baseline, prompt repeated", f"rouge.baselines.repeat_prompt.rouge{kind}", ".3f"),
            ("  baseline, random passage", f"rouge.baselines.random_passage.rouge{kind}", ".3f"),
        )
    ),
    *(
        row
        for label, key, form in (
            ("different words", "distinct1", ".3f"),
            ("different word pairs", "distinct2", ".3f"),
            ("entropy of words, bits", "entropy", ".2f"),
            ("repetition", "repetition", ".3f"),
        )
        for row in (
            (f"diversity, {label}", f"diversity.{key}", form),
            ("  of the true text", f"diversity.reference.{key}", form),
        )
    ),
    ("written chunks, cut where text is cut", "rechunked", ".2%"),
    ("speed of writing, characters per second", "speed.characters_per_second", ",.0f"),
    ("cost, parameters", "cost.parameters", ",.0f"),
    ("  seconds of training", "cost.train_seconds", ",.0f"),
    ("  characters of training", "cost.train_characters", ",.0f"),
)


# of `hldm evaluate --meaning`
_MEANING: tuple[tuple[str, str, str], ...] = (
    ("verses found in another translation", "meaning.translation", ""),
    *(
        (f"  by {name}", f"meaning.{kind}.recall_1", ".1%")
        for kind, name in (
            ("tfidf", "TF-IDF of characters"),
            ("latents", "latents, whitened"),
            ("summaries", "means of chunks, whitened"),
            ("features", "means of bytes, whitened"),
            ("trunk", "the trunk, whitened"),
        )
    ),
    ("book of a verse by 5 neighbours, means of bytes", "meaning.features.book_nearest", ".1%"),
)


def compare(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Evaluations side by side: a column each, named by its key; no row of what none of them has.

    Raises ValueError where their texts differ.
    """
    from hldm.evaluation.context_length import rows

    texts = {found.get("text", "")[:12] or "unknown": name for name, found in columns.items()}
    if len(texts) > 1:
        named = ", ".join(f"{name} on {text}" for text, name in texts.items())
        raise ValueError(f"evaluations of different texts do not stand in one table: {named}")
    known = (*_ROWS, *rows(columns.values()), *_MEANING)
    # no importance-weighted draws: nothing to say of them
    asked = {name: {**found, "samples": found.get("samples") or None} for name, found in columns.items()}
    found = [row(label, form, asked, *key.split(".")) for label, key, form in known]
    return Table(["", *map(short, columns)], [line for line in found if set(line[1:]) != {"-"}])


def measured_on(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of evaluations, the line that says which text they were measured on."""
    texts = (found.get("measured_on") or found.get("split") for found in columns.values())
    return [f"measured on {text}" for text in dict.fromkeys(texts) if text]
