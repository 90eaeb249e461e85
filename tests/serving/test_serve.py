"""`pitome-mllm serve` as people use it: a server of its own, asked by the openai package."""

import asyncio
import base64
import copy
import functools
import http.client
import http.server
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import families
import openai
import pytest
from packed import PACKED

from pitome_mllm import attach, load
from pitome_mllm.schedule import target_count
from pitome_mllm.serving import app
from pitome_mllm.serving.engine import Engine
from pitome_mllm.serving.requests import Refused, parse
from pitome_mllm_eval.benchmark.sets import scene

KEEP = 6


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its process, and a client for it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("pitome-mllm")), "serve", "--engine", "transformers"]
    command += ["--method", "tome", "--keep", str(KEEP), "--port", str(port)]
    log = tmp_path_factory.mktemp("serve") / "log"
    process = subprocess.Popen(
        command, stdout=log.open("w"), stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    process.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
    process.connection = http.client.HTTPConnection("127.0.0.1", port)
    process.log = log
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.5)
    yield process
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def local():
    """The same model and settings in this process: what the server has to answer, and the tokens of its prompt."""
    model, processor = load("tiny")
    with attach(model, "tome", keep=KEEP) as handle:

        def answer(number, question):
            picture = scene(number)[0]
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=picture, text=prompt, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            return processor.tokenizer.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[1]

        yield answer
        assert handle.stats.tokens_after == KEEP


def ask(connection, body, path="/v1/chat/completions"):
    """Status and JSON of an answer over one connection, which stays open."""
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def asking(url, question):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def data_url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def messages(number, question, tmp_path):
    path = tmp_path / "scene.png"
    scene(number)[0].save(path)
    return asking(data_url(path.read_bytes()), question)


QUESTIONS = [(number, question.text) for number in (0, 3, 16) for question in scene(number)[1][:4]]


def test_answers_are_those_of_the_merged_model(server, local, tmp_path):
    """Of the questions some are answered otherwise by the plain model: the server must give the merged answers."""
    differ = 0
    for number, question in QUESTIONS:
        expected, prompt = local(number, question)
        reply = server.client.chat.completions.create(
            model="tiny", messages=messages(number, question, tmp_path), max_tokens=8, temperature=0
        )
        assert reply.choices[0].message.content == expected and reply.choices[0].finish_reason == "stop"
        assert reply.usage.prompt_tokens == prompt - 576 + KEEP  # as the LLM reads it
        truth = next(q.answer for q in scene(number)[1] if q.text == question)
        differ += expected.strip() != truth
    assert differ > 0, "choose a smaller keep: the plain model could have answered the same"


def test_streaming(server, local, tmp_path):
    number, question = QUESTIONS[0]
    stream = server.client.chat.completions.create(
        model="tiny", messages=messages(number, question, tmp_path), max_tokens=8, temperature=0, stream=True
    )
    chunks = list(stream)
    words = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(chunks) >= 3 and words.strip() == local(number, question)[0].strip()
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_turns(server, tmp_path):
    first = messages(0, "is there a star?", tmp_path)
    said = server.client.chat.completions.create(model="tiny", messages=first, max_tokens=8, temperature=0)
    answer = said.choices[0].message.content.strip()
    more = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "is there a circle?"}]
    again = server.client.chat.completions.create(model="tiny", messages=more, max_tokens=8, temperature=0)
    assert again.choices[0].message.content.strip() in ("yes", "no")
    assert again.usage.prompt_tokens > said.usage.prompt_tokens


def test_a_request_may_keep_fewer_tokens_and_no_more(server, local, tmp_path):
    number, question = QUESTIONS[0]
    for keep, after in ((None, KEEP), (3, 3), (0.005, target_count(0.005, 576))):
        reply = server.client.chat.completions.create(
            model="tiny", messages=messages(number, question, tmp_path), extra_body={"keep": keep}
        )
        assert reply.usage.visual_tokens == {"before": 576, "after": after}
        assert reply.usage.prompt_tokens == local(number, question)[1] - 576 + after
    for keep in (KEEP + 1, 0.5, 0, -1, 1.5, "many", True):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client.chat.completions.create(
                model="tiny", messages=messages(number, question, tmp_path), extra_body={"keep": keep}
            )
        assert caught.value.param.startswith("keep"), keep


