"""``pitome-mllm bench``: how long every stage takes, plain and with merging, on this device; see eval/speed/."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._companion import companion
from ._options import keep

METHODS = "pitome pitome:published tome tome:weights visionzip visionzip:weights random pool downsample oracle".split()
MODES = "for all alike: eager, or graph: the same kernels as CUDA graphs (%(default)s)"
ABOUT = """Stages are timed apart, everything that is compared in turns: medians after a warm-up, one CSV row each.
METHOD:published is what its paper does, METHOD:weights the same with a vision tower that writes its attention weights
down, as its paper's code does.
An oracle removes as many tokens by slicing, and its LLM gets what is left without any bookkeeping: the floor."""


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("bench", help="time every stage of a model, plain and merged", description=ABOUT)
    group = parser.add_argument_group("model").add_mutually_exclusive_group()
    group.add_argument("--model", default="tiny", help="'tiny' (embedded), a folder, or a hub name (%(default)s)")
    group.add_argument("--shape", metavar="S", help="random weights of a published model's sizes, e.g. llava-1.5-7b")
    parser.add_argument("--layers", type=int, metavar="N", help="with --shape: only so many blocks of the LLM")
    parser.add_argument("--tower-only", action="store_true", help="with --shape: only the stages in front of the LLM")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the processor (%(default)s)")
    parser.add_argument("--attention", default="sdpa", help="of the LLM: sdpa, eager, flash_attention_2 (%(default)s)")
    parser.add_argument("--mode", default="eager", help=MODES)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="M", help=f"default: {' '.join(METHODS)}")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--keep", nargs="+", type=keep, metavar="K", help="visual tokens per picture (144)")
    amount.add_argument("--ratio", nargs="+", type=float, metavar="R", help="share of its tokens that a block keeps")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="B", help="rows, one or more sizes (1)")
    parser.add_argument("--images", type=int, metavar="I", help="pictures per row (default: the shape's, else 1)")
    parser.add_argument("--text-tokens", type=int, default=40, metavar="N", help="of the prompt (%(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, default=8, metavar="N", help="for decode and end to end (%(default)s)"
    )
    parser.add_argument("--stages", nargs="+", metavar="S", help="only these stages")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before, at least 1 (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="CSV", help="also append the rows to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, write rows.

    Raises
    ------
    ValueError
        A mistake the user can mend, in one sentence.
    """
    companion("eval", "speed.measure").bench(options)
