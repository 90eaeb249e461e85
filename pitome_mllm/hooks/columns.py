"""Between the caller's columns and the shorter prompt's places: which logits are asked for, and what comes back.

A training loop sets what a model returns against its own ids and labels, column by column. With ``logits="caller"``
everything that a call returns per token has the caller's columns; those that ``logits_to_keep`` names always are the
caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import IGNORED, Layout


@dataclass(frozen=True, eq=False)
class Columns:
    """Where what a model returns stands, by the columns of the caller."""

    logits: Tensor  # (B, n) int64, for every column that the caller gets its place among the logits (B, S', V)
    predicting: Tensor | None  # (B, T) int64, the place that predicts the token after a column; None = only logits move
    labelled: Tensor | None  # (B, T) bool, whether that token has a label; None = no labels
    places: int  # how many places the model has, S

    def restore(self, output: Any) -> Any:
        """What the model returned, a mapping or a tuple, with the caller's columns."""
        if isinstance(output, tuple):
            first = next((i for i, x in enumerate(output) if isinstance(x, Tensor) and x.dim() == 3), -1)
            return tuple(self._logits(x) if i == first else x for i, x in enumerate(output))
        for name, x in list(output.items()):
            if name in ("logits", "last_hidden_state") and x is not None:  # the latter of the core alone
                output[name] = self._logits(x)
            elif isinstance(x, Tensor) and self._per_token(x):
                output[name] = self._per_label(x)
        return output

    def _logits(self, logits: Tensor) -> Tensor:
        at = self.logits.to(logits.device)
        return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))

    def _per_token(self, x: Tensor) -> bool:
        """Whether ``x`` says something of every next token: (B, S - 1), or (B, S) where the caller shifted labels."""
        shapes = ((len(self.logits), self.places - shorter) for shorter in (0, 1))
        return self.predicting is not None and tuple(x.shape) in shapes

    def _per_label(self, x: Tensor) -> Tensor:
        width = self.predicting.shape[1] - (self.places - x.shape[1])
        moved = x.gather(1, self.predicting[:, :width].to(x.device))
        return moved if self.labelled is None else moved * self.labelled[:, :width].to(moved)


def columns_of(layout: Layout, kwargs: Mapping[str, Any], at_caller: bool) -> tuple[Columns | None, dict[str, Any]]:
    """How a model's output comes to the columns that a call with ``kwargs`` asks for, and the arguments it needs.

    ``layout`` is that of the tokens of the call. None where the output has the places of the shorter prompt.
    """
    keep = kwargs.get("logits_to_keep", 0)
    if not at_caller and not isinstance(keep, Tensor):
        return None, {}
    place, count = places(layout), layout.index.shape[1]
    logits, needed = place, {}
    if isinstance(keep, Tensor) or keep:
        column = torch.arange(layout.width, device=place.device)
        wanted = place[:, column[keep.to(place.device)] if isinstance(keep, Tensor) else column[-keep:]]
        needed["logits_to_keep"] = wanted.unique()
        logits = torch.searchsorted(needed["logits_to_keep"], wanted)
    if not at_caller:
        return Columns(logits, None, None, count), needed
    predicting = F.pad(place[:, 1:] - 1, (0, 1), value=count - 1).clamp(min=0)
    following = _following(kwargs)
    if following is not None:
        following = F.pad(following != IGNORED, (0, layout.width - following.shape[1]))
    return Columns(logits, predicting, following, count), needed


def places(layout: Layout) -> Tensor:
    """(B, T) int64: the place of every column of the caller; that of the token before it, if it was dropped."""
    rows, count = layout.index.shape
    place = torch.arange(count, device=layout.index.device).expand(rows, -1)
    column = layout.index.where(layout.real, layout.width)
    found = place.new_zeros(rows, layout.width + 1).scatter(1, column, place)
    return found[:, : layout.width].cummax(1).values


def _following(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The label after every column: (B, T) where the caller shifted them, else (B, T - 1); None without labels."""
    labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
    if shifted is not None:
        return shifted
    return None if labels is None else labels[:, 1:]


def labels_left(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """num_items_in_batch of a call with the arguments ``after``, which had those of ``before``.

    It counts the labels of a whole step, perhaps of several calls; less the share of them that this call dropped, the
    loss is a mean over labels that are there, in which a call weighs as many labels as the caller gave it.
    """
    count, had, have = before.get("num_items_in_batch"), _following(before), _following(after)
    if count is None or had is None:
        return {}
    left, all_of_them = ((labels != IGNORED).sum() for labels in (have, had))
    return {"num_items_in_batch": count * torch.where(left > 0, left / all_of_them, 1.0)}
