"""What is promised of speed on a GPU, measured: ``python -m eval.speed.gpu`` or ``make bench-gpu``, within 8 minutes.

Phases run one after the other, each in a process and with a time limit of its own, so that one that fails or hangs
costs only its own cells. Rows are written as they come. At the end there is a table of what was promised.
``--device cpu --shape tiny --repeats 1`` rehearses all of it in a few minutes; nothing is captured then.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pitome_mllm.methods import UserError

from ..provenance import check_commit, commit
from . import phases
from .promises import table


@dataclass(frozen=True)
class Phase:
    """What runs in a process of its own, with the LLM or without it, for at most so many seconds."""

    run: Callable[[phases.Bench], None]
    llm: bool
    seconds: int


PHASES = {
    "tower": Phase(phases.tower, False, 130),
    "merge": Phase(phases.merge, False, 50),
    "bits": Phase(phases.bits, False, 75),
    "prefill": Phase(phases.prefill, True, 75),
    "first token": Phase(phases.first_token, True, 80),
    "memory": Phase(phases.memory, True, 60),
}


def main(argv: list[str] | None = None) -> int:
    """Run every phase, or those that are named, and print the table; the number of phases that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="llava-1.5-7b", choices=("llava-1.5-7b", "tiny"))
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds, of captured calls more (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.csv"), help="rows are added to it (%(default)s)")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--within", choices=PHASES, help="run this phase in this very process")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --shape tiny rehearses without one")
    try:
        check_commit(options.out, commit())
    except UserError as error:
        parser.error(str(error))
    if options.within:
        with torch.inference_mode():
            PHASES[options.within].run(phases.Bench(options, PHASES[options.within].llm))
        return 0
    failed = [name for name in options.phases if not run_phase(name, argv or sys.argv[1:])]
    if options.out.exists():
        with options.out.open(newline="") as file:
            print(table(list(csv.DictReader(file))))
    for name in failed:
        print(f"failed: {name}")
    return len(failed)


def run_phase(name: str, argv: list[str]) -> bool:
    """Whether a phase came to its end in its time."""
    began = time.monotonic()
    try:
        command = [sys.executable, "-m", f"{__package__}.gpu", *argv, "--within", name]
        done = subprocess.run(command, timeout=PHASES[name].seconds).returncode == 0
    except subprocess.TimeoutExpired:
        done = False
    print(f"{name}: {'done' if done else 'FAILED'} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return done


if __name__ == "__main__":
    sys.exit(main())
