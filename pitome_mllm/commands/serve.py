"""``pitome-mllm serve``: an OpenAI-compatible server with merged tokens."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from ..errors import UserError, missing_package
from ._options import add_merging, add_model, add_server, bound, check_method, merging, open_model

PACKAGES = ("pydantic", "starlette", "uvicorn")


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Serve a model with merged tokens to any OpenAI client: chat completions, pictures, streaming.",
    )
    add_model(parser)
    add_merging(parser)
    group = add_server(parser, default=8000)
    urls = "fetch the pictures that clients name by http(s), from public addresses; else only data: URLs"
    group.add_argument("--allow-urls", action="store_true", help=urls)
    private = "with --allow-urls: hosts that need not have public addresses"
    group.add_argument("--allow-private", nargs="+", default=(), metavar="HOST", help=private)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    check_method(options.method)
    with bound(options.host, options.port) as listener:
        if not all(map(importlib.util.find_spec, PACKAGES)):
            raise missing_package(f"serving needs {', '.join(PACKAGES)}", "serve")
        import uvicorn

        from ..attach import attach
        from ..serving.app import make_app
        from ..serving.engine import Engine
        from ..serving.resolution import amount

        model, processor = open_model(options)
        if not getattr(processor, "chat_template", None):
            raise UserError(f"{options.model!r} has no chat template, which a chat needs; choose another model")
        with attach(model, options.method, **merging(options)) as handle:
            app = make_app(Engine(options.model, handle, processor), options.allow_urls, options.allow_private)
            sys.stdout.write(
                f"{options.model}: {handle.plan.method}, {amount(handle.plan)}, "
                f"at http://{options.host}:{options.port}/v1\n"
            )
            sys.stdout.flush()
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
