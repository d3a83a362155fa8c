"""From the bytes of a file to text: UTF-8 with newlines, or one line that says what the file is instead.

The same for training files, prompt files and `--text`. What a file is called does not matter: gzip is unpacked;
UTF-16 and UTF-32 are decoded where a byte-order mark says so; the mark itself is dropped; CR LF, and CR in a file
without LF, become LF. Everything else that is not UTF-8 text is refused: nobody can know what was meant.
"""

from __future__ import annotations

import codecs
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

MAX_UNPACKED_BYTES, MAX_UNPACKING = 64 * 2**20, 100  # beyond so much, to 100 times its size: a bomb, no text
HEAD_BYTES = 512  # tar says what it is at byte 257; more is read of the text itself
BLOCK = 2**20
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"

_BOMS = (  # UTF-32 first: its little-endian mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, ""),
)
_MARKS = (  # how files begin that would pass for text, or that one may take for it
    (b"PK\x03\x04", "a zip archive (or .docx, .xlsx, .odt, .epub)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (PARQUET, "a parquet file"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"{\\rtf", "an RTF document"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    *((b"BZh%d1AY&SY" % level, "a bzip2 file") for level in range(1, 10)),
    (b"\xfd7zXZ\0", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"!<arch>\n", "an ar archive"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x00\x05\x16", "a macOS resource fork"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer (git lfs pull fetches the file)"),
)


def open_text(file: io.BufferedReader, name: str) -> io.BufferedReader:
    """A reader of the same text in UTF-8: unpacked, decoded, without a byte-order mark; line ends as they are.

    Raises ValueError, one line, for what its first bytes show to be no text. The bytes themselves are not checked.
    """
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    if head.startswith(GZIP):
        file = _as_file(_unpacked(file, name))
        head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
        if head.startswith(GZIP):
            raise ValueError(f"{name}: gzip within gzip: unpack it once")
    if kind := kind_of(head):
        raise ValueError(f"{name}: holds {kind}, not text")
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            file.read(len(mark))
            return _as_file(_decoded(file, encoding, name)) if encoding else file
    if b"\0" in head:
        raise ValueError(f"{name}: {_why_nul(head)}")
    return file


def open_packed(file: io.BufferedReader, name: str) -> BinaryIO:
    """A reader of a parquet file that can be wound back, unpacked if need be. Raises ValueError for other files."""
    head, whole = file.peek(HEAD_BYTES)[:HEAD_BYTES], None
    if head.startswith(GZIP):
        whole = b"".join(_unpacked(file, name))
        head = whole[:HEAD_BYTES]
    if not head.startswith(PARQUET) and (kind := kind_of(head)):
        raise ValueError(f"{name}: holds {kind}, not rows")
    return file if whole is None else io.BytesIO(whole)


def read_text(name: str | Path, limit: int) -> bytes:
    """The text of a file, or of standard input for `-`: UTF-8 with newlines.

    Raises ValueError, one line, when it is no text, or longer than limit bytes.
    """
    if str(name) == "-":
        if sys.stdin is None:
            raise ValueError("-: standard input is closed")
        return _whole_text(sys.stdin.buffer, "standard input", limit)
    with open(name, "rb") as file:
        return _whole_text(file, str(name), limit)


def _whole_text(file: Any, name: str, limit: int) -> bytes:
    # a pipe gives a few bytes at a time; a character of UTF-32 is four of them
    if not (isinstance(file, io.BufferedReader) and file.seekable()):
        file = io.BufferedReader(io.BytesIO(read_up_to(file, 4 * limit + HEAD_BYTES)))
    with damage_named(name):
        text = read_up_to(open_text(file, name), limit + 1)
    if len(text) > limit:
        raise ValueError(f"{name}: longer than {limit:,} bytes; take a part of it, such as its end")
    require_utf8(text, name)
    return unix_lines(text)


def read_up_to(file: BinaryIO, limit: int) -> bytes:
    """The first `limit` bytes, read in blocks: the limit may be far larger than the file, or than memory."""
    text = bytearray()
    while block := file.read(min(limit - len(text), BLOCK)):
        text += block
    return bytes(text)


def unix_lines(text: bytes) -> bytes:
    """CR LF as LF; CR as LF where there is no LF at all."""
    if b"\r" not in text:
        return text
    return text.replace(b"\r\n", b"\n") if b"\n" in text else text.replace(b"\r", b"\n")


def character_border(text: bytes, at: int) -> int:
    """`at`, or up to 3 bytes less where that lies inside a UTF-8 character."""
    if at >= len(text):
        return len(text)
    back = 0
    while back < 3 and back < at and text[at - back] & 0xC0 == 0x80:
        back += 1
    return at - back


def line_border(text: bytes, at: int) -> int:
    """The start of the next line, or of the next word, within 1000 bytes of `at`; else of a character."""
    for border in (b"\n", b" "):
        found = text.find(border, at, at + 1000)
        if 0 <= found < len(text) - 1:
            return found + 1
    return character_border(text, at)


def is_blank(text: bytes) -> bool:
    """Whether there is nothing but white space."""
    return not any(
        text[begin : begin + BLOCK].decode("utf-8", "ignore").strip() for begin in range(0, len(text), BLOCK)
    )


def require_utf8(text: bytes, name: str, *, is_cut: bool = False) -> None:
    """Raise ValueError, one line, at the first byte that is no UTF-8, or that no text holds.

    is_cut: the end may lie inside a character
    """
    if (at := text.find(b"\0")) >= 0:
        raise ValueError(f"{name}: {_why_nul(text[max(at - 256, 0) : at + 256])}")
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(text) + 1, BLOCK):
        carried = len(decoder.getstate()[0])
        try:
            decoder.decode(text[begin : begin + BLOCK], final=not is_cut and begin + BLOCK > len(text))
        except UnicodeDecodeError as error:
            at = begin - carried + error.start
            line = text.count(b"\n", 0, at) + 1
            guess = _guess(text[max(at - 2048, 0) : at + 2048])
            raise ValueError(f"{name}: not UTF-8: byte 0x{text[at]:02x} in line {line:,}; {guess}") from None


def is_read_from_its_start(head: bytes) -> bool:
    """Whether a file that begins so is packed or in another encoding, and cannot be entered in its middle."""
    return head.startswith(GZIP) or any(head.startswith(mark) for mark, encoding in _BOMS if encoding)


def kind_of(head: bytes) -> str:
    """What a file that begins so holds instead of text, in words; "" where that is not known."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((kind for mark, kind in _MARKS if head.startswith(mark)), "")


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Within: errors of unpacking become one line that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: damaged gzip file ({error}): fetch it again") from None


def _why_nul(text: bytes) -> str:
    """What text with NUL bytes is likely to be, and what to do."""
    even, odd = text[::2].count(0), text[1::2].count(0)
    for zeros, others, order in ((odd, even, "LE"), (even, odd, "BE")):
        if zeros > len(text) / 5 and not others:
            return f"looks like UTF-16 without a byte-order mark: iconv -f UTF-16{order} -t UTF-8 converts it"
    return "holds NUL bytes: it is binary, not text"


def _guess(text: bytes) -> str:
    """What text that is not UTF-8 is likely to be, and what to do."""
    high = sum(byte >= 0x80 for byte in text) / len(text)
    controls = sum(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in text) / len(text)
    if controls > 0.02:
        return "it is binary, not text"
    if high < 0.25:
        return "if it is Latin-1 or Windows-1252, iconv -f WINDOWS-1252 -t UTF-8 converts it"
    return "convert it from its own encoding, such as Shift-JIS, GBK or KOI8-R: iconv -f ENCODING -t UTF-8"


def _unpacked(packed: BinaryIO, name: str) -> Iterator[bytes]:
    """What a gzip file holds. Raises ValueError where that is far more than text can be packed to."""
    begin, size = packed.tell(), 0
    with gzip.GzipFile(fileobj=packed) as file:
        while block := file.read(BLOCK // 16):
            size += len(block)
            if size > max(MAX_UNPACKED_BYTES, MAX_UNPACKING * (packed.tell() - begin)):
                raise ValueError(
                    f"{name}: unpacks to more than {MAX_UNPACKING} times its size, which text does not; "
                    "unpack it yourself if you trust it"
                )
            yield block


def _decoded(file: BinaryIO, encoding: str, name: str) -> Iterator[bytes]:
    """UTF-8 of a file in another encoding, block by block."""
    try:
        for text in codecs.iterdecode(iter(partial(file.read, BLOCK // 16), b""), encoding):
            yield text.encode()
    except UnicodeError as error:
        reason = getattr(error, "reason", str(error))
        raise ValueError(
            f"{name}: begins as {encoding.upper()}, but is not ({reason}): damaged or binary"
        ) from None


def _as_file(blocks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Blocks(blocks), BLOCK // 16)


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns how many bytes, 0 at the end."""
        self._left = self._left or next(self._blocks, b"")
        data, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
