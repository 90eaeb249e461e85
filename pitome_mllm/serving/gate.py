"""What clients of ``pitome-mllm serve`` may ask for: answers, with images that are decoded here within limits.

transformers' server opens whatever a request names as an image, files of this machine included. So every request
passes `Gate` first, which hands on images only as PNG data that it wrote itself.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import urllib.request
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .uploads import MAX_BYTES, read_upload

MODELS = "/v1/models"
PATHS = ("/health", MODELS, "/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_BODY = 64_000_000  # bytes of a request
MAX_PICTURES = 8  # in a request
MAX_DEPTH = 100  # of lists and objects within each other, whatever Python's own limit is
REFUSED = ("video_url", "audio_url", "input_audio", "chat_template_kwargs")
SECONDS = 10  # that another server may keep us waiting


class Gate:
    """An ASGI application before another one.

    Parameters
    ----------
    app : object
        Transformers' server.
    model : str
        The name of the model that it serves.
    allow_urls : bool, default False
        Images may be http(s) addresses, which are fetched from here.
    """

    def __init__(self, app: Any, model: str, allow_urls: bool = False) -> None:
        self.app, self.model, self.allow_urls = app, model, allow_urls

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] not in PATHS:
            return await _refuse(send, 404, f"nothing is served at {scope['path']}; possible: {', '.join(PATHS)}")
        if scope["path"] == MODELS:  # the other server would list all that lie in this machine's cache
            served = {"id": self.model, "object": "model", "created": 0, "owned_by": "pitome-mllm"}
            return await _answer(send, 200, {"object": "list", "data": [served]})
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = await _read(receive)
        if body is None:
            return await _refuse(send, 413, f"the request is too large; at most {MAX_BODY / 1e6:.0f} MB are possible")
        try:
            body = await asyncio.to_thread(self.checked, body)
        except UserError as error:
            return await _refuse(send, 400, str(error))
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
        headers.append((b"content-length", str(len(body)).encode()))
        return await self.app({**scope, "headers": headers}, _replay(body, receive), send)

    def checked(self, body: bytes) -> bytes:
        """A request with all of its images decoded and written anew.

        Raises
        ------
        ValueError
            No JSON object; an image that cannot be, or too many; something in `REFUSED`.
        """
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise UserError("the request is no JSON object")
            pictures = _pictures(request)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError("the request is no JSON that can be read") from error
        if len(pictures) > MAX_PICTURES:
            raise UserError(f"the request has {len(pictures)} pictures; at most {MAX_PICTURES} are possible")
        for number, (holder, key) in enumerate(pictures, 1):
            holder[key] = self._written(holder[key], f"picture {number}")
        return json.dumps(request).encode()

    def _written(self, url: Any, name: str) -> str:
        """The image at an address, as data."""
        image = read_upload(self._content(url, name), name)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _content(self, url: Any, name: str) -> bytes:
        if isinstance(url, str) and url.startswith("data:"):
            head, _, data = url.partition(",")
            if not head.endswith(";base64"):
                raise UserError(f"{name!r} is no base64 data; send 'data:image/png;base64,...'")
            try:
                return base64.b64decode(data, validate=True)
            except binascii.Error as error:
                raise UserError(f"{name!r} is damaged base64 data: {error}") from error
        if isinstance(url, str) and url.startswith(("http://", "https://")):
            if self.allow_urls:
                return _fetch(url, name)
            raise UserError(f"{name!r} is an address, and this server fetches none; send it as a data: URL")
        raise UserError(f"{name!r} is neither a data: URL nor a web address; send 'data:image/png;base64,...'")


def _fetch(url: str, name: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return answer.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} could not be fetched: {error}") from error


def _pictures(part: Any, depth: int = 0) -> list[tuple[dict[str, Any], str]]:
    """Where the addresses of images stand in a request: the object and the key in it, in their order."""
    if depth > MAX_DEPTH:
        raise UserError(f"the request is nested more than {MAX_DEPTH} levels deep")
    if isinstance(part, list):
        return [found for each in part for found in _pictures(each, depth + 1)]
    if not isinstance(part, dict):
        return []
    for key in REFUSED:
        if key in part:
            raise UserError(f"{key!r} is not possible here; send text and pictures")
    found = []
    for key, value in part.items():
        if key == "image_url":
            found.append((value, "url") if isinstance(value, dict) and "url" in value else (part, key))
        else:
            found += _pictures(value, depth + 1)
    return found


async def _read(receive: Any) -> bytes | None:
    """The body of a request; None = too large."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def _replay(body: bytes, receive: Any) -> Callable[[], Any]:
    """A ``receive`` that begins with this body."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return parts.pop() if parts else await receive()

    return again


async def _refuse(send: Any, status: int, message: str) -> None:
    """An error as OpenAI's clients read it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    await _answer(send, status, {"error": error})


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
