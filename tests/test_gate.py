"""What `pitome-mllm serve` lets through to transformers' server, without that server."""

import asyncio
import base64
import functools
import http.server
import io
import json
import sys
import threading

import numpy as np
import pytest
from bombs import png_of
from models import picture
from PIL import Image

from pitome_mllm import cli
from pitome_mllm.serving import gate
from pitome_mllm.serving.gate import Gate


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def asking(*urls):
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "tiny", "messages": [{"role": "user", "content": [*content, {"type": "text", "text": "hello"}]}]}


def send(body, path="/v1/chat/completions", method="POST", allow_urls=False, pieces=1):
    """Status, what the client reads, and the request that arrived behind the gate (None: it did not)."""
    arrived, sent = [], []
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = -(-len(body) // pieces) or 1
    parts = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
    incoming = [{"type": "http.request", "body": p, "more_body": p is not parts[-1]} for p in parts]

    async def receive():
        return incoming.pop(0)

    async def reply(message):
        sent.append(message)

    async def app(scope, receive, send):
        got = (await receive())["body"]
        lengths = [int(value) for name, value in scope["headers"] if name == b"content-length"]
        assert method != "POST" or lengths == [len(got)]
        arrived.append(json.loads(got) if got else None)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    scope = {"type": "http", "path": path, "method": method, "headers": [(b"content-length", b"1")]}
    asyncio.run(Gate(app, "tiny", allow_urls)(scope, receive, reply))
    return sent[0]["status"], json.loads(sent[1]["body"]), arrived[0] if arrived else None


def refused(*args, **options):
    status, reply, arrived = send(*args, **options)
    assert arrived is None and reply["error"]["type"] == "invalid_request_error"
    return status, reply["error"]["message"]


@pytest.mark.parametrize("pieces", [1, 3])
def test_pictures_arrive_pixel_by_pixel(pieces):
    status, _, arrived = send(asking(data_url(encoded(picture(0))), data_url(encoded(picture(1)))), pieces=pieces)
    assert status == 200
    for number, part in enumerate(arrived["messages"][0]["content"][:2]):
        made = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
        assert np.array_equal(np.asarray(made), np.asarray(picture(number)))
    assert arrived["messages"][0]["content"][2] == {"type": "text", "text": "hello"}


@pytest.mark.parametrize(
    "url, message",
    [
        ("/etc/passwd", "neither a data: URL nor a web address"),
        ("file:///etc/passwd", "neither a data: URL nor a web address"),
        ("iVBORw0KGgo=", "neither a data: URL nor a web address"),
        (None, "neither a data: URL nor a web address"),
        ("https://example.com/a.png", "this server fetches none"),
        ("data:image/png,abc", "is no base64 data"),
        ("data:image/png;base64,a b", "damaged base64 data"),
        (data_url(b"no picture"), "is no picture in one of the formats"),
        (data_url(encoded(picture(0), "TIFF")), "is no picture in one of the formats"),
        (data_url(encoded(picture(0))[:2000]), "truncated"),
        (data_url(png_of(30_000, 30_000)), "far too many pixels"),
        (data_url(png_of(7_000, 7_000)), "has 7000 x 7000 pixels"),
        (data_url(bytes(gate.MAX_BYTES + 1)), "at most 20 MB"),
    ],
)
@pytest.mark.parametrize("form", [lambda url: {"url": url}, lambda url: url], ids=["completions", "responses"])
def test_what_is_no_picture_that_was_sent_is_refused(url, message, form):
    part = {"type": "image_url", "image_url": form(url)}
    status, said = refused({"input": [{"role": "user", "content": [part]}]}, path="/v1/responses")
    assert status == 400 and message in said and "picture 1" in said


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"a": ' + b"[" * 100_000, "no JSON"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested more than 100 levels"),
        ({"messages": [{"content": [{"type": "video_url", "video_url": {"url": "/etc/passwd"}}]}]}, "'video_url'"),
        ({"messages": [], "chat_template_kwargs": {"images": ["/etc/passwd"]}}, "'chat_template_kwargs'"),
        (asking(*["data:"] * 9), "has 9 pictures; at most 8"),
    ],
)
def test_odd_requests_are_refused(body, message):
    status, said = refused(body)
    assert status == 400 and message in said


def test_requests_may_be_nested_as_deep_as_the_limit_and_not_as_python_happens_to_allow():
    before, deep = sys.getrecursionlimit(), b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"
    sys.setrecursionlimit(10_000)  # as other packages do
    try:
        assert "nested more than 100 levels" in refused(deep)[1]
    finally:
        sys.setrecursionlimit(before)
    assert send(b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}")[0] == 200


def test_requests_that_are_too_large_are_not_read_to_their_end():
    status, said = refused(b" " * (gate.MAX_BODY + 1), pieces=4)
    assert status == 413 and "at most 64 MB" in said


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/audio/transcriptions", "/v1/systemone", "/docs"])
def test_only_answers_are_served(path):
    status, said = refused({"model": "other"}, path=path)
    assert status == 404 and path in said


def test_what_has_no_pictures_passes():
    assert send(b"", "/health", "GET")[0] == send({"prompt": "hello"}, "/v1/completions")[0] == 200


def test_the_served_model_is_the_only_one_listed():
    status, reply, arrived = send(b"", "/v1/models", "GET")
    assert status == 200 and [model["id"] for model in reply["data"]] == ["tiny"] and arrived is None


@pytest.fixture
def web(tmp_path):
    """A server of files, and what was asked of it."""
    asked = []

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_addresses_are_fetched_only_where_that_is_allowed(web, tmp_path):
    address, asked = web
    picture(2).save(tmp_path / "a.png")
    assert refused(asking(f"{address}/a.png"))[0] == 400 and asked == []
    _, _, arrived = send(asking(f"{address}/a.png"), allow_urls=True)
    url = arrived["messages"][0]["content"][0]["image_url"]["url"]
    assert asked == ["/a.png"] and url.startswith("data:image/png;base64,")
    assert "could not be fetched" in refused(asking(f"{address}/b.png"), allow_urls=True)[1]
    (tmp_path / "c.png").write_bytes(png_of(7_000, 7_000))
    assert "pixels" in refused(asking(f"{address}/c.png"), allow_urls=True)[1]
    assert "neither" in refused(asking(str(tmp_path / "a.png")), allow_urls=True)[1]  # files of this machine: never


def test_the_command_says_how_to_allow_addresses(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "--allow-urls" in capsys.readouterr().out
