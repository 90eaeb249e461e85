"""`pitome-mllm serve --engine vllm` as people use it: one server, asked by the openai package and by lmms-eval."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import psutil
import pytest

from pitome_mllm_eval.benchmark.bootstrap import Bootstrap
from pitome_mllm_eval.benchmark.sets import scene

KEEP, KEEPS = 144, (None, 100, 36, 9)
ROOM = 1536  # tokens of prompt and answer
OPTIONS = ["--max-model-len", ROOM, "--enforce-eager", "--max-num-seqs", 32, "--mm-processor-cache-gb", 0]
OPTIONS += ["--num-gpu-blocks-override", 64]  # of 128 tokens: memory that is touched little by little is no leak
# What libraries keep for later: up to 1024 of oneDNN's kernels, one for each number of tokens, and malloc's heaps.
FLAT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}


class Server:
    """Its process, and a client for it."""

    def __init__(self, folder):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "log"
        command = ["-m", "pitome_mllm.cli", "serve", "--engine", "vllm", "--keep", KEEP, "--port", self.port, "--"]
        own = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, [*command, *OPTIONS])], stdout=log, stderr=subprocess.STDOUT, env=own | FLAT
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def wait(self):
        """Until it answers."""
        for _ in range(900):
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                return httpx.get(f"{self.url}/health", timeout=5).raise_for_status()
            except httpx.HTTPError:
                time.sleep(1)
        pytest.fail(self.log.read_text()[-5000:])

    def family(self):
        """Its processes."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def memory(self):
        """Bytes that they hold by themselves."""
        return sum(process.memory_full_info().uss for process in self.family())

    def metric(self, name):
        """The sum of a figure of /metrics over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M))

    def ask(self, number, question=None, keep=None, **more):
        """One question about a scene."""
        asked = {"max_tokens": 4, "temperature": 0, "extra_body": {"keep": keep} if keep else {}, **more}
        return self.client.chat.completions.create(model="tiny", messages=messages(number, question), **asked)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("serve"))
    found.wait()
    yield found
    family = found.family()
    found.process.send_signal(signal.SIGTERM)
    assert found.process.wait(120) in (0, -signal.SIGTERM)
    assert not psutil.wait_procs(family, timeout=30)[1], "processes of the server are left behind"


def url(number):
    file = io.BytesIO()
    scene(number)[0].save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def asking(address, question):
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def messages(number, question=None):
    return asking(url(number), question or scene(number)[1][0].text)


def test_it_says_what_it_runs(server):
    line = next(line for line in server.log.read_text().splitlines() if line.startswith("vllm serve "))
    assert all(part in line for part in ('"PitomeLlava', f'"keep": {KEEP}', f"--port {server.port}", "--max-model-len"))


def test_an_answer_streamed_is_the_whole_one(server):
    whole = server.ask(3)
    chunks = list(server.ask(3, stream=True, stream_options={"include_usage": True}))
    words = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert words == whole.choices[0].message.content != "" and chunks[-1].usage == whole.usage


def test_usage_and_metrics_count_what_the_llm_reads(server):
    text = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": scene(0)[1][0].text}], max_tokens=1
    ).usage.prompt_tokens
    names = "pitome_visual_tokens_before_total", "pitome_visual_tokens_after_total"
    for number, keep in enumerate(KEEPS, 100):
        before = [server.metric(name) for name in names]
        kept = keep or KEEP
        assert server.ask(number, scene(0)[1][0].text, keep).usage.prompt_tokens == text + kept
        assert [server.metric(name) - count for name, count in zip(names, before)] == [576, kept]


def test_many_at_once_with_numbers_of_tokens_of_their_own(server):
    asked = [(number, KEEPS[number % len(KEEPS)]) for number in range(32)]
    alone = [server.ask(number, keep=keep) for number, keep in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: server.ask(one[0], keep=one[1]), asked))
    assert [one.usage.prompt_tokens for one in together] == [one.usage.prompt_tokens for one in alone]
    assert len({one.usage.prompt_tokens for one in together}) >= len(KEEPS)
    same = [one.choices[0].message.content == other.choices[0].message.content for one, other in zip(together, alone)]
    assert sum(same) >= 30  # a batch may round another way, and near-ties of drawn scenes then merge otherwise


def bad():
    """Bodies that are wrong, by what is."""
    good = {"model": "tiny", "messages": messages(0), "max_tokens": 2}
    for keep in (KEEP + 1, 0.5, 0, -1, 1.5, "many", True, [9], {"a": 9}):
        yield f"keep={keep}", {**good, "keep": keep}
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        yield name, {**good, name: {"image": {"a": 1}}}
    for address in ("http://127.0.0.1:1/a.png", "data:image/png;base64,a b", "nothing"):
        yield address, {**good, "messages": asking(address, "is there a star?")}
    yield "no picture", {**good, "messages": asking("data:image/png;base64,AAAA", "is there a star?")}
    yield "cut off", {**good, "messages": asking(url(0)[:2000], "is there a star?")}
    yield "too long", {**good, "messages": [{"role": "user", "content": "a " * 3000}]}
    yield "no messages", {**good, "messages": []}
    yield "no JSON", b"{"
    yield "deep", b"[" * 100_000


def test_what_is_wrong_is_refused_and_the_next_is_answered(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for name, body in bad():
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            reply = client.post("/v1/chat/completions", content=data, headers={"content-type": "application/json"})
            assert reply.status_code == 400, (name, reply.text)
            assert server.ask(0).choices[0].message.content
    for keep, said in ((KEEP + 1, f"at most {KEEP} are served"), ("many", "keep='many' is not possible")):
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            server.ask(0, keep=keep)
        assert said in caught.value.body["message"]


def test_a_client_that_is_killed_while_it_listens_holds_nobody_up(server):
    code = (
        "import json, sys, httpx\n"
        "with httpx.stream('POST', sys.argv[1], json=json.load(sys.stdin), timeout=60) as reply:\n"
        "    for line in reply.iter_lines(): print(line, flush=True)"
    )
    body = {"model": "tiny", "messages": messages(0), "max_tokens": ROOM - 300, "stream": True, "ignore_eos": True}
    before = server.metric("vllm:generation_tokens_total")
    with subprocess.Popen(
        [sys.executable, "-c", code, f"{server.url}/v1/chat/completions"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as listener:
        listener.stdin.write(json.dumps(body).encode())
        listener.stdin.close()
        assert listener.stdout.readline().startswith(b"data: ")
        listener.kill()
    while server.metric("vllm:num_requests_running"):
        time.sleep(0.2)
    assert server.metric("vllm:generation_tokens_total") - before < ROOM - 300
    assert server.ask(0).choices[0].message.content


def test_nothing_leaks_over_500_requests(server):
    def some(first, count):
        asked = [(number % 50, KEEPS[number % len(KEEPS)], 1 + number % 4) for number in range(first, first + count)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda one: server.ask(one[0], keep=one[1], max_tokens=one[2]), asked))

    some(0, 200)
    before = server.memory()
    some(200, 500)
    assert server.memory() < 1.02 * before


def test_lmms_eval_finds_the_accuracy_of_this_process(server, capsys):
    """The embedded benchmark through lmms-eval's own model for such servers, and through ours without vLLM."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from pitome_mllm_eval.lmms.scene_tasks import GROUP, TASKS

    models = {
        "openai": f"model=tiny,base_url={server.url}/v1,api_key=unused,num_concurrent=16,timeout=120",
        "pitome_llava": f"pretrained=tiny,keep={KEEP},calibration=none",
    }
    right = {}
    for model, model_args in models.items():
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        options = dict(tasks=[GROUP], task_manager=manager, limit=50, batch_size=8, bootstrap_iters=0)
        found = simple_evaluate(model=model, model_args=model_args, **options)["samples"]
        rows = [one for task in sorted(found) for one in sorted(found[task], key=lambda one: one["doc_id"])]
        right[model] = np.array([float(one["exact_match"]) for one in rows])
    served, local = right.values()
    bootstrap = Bootstrap(np.array([one["doc"]["scene"] for one in rows]))
    shown = {**right, "difference": served - local}
    figures = {name: bootstrap(values, np.ones(len(rows), bool)) for name, values in shown.items()}
    with capsys.disabled():
        said = ", ".join(f"{name} {mean:.3f} ({low:.3f} to {high:.3f})" for name, (mean, low, high) in figures.items())
        sys.stdout.write(f"\nright of {len(rows)} questions: {said}\n")
    assert len(rows) >= 300 and local.mean() > 0.7 and (served == local).mean() > 0.95
    assert figures["difference"][1] <= 0 <= figures["difference"][2]
