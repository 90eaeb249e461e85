"""``pitome-mllm serve``: transformers' own OpenAI-compatible server, with merged tokens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import UserError
from ..serving.gate import Gate
from ._options import add_merging, add_model, check_method, merging, open_model


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Serve a model with merged tokens to any OpenAI client: chat completions, pictures, streaming.",
    )
    add_model(parser)
    add_merging(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    group.add_argument(
        "--allow-urls",
        action="store_true",
        help="fetch the pictures that clients name by http(s); else only data: URLs",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve until interrupted.

    Raises
    ------
    ValueError
        A mistake the user can mend, in one sentence.
    """
    from transformers.utils.import_utils import is_serve_available

    from ..attach import attach

    if not is_serve_available():
        raise UserError(
            "serving needs fastapi, openai and uvicorn; install them with: pip install 'pitome-mllm[serve]'"
        )
    check_method(options.method)
    model, processor = open_model(options)
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{options.model!r} has no chat template, which an OpenAI server needs; choose another model")
    with attach(model, options.method, **merging(options)) as handle:
        plan = handle.plan
        sys.stdout.write(
            f"{options.model}: {plan.method}, {plan.keep} of {plan.available} visual tokens, "
            f"at http://{options.host}:{options.port}/v1\n"
        )
        sys.stdout.flush()
        server_with(options.model, model, processor, options.allow_urls)(host=options.host, port=options.port)


def server_with(name: str, model: Any, processor: Any, allow_urls: bool = False) -> Any:
    """transformers' server for this model, which is in memory already, and for no other; call it to serve.

    Requests pass a `Gate` first; ``allow_urls`` is for it.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import TimedModel

    class OneModel(Serve):
        def __init__(self, **options: Any) -> None:
            super().__init__(non_blocking=True, **options)  # ends by calling start_server

        def start_server(self) -> None:
            manager = self._model_manager
            manager.force_model = name  # the only one that requests may ask for
            manager.loaded_models[manager.process_model_name(name)] = TimedModel(model, -1, processor)
            self.server.config.app = Gate(self.server.config.app, name, allow_urls)
            self.server.run()

    return OneModel
