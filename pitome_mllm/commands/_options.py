"""Arguments and start-up that several commands share."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import UserError

QUARTER = 0.25  # share of the visual tokens kept when neither --keep nor --ratio is given
PORTS = range(7860, 7960)  # the first free one of them, where none is given
EVERY = 10  # seconds between the lines of a progress bar on a pipe


def keep(text: str) -> int | float:
    """``144`` is a number of tokens, ``0.25`` a share of them."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor a share such as 0.25") from None


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible; give 1 or more")
    return int(text)


def merge_points(text: str) -> int | str:
    """``6`` is a number of merge points; words are `attach`'s to judge."""
    return int(text) if text.lstrip("-").isdigit() else text


def add_subject(parser: argparse.ArgumentParser, question: bool) -> None:
    """PICTURE, QUESTION and --scene."""
    group = parser.add_argument_group("what to look at (without any: held-out test scene 0)")
    group.add_argument("picture", nargs="?", metavar="PICTURE", help="a picture file")
    if question:
        group.add_argument("question", nargs="?", metavar="QUESTION", help="a question about it")
    group.add_argument("--scene", type=int, metavar="N", help="a held-out scene of the embedded benchmark")


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --bits, --dtype and --device."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tiny", help="'tiny' (embedded), a folder, or a hub name (%(default)s)")
    group.add_argument("--bits", type=int, metavar="4|8", help="quantise the weights (needs bitsandbytes)")
    group.add_argument("--dtype", help="float32, float16 or bfloat16")
    group.add_argument("--device", help="cpu, cuda:0, ...; auto spreads the model (default: a GPU if there is one)")


def add_merging(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """--method (one, or ``several``), --published, --keep, --ratio, --merges and --where."""
    group = parser.add_argument_group("merging")
    group.add_argument(
        "--method",
        nargs="+" if several else None,
        metavar="M",
        help=f"{'one or more of' if several else 'see'} `pitome-mllm methods`, which marks the default",
    )
    add_published(group)
    amount = group.add_mutually_exclusive_group()
    amount.add_argument(
        "--keep", type=keep, metavar="K", help="visual tokens left, a number or a share (default: 0.25, a quarter)"
    )
    amount.add_argument("--ratio", type=float, metavar="R", help="share of its tokens that every block keeps, e.g. 0.9")
    group.add_argument(
        "--merges",
        type=merge_points,
        metavar="M",
        help="with --keep: how many blocks of the tower merge, or every (default: 6, if the method goes in steps)",
    )
    group.add_argument("--where", metavar="W", help="tower, projector or both (default: by the kind of method)")


def add_published(group: Any) -> None:
    """--published."""
    group.add_argument(
        "--published", action="store_true", help="what the method's paper does, instead of the library's defaults"
    )


def merging(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `attach` that the options of `add_merging` but ``--method`` stand for."""
    amount = {"keep": QUARTER if options.keep is None else options.keep}
    if options.ratio is not None:
        amount = {"ratio": options.ratio}
    return {**amount, **{name: getattr(options, name) for name in ("published", "merges", "where")}}


@contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A spinner on stderr, or a bar of ``total`` steps, with the time elapsed; lines where stderr is a pipe.

    Yields a function to call after every step.
    """
    console = Console(stderr=True)
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    if total is not None:
        columns.insert(2, BarColumn())
    # Two redraws per second: what runs underneath is sometimes being timed.
    bar = Progress(*columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal)
    task, ended = bar.add_task(text, total=total), Event()

    def say() -> None:
        while not ended.wait(EVERY):
            steps = "" if total is None else f" {bar.tasks[task].completed:.0f} of {total},"
            console.file.write(f"{text}:{steps} {bar.tasks[task].elapsed or 0:.0f} s\n")
            console.file.flush()

    with bar:
        bar.reset(task)
        if not console.is_terminal:
            Thread(target=say, daemon=True).start()
        try:
            yield lambda: bar.advance(task)
        finally:
            ended.set()


def open_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model and processor that the options name."""
    import torch

    device = options.device
    if device is None and options.bits is None and torch.cuda.is_available():
        device = "cuda"
    with progress(f"Looking for {options.model}"):
        from huggingface_hub.utils import enable_progress_bars
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as transformers_logging

        from ..loading import load, read_config

        if not options.debug:
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            hub_logging.set_verbosity_error()
        read_config(options.model)
    here = options.model == "tiny" or Path(options.model).expanduser().is_dir()
    if not here and sys.stderr.isatty():
        enable_progress_bars()  # a download shows its own, which a spinner would garble
    with progress(f"Loading {options.model}") if here else nullcontext():
        return load(options.model, bits=options.bits, dtype=options.dtype, device=device)


def check_method(name: str | None) -> None:
    """Refuse an unknown method before a large model is loaded; the message lists what there is."""
    from ..methods import METHODS, get_method

    if name is not None and name not in METHODS:
        get_method(name)


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
