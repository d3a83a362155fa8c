"""The playground's server: this machine alone, one page, two calls, nothing kept between them.

Any page of the web may send requests to a local port, so Host (against DNS rebinding), Origin and content type are
checked before anything is read. Texts are streamed as lines of JSON, a chunk each.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hldm.app.page import HERE, fill, shown
from hldm.app.playground.asking import MAX_CANDIDATES, MAX_CHUNKS, MAX_REQUEST_BYTES, Asked, read_call
from hldm.app.playground.drafting import Chunk, Draft
from hldm.app.playground.turns import Busy, Turns
from hldm.generation.footprint import require_room_to_write
from hldm.generation.pipeline import HLDMPipeline
from hldm.text.bytes import count_characters

ADDRESS = "127.0.0.1"  # and no other: only this machine may use it
MOST_CONNECTIONS = 64
LEAVE_SECONDS = 2.0  # that writers have to stop when the server does
FILES = {
    "/page.css": ("page.css", "text/css"),
    "/playground.css": ("playground/playground.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/playground.js": ("playground/playground.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Refused(Exception):
    """A request that is not answered: a status and one line."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class Playground(ThreadingHTTPServer):
    """A model behind a port of this machine."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, pipeline: HLDMPipeline, name: str, port: int):
        """port: 0 takes a free one. Raises OSError where it is taken."""
        self.pipeline, self.name = pipeline, name
        self.turns = Turns()
        self.closing = threading.Event()
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((ADDRESS, port), Handler)
        self.hosts = {f"{host}:{self.server_port}" for host in (ADDRESS, "localhost")}

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def connections(self) -> int:
        """How many are being answered."""
        return MOST_CONNECTIONS - self._free._value

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def server_close(self) -> None:
        """Have writers stop after the chunk that they are at, and wait for them a little."""
        self.closing.set()
        super().server_close()
        end = time.monotonic() + LEAVE_SECONDS
        while self.connections and time.monotonic() < end:
            time.sleep(0.01)

    def page(self) -> str:
        """The page, with what it must know of the model."""
        autoencoder, settings = self.pipeline.autoencoder, self.pipeline.settings
        about = {
            "latent_dim": autoencoder.latent_dim,
            "max_chunks": MAX_CHUNKS,
            "max_candidates": MAX_CANDIDATES,
        }
        return fill(
            "playground/playground.html",
            name=self.name,
            is_twin=self.pipeline.prior is None,
            settings=settings,
            max_chunks=MAX_CHUNKS,
            max_candidates=MAX_CANDIDATES,
            data=about,
        )

    def write(self, asked: Asked) -> Iterator[Chunk]:
        """One chunk after another, others' turns between them, until the document or the count ends."""
        draft = self._draft(asked, rows=1)
        for number in range(asked.wanted):
            latent = asked.latent if asked.hold or not number else None
            with self.turns.take():
                (chunk,) = draft.write(asked.seed, [0 if number else asked.draw], latent)
            yield chunk
            if chunk.ends or self.closing.is_set():
                return

    def candidates(self, asked: Asked) -> list[Chunk]:
        """So many chunks for one place, each another draw; with a latent given, other bytes of it."""
        draft = self._draft(asked, rows=asked.wanted)
        draws = range(asked.draw, asked.draw + asked.wanted)
        with self.turns.take():
            return draft.write(asked.seed, draws, asked.latent)

    def _draft(self, asked: Asked, rows: int) -> Draft:
        autoencoder, prior = self.pipeline.autoencoder, self.pipeline.prior
        text = asked.prompt + b"".join(asked.chunks)
        characters = asked.wanted * autoencoder.chunking.max_bytes
        require_room_to_write(autoencoder, prior, [text], rows, characters)
        with self.turns.take():
            return Draft(autoencoder, prior, asked.prompt, asked.chunks, asked.settings, rows)


