"""What one call of the model knows, handed down to its LLM as a keyword, so that it ends with the call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plan import Plan
from .columns import Columns
from .layout import Layout

CALL = "pitome_call"  # the keyword that hands a Call from the model down to its LLM


class Call:
    """One prompt as the model gets it; masks and layouts on the host.

    No dataclass: wrappers such as FSDP go through the fields of those that they find among the arguments.
    """

    def __init__(
        self,
        kwargs: dict[str, Any],
        image: Tensor,
        layout: Layout | None = None,
        calibration: str = "none",
        sample: Tensor | None = None,
        fresh: Layout | None = None,
    ) -> None:
        self.kwargs = kwargs  # the arguments, with every per-token tensor shortened
        self.image = image  # (B, S) bool, the placeholders among the tokens of this call
        self.layout = layout  # of every place of the KV cache after this call; None = the caller's columns
        self.calibration = calibration  # what the LLM is told of visual tokens as soon as the tower has run
        self.sample = sample  # (B, S) int64, which sample a token is of, where several are packed into one row
        self.fresh = fresh  # the layout of the tokens of this call only; None = the caller's columns
        self.encoded: Encoded | None = None  # images that are encoded already; the only place that keeps them
        self.answer: Columns | None = None  # how the output comes to the caller's columns; None = it stays as it is
        self.owner: nn.Module | None = None  # whose call it is, the model's or its core's
        self.places: list[Tensor] = []  # by row (L,) or (L, A), positions of all placeholders that its pictures had
        self.told: Layout | None = None  # once the LLM was called, the layout with what it was told, for its rows

    def again(self) -> Call:
        """The same call with images that are encoded anew."""
        call = Call(self.kwargs, self.image, self.layout, self.calibration, self.sample)
        call.places = self.places
        return call

    def part(self, rows: int, width: int, length: int) -> Tensor:
        """(``rows``, ``width``) of ``image``, after ``length`` places of a KV cache.

        generate() may repeat rows, split the prompt into chunks, and bring it again with the tokens that followed.
        """
        start = max(length - self.layout.places + self.image.shape[1], 0)
        image = self.image.repeat_interleave(max(rows // len(self.image), 1), 0)
        return F.pad(image, (0, max(start + width - image.shape[1], 0)))[:, start : start + width]


class Encoded:
    """Images and videos that a call brought, encoded before the model asks for them, which it does once."""

    def __init__(self, plan: Plan, made: dict[str, tuple[Tensor, Any]]) -> None:
        self.plan, self.made = plan, made  # by kind, "image" or "video": pixels, and the model's output for them

    def take(self, kind: str, pixels: Tensor | None, plan: Plan | None) -> Any:
        """The model's output for ``pixels``: these, or what generate() made of them for beams, each several times.

        None for any others, for those that come as patches of all in a row, and a second time.
        """
        own, output = self.made.pop(kind, (None, None))
        if own is None or pixels is None or plan is not self.plan:
            return None
        if pixels is own:
            return output
        times, rest = divmod(len(pixels), len(own))
        alike = pixels.shape[1:] == own.shape[1:] and (pixels.dtype, pixels.device) == (own.dtype, own.device)
        if not alike or not times or rest or not torch.equal(pixels[::times], own):
            return None
        output, made = copy.copy(output), output.pooler_output
        if len(made) != len(own):
            return None
        repeated = [one for one in made for _ in range(times)]
        output.pooler_output = torch.stack(repeated) if isinstance(made, Tensor) else repeated
        return output


def named(method: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of an unbound method by their names, self left out."""
    return {**dict(zip(_parameters(method)[1:], args)), **kwargs}


@lru_cache
def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
