"""``pitome-mllm bench``: how long a model takes on this device, plain and merging; see eval/speed/."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._companion import companion
from ._options import keep, positive

METHODS = ["pitome", "tome", "visionzip", "downsample", "oracle"]
ABOUT = """Vision tower, first token and each further one are timed, what is compared in turns, on random pictures and
40 tokens of text; merging alone too. METHOD:published is what its paper does; METHOD:keys and METHOD:hidden compare
tokens by these. The oracle removes as many tokens from the tower as the first method does, by slicing: the floor."""


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("bench", help="time a model, plain and merging", description=ABOUT)
    group = parser.add_argument_group("model").add_mutually_exclusive_group()
    group.add_argument("--model", default="tiny", help="'tiny' (embedded), a folder, or a hub name (%(default)s)")
    group.add_argument("--shape", metavar="S", help="random weights of a published model's sizes, e.g. llava-1.5-7b")
    parser.add_argument("--layers", type=int, metavar="N", help="with --shape: so many LLM blocks; 0: the tower alone")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of the processor (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="M", help=f"default: {' '.join(METHODS)}")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--keep", nargs="+", type=keep, metavar="K", help="visual tokens per picture (144)")
    amount.add_argument("--ratio", nargs="+", type=float, metavar="R", help="share of its tokens that a block keeps")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], metavar="B", help="rows, several sizes (1)")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="CSV", help="also append the rows to this file")
    parser.set_defaults(run=run, bits=None)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, write rows."""
    companion("eval", "speed.measure").bench(options)
