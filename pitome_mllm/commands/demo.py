"""``pitome-mllm demo``: the chat in a browser."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from ._companion import companion
from ._options import add_model, add_server, bound, open_model


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="a chat in the browser that shows the merging",
        description="Open a chat in the browser: ask, compare with the plain model, look at the merged tokens.",
    )
    add_model(parser)
    group = add_server(parser, default=None)
    group.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    group.add_argument("--open", action="store_true", help="open the browser")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve the chat until interrupted."""
    with bound(options.host, options.port) as found:
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pitome-mllm-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "cache")  # read when Gradio is imported,
        os.environ.setdefault("MPLCONFIGDIR", str(Path(folder) / "matplotlib"))  # and matplotlib, for its list of fonts
        companion("eval")  # whose figures and examples the page shows
        app, engines = companion("demo", "app"), companion("demo", "engine")
        sys.stdout.write(f"Loading {options.model}; the chat opens at the address below, Ctrl+C ends it\n")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind when a service manager ends it
        name = f"{options.model} ({options.bits} bit)" if options.bits else options.model
        engine = engines.Engine(name, *open_model(options))
        app.serve(engine, Path(folder), options.host, port, options.share, inbrowser=options.open)
