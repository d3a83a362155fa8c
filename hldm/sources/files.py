"""Which files a path names: a file, a folder with all below it, or a glob of either.

A folder and a glob of its contents name the same files. Hidden and temporary files are left out, links are followed
once, and what was left out is counted in one line. Knows nothing of what the files hold.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
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
    search = _Search()
    if place.is_dir():
        search.enter(place)
    elif os.path.lexists(place):
        what = "a link to nothing" if place.is_symlink() and not place.exists() else "not a regular file"
        raise FileNotFoundError(f"data.path={path}: {what}")
    elif glob.has_magic(path):
        search.match(place)
    else:
        raise FileNotFoundError(f"data.path={path}: no such file or folder")
    search.follow_links()
    files = search.files()
    if not files:
        raise FileNotFoundError(f"data.path={path}: no file there ends in {endings}{search.left_out()}")
    if search.left:
        note(f"data.path={path}: read {len(files):,} files{search.left_out()}")
    return files


class _Search:
    """Files found so far, and what was left out."""

    def __init__(self) -> None:
        self.left: dict[str, dict[Path, None]] = {}  # by reason, in order
        self._files: dict[tuple[int, int], Path] = {}  # by device and inode: each once, however it is reached
        self._folders: set[tuple[int, int]] = set()
        self._links: list[
            Path
        ] = []  # followed last, so that a file is known by its own name if it has one here

    def match(self, pattern: Path) -> None:
        """What a glob names; a folder that it names is entered. `**` is any folders, as in glob.glob."""
        parts = pattern.parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        todo = [(Path(*parts[:fixed]), fixed)]
        linked: list[tuple[Path, int]] = []
        walked: set[tuple[int, int, int]] = set()  # folders that `**` stood for: a loop of links ends
        while todo or linked:
            path, index = todo.pop() if todo else linked.pop(0)
            if index == len(parts):
                self.take(path, is_named=True)
                continue
            if not glob.has_magic(parts[index]):
                if os.path.lexists(path / parts[index]):
                    todo.append((path / parts[index], index + 1))
                continue
            if not path.is_dir():
                continue
            is_any = parts[index] == "**"
            if parts[index:] == ("*",):  # the same as entering it
                found = path.stat()
                self._folders.add((found.st_dev, found.st_ino))
            if is_any and index + 1 == len(parts):
                self.take(path, is_named=True)
                continue
            if is_any:
                found = path.stat()
                if (found.st_dev, found.st_ino, index) in walked:
                    continue
                walked.add((found.st_dev, found.st_ino, index))
                todo.append((path, index + 1))
            for entry in sorted(path.iterdir(), reverse=True):
                if is_any and not entry.is_dir():
                    continue
                if not is_any and not fnmatch.fnmatchcase(entry.name, parts[index]):
                    continue
                if not parts[index].startswith(".") and self._is_hidden(entry):
                    continue
                (linked if entry.is_symlink() else todo).append((entry, index + (not is_any)))

    def take(self, path: Path, is_named: bool = False) -> None:
        """A file, a folder with all below it, or a link to either. is_named: by its very name, hidden or not."""
        if not is_named and self._is_hidden(path):
            return
        if path.is_symlink():
            self._links.append(path)
        else:
            self._enter_or_add(path)

    def enter(self, folder: Path) -> None:
        """Everything below a folder; one that was entered before is left alone."""
        folders = [folder]
        while folders:
            found = folders[-1].stat()
            inside = sorted(folders.pop().iterdir())
            if (found.st_dev, found.st_ino) in self._folders:
                continue
            self._folders.add((found.st_dev, found.st_ino))
            for path in inside:
                if path.is_dir() and not path.is_symlink() and not self._is_hidden(path):
                    folders.append(path)
                elif not path.is_dir() or path.is_symlink():
                    self.take(path)

    def follow_links(self) -> None:
        """Take what links lead to; a loop ends where it would enter a folder again."""
        while self._links:
            link = self._links.pop(0)
            try:
                found = link.stat()
            except OSError:  # no such file, a loop of links, or a place that may not be looked at
                self._leave("links to nothing", link)
                continue
            place = (found.st_dev, found.st_ino)
            if self._files.get(place) == link:
                continue
            if place in self._folders or place in self._files:
                self._leave("links to what is read already", link)
            else:
                self._enter_or_add(link)

    def files(self) -> list[Path]:
        """Those found, sorted."""
        return sorted(self._files.values())

    def left_out(self) -> str:
        """What was left out, in words, from the comma on; "" for nothing."""
        parts = [
            f"{len(paths):,} {reason} ({some(path.name for path in sorted(paths)[:3])})"
            for reason, paths in sorted(self.left.items())
        ]
        return f"; left out: {', '.join(parts)}" if parts else ""

    def _enter_or_add(self, path: Path) -> None:
        if path.is_dir():
            self.enter(path)
        elif not path.is_file():
            self._leave("not regular files", path)
        elif not format_of(path):
            self._leave("with other endings", path)
        else:
            found = path.stat()
            place = (found.st_dev, found.st_ino)
            if place in self._files and self._files[place] != path:
                self._leave("links to what is read already", path)  # a hard link
            elif not found.st_size:
                self._leave("empty", path)
            else:
                self._files.setdefault(place, path)

    def _is_hidden(self, path: Path) -> bool:
        if path.name.startswith(".") or _LEFT_BEHIND.fullmatch(path.name):
            self._leave("hidden or temporary", path)
            return True
        return False

    def _leave(self, reason: str, path: Path) -> None:
        self.left.setdefault(reason, {})[path] = None
