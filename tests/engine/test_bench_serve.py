"""`make bench-serve` asks as it says, without a server."""

import asyncio
import json

import httpx
import pytest

from pitome_mllm_eval.speed import serving


def client(status=200, tokens=serving.NEW_TOKENS, seen=None):
    """Of a server that streams so many tokens, and keeps in ``seen`` how many are asked at once."""

    async def stream():
        for written in range(tokens + 1):  # the first event says who speaks
            yield f"data: {json.dumps({'usage': {'completion_tokens': written}})}\n\n".encode()
            await asyncio.sleep(0)
        yield b"data: [DONE]\n\n"

    async def answer(request):
        if seen is not None:
            seen.append(request.content)
        return httpx.Response(status, content=stream())

    return httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(answer))


def test_every_request_is_asked_once_and_answers_have_two_times():
    asked, seen = [b"%d" % number for number in range(7)], []
    for load in (
        lambda: serving.at_once(client(seen=seen), asked, 3),
        lambda: serving.arriving(client(seen=seen), asked, 1e6),
    ):
        found = asyncio.run(load())
        assert sorted(seen) == asked and len(found) == 7
        assert all(one.first > 0 and one.each > 0 for one in found)
        seen.clear()


def test_what_is_no_whole_answer_stops_the_measurement():
    for there, message in ((client(status=400), "400"), (client(tokens=3), "3 tokens in place of 16")):
        with pytest.raises(RuntimeError, match=message):
            asyncio.run(serving.at_once(there, [b"{}"], 1))


def test_pictures_differ():
    assert len(set(serving.bodies(5, 28))) == 5
