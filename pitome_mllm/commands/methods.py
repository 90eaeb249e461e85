"""``pitome-mllm methods``: the table of methods."""

from __future__ import annotations

import argparse
from typing import Any

from ._report import print_table

ABOUT = """which tokens join. Its own options and settings hold always; by default the library adds to them what it does
with every method of its kind, with --published what its paper does."""


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("methods", help="list the methods", description="List the methods there are: " + ABOUT)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print every method with its summary, where it comes from, and what it sets differently."""
    from ..methods import METHODS
    from ..settings import DEFAULT_METHOD

    heads, lines = ("method", "what it does", "from", "its own", "by default"), []
    for name, method in METHODS.items():
        pairs = {**method.options, **method.settings}, method.library
        said = (", ".join(f"{key}={value}" for key, value in each.items()) for each in pairs)
        lines.append((name + " (default)" * (name == DEFAULT_METHOD), method.summary, method.reference, *said))
    print_table(heads, lines, text=5)
