"""``pitome-mllm demo``: the chat in a browser."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..methods import UserError
from ._companion import companion
from ._options import add_model, open_model

PORTS = range(7860, 7960)  # the first free one of them, where none is given


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="a chat in the browser that shows the merging",
        description="Open a chat in the browser: ask, compare with the plain model, look at the merged tokens.",
    )
    add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    group.add_argument("--port", type=int, help=f"default: the first free one from {PORTS[0]}")
    group.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    group.add_argument("--open", action="store_true", help="open the browser")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve the chat until interrupted.

    Raises
    ------
    ValueError
        A mistake the user can mend, in one sentence.
    """
    port = free_port(options.host, options.port)
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


def free_port(host: str, port: int | None) -> int:
    """The port to listen on: the one given, else the first free one of `PORTS`.

    Raises
    ------
    ValueError
        It is taken, or there is no such address here.
    """
    for number in PORTS if port is None else [port]:
        try:
            family, kind, *_, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # free again once its last user is gone
                tried.bind((address[0], number, *address[2:]))  # as given: look-ups cut ports to 16 bits
                return number
        except (OSError, OverflowError) as error:
            failed = error
    said = f"port {port}" if port is not None else f"any port from {PORTS[0]} to {PORTS[-1]}"
    raise UserError(f"cannot listen on {host}, {said}: {failed}; choose another --host or --port") from failed
