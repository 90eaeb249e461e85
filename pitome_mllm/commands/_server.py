"""The address that `serve` and `demo` listen on."""

from __future__ import annotations

import argparse
import socket
from contextlib import ExitStack
from typing import Any

from ..errors import UserError

PORTS = range(7860, 7960)  # the first free one of them, where none is given


def add_server(parser: argparse.ArgumentParser, default: int | None) -> Any:
    """--host and --port, in a group that is returned."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    said = f"the first free one from {PORTS[0]}" if default is None else default
    group.add_argument("--port", type=_port, default=default, help=f"port to listen on (default: {said})")
    return group


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number from 1 to 65535")
    return int(text)


def bound(host: str, port: int | None) -> socket.socket:
    """A socket at the port that is given, else at the first free one of `PORTS`."""
    for number in PORTS if port is None else [port]:
        with ExitStack() as failing:
            try:
                family, kind, *_, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
                found = failing.enter_context(socket.socket(family, kind))
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # free again once its last user is gone
                found.bind(address)
                failing.pop_all()
                return found
            except OSError as error:
                failed = error
    said = f"port {port}" if port is not None else f"any port from {PORTS[0]} to {PORTS[-1]}"
    raise UserError(f"cannot listen on {host}, {said}: {failed}; choose another --host or --port") from failed
