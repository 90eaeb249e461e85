"""``pitome-mllm serve``: an OpenAI-compatible server with merged tokens, of this package or of vLLM."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package
from ._options import add_merging, add_model, add_server, bound, check_method, merging, open_model

PACKAGES = ("pydantic", "starlette", "uvicorn")
NOBODY = "only-data-urls.invalid"  # the one host that vLLM fetches from, unless it is told others
# Options of ours that vLLM has no equal of, and what to do instead.
NOT_IN_VLLM = {
    "bits": "vLLM quantises in its own ways: serve a quantised checkpoint, or write -- --quantization fp8",
    "device": "vLLM finds devices itself: CUDA_VISIBLE_DEVICES chooses GPUs, -- --tensor-parallel-size N spreads",
    "allow_urls": "vLLM fetches from private addresses too: name the hosts it may ask, -- --allowed-media-domains HOST",
    "allow_private": "name the hosts that vLLM may ask for pictures: -- --allowed-media-domains HOST",
}


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Serve a model with merged tokens to any OpenAI client: chat completions, pictures, streaming.",
    )
    engine = "vllm for many requests at once, transformers for one at a time (default: vllm where it is installed)"
    parser.add_argument("--engine", choices=ENGINES, help=engine)
    parser.add_argument("rest", nargs="*", metavar="-- OPTIONS", help="with vLLM: options of `vllm serve`")
    add_model(parser)
    add_merging(parser)
    group = add_server(parser, default=8000)
    urls = "fetch the pictures that clients name by http(s), from public addresses; else only data: URLs"
    group.add_argument("--allow-urls", action="store_true", help=f"{urls} (transformers)")
    private = "with --allow-urls: hosts that need not have public addresses"
    group.add_argument("--allow-private", nargs="+", default=(), metavar="HOST", help=private)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    check_method(options.method)
    there = "vllm" in packages_distributions()  # a folder of that name is not it
    ENGINES[options.engine or ("vllm" if there else "transformers")](options)


def with_vllm(options: argparse.Namespace) -> None:
    """Become vLLM's server, so that signals and exit code are its own."""
    from ..serving.vllm.versions import check

    check()
    line = vllm_line(options)
    bound(options.host, options.port).close()  # said now, not in a minute
    sys.stdout.write(f"{shlex.join(line)}\n")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *line[1:]])


def vllm_line(options: argparse.Namespace) -> list[str]:
    """``vllm serve`` with what our options come to there; UserError for what it cannot do."""
    from ..loading import TINY, load_processor, read_config
    from ..serving.prompts import begins_bare
    from ..serving.vllm import BEGINNING, MIDDLEWARE
    from ..serving.vllm.spec import hf_overrides

    for name, instead in NOT_IN_VLLM.items():
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} is not possible with vLLM; {instead}")
    if any(word.replace("_", "-").startswith("--hf-overrides") for word in options.rest):
        raise UserError("--hf-overrides is where vLLM is told of merging; write the line of `vllm serve` yourself")
    asked = {"method": options.method, **merging(options), "published": options.published or None}
    told = hf_overrides(read_config(options.model), **asked)
    processor = load_processor(options.model)
    if "--chat-template" not in options.rest:
        check_template(options.model, processor)
    folder = TINY if options.model == "tiny" else Path(options.model).expanduser()
    model = str(folder) if folder.is_dir() else options.model
    dtype = options.dtype or ("float32" if options.model == "tiny" else None)  # as `load` has it
    return [
        *("vllm", "serve", model, "--served-model-name", options.model, "--hf-overrides", json.dumps(told)),
        *("--middleware", BEGINNING if begins_bare(processor) else MIDDLEWARE),
        "--trust-request-mm-kwargs",  # of which the middleware lets `keep` through alone
        *("--allowed-media-domains", NOBODY, "--host", options.host, "--port", str(options.port)),
        *(("--dtype", dtype) if dtype else ()),
        *options.rest,
    ]


def with_transformers(options: argparse.Namespace) -> None:
    """Serve from this process."""
    if options.rest:
        raise UserError(f"{shlex.join(options.rest)!r} is for vLLM; choose --engine vllm, or leave it out")
    with bound(options.host, options.port) as listener:
        if not all(map(importlib.util.find_spec, PACKAGES)):
            raise missing_package(f"serving needs {', '.join(PACKAGES)}", "serve")
        import uvicorn

        from ..attach import attach
        from ..serving.app import make_app
        from ..serving.engine import Engine
        from ..serving.resolution import amount

        model, processor = open_model(options)
        check_template(options.model, processor)
        with attach(model, options.method, **merging(options)) as handle:
            app = make_app(Engine(options.model, handle, processor), options.allow_urls, options.allow_private)
            sys.stdout.write(
                f"{options.model}: {handle.plan.method}, {amount(handle.plan)}, "
                f"at http://{options.host}:{options.port}/v1\n"
            )
            sys.stdout.flush()
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def check_template(model: str, processor: Any) -> None:
    """UserError for a model that does not say how conversations are written."""
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{model!r} has no chat template, which a chat needs; choose another model")


ENGINES = {"transformers": with_transformers, "vllm": with_vllm}
