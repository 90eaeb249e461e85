"""What the methods themselves cost: ``python -m pitome_mllm_eval.costs``.

Every merge of a plan, matching and combining, is run alone on random tokens of the model's widths, on one thread and
by thread CPU time, which other processes do not count into. The models' own work is not in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .curves import KEEPS, PLACES, Setting, settings
from .runs import processor_name, write_csv

RESULTS = Path(__file__).parent / "results" / "costs.csv"
# What is timed: "tiny", or the widths of a published model's tower and LLM.
SHAPES = ("tiny", "llava-1.5-7b")


@dataclass(frozen=True)
class Cost:
    """Thread milliseconds per picture for all merges of one setting: median, and the 20 % and 80 % quantiles."""

    shape: str
    method: str
    where: str
    keep: int
    merges: int
    ms: float
    p20: float
    p80: float
    repeats: int


def config_of(shape: str) -> Any:
    """The configuration behind a name in `SHAPES`."""
    from pitome_mllm.shapes import get_shape

    from .tiny_model import build_config

    return build_config() if shape == "tiny" else get_shape(shape).config()


def inputs(plan: Any, config: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Random metric, features and attention of one picture with so many patch tokens."""
    vision, everything = config.vision_config, tokens + plan.geometry.class_tokens
    random = torch.Generator().manual_seed(tokens)
    head = vision.hidden_size // vision.num_attention_heads
    widths = {
        "keys": head,
        "history": head,
        "hidden": vision.hidden_size,
        "projected": config.text_config.hidden_size,
    }
    metric = torch.randn(1, everything, widths[plan.metric], generator=random)
    features = torch.randn(1, everything, vision.hidden_size, generator=random)
    attention = torch.rand(1, everything, generator=random)
    return metric, features, {"attention": attention} if "attention" in plan.clues else {}


def milliseconds(plan: Any, config: Any, repeats: int) -> list[float]:
    """Thread CPU time of all merges of one picture, ``repeats`` times after a warm-up."""
    steps = [(inputs(plan, config, before), before - after, depth) for before, after, depth in plan.steps]
    taken = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        for (metric, features, attention), r, depth in steps:
            size = torch.ones_like(features[..., :1])
            merge = plan.reducer.match(metric, r, size=size, depth=depth, **plan.context, **attention)
            merge.reduce(features, size)
        taken.append(1000 * (time.thread_time() - start))
    return taken[1:]


def costs(shape: str, wanted: list[Setting], repeats: int) -> Iterator[Cost]:
    """One `Cost` per setting."""
    from pitome_mllm.plan import Settings, make_plan
    from pitome_mllm.specs import geometry

    config = config_of(shape)
    for setting in wanted:
        plan = make_plan(Settings().changed(**setting.keywords()), geometry(config))
        taken = milliseconds(plan, config, repeats)
        low, middle, high = (round(float(q), 3) for q in np.quantile(taken, (0.2, 0.5, 0.8)))
        yield Cost(shape, setting.method, setting.where, setting.keep, len(plan.steps), middle, low, high, repeats)


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSV."""
    from rich.progress import track

    import pitome_mllm
    from pitome_mllm.specs import geometry

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=list(pitome_mllm.METHODS), choices=list(pitome_mllm.METHODS))
    parser.add_argument("--where", nargs="+", default=list(PLACES), choices=PLACES)
    parser.add_argument("--keep", nargs="+", type=int, default=list(KEEPS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = {"processor": processor_name(), "torch": torch.__version__, "date": date.today().isoformat()}
    found = []
    for shape in args.shapes:
        every = settings(args.methods, args.where, args.keep, geometry(config_of(shape)))
        wanted = [setting for setting in every if not setting.like]
        found += track(costs(shape, wanted, args.repeats), shape, total=len(wanted))
    write_csv(args.out, found, about)


if __name__ == "__main__":
    main()
