"""Which files a path names: a file, a folder with all below it, or a glob of either.

A folder and a glob of its contents name the same files. Hidden and temporary files are left out, links are followed
once, and what was left out is counted in one line. Knows nothing of what the files hold.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hldm.config import ConfigError
from hldm.sources.notes import note, some

FORMATS = (".txt", ".jsonl", ".parquet")
# What editors, systems and archives leave beside a text; all that begins with a dot is hidden besides.
_LEFT_BEHIND = re.compile(
    r"__MACOSX|\$RECYCLE\.BIN|System Volume Information|lost\+found|Thumbs\.db|desktop\.ini|Icon\r"
    r"|.*~|~\$.*|#.*#|.*\.(bak|swp|swo|swx|tmp|temp|part|partial|crdownload|orig|rej)(\.gz)?",
    re.IGNORECASE,
)


def format_of(path: Path) -> str:
    """One of FORMATS, or "" for any other file; upper case counts, too."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    return ending if ending in FORMATS else ""


def matching_files(path: str) -> list[Path]:
    """The files that a file, folder or glob names, each once, sorted. Raises where there is none."""
    try:
        place = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise ConfigError(f"data.path={path}: {error}") from None
    endings = f"{', '.join(FORMATS)}, plain or with .gz"
    if place.is_file():
        if not format_of(place):
            raise ConfigError(f"data.path={path}: the file must end in {endings}")
        return [place]
    if place.is_dir():
        start, pattern = place, tuple[str, ...]()
    elif os.path.lexists(place):
        what = "a link to nothing" if place.is_symlink() and not place.exists() else "not a regular file"
        raise FileNotFoundError(f"data.path={path}: {what}")
    elif glob.has_magic(path):
        fixed = next(index for index, part in enumerate(place.parts) if glob.has_magic(part))
        start, pattern = Path(*place.parts[:fixed]), place.parts[fixed:]
    else:
        raise FileNotFoundError(f"data.path={path}: no such file or folder")
    search = _Search(start, pattern)
    if not search.files:
        raise FileNotFoundError(f"data.path={path}: no file there ends in {endings}{search.left_out()}")
    if search.left:
        note(f"data.path={path}: read {len(search.files):,} files{search.left_out()}")
    return sorted(search.files.values())


def typed_bytes(typed: str) -> bytes:
    r"""A word as typed in a shell, its line ends those of texts as they are read, `\n`, `\r` and `\t` what they mean.

    Not where a letter follows: `\newpage` and `\textbf` are themselves.
    """
    escapes = {"n": "\n", "r": "\r", "t": "\t"}
    meant = re.sub(r"\\([nrt])(?![A-Za-z])", lambda match: escapes[match[1]], typed)
    return meant.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "surrogateescape")


class _Search:
    """The files below a folder that a glob names, or that lie in a folder it names; and what was left out.

    A path is found together with its place in the pattern: how many of the pattern's parts lead to it.
    """

    def __init__(self, start: Path, pattern: Sequence[str]) -> None:
        """pattern: parts of a glob as in glob.glob, `**` for any folders; () for all files."""
        named = list(pattern)
        if named[-1:] == ["*"]:
            named[-1] = "**"  # the same, for a folder that is named is entered
        self.names_folders = named[-1:] == ["**"]
        while named[-1:] == ["**"]:
            named.pop()
        self.pattern = [*named, "**"]
        self.left: dict[str, dict[Path, None]] = {}  # by reason, in order
        self.files: dict[tuple[int, int], Path] = {}  # by device and inode: each once, however it is reached
        folders: set[tuple[int, int, int]] = set()  # entered, and at which place: a loop of links ends
        found = [(start, 0)] if start.is_dir() else []
        # followed last, so that a file is known by its own name if it has one here
        links: list[tuple[Path, int]] = []
        while found or links:
            path, place = found.pop() if found else links.pop(0)
            try:
                status = path.stat()
            except OSError:  # no such file, a loop of links, or a place that may not be looked at
                if path.is_symlink():
                    self._leave("links to nothing", path)
                continue
            inode = status.st_dev, status.st_ino
            if not path.is_dir():
                if place == len(self.pattern) - 1:
                    self._add(path, inode, status.st_size)
            elif (*inode, place) not in folders:
                folders.add((*inode, place))
                inside = [
                    (entry, at) for entry in sorted(path.iterdir()) for at in self._places(entry, place)
                ]
                links += [(entry, at) for entry, at in inside if entry.is_symlink()]
                found += [(entry, at) for entry, at in reversed(inside) if not entry.is_symlink()]
            elif path.is_symlink():
                self._leave("links to what is read already", path)

    def _places(self, entry: Path, place: int) -> list[int]:
        """The places in the pattern of what lies in a folder at `place`; none where it does not match."""
        part = self.pattern[place]
        if part == "**":
            is_last = place == len(self.pattern) - 1
            stays = (is_last or entry.is_dir()) and not self._is_hidden(entry)
            return [place] * stays + ([] if is_last else self._places(entry, place + 1))
        if not fnmatch.fnmatchcase(entry.name, part):
            return []
        if self.names_folders and place == len(self.pattern) - 2 and not entry.is_dir():
            return []
        is_named = part.startswith(".") or not glob.has_magic(part)
        return [place + 1] if is_named or not self._is_hidden(entry) else []

    def _add(self, path: Path, inode: tuple[int, int], size: int) -> None:
        if not path.is_file():
            self._leave("not regular files", path)
        elif not format_of(path):
            self._leave("with other endings", path)
        elif self.files.get(inode, path) != path:
            self._leave("links to what is read already", path)
        elif not size:
            self._leave("empty", path)
        else:
            self.files[inode] = path

    def _is_hidden(self, path: Path) -> bool:
        if path.name.startswith(".") or _LEFT_BEHIND.fullmatch(path.name):
            self._leave("hidden or temporary", path)
            return True
        return False

    def _leave(self, reason: str, path: Path) -> None:
        self.left.setdefault(reason, {})[path] = None

    def left_out(self) -> str:
        """What was left out, in words, from the comma on; "" for nothing."""
        parts = [
            f"{len(paths):,} {reason} ({some(path.name for path in sorted(paths)[:3])})"
            for reason, paths in sorted(self.left.items())
        ]
        return f"; left out: {', '.join(parts)}" if parts else ""
