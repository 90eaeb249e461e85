"""ToFu: "Token Fusion: Bridging the Gap between Token Pruning and Token Merging" (WACV 2024, arXiv 2312.01026)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .matching import most_similar_first, unit_metric
from .merge import Merge, rows
from .reducer import Known, Reducer
from .tome import alternate

REFERENCES = ("mean", "target")


class NormPreserving(Merge):
    """A group's mean, rescaled so that the largest norm among its tokens survives."""

    target: Tensor | None = None  # (B, K) the token of each group whose norm is the reference; None = that of the mean

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, total = super().reduce(wide, size)
        norm = wide.norm(dim=-1)
        largest = rows(norm[..., None], self._first)[..., 0].scatter_reduce(
            1, self._group.gather(1, self._rest), norm.gather(1, self._rest), "amax"
        )
        own = mean.norm(dim=-1) if self.target is None else norm.gather(1, self.target)
        alone = super().reduce(norm[..., None].detach())[1][..., 0] == 1
        scale = (largest / own).masked_fill(alone | (own == 0), 1.0)
        return (mean * scale[..., None]).to(x.dtype), total


@dataclass(frozen=True)
class ToFu(Reducer):
    r"""ToMe's matching, and a group that keeps the largest norm of its tokens (MLERP, section 3).

    .. math:: x = \bar x \cdot \max_i \|x_i\| \,/\, n

    Means are shorter than what they are the means of, which later layers were not trained on. The paper drops the
    merged tokens instead in early layers, up to a depth that it gives for no CLIP tower: that is left out here. The
    preset's means count every token once, whatever it holds; attention still weighs tokens by their sizes.

    Parameters
    ----------
    reference : str, default 'mean'
        What n is: "mean" = the norm of the mean (the paper), "target" = that of the token which the others joined (the
        published code).
    """

    reference: str = "mean"

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise UserError(f"unknown reference {self.reference!r}; choose one of {', '.join(REFERENCES)}")

    def decide(self, metric: Tensor, r: int, known: Known) -> Merge:
        a, b = alternate(metric, known.protected)
        merged, target = most_similar_first(unit_metric(metric), a, b, r)
        merge = NormPreserving.join(metric.shape[1], merged, target)
        if self.reference == "target":
            merge.target = merge._first.scatter(1, merge._group.gather(1, target), target)
        return merge
