"""`pitome-mllm serve` as people use it: a server of its own, asked by the openai package."""

import base64
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch

from pitome_mllm import attach, load
from pitome_mllm_eval.benchmark.sets import scene

KEEP = 36


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its process, and a client for it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("pitome-mllm")), "serve", "--method", "tome", "--keep", str(KEEP)]
    log = tmp_path_factory.mktemp("serve") / "log"
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=log.open("w"), stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    process.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
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
    model, processor = load("tiny")
    differ = 0
    for number, question in QUESTIONS:
        expected, prompt = local(number, question)
        reply = server.client.chat.completions.create(
            model="tiny", messages=messages(number, question, tmp_path), max_tokens=8, temperature=0
        )
        assert reply.choices[0].message.content == expected and reply.choices[0].finish_reason == "stop"
        assert reply.usage.prompt_tokens == prompt  # as the client's prompt counts
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


def test_no_other_model_is_served(server, tmp_path):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(model="other", messages=messages(0, "is there a star?", tmp_path))
    assert "pinned to 'tiny'" in caught.value.response.json()["detail"]


def test_pictures_that_are_not_sent_are_refused(server, tmp_path):
    """Neither files of this machine nor addresses; and what is sent is decoded with care."""
    scene(0)[0].save(tmp_path / "scene.png")
    whole = (tmp_path / "scene.png").read_bytes()
    for url, message in [
        (str(tmp_path / "scene.png"), "neither a data: URL nor a web address"),
        ((tmp_path / "scene.png").as_uri(), "neither a data: URL nor a web address"),
        ("http://127.0.0.1:1/scene.png", "this server fetches none"),
        (data_url(whole[:3000]), "cannot read the picture 'picture 1': image file is truncated"),
        (data_url(b"no picture"), "is no picture in one of the formats"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            server.client.chat.completions.create(model="tiny", messages=asking(url, "is there a star?"), max_tokens=4)


def test_clients_load_and_reset_nothing(server):
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions"):
        with pytest.raises(openai.NotFoundError, match=f"nothing is served at {path}"):
            server.client.post(f"{str(server.client.base_url).removesuffix('/v1/')}{path}", body={}, cast_to=object)
    assert [model.id for model in server.client.models.list()] == ["tiny"]


def test_responses_pass_the_same_checks(server, tmp_path):
    scene(0)[0].save(tmp_path / "scene.png")
    content = [{"type": "input_image", "image_url": str(tmp_path / "scene.png"), "detail": "auto"}]
    with pytest.raises(openai.BadRequestError, match="neither a data: URL"):
        server.client.responses.create(model="tiny", input=[{"role": "user", "content": content}])


def test_it_says_what_it_serves(server):
    assert re.search(rf"tiny: tome, {KEEP} of 576 visual tokens, at http://127.0.0.1:\d+/v1", server.log.read_text())


def test_the_language_model_reads_the_short_prompt(monkeypatch, tmp_path):
    """The same server in this process: what arrives at the LLM is counted."""
    from fastapi.testclient import TestClient

    from pitome_mllm.commands.serve import server_with

    model, processor = load("tiny")
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr("uvicorn.Server.run", lambda self: None)
    with attach(model, "tome", keep=KEEP), torch.no_grad():
        app = server_with("tiny", model, processor)(port=free_port()).server.config.app
        body = {"model": "tiny", "messages": messages(0, "is there a star?", tmp_path), "max_tokens": 4}
        reply = TestClient(app).post("/v1/chat/completions", json=body)
    assert reply.status_code == 200
    assert lengths[0] == reply.json()["usage"]["prompt_tokens"] - 576 + KEEP