def test_stop_strings_end_the_answer(server, local, tmp_path):
    number, question = QUESTIONS[0]
    whole = local(number, question)[0]
    for stop, expected in ((whole[2:4], whole[:2]), (["no such", whole], ""), (["never"], whole)):
        asked = {"model": "tiny", "messages": messages(number, question, tmp_path), "stop": stop, "temperature": 0}
        reply = server.client.chat.completions.create(**asked)
        chunks = server.client.chat.completions.create(**asked, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert reply.choices[0].message.content == streamed == expected and reply.choices[0].finish_reason == "stop"


def test_an_answer_that_ends_at_the_limit_was_not_cut_off(server, tmp_path):
    for limit, reason in ((1, "length"), (2, "stop")):  # a word, and the end
        asked = messages(0, "is there a star?", tmp_path)
        reply = server.client.chat.completions.create(model="tiny", messages=asked, max_tokens=limit, temperature=0)
        assert reply.choices[0].finish_reason == reason and reply.usage.completion_tokens == limit


def test_sampling_repeats_with_its_seed(server):
    def answer(seed):
        said = [{"role": "user", "content": "how many stars are there?"}]  # without a picture it has to guess
        reply = server.client.chat.completions.create(model="tiny", messages=said, temperature=2, seed=seed)
        return reply.choices[0].message.content

    assert answer(1) == answer(1) and len({answer(seed) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model": "other"}, "model|the model 'other' does not exist; 'tiny' is served"),
        ({"model": None}, "model|valid string"),
        ({"messages": None}, "messages|valid array"),
        ({"messages": []}, "messages|at least 1 item"),
        ({"messages": [{"role": "king", "content": "hello"}]}, "messages.0.role|Input should be 'system', 'developer'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content|Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "a"}]}]},
            "messages.0.content.0|expected tags",
        ),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "messages.0|stands for a picture"),
        ({"messages": asking("data:image/png;base64,", "a") * 9}, "messages|has 9 pictures; at most 8"),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "messages|the model holds 2048"),
        ({"max_tokens": 0}, "max_tokens|greater than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens|greater than or equal to 1"),
        ({"max_tokens": 10**6}, "messages|the model holds 2048"),
        ({"temperature": "hot"}, "temperature|valid number"),
        ({"temperature": float("nan")}, "temperature|finite number"),
        ({"top_p": 0}, "top_p|greater than 0"),
        ({"stop": [3]}, "stop.0|valid string"),
        ({"stop": ""}, "stop.0|at least 1 character"),
        ({"n": 3}, "n|Input should be 1"),
        ({"tools": [{}]}, "tools|is not possible here"),
        ({"chat_template_kwargs": {"images": ["/etc/passwd"]}}, "chat_template_kwargs|is not possible here"),
        (b"{", "None|Invalid JSON"),
        (b"[]", "None|Input should be an object"),
        (b"[" * 100_000, "None|recursion limit"),
    ],
)
def test_what_is_wrong_is_refused_in_the_words_of_openai(server, wrong, message):
    good = {"model": "tiny", "messages": [{"role": "user", "content": "is there a star?"}]}
    status, body = ask(server.connection, wrong if isinstance(wrong, bytes) else {**good, **wrong})
    param, said = message.split("|") if "|" in message else (message, "")
    error = body["error"]
    assert status == (404 if error["code"] == "model_not_found" else 400)
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert str(error["param"]) == param and said in error["message"]


def test_no_bad_request_harms_the_next(server):
    """Hundreds of broken bodies and paths on one connection, which no answer may close."""
    rng = random.Random(0)
    good = {"model": "tiny", "messages": [{"role": "user", "content": "is there a star?"}], "max_tokens": 2}
    junk = [None, True, -1, 0, 1e308, "", "hot", "\ud800", [], [[]], {}, {"a": {}}, [None] * 3, 2**70, "a" * 9000]
    fields = [*good, *"keep stop n seed top_p temperature max_completion_tokens stream_options logprobs tools".split()]
    assert ask(server.connection, good)[0] == 200
    link = server.connection.sock
    for number in range(500):
        body = copy.deepcopy(good)
        for field in rng.sample(fields, rng.randint(1, 3)):
            body[field] = rng.choice(junk)
        if rng.random() < 0.3:
            body["messages"] = [{rng.choice(["role", "content", "x"]): rng.choice(junk)}]
        data = json.dumps(body).encode()
        if rng.random() < 0.3:  # cut off, or a byte of it changed
            at = rng.randrange(len(data))
            data = data[:at] if rng.random() < 0.5 else data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        path = rng.choice(["/v1/chat/completions"] * 9 + ["/v1/nothing"])
        status, said = ask(server.connection, data, path)
        assert status == 200 or (400 <= status < 500 and said["error"]["message"]), (data, said)
        if number % 25 == 0:
            assert ask(server.connection, good)[0] == 200
    assert server.connection.sock is link and server.poll() is None


