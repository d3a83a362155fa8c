"""Draw the data flow of hldm: data-flow-light.svg and data-flow-dark.svg, beside this file.

    python docs/figures/data_flow.py

A schema in plain SVG: text in chunks, encoder, latents, pyramid and trunk, prior, next latent, decoder, next chunk.
The shades of the squares are an illustration, not numbers of a model. Needs nothing but Python, and writes the same
bytes every time (tests/test_docs.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

# cut at white space, as `words` does (tests/test_docs.py)
CHUNKS = ("And the", " king", " said", " to them,", " Come", " near")
NEXT = " me,"
NEXT_COLOR = 2  # of the four, in turn
WIDTH, HEIGHT = 760, 450
LEFT, RIGHT = 20, 466  # of the column that encodes
NEXT_X = 640  # middle of the column that writes
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Colors(NamedTuple):
    """Colours of one version, as CSS has them."""

    text: str
    muted: str  # labels and arrows
    box: str  # a network's background
    border: str
    chunks: tuple[str, ...]  # backgrounds, in turn
    latents: tuple[str, ...]  # the same, stronger


THEMES = {
    "light": Colors(
        "#1f2328",
        "#59636e",
        "#f3f5f8",
        "#a9b3bf",
        ("#cfe8ff", "#ffe6b3", "#d5f0d9", "#f6d9ec"),
        ("#0969b2", "#b36200", "#1a7f45", "#a8327e"),
    ),
    "dark": Colors(
        "#f0f3f6",
        "#a3adb8",
        "#1d242d",
        "#5b6672",
        ("#12416b", "#5c420c", "#1c4a2b", "#572344"),
        ("#6cb8f7", "#f0b04a", "#6fd08c", "#ee8fca"),
    ),
}


class Drawing:
    """SVG elements, in the order they are drawn."""

    def __init__(self, colors: Colors) -> None:
        self.colors, self.parts = colors, list[str]()

    def text(
        self, x: float, y: float, words: str, size: int = 13, *, anchor: str = "middle", kind: str = "text"
    ) -> None:
        """kind: text, bold, muted, or mono for characters of the text itself."""
        family = MONO if kind == "mono" else SANS
        weight = ' font-weight="600"' if kind == "bold" else ""
        fill = self.colors.muted if kind == "muted" else self.colors.text
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-family="{family}"{weight} fill="{fill}" '
            f'text-anchor="{anchor}" xml:space="preserve">{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *, dashed: bool = False
    ) -> None:
        """A rounded rectangle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
            f'stroke="{self.colors.border}"{dash}/>'
        )

    def network(self, x: float, y: float, width: float, name: str, does: str) -> None:
        """A box of 44 with a name and one line of what it does."""
        self.box(x, y, width, 44, self.colors.box)
        self.text(x + width / 2, y + 18, name, 14, kind="bold")
        self.text(x + width / 2, y + 35, does, 12, kind="muted")

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through these points, with a head at the last."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.colors.muted}" stroke-width="1.5"{dash} '
            'marker-end="url(#head)"/>'
        )

    def latent(self, x: float, y: float, seed: int, color: str, noise: float = 0.0) -> None:
        """Four squares around x, y. noise: share of a shade that belongs to no colour."""
        for place in range(4):
            shade = 0.25 + 0.75 * ((seed * 37 + place * 59 + 11) % 97) / 96
            left, top = x - 11 + 12 * (place % 2), y - 11 + 12 * (place // 2)
            for fill, opacity in ((self.colors.muted, noise * (1.2 - shade)), (color, (1 - noise) * shade)):
                if opacity > 0:
                    self.parts.append(
                        f'<rect x="{left:g}" y="{top:g}" width="10" height="10" rx="2" fill="{fill}" '
                        f'fill-opacity="{opacity:.2f}"/>'
                    )

    def svg(self, title: str) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img">\n<title>{escape(title)}</title>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{self.colors.muted}"/></marker></defs>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def draw(colors: Colors) -> str:
    """The picture in these colours."""
    drawing = Drawing(colors)
    drawing.text(LEFT, 24, "text, cut into chunks", kind="muted", anchor="start")
    drawing.text(NEXT_X, 24, "next chunk", kind="muted")
    _encode(drawing)
    _predict(drawing)
    _write(drawing)
    return drawing.svg(
        "hldm: text in chunks, encoder, latents, pyramid and trunk, prior, next latent, decoder, words"
    )


def _encode(drawing: Drawing) -> None:
    """Chunks, encoder and latents, downward on the left."""
    colors, x = drawing.colors, float(LEFT)
    gap = (RIGHT - LEFT - sum(8.2 * len(chunk) + 12 for chunk in CHUNKS)) / (len(CHUNKS) - 1)
    for number, chunk in enumerate(CHUNKS):
        width, color = 8.2 * len(chunk) + 12, number % len(colors.chunks)
        drawing.box(x, 34, width, 28, colors.chunks[color])
        drawing.text(x + width / 2, 53, chunk, kind="mono")
        drawing.arrow((x + width / 2, 64), (x + width / 2, 82))
        drawing.arrow((x + width / 2, 130), (x + width / 2, 150))
        drawing.latent(x + width / 2, 166, number, colors.latents[color])
        x += width + gap
    drawing.network(
        LEFT, 84, RIGHT - LEFT, "encoder", "reads the bytes; its recurrent state goes on from chunk to chunk"
    )
    drawing.text(LEFT, 202, "one latent a chunk: 4 numbers", kind="muted", anchor="start")


def _predict(drawing: Drawing) -> None:
    """Pyramid, trunk and prior, and the denoising of the next latent."""
    colors = drawing.colors
    drawing.network(LEFT, 228, 212, "pyramid", "means of 8, 64, 512 chunks")
    drawing.network(LEFT + 234, 228, 212, "trunk", "recurrent, one step a chunk")
    drawing.arrow((LEFT + 106, 208), (LEFT + 106, 226))
    drawing.arrow(
        (LEFT + 308, 130), (LEFT + 308, 226)
    )  # between two latents: it takes the encoder's features
    drawing.text(LEFT + 318, 204, "features of each chunk", 12, kind="muted", anchor="start")
    for middle in (LEFT + 106, LEFT + 340):
        drawing.arrow((middle, 274), (middle, 308))
    drawing.text(LEFT + 118, 296, "context", 12, kind="muted", anchor="start")
    drawing.text(LEFT + 352, 296, "summary", 12, kind="muted", anchor="start")
    drawing.network(
        LEFT,
        310,
        RIGHT - LEFT,
        "prior: a mixture of typical latents + a denoiser",
        "p(next latent | text before)",
    )
    y = 412
    drawing.arrow((243, 356), (243, y), (484, y))
    drawing.text(LEFT + 214, y - 8, "removes noise, step by step", 12, kind="muted", anchor="end")
    for x, noise in ((506, 1.0), (573, 0.5), (NEXT_X, 0.0)):
        drawing.latent(x, y, 21, colors.latents[NEXT_COLOR], noise)
        if x != NEXT_X:
            drawing.arrow((x + 18, y), (x + 49, y))
    drawing.text(506, y + 28, "noise", 12, kind="muted")
    drawing.text(NEXT_X, y + 28, "next latent", 12, kind="muted")


def _write(drawing: Drawing) -> None:
    """From the next latent upward to the next chunk, which joins the text."""
    drawing.arrow((NEXT_X, 394), (NEXT_X, 130))
    drawing.network(NEXT_X - 100, 84, 200, "decoder", "writes byte by byte, and ends")
    drawing.arrow((LEFT + 448, 250), (570, 250), (570, 130))
    drawing.text(578, 204, "summary", 12, kind="muted", anchor="start")
    drawing.arrow((NEXT_X, 82), (NEXT_X, 64))
    width = 8.2 * len(NEXT) + 12
    drawing.box(NEXT_X - width / 2, 34, width, 28, drawing.colors.chunks[NEXT_COLOR], dashed=True)
    drawing.text(NEXT_X, 53, NEXT, kind="mono")
    drawing.arrow((NEXT_X - width / 2 - 4, 48), (RIGHT + 6, 48), dashed=True)
    drawing.text((NEXT_X + RIGHT) / 2 - 8, 42, "read back, repeat", 12, kind="muted")


def main() -> None:
    """Write both versions."""
    for name, colors in THEMES.items():
        path = Path(__file__).with_name(f"data-flow-{name}.svg")
        path.write_text(draw(colors), encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main()
