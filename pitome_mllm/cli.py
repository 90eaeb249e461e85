"""The command line: ``pitome-mllm``, or ``python -m pitome_mllm.cli`` in a checkout."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from threading import current_thread, main_thread
from typing import Any, NoReturn

from . import __version__
from .errors import UserError

COMMANDS = ("ask", "demo", "serve", "groups", "spectrum", "cost", "bench", "reproduce", "methods")

DESCRIPTION = """Ask a LLaVA model about a picture with a fraction of its visual tokens.

  pitome-mllm ask                                     a held-out picture of the embedded model, 144 of 576 visual tokens
  pitome-mllm ask --compare                           ... beside the answer and the cost with all 576
  pitome-mllm ask photo.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf --bits 4
  pitome-mllm demo                                    a chat in the browser that shows the merging
  pitome-mllm serve                                   the same model for any OpenAI client
  pitome-mllm groups --out groups.png                 draw which patches were merged
  pitome-mllm spectrum                                how far methods change the graph of a picture's tokens
  pitome-mllm cost                                    FLOPs and KV cache of published models, from their sizes alone
  pitome-mllm bench                                   how long every stage takes here, plain and with every method
  pitome-mllm reproduce --table pitome-paper --plan   a published table through lmms-eval; --plan says what it takes
  pitome-mllm methods                                 the methods there are"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, and a help that cannot be written."""

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands; each command stores its function as ``run``."""
    parser = _Parser(prog="pitome-mllm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"pitome-mllm {__version__}")
    parser.add_argument("--debug", action="store_true", help="log what happens, and show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        import_module(f".commands.{command}", __package__).register(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process, and return its exit code.

    0; 2 after a mistake of the user, 1 without enough memory or space to write (one line on stderr says which); 130
    when interrupted.
    """
    with _noticed_interrupts() as interrupts:
        try:
            return _run(arguments)
        except KeyboardInterrupt:
            return _failed("interrupted", 130)
        except Exception:
            if not interrupts:
                raise
            return _failed("interrupted", 130)


@contextmanager
def _noticed_interrupts() -> Iterator[list[int]]:
    """A list of the interrupts so far: imports of compiled modules swallow some, and fail of another error later."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    own = current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(arguments: Sequence[str] | None) -> int:
    debug = False
    try:
        try:
            options = build_parser().parse_args(arguments)
            debug = options.debug
            _set_up_logging(debug)
            options.run(options)
        finally:
            sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        return _failed(" ".join(str(error).split()), 2)
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        advice = "choose --bits 4 or 8, --dtype float16, or --device auto or cpu"
        return _failed(f"out of memory; {advice} ({str(error).split('.')[0]})", 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        sys.stdout = open(os.devnull, "w")  # where Python flushes what is left, without another error
        return 1 if error.errno == errno.EPIPE else _failed(f"cannot write: {error.strerror}", 1)
    return 0


def _failed(message: str, code: int) -> int:
    sys.stderr.write(f"pitome-mllm: {message}\n")
    return code


def _set_up_logging(debug: bool) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(name)s: %(message)s")
    for noisy in ("bitsandbytes", "PIL", "filelock", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
