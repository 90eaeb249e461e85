"""The operators that a plain and a merged tower spend their time in: ``python -m pitome_mllm_eval.speed.profiled``."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pitome_mllm.loading import DTYPES
from pitome_mllm.methods import unknown

from ..accuracy.runs import processor_name
from .contenders import Contender, configuration, contenders, find_shape, parted, random_model
from .stages import Load, Stages


def operators(contender: Contender, batch: int) -> dict[str, tuple[float, int]]:
    """Milliseconds of its own, and calls, of every operator of one tower call, after one that does not count."""
    stages = Stages(contender, Load(batch, 1, 1, 2, None))
    device = stages.model.device.type
    stages.features()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        stages.features()
    timed = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return {event.key: (getattr(event, timed) / 1000, event.count) for event in profiler.key_averages()}


def table(title: str, found: dict[str, dict[str, tuple[float, int]]], top: int) -> Any:
    """A table for the terminal: the ``top`` operators by their largest time, and all others together."""
    from rich.table import Table

    most = {name: max(by.get(name, (0.0, 0))[0] for by in found.values()) for by in found.values() for name in by}
    names = sorted(most, key=most.__getitem__, reverse=True)
    made = Table(title=title, title_justify="left")
    for heading in ("operator", *(f"{who}: {what}" for who in found for what in ("ms", "calls"))):
        made.add_column(heading, justify="left" if heading == "operator" else "right")
    parts = [(name, [name]) for name in names[:top]] + [("all others", names[top:]), ("together", names)]
    for label, members in parts:
        sums = [[sum(by.get(name, (0.0, 0))[part] for name in members) for part in (0, 1)] for by in found.values()]
        made.add_row(label, *(cell for ms, calls in sums for cell in (f"{ms:.2f}", str(calls))))
    return made


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llava-1.5-7b", help="random weights of its sizes (%(default)s)")
    parser.add_argument("--method", default="pitome", help="%(default)s")
    parser.add_argument("--keep", type=int, default=144, help="%(default)s")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    parser.add_argument("--batch", type=int, default=1, help="%(default)s")
    parser.add_argument("--top", type=int, default=14, help="operators to show (%(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.dtype not in DTYPES:
            raise ValueError(unknown("dtype", args.dtype, DTYPES))
        parted(args.method)
        shape, device = find_shape(args.shape), torch.device(args.device)
        torch.set_num_threads(1)
        model = random_model(configuration(shape, None, True), DTYPES[args.dtype], device)
        with torch.inference_mode():
            field = list(contenders(model, [args.method], [{"keep": args.keep}]))
            found = {made.method: operators(made, args.batch) for made in field}
    except ValueError as error:
        parser.error(str(error))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor_name()}, 1 thread"
    title = (
        f"{shape.title}'s tower, keep {args.keep}, batch {args.batch}, {args.dtype}; {name}, torch {torch.__version__}"
    )
    Console(width=120).print(table(title, found, args.top))


if __name__ == "__main__":
    main()
