"""The playground answers this machine's own page, refuses everything else in one line, and serves several at once."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from hldm import cli
from hldm.app.playground import server as module
from hldm.app.playground.asking import MAX_REQUEST_BYTES, MAX_TEXT_BYTES, read_call
from hldm.app.playground.server import Playground
from hldm.app.playground.turns import Busy, Turns
from hldm.config import GenerationConfig
from hldm.generation.pipeline import read_pipeline
from hldm.runs.signals import Stopped


@pytest.fixture(scope="module")
def pipeline(saved_pipeline):
    return read_pipeline(saved_pipeline)


@contextmanager
def served(pipeline) -> Iterator[Playground]:
    with Playground(pipeline, "tiny", 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def playground(pipeline):
    with served(pipeline) as found:
        yield found


def ask(playground, method="POST", path="/write", body=b"", **headers):
    """Status, headers and body of one request; headers given as None are left out."""
    connection = http.client.HTTPConnection("127.0.0.1", playground.server_port, timeout=20)
    known = {"Content-Type": "application/json"} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    with closing(connection):
        connection.putrequest(method, path, skip_host="Host" in known)
        if method == "POST" and "Content-Length" not in known:
            known["Content-Length"] = str(len(body))
        for name, value in known.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        connection.send(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def lines(body: bytes) -> list[dict]:
    return [json.loads(line) for line in body.splitlines()]


def test_the_page_and_its_files_come_with_strict_headers(playground):
    status, headers, body = ask(playground, "GET", "/")
    assert status == 200 and b"tiny" in body and b"<script src=" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "unsafe" not in str(headers)
    for path in ("/page.css", "/page.js", "/playground.css", "/playground.js"):
        status, headers, body = ask(playground, "GET", path)
        assert status == 200 and len(body) > 100 and headers["X-Content-Type-Options"] == "nosniff"
    assert ask(playground, "HEAD", "/")[0] == 501


def test_it_listens_to_this_machine_alone(playground):
    assert playground.server_address[0] == "127.0.0.1"


def test_chunks_are_streamed_and_the_same_seed_writes_the_same(playground):
    for seed in range(20):
        asked = json.dumps({"prompt": "In the", "count": 5, "seed": seed}).encode()
        status, headers, body = ask(playground, body=asked)
        found = lines(body)
        chunks = [line["chunk"] for line in found[:-1]]
        assert status == 200 and headers["Content-Type"].startswith("application/x-ndjson")
        assert found[-1]["done"]["chunks"] == len(chunks) and (len(chunks) == 5 or chunks[-1]["ends"])
        assert all(bytes.fromhex(chunk["hex"]) and len(chunk["latent"]) == 2 for chunk in chunks)
        if len(chunks) == 5:
            break
    assert [line["chunk"] for line in lines(ask(playground, body=asked)[2])[:-1]] == chunks
    rest = {"prompt": "In the", "count": 3, "seed": seed, "chunks": [chunk["hex"] for chunk in chunks[:2]]}
    gone_on = lines(ask(playground, body=json.dumps(rest).encode())[2])[:-1]
    assert [line["chunk"]["hex"] for line in gone_on] == [chunk["hex"] for chunk in chunks[2:]]


def test_candidates_and_a_held_latent(playground):
    asked = {"prompt": "In the", "count": 4, "latent": [0.5, -0.25]}
    status, _, body = ask(playground, path="/candidates", body=json.dumps(asked).encode())
    found = json.loads(body)["candidates"]
    assert status == 200 and [chunk["draw"] for chunk in found] == [0, 1, 2, 3]
    assert all(chunk["latent"] == [0.5, -0.25] for chunk in found)
    asked |= {"count": 3, "hold": True}
    found = [line["chunk"] for line in lines(ask(playground, body=json.dumps(asked).encode())[2])[:-1]]
    assert all(chunk["latent"] == [0.5, -0.25] for chunk in found)


@pytest.mark.parametrize(
    ("headers", "status", "named"),
    [
        ({"Host": "evil.example"}, 403, "alone"),
        ({"Host": "127.0.0.1:1"}, 403, "alone"),
        ({"Host": None}, 403, "alone"),
        ({"Origin": "http://evil.example"}, 403, "other sites"),
        ({"Origin": "null"}, 403, "other sites"),
        ({"Sec_Fetch_Site": "cross-site"}, 403, "other sites"),
        ({"Content_Type": "text/plain"}, 415, "application/json"),
        ({"Content_Type": None}, 415, "application/json"),
        ({"Content_Length": None}, 411, "Content-Length"),
        ({"Content_Length": "-1"}, 400, "whole number"),
        ({"Content_Length": str(MAX_REQUEST_BYTES + 1)}, 413, "at most"),
        ({"Content_Length": "9" * 40}, 413, "at most"),
        ({"Transfer_Encoding": "chunked"}, 411, "Content-Length"),
    ],
)
def test_a_request_that_is_not_the_pages_own_is_refused(playground, monkeypatch, headers, status, named):
    monkeypatch.setattr(module.Handler, "timeout", 2)
    found, _, body = ask(playground, body=b"{}", **headers)
    error = json.loads(body)["error"]
    assert found == status and named in error and "\n" not in error


@pytest.mark.parametrize("path", ["/nowhere", "/../page.css", "/write/"])
def test_other_paths_are_not_there(playground, path):
    assert ask(playground, "GET", path)[0] == 404 and ask(playground, path=path)[0] == 404


def test_a_body_that_is_too_long_is_refused_though_it_is_sent(playground):
    status, _, body = ask(playground, body=b"x" * (2 * MAX_REQUEST_BYTES))
    assert status == 413 and "take a shorter text" in json.loads(body)["error"]


MISTAKES = [
    (b"", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"seed": NaN}', "NaN is no number"),
    (b"[]", "JSON object"),
    ({"what": 1}, "unknown field 'what'"),
    ({"prompt": 5}, "prompt must be text"),
    ({"prompt": "\ud800"}, "surrogate"),
    ({"prompt": "a" * (MAX_TEXT_BYTES + 1)}, "take a shorter text"),
    ({"chunks": "ab"}, "hexadecimal"),
    ({"chunks": ["xy"]}, "hexadecimal"),
    ({"chunks": [""]}, "empty"),
    ({"seed": -1}, "seed must be"),
    ({"seed": 2**31}, "seed must be"),
    ({"seed": True}, "seed must be"),
    ({"count": 0}, "count must be"),
    ({"count": 10**9}, "count must be"),
    ({"count": 1.5}, "count must be"),
    ({"draw": "x"}, "draw must be"),
    ({"latent": [1.0]}, "latent must be 2 numbers"),
    ({"latent": [1.0, 1e9]}, "latent must be 2 numbers"),
    ({"latent": {"a": 1}}, "latent must be 2 numbers"),
    ({"hold": 1}, "hold must be"),
    ({"settings": []}, "settings must be an object"),
    ({"settings": {"scheduler": "dpm"}}, "unknown setting"),
    ({"settings": {"steps": "4"}}, "steps must be a number"),
    ({"settings": {"steps": 501}}, "at most 500"),
    ({"settings": {"steps": 1.5}}, "steps"),
    ({"settings": {"top_p": 0}}, "top_p"),
    ({"settings": {"temperature": -1}}, "temperature"),
    ({"settings": {"guidance": 1e300}}, "guidance"),
]


@pytest.mark.parametrize(("sent", "named"), MISTAKES)
def test_a_mistake_is_one_line(sent, named):
    data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    with pytest.raises(ValueError, match="(?s).*") as error:
        read_call(data, GenerationConfig(), latent_dim=2)
    assert named in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("sent", [b"{", b'{"count": 0}', b'{"settings": {"steps": 0, "temperature": 101}}'])
def test_a_mistake_is_answered_with_400(playground, sent):
    status, _, body = ask(playground, body=sent)
    assert status == 400 and "\n" not in json.loads(body)["error"]


def test_a_twin_takes_no_latent():
    with pytest.raises(ValueError, match="is a twin"):
        read_call(b'{"latent": []}', GenerationConfig(), latent_dim=0)


# ---- several users


def test_turns_are_taken_in_the_order_of_asking():
    turns, order, threads = Turns(), [], []

    def work(number: int) -> None:
        with turns.take():
            order.append(number)

    with turns.take():
        for number in range(6):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            while len(turns._waiting) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(6))


def test_too_many_are_told_to_wait(monkeypatch):
    monkeypatch.setattr("hldm.app.playground.turns.MOST_WAITING", 1)
    turns = Turns()
    with turns.take(), pytest.raises(Busy, match="try again"), turns.take():
        pass
    with turns.take():  # and afterwards it is free again
        pass


def test_two_users_write_at_once_each_their_own_text(playground):
    alone = {}
    for prompt in ("In the beginning", "And so"):
        asked = json.dumps({"prompt": prompt, "count": 40, "seed": 1}).encode()
        alone[prompt] = [line.get("chunk") for line in lines(ask(playground, body=asked)[2])]
    found: dict[str, list] = {}

    def work(prompt: str) -> None:
        asked = json.dumps({"prompt": prompt, "count": 40, "seed": 1}).encode()
        found[prompt] = [line.get("chunk") for line in lines(ask(playground, body=asked)[2])]

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_whoever_closes_the_page_stops_the_writing(pipeline, monkeypatch):
    written = []
    original = module.Draft.write

    def counted(self, *arguments):
        written.append(1)
        time.sleep(0.01)
        return [chunk._replace(ends=False) for chunk in original(self, *arguments)]

    monkeypatch.setattr(module.Draft, "write", counted)
    with served(pipeline) as playground:
        body = json.dumps({"prompt": "In the", "count": 400}).encode()
        with socket.create_connection(playground.server_address) as client:
            head = f"POST /write HTTP/1.1\r\nHost: 127.0.0.1:{playground.server_port}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert b"chunk" in client.recv(4096) + client.recv(4096)
        end = time.monotonic() + 10
        while playground.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert playground.connections == 0 and len(written) < 200


def test_closing_ends_what_is_being_written(pipeline, monkeypatch):
    original = module.Draft.write

    def slow(self, *arguments):
        time.sleep(0.02)
        return [chunk._replace(ends=False) for chunk in original(self, *arguments)]

    monkeypatch.setattr(module.Draft, "write", slow)
    body = json.dumps({"prompt": "In the", "count": 400}).encode()
    found = []
    with served(pipeline) as playground:
        client = threading.Thread(target=lambda: found.append(ask(playground, body=body)))
        client.start()
        while not playground.connections:
            time.sleep(0.001)
        time.sleep(0.1)
    client.join(5)
    assert not client.is_alive() and 1 <= len(lines(found[0][2])) < 300


def test_a_model_that_runs_away_is_one_line(playground, monkeypatch):
    asked = {"prompt": "In the", "count": 3, "settings": {"steps": 1, "guidance": 100, "temperature": 100}}
    monkeypatch.setattr("hldm.generation.finite.LARGEST", 1e-6)
    status, _, body = ask(playground, body=json.dumps(asked).encode())
    assert status == 400 and "lower generation.guidance" in json.loads(body)["error"]


# ---- the command


def test_a_port_that_is_taken_is_one_line(playground, saved_pipeline, refused):
    port = playground.server_port
    line = refused(cli.main(["playground", "--run", str(saved_pipeline), "--port", str(port)]))
    assert f"port {port}" in line and "choose another --port" in line


def test_what_is_no_run_is_one_line(tmp_path, refused):
    assert "holds no trained model" in refused(cli.main(["playground", "--run", str(tmp_path)]))
    assert "port" in refused(cli.main(["playground", "--port", "99999"]))


def test_ctrl_c_ends_it_in_words(saved_pipeline, monkeypatch, capsys):
    def interrupted(self, poll_interval):
        raise Stopped(2)

    monkeypatch.setattr(Playground, "serve_forever", interrupted)
    assert cli.main(["playground", "--run", str(saved_pipeline), "--port", "0"]) == 0
    said = capsys.readouterr()
    assert "is at http://127.0.0.1:" in said.out and said.out.endswith("the playground is closed\n")
    assert said.err == ""
