"""A request's own ``keep`` in front of vLLM's server: the body field that `pitome-mllm serve` takes everywhere.

vLLM reads what a request says to the processor from ``mm_processor_kwargs``, and trusts none of it unless the server
is started with ``--trust-request-mm-kwargs``; so this takes the field of a stranger's request apart, and lets ``keep``
through alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import HTTPException

from ...errors import UserError
from ...schedule import picture_count
from . import KEY

UNTRUSTED = ("mm_processor_kwargs", "media_io_kwargs")
CHATS = ("/chat/completions", "/chat/completions/batch", "/chat/completions/render", "/tokenize")
READS = (*CHATS, "/responses", "/responses/render", "/invocations")  # where vLLM reads settings of the processor


class Keep:
    """An ASGI application around another; for ``--middleware``."""

    also: ClassVar[dict[str, Any]] = {}  # fields of chats that say nothing of them

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        read, path = False, scope["path"]
        also = self.also if path.endswith(CHATS) else {}

        async def whole() -> Any:
            """The body as vLLM is to see it, once it asks; nothing is read of whom it turns away before."""
            nonlocal read
            if read:
                return await receive()
            read, body, more = True, bytearray(), True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                body += message.get("body", b"")
                more = message.get("more_body", False)
            return {"type": "http.request", "body": translated(bytes(body), also, path), "more_body": False}

        return await self.app(scope, whole, send)


class KeepAndBegin(Keep):
    """For models whose chat template leaves out the token that texts begin with, as LLaVA-1.5's: vLLM adds none."""

    also: ClassVar[dict[str, Any]] = {"add_special_tokens": True}


def translated(body: bytes, also: Mapping[str, Any], path: str) -> bytes:
    """The body with ``keep`` where vLLM looks for it, and ``also``; one that is no JSON object is vLLM's to refuse.

    Raises
    ------
    HTTPException
        400, where ``keep`` is no number of tokens and no share, or vLLM would not read it at ``path``, or a field is
        there that vLLM trusts.
    """
    try:
        asked = json.loads(body)
    except ValueError:
        return body
    if not isinstance(asked, dict):
        return body
    for name in UNTRUSTED:
        if asked.get(name):
            raise HTTPException(400, f"{name} is not possible here; a request's own number of visual tokens is 'keep'")
    keep = asked.pop("keep", None)
    if keep is None:
        return json.dumps({**also, **asked}).encode() if also else body
    if not path.endswith(READS):
        raise HTTPException(400, f"keep has no effect at {path}; ask at /v1/chat/completions or /v1/responses")
    try:
        picture_count(keep, 1)  # of any picture: how many it has is for the processor to know
    except UserError as error:
        raise HTTPException(400, str(error)) from error
    return json.dumps({**also, **asked, UNTRUSTED[0]: {KEY: {"keep": keep}}}).encode()
