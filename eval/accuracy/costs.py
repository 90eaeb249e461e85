"""What the methods themselves cost: ``python -m pitome_mllm_eval.accuracy.costs``.

What merging adds is run alone, by the code that runs in a model, on random tensors of its widths: reading keys and
class attention, matching, combining, and for methods that look at projected tokens one more pass of the projector. On
one thread, by thread CPU time, which other processes do not count into. The models' own work is not in it, nor the
logarithms of sizes that attention adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pitome_mllm import METHODS
from pitome_mllm.costs.published import get_shape
from pitome_mllm.families.geometry import geometry
from pitome_mllm.hooks.run import Run
from pitome_mllm.hooks.tower import smaller_picture
from pitome_mllm.loading import read_config
from pitome_mllm.methods import UserError
from pitome_mllm.methods.pitome import pair_means
from pitome_mllm.plan import Plan, make_plan
from pitome_mllm.settings import Settings

from ..clocks import Call, in_turns, quantiles
from ..documents import read, write_csv
from ..provenance import RESULTS as FOLDER
from ..provenance import about_machine, check_out
from .curves import KEEPS, PLACES, Setting, settings

COMMAND = "python -m pitome_mllm_eval.accuracy.costs"
RESULTS = FOLDER / "costs.csv"
# What is timed: "tiny", or the widths of a published model's tower and LLM.
SHAPES = ("tiny", "llava-1.5-7b")


@dataclass(frozen=True)
class Cost:
    """Thread milliseconds per picture for all merges of one setting: median, and the 20 % and 80 % quantiles."""

    shape: str
    method: str
    where: str
    keep: int
    published: bool
    merges: int
    ms: float
    p20: float
    p80: float
    repeats: int


def config_of(shape: str) -> Any:
    """The configuration behind a name in `SHAPES`."""
    return read_config(shape) if shape == "tiny" else get_shape(shape).config()


class Picture:
    """Random tensors of pictures as they enter and leave the blocks of a tower, with the token counts of a plan."""

    def __init__(
        self,
        plan: Plan,
        config: Any,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan, vision = plan, config.vision_config
        self.batch, self.kind = batch, {"dtype": dtype, "device": device}
        self.heads, self.width = vision.num_attention_heads, vision.hidden_size
        self.random = torch.Generator().manual_seed(0)
        counts = [plan.input_patches, *plan.counts]
        self.hidden = [self._draw(count + plan.geometry.class_tokens, self.width) for count in counts]
        self.pixels = self._draw(3, vision.image_size, vision.image_size)
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(self.width, config.text_config.hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size),
        ).to(**self.kind)

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape, generator=self.random).to(**self.kind)

    @torch.inference_mode()
    def merge(self) -> list[torch.Tensor]:
        """What merging does beside the models' own work: what it looks at, matching, combining, a smaller picture.

        What it makes comes back, else a compiler would leave it out.
        """
        plan, made = self.plan, []
        if plan.input_patches < plan.geometry.patches:
            made.append(smaller_picture(plan, (self.pixels,), {})[1]["pixel_values"])
        run = Run(plan)
        for block in range(plan.geometry.merging_blocks):
            inputs = {}
            if run.wants_match_inputs(block):
                keys = self.hidden[block].unflatten(-1, (self.heads, -1))
                inputs = run.read(block, keys[:, 0], keys)
            made.append(run.merge_block(block, self.hidden[block], inputs))
        return [*made, run.before_projector(self.hidden[-1], self.projector)[0]]

    def yardstick(self) -> list[torch.Tensor]:
        """`yardstick` for every merge in a block."""
        blocks = ((self.hidden[block], self.hidden[block + 1].shape[1]) for block in self.plan.merging)
        return [made for x, left in blocks for made in yardstick(x, self.width // self.heads, left)]


def yardstick(x: torch.Tensor, keys: int, left: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What merging tokens ``x`` (B, N, C) by energies of their keys comes down to, without deciding anything.

    The mean of keys of width ``keys`` over heads, one exp of the product of every pair of tokens, summed up for each
    token, and a copy of ``left`` rows.
    """
    return pair_means(x.unflatten(-1, (-1, keys)).mean(2).float(), torch.exp_), x[:, :left].clone()


def stored(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV of this command; ValueError as `read`."""
    return read(path, COMMAND, ("shape", "ms", "commit"))


def costs(shape: str, wanted: list[Setting], repeats: int) -> Iterator[Cost]:
    """One `Cost` per setting."""
    config = config_of(shape)
    for setting in wanted:
        plan = make_plan(Settings().changed(**asdict(setting)), geometry(config))
        taken = in_turns({0: Call(Picture(plan, config).merge)}, torch.device("cpu"), repeats, warmup=1)[0]
        low, middle, high = (round(q, 3) for q in quantiles(taken))
        yield Cost(shape, **asdict(setting), merges=len(plan.steps), ms=middle, p20=low, p80=high, repeats=repeats)


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSV."""
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--where", nargs="+", default=list(PLACES), choices=PLACES)
    parser.add_argument("--keep", nargs="+", type=int, default=list(KEEPS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="%(default)s")
    args = parser.parse_args(argv)
    usual = parser.parse_args([])
    try:
        check_out(args.out, RESULTS, vars(args) == {**vars(usual), "out": args.out, "repeats": args.repeats})
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    found = []
    for shape in args.shapes:
        wanted = list(settings(args.methods, args.where, args.keep, geometry(config_of(shape))))
        found += track(costs(shape, wanted, args.repeats), shape, total=len(wanted))
    write_csv(args.out, found, about_machine())


if __name__ == "__main__":
    main()
