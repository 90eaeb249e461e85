"""How long `attach`, `update` and `remove` take, and importing the package.

``python -m pitome_mllm_eval.speed.handles``.

On a tower of CLIP-L's size with random weights. Importing is timed in fresh processes, in which torch is there already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pitome_mllm import attach

from ..documents import write_csv
from .clocks import quantiles
from .contenders import configuration, find_shape, random_model
from .rows import stamp

RESULTS = Path(__file__).parents[1] / "results" / "handles.csv"
SHAPE = "llava-1.5-7b"
IMPORT = "import time, torch; t = time.thread_time(); import pitome_mllm; print(1000 * (time.thread_time() - t))"


@dataclass(frozen=True)
class Handling:
    """One step, thread milliseconds: the median and the 20 % and 80 % quantiles."""

    step: str
    ms: float
    p20: float
    p80: float
    repeats: int


def handle_times(model: Any, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every step, so many times after a first round that does not count."""
    taken: dict[str, list[float]] = {"attach": [], "update": [], "remove": []}
    for turn in range(repeats + 1):
        ticks = [time.thread_time()]
        handle = attach(model, keep=144)
        ticks.append(time.thread_time())
        handle.update(keep=72, method="tome")
        ticks.append(time.thread_time())
        handle.remove()
        ticks.append(time.thread_time())
        if turn:
            for times, before, after in zip(taken.values(), ticks, ticks[1:]):
                times.append(1000 * (after - before))
    return taken


def import_times(repeats: int) -> list[float]:
    """Milliseconds of importing the package, each in a process of its own."""
    command = [sys.executable, "-c", IMPORT]
    return [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)]


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="%(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="%(default)s")
    args = parser.parse_args(argv)
    about = {"model": SHAPE} | stamp(parser, args.out)
    torch.set_num_threads(1)
    model = random_model(configuration(find_shape(SHAPE), None, True), torch.float32, torch.device("cpu"))
    taken = handle_times(model, args.repeats) | {"import": import_times(args.repeats)}
    rows = []
    for step, times in taken.items():
        low, middle, high = (round(ms, 3) for ms in quantiles(times))
        rows.append(Handling(step, middle, low, high, args.repeats))
    write_csv(args.out, rows, about)


if __name__ == "__main__":
    main()
