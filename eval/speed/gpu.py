"""What is promised of speed on a GPU, measured: ``python -m eval.speed.gpu`` or ``make bench-gpu``, in some 4 minutes.

Phases run one after the other, each in a process and with a time limit of its own, so that one that fails or hangs
costs only its own cells. Rows are written as they come. At the end there is a table of what was promised.
``--device cpu --shape tiny --repeats 1`` rehearses all of it in a minute; nothing is captured then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ..documents import read
from ..provenance import parse_measuring
from . import phases
from .report import gpu_table

# name -> what runs, LLM blocks (None: all), seconds
PHASES: dict[str, tuple[Callable[[phases.Bench], None], int | None, int]] = {
    "tower": (phases.tower, 0, 120),
    "merge": (phases.merge, 0, 50),
    "prefill": (phases.prefill, None, 70),
    "first token": (phases.first_token, None, 80),
    "memory": (phases.memory, None, 60),
    "bits": (phases.bits, 0, 80),
}


def main(argv: list[str] | None = None) -> int:
    """Run every phase, or those that are named, and print the table; the number of phases that failed."""
    options = parse(argv)
    start = next((method for method in ("fork", "spawn") if run_in(method, 60, probe, options.device)), None)
    if start is None:
        print(f"there is no {options.device} device here; --device cpu --shape tiny rehearses without", file=sys.stderr)
        return 2
    failed = []
    for name in options.phases:
        began, seconds = time.monotonic(), PHASES[name][2] * (1 if options.device == "cuda" else 5)
        if not run_in(start, seconds, work, name, options):
            failed.append(name)
        said = "FAILED" if name in failed else "done"
        print(f"{name}: {said} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if options.out.exists():
        print(gpu_table(read(options.out, "make bench-gpu")))
    for name in failed:
        print(f"failed: {name}")
    return len(failed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="llava-1.5-7b", choices=("llava-1.5-7b", "tiny"))
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.csv"), help="rows are added to it (%(default)s)")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    return parse_measuring(parser, argv)


def run_in(start: str, seconds: int, target: Callable[..., None], *given: Any) -> bool:
    """Whether ``target`` ends well and in time in a process of its own.

    A forked one (``start``) has what this one imported; where that looked for GPUs, only a spawned one can use them.
    """
    child = multiprocessing.get_context(start).Process(target=target, args=given)
    child.start()
    child.join(seconds)
    done = child.exitcode == 0
    if child.is_alive():
        child.kill()
    child.join()
    return done


def probe(device: str) -> None:
    """Fails where there is no such device for this process."""
    torch.zeros(1, device=device)


def work(name: str, options: argparse.Namespace) -> None:
    """One phase, in this process."""
    run, layers, _ = PHASES[name]
    with torch.inference_mode():
        run(phases.Bench(options, layers))


transformers.LlavaForConditionalGeneration  # noqa: B018 - imported here, for all phases

if __name__ == "__main__":
    sys.exit(main())
