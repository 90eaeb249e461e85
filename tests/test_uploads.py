"""Pictures that strangers send or name: decoded as what was checked, fetched in time and from the internet only."""

import functools
import http.server
import io
import socket
import threading
import time

import pytest
from bombs import png_of
from models import picture
from PIL import Image

from pitome_mllm.serving import fetch
from pitome_mllm.serving.uploads import read_upload


def test_what_was_checked_is_what_is_decoded(monkeypatch):
    """Pillow takes a WebP with this word at this place for a Photo CD, if it asks that decoder first."""
    Image.init()
    monkeypatch.setattr(Image, "ID", ["PCD", *Image.ID])
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "WEBP", xmp=bytes(5000))
    data = bytearray(buffer.getvalue())
    data[2048:2052] = b"PCD_"
    with Image.open(io.BytesIO(data)) as file:
        assert file.format == "PCD"
    assert read_upload(bytes(data), "a.webp").size == (64, 48)


@pytest.fixture
def web(tmp_path):
    """A server of files, redirects and pictures that never end, and what was asked of it."""
    asked = []

    class Files(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            elif self.path in ("/slow/head", "/slow/body"):
                self.wfile.write(b"HTTP/1.0 200 OK\r\n" + b"\r\n" * self.path.endswith("body"))
                try:
                    while True:
                        self.wfile.write(b"a")
                        time.sleep(0.02)
                except OSError:
                    pass
            else:
                super().do_GET()

        def log_message(self, form, *values):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_private_addresses_are_asked_only_where_they_are_allowed_by_name(web, tmp_path):
    address, asked = web
    picture(2).save(tmp_path / "a.png")
    for url in (address, address.replace("127.0.0.1", "localhost"), address.replace("127.0.0.1", "[::ffff:127.0.0.1]")):
        with pytest.raises(ValueError, match="which is not public"):
            fetch.fetch(f"{url}/a.png")
    assert asked == []
    assert fetch.fetch(f"{address}/a.png", ["127.0.0.1"]) == (tmp_path / "a.png").read_bytes()
    assert fetch.fetch(f"{address}/to//a.png", ["127.0.0.1"]) == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(
    "address, public",
    [("8.8.8.8", True), ("10.0.0.1", False), ("169.254.169.254", False), ("0.0.0.0", False), ("224.0.0.1", False)]
    + [("::1", False), ("fe80::1%eth0", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False)]
    + [("2002:a00:1::", False), ("2606:4700::1111", True)],
)
def test_public_addresses(address, public):
    assert fetch._public(address) == public


def test_redirects_are_checked_too(web, monkeypatch):
    """A public server that sends us to a private one; and the name is looked up once only."""
    address, asked = web
    looked_up, real = [], socket.getaddrinfo

    def look_up(host, port, **options):
        looked_up.append(host)
        return real("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    port = address.rpartition(":")[2]
    with pytest.raises(ValueError, match=r"'10.0.0.1' has the address 127.0.0.1, which is not public"):
        fetch.fetch(f"http://good.example:{port}/to/http://10.0.0.1:{port}/a.png", ["good.example"])
    assert looked_up == ["good.example", "10.0.0.1"] and len(asked) == 1
    for to, message in (("file:///etc/passwd", "is no web address"), ("/to/" * 9 + "a", "could not be fetched")):
        with pytest.raises(ValueError, match=message):
            fetch.fetch(f"http://good.example:{port}/to/{to}", ["good.example"])


@pytest.mark.parametrize("path", ["/slow/head", "/slow/body"])
def test_one_deadline_is_over_all_of_it(web, monkeypatch, path):
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"it took more than 0.3 seconds"):
        fetch.fetch(web[0] + path, ["127.0.0.1"])


def test_what_is_not_there_or_too_large(web, tmp_path):
    with pytest.raises(ValueError, match="could not be fetched: HTTP 404"):
        fetch.fetch(web[0] + "/b.png", ["127.0.0.1"])
    (tmp_path / "c.png").write_bytes(png_of(9_000, 9_000))
    with pytest.raises(ValueError, match="pixels"):
        read_upload(fetch.fetch(web[0] + "/c.png", ["127.0.0.1"]), "c.png")
