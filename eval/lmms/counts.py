"""How many visual tokens the rows of a batch have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pitome_mllm.hooks.tiles import at_most

from .asked import Asked


def lay_out(model: Any, asked: Sequence[Asked], inputs: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Pictures, placeholders and other tokens of every row of the processor's ``inputs``."""
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    lengths = inputs["attention_mask"].sum(1).tolist()
    texts = [length - count for length, count in zip(lengths, placeholders, strict=True)]
    return [len(one.pictures) for one in asked], placeholders, texts


def before(handle: Any, inputs: Mapping[str, Any], placeholders: Sequence[int], pictures: Sequence[int]) -> list[int]:
    """Of each row when its prompt is known: exact, except for tiles that merge in the tower; there at most as many.

    Parameters
    ----------
    handle : what `attach` gave; None is the plain model.
    inputs : of the batch, from the processor.
    placeholders : of each row, in the prompt as the processor writes it.
    pictures : of each row.
    """
    if not _cut(handle):
        return _uncut(handle, placeholders)
    return _by_row(at_most(handle, inputs) if sum(pictures) else [], pictures)


def after(handle: Any, placeholders: Sequence[int], pictures: Sequence[int]) -> list[int]:
    """Of each row once the model has run."""
    if not _cut(handle):
        return _uncut(handle, placeholders)
    if not sum(pictures):
        return [0] * len(pictures)
    lengths = handle.stats.lengths
    return _by_row(lengths[:: len(lengths) // sum(pictures)], pictures)  # beams have each picture several times


def _cut(handle: Any) -> bool:
    """Whether how many tokens a picture keeps depends on the picture."""
    return bool(handle) and handle.family.tiles == "anyres" and handle.plan.keep < handle.plan.available


def _uncut(handle: Any, placeholders: Sequence[int]) -> list[int]:
    if not handle or handle.plan.keep == handle.plan.available:
        return list(placeholders)
    return [count // handle.plan.available * handle.plan.keep for count in placeholders]


def _by_row(lengths: Sequence[int], pictures: Sequence[int]) -> list[int]:
    """The sums of ``lengths``, one for each picture, over each row's pictures."""
    left = iter(lengths)
    return [sum(next(left) for _ in range(count)) for count in pictures]
