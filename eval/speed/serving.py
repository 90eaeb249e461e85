"""What users of a server wait, and how many it answers: ``make bench-serve``, in at most 20 minutes on two cores.

Servers of stock vLLM, and of vLLM that keeps so many visual tokens, run beside each other and are asked in turns. Their
model is random, with an LLM that dominates: its tower takes about the share of the work that LLaVA-1.5-7B's does. All
pictures differ, and nothing is cached from one request to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from pitome_mllm.costs.published import SHAPES, Shape
from pitome_mllm.loading import TINY

from ..documents import write_csv
from ..provenance import about_machine, parse_measuring
from .models import configuration

STOCK, ALL = "stock", 576
CONTENDERS = {STOCK: None, "576": ALL, "144": 144, "64": 64}
REQUESTS = {1: 12, 4: 24, 12: 48, 32: 96}  # asked at once: in all, in each round
BUSY = {"0.8": 48, "1.5": 48}  # Poisson arrivals, as a share of what stock vLLM answers 12 at once: in all
WORDS, NEW_TOKENS = "is there a red star in the top left? " * 4, 16
NAME = "random"
ALIKE = ["--served-model-name", NAME, "--load-format", "dummy", "--max-model-len", "2048", "--no-enable-prefix-caching"]
ALIKE += ["--mm-processor-cache-gb", "0", "--disable-uvicorn-access-log"]
# On a processor a model has one core, and what asks and parses another; 1 GiB holds what 32 requests need.
ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}

_SMALL_TOWER = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 2,
    "image_size": 336, "patch_size": 14, "projection_dim": 64,
}  # fmt: skip
_MOST_OF_IT = dict(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=32064,
)  # fmt: skip
MODELS: dict[str, tuple[Shape, str, list[str]]] = {
    "llm-heavy": (Shape("8 blocks of width 512", _SMALL_TOWER, _MOST_OF_IT), "float32", ["--enforce-eager"]),
    "llava-1.5-7b": (SHAPES["llava-1.5-7b"], "bfloat16", []),
}


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token, and for each further one."""

    first: float
    each: float


@dataclass
class Cell:
    """What a server did under one load, in all rounds."""

    rate: float | str = ""  # requests per second that came, where they come by themselves
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    blocks: int = 0  # of the KV cache, at most

    def row(self, load: str, what: str, server: Server) -> dict[str, object]:
        """What is published of it."""
        found: dict[str, object] = {"load": load, "what": what, "prompt_tokens": server.prompt}
        found |= {"requests": len(self.answers), "offered": self.rate}
        found["requests_s"] = round(len(self.answers) / self.seconds, 4)
        for name in ("first", "each"):
            ms = np.quantile([1000 * getattr(one, name) for one in self.answers], (0.5, 0.95, 0.99))
            found |= {f"{name}_p{q}": round(float(value), 2) for q, value in zip((50, 95, 99), ms)}
        return found | {"kv_blocks": self.blocks, "of_blocks": server.blocks, "block_tokens": server.block_tokens}


@dataclass
class Server:
    """One that runs, or is about to."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    prompt: int = 0  # tokens of every prompt
    blocks: int = 0  # of its KV cache
    block_tokens: int = 0  # of each

    def answers(self) -> bool:
        """Whether it does yet; RuntimeError where it never will."""
        if self.process.poll() is not None:
            raise RuntimeError(f"a server does not start: {self.log.read_text()[-3000:]}")
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def main(argv: list[str] | None = None) -> None:
    """Start all servers, ask them in turns, and write down what came of it."""
    options = parse(argv)
    shape, dtype, more = MODELS[options.shape]
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_model(shape, Path(folder))
        begun = time.monotonic()
        servers = {
            what: stack.enter_context(started(what, keep, Path(folder), [*more, "--dtype", dtype]))
            for what, keep in CONTENDERS.items()
        }
        for server in servers.values():
            while not server.answers():
                time.sleep(1)
            asyncio.run(first(server))
        less = {servers[STOCK].prompt - server.prompt for server in servers.values()}
        if less != {ALL - (keep or ALL) for keep in CONTENDERS.values()}:
            raise RuntimeError(f"prompts of the servers are shorter than stock vLLM's by {sorted(less)} tokens")
        print(f"{len(servers)} servers after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        cells = measured(servers, options.rounds, options.part, shape.vision["image_size"])
        version = httpx.get(f"{servers[STOCK].url}/version").json()["version"]
    about = about_machine() | device | {"shape": shape.title, "dtype": dtype, "vllm": version, "rounds": options.rounds}
    write_csv(options.out, [cell.row(load, what, servers[what]) for (load, what), cell in cells.items()], about)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llm-heavy", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=2, help="how often each server gets each load (%(default)s)")
    parser.add_argument("--part", type=float, default=1.0, help="ask only so many of the requests, to rehearse")
    parser.add_argument("--out", type=Path, default=Path("bench-serve.csv"))
    return parse_measuring(parser, argv)


def write_model(shape: Shape, folder: Path) -> None:
    """A model of this shape without weights, which reads the embedded model's words."""
    from transformers import AutoConfig, AutoProcessor

    config, tiny = configuration(shape), AutoConfig.from_pretrained(TINY)
    config.architectures, config.image_token_id = tiny.architectures, tiny.image_token_id
    config.text_config.eos_token_id = tiny.text_config.eos_token_id
    config.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(TINY)
    side = {"height": shape.vision["image_size"], "width": shape.vision["image_size"]}
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": side["height"]}, side
    processor.patch_size = shape.vision["patch_size"]
    processor.save_pretrained(folder)


