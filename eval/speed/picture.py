"""What merging adds to a model, alone: on random tensors of its widths, by the code that runs in it."""

from __future__ import annotations

from typing import Any

import torch

from pitome_mllm.hooks.run import Run
from pitome_mllm.hooks.tower import smaller_picture
from pitome_mllm.methods.pitome import pair_means
from pitome_mllm.plan import Plan


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
