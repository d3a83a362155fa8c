"""What the site has beyond mkdocs.yml: pages from outside docs/, a page of API for each folder, and the order of all.

README.md is the index. A page that is there is in the navigation, a page that is not is not missed. A link to a file of
the repository that is no page, such as configs/tiny.yaml, becomes plain text; a link to nothing stays, and fails.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# pages of the site that are files elsewhere
ELSEWHERE = {
    "index.md": "README.md",
    "changes.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    **{
        f"examples/{p.parent.name}.md": f"examples/{p.parent.name}/README.md"
        for p in ROOT.glob("examples/*/README.md")
    },
    "examples/index.md": "examples/README.md",
}
# the order of what is in docs/; the rest comes after it, by name
GUIDES = (
    "concepts",
    "glossary",
    "commands",
    "faq",
    "architecture",
    "chunking",
    "training",
    "reading",
    "parts",
    "look",
    "scoring",
    "sharing",
    "own_part",
    "steering",
    "jepa",
    "cluster",
)
EVIDENCE = ("results", "performance", "reliability", "journal")
LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
# a picture in a light and a dark version, as GitHub has it
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img alt="([^"]+)" src="([^"]+)">\s*</picture>'
)


def rooms() -> dict[str, list[str]]:
    """The modules of each folder of the package, and of the single files."""
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("hldm/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not parts[-1].startswith("__"):
            found.setdefault(parts[1] if len(parts) > 2 else "settings and commands", []).append(
                ".".join(parts)
            )
    return found


def api_pages() -> dict[str, str]:
    """Markdown of the API, by page."""
    return {
        f"api/{room.replace(' ', '_')}.md": f"# {room}\n\n"
        + "".join(f"::: {module}\n\n" for module in modules)
        for room, modules in rooms().items()
    }


def _ordered(names: set[str], first: tuple[str, ...]) -> list[str]:
    return [f"{name}.md" for name in (*[n for n in first if n in names], *sorted(names - {*first}))]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, of the pages that are there."""
    here = {path.stem for path in Path(config.docs_dir).glob("*.md")}
    tutorials = sorted(path.name for path in Path(config.docs_dir).glob("tutorials/*.md"))
    examples = sorted(
        page for page in ELSEWHERE if page.startswith("examples/") and page != "examples/index.md"
    )
    config.nav = [
        {"hldm": "index.md"},
        {"Tutorials": [f"tutorials/{name}" for name in tutorials]},
        {"Guides": _ordered(here - {*EVIDENCE}, GUIDES)},
        {"Examples": ["examples/index.md", *examples]},
        {"Evidence": _ordered(here & {*EVIDENCE}, EVIDENCE)},
        {"API": sorted(api_pages())},
        {"Changes": ["changes.md", "contributing.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages from outside docs/, and those of the API."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for page, name in ELSEWHERE.items()}
    for page, text in {**pages, **api_pages()}.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the repository has them, made links of the site; pictures follow the theme's own button."""
    markdown = PICTURE.sub(r"![\2](\3#only-light) ![\2](\1#only-dark)", markdown)
    uri = page.file.src_uri
    source = ROOT / ELSEWHERE.get(uri, f"docs/{uri}")
    pages = {str((ROOT / name).resolve()): page for page, name in ELSEWHERE.items()}
    up = "../" * uri.count("/")

    def moved(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (source.parent / target).resolve()
        found = pages.get(str(path))
        docs = Path(config.docs_dir).resolve()
        if found is None and path.is_relative_to(docs) and path.is_file():
            found = path.relative_to(docs).as_posix()
        if found is not None and files.get_file_from_path(found):
            return f"{image}[{text}]({up}{found}{anchor})"
        return text if path.exists() and not image else match[0]

    return LINK.sub(moved, markdown)


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """A built page that would load something over a network fails the build."""
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?(https?:)?//[^"'\s>]+""")
    for path in Path(config.site_dir).rglob("*.html"):
        for match in loaded.finditer(path.read_text(encoding="utf-8")):
            if 'rel="canonical"' not in match[0]:
                raise SystemExit(f"{path} loads {match[0]} over a network")
