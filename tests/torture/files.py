"""What lies beside a text, and how it is encoded: the same documents come out, or one line that names the file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from hldm.config import DataConfig
from hldm.sources.corpora import load_corpora
from hldm.sources.encodings import read_text
from hldm.text.bytes import MAX_PROMPT_BYTES
from tests.torture.trial import Trial

FOLDERS, ENCODINGS = 1500, 1500
TEXT = (
    "First of the lines, with wörds, 世界, नमस्ते and \U0001f600.\n\nA second document, longer than the first.\n\n"
    * 12
)

# What is left beside a text by systems, editors and archives, each a function of the folder: never read.
LEFT_OUT: dict[str, Callable[[Path], object]] = {
    "hidden file": lambda folder: (folder / ".hidden.txt").write_text("secret"),
    "resource fork": lambda folder: (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07fork"),
    "backup": lambda folder: (folder / "a.txt~").write_text("old"),
    "swap file": lambda folder: (folder / "a.txt.swp").write_bytes(b"b0VIM"),
    "half a download": lambda folder: (folder / "b.txt.part").write_text("half"),
    "other ending": lambda folder: (folder / "README.md").write_text("no text"),
    "empty file": lambda folder: (folder / "empty.txt").touch(),
    "FIFO": lambda folder: os.mkfifo(folder / "pipe.txt"),
    "socket": lambda folder: socket.socket(socket.AF_UNIX).bind(os.path.relpath(folder / "s.txt")),
    "device": lambda folder: (folder / "null.txt").symlink_to("/dev/null"),
    "dangling link": lambda folder: (folder / "gone.txt").symlink_to("nowhere.txt"),
    "link to itself": lambda folder: (folder / "self.txt").symlink_to("self.txt"),
    "two links to the folder": lambda folder: [(folder / name).symlink_to(".") for name in ("one", "two")],
    "link to the text": lambda folder: (folder / "z.txt").symlink_to("a.txt"),
    "hard link": lambda folder: os.link(folder / "a.txt", folder / "zz.txt"),
    "checkpoints of notebooks": lambda folder: inside(folder, ".ipynb_checkpoints", "copy"),
    "repository": lambda folder: inside(folder, ".git/objects", "blob"),
    "archive's rest": lambda folder: inside(folder, "__MACOSX", "fork"),
    "empty folder named as a text": lambda folder: (folder / "folder.txt").mkdir(),
}


def inside(folder: Path, name: str, content: str) -> None:
    """A text in a folder of its own."""
    (folder / name).mkdir(parents=True)
    (folder / name / "x.txt").write_text(content)


def zipped(text: bytes) -> bytes:
    """A zip archive of one file."""
    whole = BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a.txt", text)
    return whole.getvalue()


# What becomes the same text.
DECODED: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16 LE": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "UTF-16 BE": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "gzip": lambda text: gzip.compress(text.encode()),
    "gzip of UTF-16 and CR LF": lambda text: gzip.compress(text.replace("\n", "\r\n").encode("utf-16")),
    "two gzip members": lambda text: gzip.compress(text[:99].encode()) + gzip.compress(text[99:].encode()),
}
# What is refused by name.
REFUSED: dict[str, Callable[[str], bytes]] = {
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "Latin-1": lambda text: text.encode("latin-1", "ignore"),
    "Shift-JIS": lambda text: text.encode("shift-jis", "ignore") + "世界の始め".encode("shift-jis"),
    "a NUL far in": lambda text: text.encode() + b"\0",
    "a byte of no text at the end": lambda text: text.encode() + b"\xe9",
    "gzip within gzip": lambda text: gzip.compress(gzip.compress(text.encode())),
    "gzip, cut": lambda text: gzip.compress(text.encode())[:-9],
    "bzip2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "zip": lambda text: zipped(text.encode()),
    "parquet": lambda text: b"PAR1" + text.encode() + b"PAR1",
    "a pointer": lambda text: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "white space": lambda text: b" \n\t" * 99 + "\u3000".encode(),
}


def torture(trial: Trial) -> None:
    before = Path.cwd()
    os.chdir(trial.folder)  # sockets take short names alone
    try:
        read_all(trial)
    finally:
        os.chdir(before)


def read_all(trial: Trial) -> None:
    """Folders with what is left beside a text, then files of every encoding."""
    home = trial.folder / "plain"
    home.mkdir()
    (home / "a.txt").write_text(TEXT)
    expected, _ = read(home)
    said = 0
    for number in range(trial.count(FOLDERS)):
        beside = trial.draw.sample(sorted(LEFT_OUT), trial.draw.randint(1, 6))
        folder = trial.folder / f"{number}"
        place = folder / "deeper" if trial.draw.random() < 0.3 else folder
        place.mkdir(parents=True)
        (place / "a.txt").write_text(TEXT)
        for name in beside:
            LEFT_OUT[name](place)
        path = f"{folder}{trial.draw.choice(['', '/', '/**', '/**/*', '/**/*.txt'])}"
        found, notes = read(Path(path))
        wrong = [] if found == expected else [f"other documents: {found}"]
        if "left out" in notes:
            said += 1
        elif set(beside) - {"other ending", "empty folder named as a text"} and not path.endswith(".txt"):
            wrong.append(f"left out without a word: {notes}")
        trial.record(f"{path} beside {', '.join(beside)}", wrong)
        shutil.rmtree(folder)
    for _ in range(trial.count(ENCODINGS)):
        name, form = trial.draw.choice([*DECODED, *REFUSED]), trial.draw.choice(["text", "rows", "prompt"])
        path = trial.folder / trial.draw.choice(
            ["a.txt", "A.TXT", "a.txt.gz"] if form != "rows" else ["a.jsonl"]
        )
        trial.record(f"{name} as {path.name}, {form}", check(path, name, form, expected))
        path.unlink()
    trial.note = (
        f"{said} folders said what they left out; {len(DECODED)} encodings decoded, {len(REFUSED)} refused"
    )


def check(path: Path, name: str, form: str, expected: str) -> list[str]:
    """Write the text as a file of some encoding; what is wrong about how it is read.

    form: a text and rows are read as for training, a prompt as it is;  expected: fingerprint of what both make
    """
    rows = "".join(json.dumps({"text": part}, ensure_ascii=False) + "\n" for part in TEXT.split("\n\n"))
    path.write_bytes({**DECODED, **REFUSED}[name](rows if form == "rows" else TEXT))
    try:
        found = read_text(path, MAX_PROMPT_BYTES).decode() if form == "prompt" else read(path)[0]
    except (ValueError, OSError) as error:
        if name in DECODED and (name, form) != ("CR", "rows"):  # no rows without line ends
            return [f"refused: {error}"]
        return [] if path.name in str(error) and "\n" not in str(error) else [f"told badly: {error}"]
    if name in REFUSED:
        return [] if (name, form) == ("white space", "prompt") else ["was read"]
    return [] if found == (TEXT if form == "prompt" else expected) else ["another text"]


def read(path: Path) -> tuple[str, str]:
    """Fingerprint of the training documents of a path, and what was said about it."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        corpora = load_corpora(DataConfig(path=str(path), separator="\n\n", held_out=0.1))
    return corpora["train"].fingerprint, " ".join(str(note.message) for note in notes)
