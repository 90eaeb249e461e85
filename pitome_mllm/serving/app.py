"""The OpenAI-compatible server around an `Engine`: chat completions, streamed or whole, and one list of one model."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
import uuid
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import UserError
from . import fetch
from .engine import Engine, Job
from .requests import ChatRequest, Picture, Refused, parse
from .uploads import read_upload

MAX_BODY = 64_000_000  # bytes of a request
MAX_PICTURES = 8  # in a request


def make_app(engine: Engine, urls: bool = False, private: Collection[str] = ()) -> Any:
    """The ASGI application; with ``urls`` it fetches images, from public addresses and the hosts in ``private``."""

    async def chat(request: Request) -> Response:
        asked = parse(await request.body())
        if asked.model != engine.name:
            raise Refused(
                f"the model {asked.model!r} does not exist; {engine.name!r} is served", "model", "model_not_found", 404
            )
        job = await asyncio.to_thread(engine.prepare, asked, await _pictures(asked, urls, private))
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.name}
        if asked.stream:
            return StreamingResponse(_events(engine, job, about), media_type="text/event-stream")
        return await _whole(request, engine, job, about)

    async def models(request: Request) -> Response:
        served = {"id": engine.name, "object": "model", "created": 0, "owned_by": "pitome-mllm"}
        return JSONResponse({"object": "list", "data": [served]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    handlers = dict.fromkeys((UserError, HTTPException, Exception), _failed)
    return WholeBodies(Starlette(routes=routes, exception_handlers=handlers))


async def _pictures(asked: ChatRequest, urls: bool, private: Collection[str]) -> list[Image.Image]:
    """All images of a request, in their order."""
    found = [(n, part) for n, turn in enumerate(asked.messages) for part in turn.content if isinstance(part, Picture)]
    if len(found) > MAX_PICTURES:
        raise Refused(f"the request has {len(found)} pictures; at most {MAX_PICTURES} are possible", "messages")
    images = []
    for number, (turn, part) in enumerate(found, 1):
        if asked.messages[turn].role != "user":
            raise Refused("only messages of the user have pictures", f"messages.{turn}")
        try:
            images.append(await _picture(part.image_url.url, f"picture {number}", urls, private))
        except UserError as error:
            raise Refused(str(error), f"messages.{turn}") from error
    return images


async def _picture(url: str, name: str, urls: bool, private: Collection[str]) -> Image.Image:
    head, _, data = url.partition(",")
    if head.startswith("data:") and head.endswith(";base64"):
        try:
            content = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise UserError(f"{name!r} is damaged base64 data: {error}") from error
    elif not url.startswith(("http://", "https://")):
        raise UserError(f"{name!r} is neither a data: URL nor a web address; send 'data:image/png;base64,...'")
    elif urls:
        fetched = asyncio.to_thread(fetch.fetch, url, private)
        try:
            content = await asyncio.wait_for(fetched, fetch.SECONDS + 1)  # a second more, for what it says itself
        except asyncio.TimeoutError as error:
            raise UserError(f"{url!r} could not be fetched: its name was not found in time") from error
    else:
        raise UserError(f"{name!r} is an address, and this server fetches none; send it as a data: URL")
    return await asyncio.to_thread(read_upload, content, name)


async def _whole(request: Request, engine: Engine, job: Job, about: dict[str, Any]) -> Response:
    text = ""
    async with aclosing(engine.answer(job)) as pieces:
        async for piece in pieces:
            text += piece
            if await request.is_disconnected():
                break
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": job.finish_reason}
    return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": job.usage})


async def _events(engine: Engine, job: Job, about: dict[str, Any]) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({**about, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    async for piece in engine.answer(job):
        yield event({"content": piece})
    yield event({}, job.finish_reason)
    if job.request.stream_options and job.request.stream_options.include_usage:
        said = {**about, "object": "chat.completion.chunk", "choices": [], "usage": job.usage}
        yield f"data: {json.dumps(said)}\n\n"
    yield "data: [DONE]\n\n"


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, {"connection": "close"} if status == 413 else None)


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return _error(error.status, str(error), error.param, error.code)
    if isinstance(error, HTTPException):
        possible = "POST /v1/chat/completions, GET /v1/models, GET /health"
        said = f"nothing is served at {request.method} {request.url.path}; possible: {possible}"
        return _error(error.status_code, said)
    if isinstance(error, UserError):
        return _error(400, str(error))
    return _error(500, "the server failed to answer; its log says why")


class WholeBodies:
    """An ASGI application that hands on requests when their bodies are here.

    Whatever the answer is, nothing of a request is left on its connection, which the next one uses.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, size, more = bytearray(), 0, True
        while more and size <= 2 * MAX_BODY:  # a little too much is read to its end, so that its client listens
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size <= MAX_BODY:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        if size > MAX_BODY:
            said = f"the request is too large; at most {MAX_BODY / 1e6:.0f} MB are possible"
            return await _error(413, said)(scope, receive, send)
        parts = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Any:
            return parts.pop() if parts else await receive()

        return await self.app(scope, again, send)