def test_a_body_that_is_too_large_is_refused_in_words(server):
    status, body = ask(server.connection, b" " * 64_000_001)
    assert status == 413 and "at most 64 MB" in body["error"]["message"]
    assert ask(server.connection, b"{")[0] == 400


def test_a_client_that_leaves_holds_nobody_up(server, tmp_path):
    body = json.dumps({"model": "tiny", "messages": messages(0, "is there a star?", tmp_path), "stream": True}).encode()
    for _ in range(5):
        with socket.create_connection((server.connection.host, server.connection.port)) as gone:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
            gone.sendall(head.encode() + body)
            gone.recv(10)
    reply = server.client.chat.completions.create(model="tiny", messages=messages(0, "is there a star?", tmp_path))
    assert reply.choices[0].message.content


def test_pictures_that_are_not_sent_are_refused(server, tmp_path):
    """Neither files of this machine nor addresses; and what is sent is decoded with care."""
    scene(0)[0].save(tmp_path / "scene.png")
    scene(0)[0].save(tmp_path / "scene.tiff")
    whole = (tmp_path / "scene.png").read_bytes()
    for url, message in [
        (str(tmp_path / "scene.png"), "neither a data: URL nor a web address"),
        ((tmp_path / "scene.png").as_uri(), "neither a data: URL nor a web address"),
        ("http://127.0.0.1:1/scene.png", "this server fetches none"),
        ("data:image/png,abc", "neither a data: URL nor a web address"),
        ("data:image/png;base64,a b", "damaged base64 data"),
        (data_url(whole[:3000]), "cannot read the picture 'picture 1': image file is truncated"),
        (data_url((tmp_path / "scene.tiff").read_bytes()), "is no picture in one of the formats"),
        (data_url(bytes(20_000_001)), "at most 20 MB"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            server.client.chat.completions.create(model="tiny", messages=asking(url, "is there a star?"), max_tokens=4)


def test_addresses_are_fetched_where_that_is_allowed(tmp_path):
    """In this process, from a server that is one of this machine's."""
    scene(0)[0].save(tmp_path / "scene.png")
    files = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), files) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}/scene.png"
        picture = asyncio.run(app._picture(url, "picture 1", True, ["127.0.0.1"]))
        assert picture.size == scene(0)[0].size
        with pytest.raises(ValueError, match="which is not public"):
            asyncio.run(app._picture(url, "picture 1", True, []))
        web.shutdown()


def test_there_is_nothing_else(server):
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/v1/responses", "/docs"):
        with pytest.raises(openai.NotFoundError, match=f"nothing is served at POST {path}"):
            server.client.post(f"{str(server.client.base_url).removesuffix('/v1/')}{path}", body={}, cast_to=object)
    assert [model.id for model in server.client.models.list()] == ["tiny"]


def test_it_says_what_it_serves(server):
    assert re.search(
        rf"tiny: tome, {KEEP} of 576 visual tokens \(1%\), at http://127.0.0.1:\d+/v1", server.log.read_text()
    )


@pytest.mark.parametrize("title, before, after", [("Qwen2.5-VL", 60, 15), ("Pixtral", 18, 4), ("InternVL", 64, 16)])
def test_models_of_pictures_of_any_size_are_served(title, before, after):
    family = next(family for family in PACKED if family.title == title)
    served = Engine(title, attach(family.build(), "tome", keep=0.25), family.chat())

    def prepared(text="how many are there", **more):
        body = {"model": title, "messages": asking("data:,", text), "max_tokens": 3, "temperature": 0, **more}
        return served.prepare(parse(json.dumps(body).encode()), families.pictures(1))

    async def answered(job):
        return [piece async for piece in served.answer(job)]

    job = prepared()
    assert asyncio.run(answered(job))
    assert job.usage["visual_tokens"] == {"before": before, "after": after}
    gone = before - after + (2 if title == "Pixtral" else 0)  # the breaks of rows too
    assert job.usage["prompt_tokens"] == job.prompt - gone and job.usage["completion_tokens"] == 3
    with pytest.raises(Refused, match="a text holds '<image>', which stands for a picture"):
        prepared("where is <image>")
    fewer = prepared(keep=0.1)
    assert asyncio.run(answered(fewer)) and fewer.usage["visual_tokens"]["after"] < after
    with pytest.raises(Refused, match="keep=0.9 comes to .* visual tokens; at most"):
        prepared(keep=0.9)