class Handler(BaseHTTPRequestHandler):
    """One request. Every answer but a stream of chunks is short; every mistake is {"error": one line}."""

    protocol_version = "HTTP/1.1"
    server: Playground
    server_version, sys_version = "hldm", ""
    timeout = 20  # seconds that a client may take to say what it wants

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a line a request tells no one anything."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, such as a method that it does not know."""
        self._send(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def _answer(self, work: Any) -> None:
        self.close_connection = True
        with suppress(ConnectionError, TimeoutError):  # the user closed the page: nobody is left to tell
            try:
                if (
                    self.headers.get("Host") not in self.server.hosts
                ):  # a name that was rebound to this machine
                    raise Refused(
                        HTTPStatus.FORBIDDEN, f"this playground answers at {self.server.address} alone"
                    )
                work()
            except Refused as refusal:
                self._send(refusal.status, {"error": str(refusal)})
            except Busy as busy:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(busy)})

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._send_bytes(HTTPStatus.OK, "text/html", self.server.page().encode())
        elif path in FILES:
            name, kind = FILES[path]
            self._send_bytes(HTTPStatus.OK, kind, (HERE / name).read_bytes())
        else:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path[:60]!r} here")

    def _post(self) -> None:
        if self.path not in ("/write", "/candidates"):
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {self.path[:60]!r} here")
        self._check_sender()
        body = self._body()
        pipeline = self.server.pipeline
        most = MAX_CHUNKS if self.path == "/write" else MAX_CANDIDATES
        try:
            asked = read_call(body, pipeline.settings, pipeline.autoencoder.latent_dim, most)
            if self.path == "/candidates":
                found = [_as_json(chunk) for chunk in self.server.candidates(asked)]
                self._send(HTTPStatus.OK, {"candidates": found})
                return
            chunks = self.server.write(asked)
            first = next(
                chunks
            )  # what the model refuses is an error with its status, before anything is sent
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, " ".join(str(error).split())) from None
        self._stream(first, chunks)

    def _check_sender(self) -> None:
        """Raise Refused for what another site's page sends."""
        origin = self.headers.get("Origin")
        is_ours = origin is None or origin in {f"http://{host}" for host in self.server.hosts}
        if not is_ours or self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refused(HTTPStatus.FORBIDDEN, "requests of other sites' pages are refused")

    def _body(self) -> bytes:
        """The request's JSON. Raises Refused for what is no JSON, has no length, or is too long."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json")
        length = self.headers.get("Content-Length")
        if length is None or self.headers.get("Transfer-Encoding"):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if not (length.isascii() and length.isdigit()):
            raise Refused(
                HTTPStatus.BAD_REQUEST, f"Content-Length must be a whole number, got {length!r:.60}"
            )
        if len(length) > 18 or int(length) > MAX_REQUEST_BYTES:
            self._drain()
            reason = (
                f"the request holds {length[:18]} bytes, {MAX_REQUEST_BYTES:,} at most: take a shorter text"
            )
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "the request ended early")
        return body

    def _drain(self) -> None:
        """Read away a little of what is too long: a browser that is still sending reads no answer."""
        self.connection.settimeout(0.5)
        with suppress(OSError):
            for _ in range(64):
                if not self.rfile.read1(MAX_REQUEST_BYTES):
                    break
        self.connection.settimeout(self.timeout)

    def _stream(self, first: Chunk, rest: Iterator[Chunk]) -> None:
        """Chunks as they come, a line of JSON each; the body ends with the connection."""
        self.send_response(HTTPStatus.OK)
        self._send_headers("application/x-ndjson")
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began, count, characters = time.monotonic(), 1, count_characters(first.text)
        self._send_line({"chunk": _as_json(first)})
        try:
            for chunk in rest:
                self._send_line({"chunk": _as_json(chunk)})
                count, characters = count + 1, characters + count_characters(chunk.text)
        except (ValueError, Busy) as error:
            self._send_line({"error": " ".join(str(error).split())})
            return
        seconds = time.monotonic() - began
        self._send_line({"done": {"chunks": count, "characters": characters, "seconds": round(seconds, 3)}})

    def _send_line(self, value: Any) -> None:
        self.wfile.write(json.dumps(value, allow_nan=False).encode() + b"\n")

    def _send(self, status: HTTPStatus, value: Any) -> None:
        self._send_bytes(status, "application/json", json.dumps(value, allow_nan=False).encode())

    def _send_bytes(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.close_connection = True
        self.send_response(status)
        self._send_headers(kind, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_headers(self, kind: str, length: int | None = None) -> None:
        text = f"{kind}; charset=utf-8"
        known = {"Content-Type": text} | ({} if length is None else {"Content-Length": str(length)})
        for name, value in {**known, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()


def _as_json(chunk: Chunk) -> dict[str, Any]:
    """A chunk for the page: its bytes in hexadecimal, to be sent back, and as they may be shown."""
    return {
        "hex": chunk.text.hex(),
        "text": shown(chunk.text),
        "latent": chunk.latent,
        "draw": chunk.draw,
        "ends": chunk.ends,
    }