@contextmanager
def started(what: str, keep: int | None, model: Path, more: Sequence[str]) -> Iterator[Server]:
    """A server that starts; its log stands beside the model."""
    with socket.create_server(("127.0.0.1", 0)) as free:  # listening, so that no two get one: vLLM would share it
        port = free.getsockname()[1]
    serve = ["-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    if keep is not None:
        serve = ["-m", "pitome_mllm.cli", "serve", "--engine", "vllm", "--model", str(model), "--keep", str(keep), "--"]
    with (model / f"{what}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *serve, "--port", str(port), *ALIKE, *more], stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | ON_CPU | {"VLLM_NO_USAGE_STATS": "1"},
        )  # fmt: skip
    try:
        yield Server(f"http://127.0.0.1:{port}", process, model / f"{what}.log")
    finally:
        process.terminate()
        process.wait(60)


def bodies(count: int, side: int) -> list[bytes]:
    """Requests, each with a picture of its own."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        pixels, file = random.integers(0, 256, (side // 7, side // 7, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(pixels).resize((side, side)).save(file, "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": WORDS}]
        asked = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}
        asked |= {"temperature": 0, "ignore_eos": True, "stream": True, "add_special_tokens": True}
        asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        made.append(json.dumps(asked).encode())
    return made


async def ask(client: httpx.AsyncClient, body: bytes) -> Answer:
    """One request, and when its tokens came."""
    began, first, tokens = time.perf_counter(), 0.0, 0
    head = {"content-type": "application/json"}
    async with client.stream("POST", "/v1/chat/completions", content=body, headers=head) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {(await reply.aread()).decode()}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and (now := json.loads(line[6:])["usage"]["completion_tokens"]) > tokens:
                first, last, tokens = first or time.perf_counter(), time.perf_counter(), now
    if tokens != NEW_TOKENS:
        raise RuntimeError(f"an answer of {tokens} tokens in place of {NEW_TOKENS}")
    return Answer(first - began, (last - first) / (NEW_TOKENS - 1))


async def at_once(client: httpx.AsyncClient, asked: Sequence[bytes], width: int) -> list[Answer]:
    """So many clients, each of which asks again as soon as it has its answer."""
    left = iter(asked)

    async def one() -> list[Answer]:
        return [await ask(client, body) for body in left]

    return sum(await asyncio.gather(*(one() for _ in range(width))), [])


async def arriving(client: httpx.AsyncClient, asked: Sequence[bytes], rate: float) -> list[Answer]:
    """Requests that come by themselves, at random times, the same for every server."""

    async def one(body: bytes, when: float) -> Answer:
        await asyncio.sleep(when)
        return await ask(client, body)

    times = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(asked)))
    return await asyncio.gather(*map(one, asked, times.tolist()))


async def under_load(server: Server, load: Callable[[httpx.AsyncClient], Awaitable[list[Answer]]], cell: Cell) -> None:
    """Let a server answer, and add to ``cell`` what it did."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        running, began = asyncio.ensure_future(load(client)), time.perf_counter()
        while not (await asyncio.wait([running], timeout=0.3))[0]:
            cell.blocks = max(cell.blocks, round(server.blocks * await usage(client)))
        cell.answers += running.result()
        cell.seconds += time.perf_counter() - began


async def usage(client: httpx.AsyncClient) -> float:
    """The share of the KV cache that is in use."""
    return float(re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)", (await client.get("/metrics")).text, re.M)[1])


async def first(server: Server) -> None:
    """Ask once, and look at what there is."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        asked = json.loads(bodies(1, 336)[0]) | {"stream": False, "stream_options": None}
        reply = await client.post("/v1/chat/completions", json=asked)
        server.prompt = reply.raise_for_status().json()["usage"]["prompt_tokens"]
        about = re.search(r"^vllm:cache_config_info\{.*\}", (await client.get("/metrics")).text, re.M)[0]
        server.blocks, server.block_tokens = (
            int(re.search(rf'[{{,]{name}="(\d+)"', about)[1]) for name in ("num_gpu_blocks", "block_size")
        )


def measured(servers: dict[str, Server], rounds: int, part: float, side: int) -> dict[tuple[str, str], Cell]:
    """Every server under every load, in turns, each round in the other direction."""
    cells = {(str(load), what): Cell() for load in (*REQUESTS, *BUSY) for what in servers}
    asked = bodies(max(*REQUESTS.values(), *BUSY.values()), side)
    for number in range(rounds):
        for load, count in (REQUESTS | BUSY).items():
            some = asked[: max(2, round(part * count))]
            for what in list(servers)[:: -1 if number % 2 else 1]:
                cell, began = cells[str(load), what], time.monotonic()
                if isinstance(load, str) and not cell.rate:
                    taken = cells["12", STOCK]
                    cell.rate = round(float(load) * len(taken.answers) / taken.seconds, 4)
                way = at_once if isinstance(load, int) else arriving
                much = load if isinstance(load, int) else cell.rate
                asyncio.run(under_load(servers[what], lambda client: way(client, some, much), cell))  # noqa: B023
                said = f"round {number + 1}, load {load}, {what}: {len(some)} in {time.monotonic() - began:.1f} s"
                print(said, file=sys.stderr, flush=True)
    return cells


if __name__ == "__main__":
    main()
