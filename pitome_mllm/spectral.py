"""What a merge does to the graph of tokens: the spectral distance of the PiToMe paper, for any method with groups.

"Accelerating Transformers with Spectrum-Preserving Token Merging" (arXiv 2405.16148), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .methods import Merge, UserError

# Distances 1 - cos below this count as none: float32 cannot tell apart directions less than about 1e-6 rad apart.
SAME = 1e-12


def spectral_distance(metric: Tensor, merge: Merge | Sequence[Merge]) -> Tensor:
    r"""How much a merge changes the spectrum of the graph of tokens; 0 = nothing.

    Tokens i, j are joined by :math:`W_{ij} = 1 - \cos(x_i, x_j)`; groups a, b of the coarse graph by the sum of W over
    their tokens; tokens of the lifted graph by that sum over the product of both groups' sizes. With the eigenvalues of
    :math:`L = I - D^{-1/2} W D^{-1/2}` of both graphs in ascending order,

    .. math:: SD = \sum_i |\lambda_i - \lambda_i^{lifted}|.

    A dropped token (group -1) keeps its place in the lifted graph without any edge, where L has eigenvalue one: what
    dropping loses is its edges. Where all tokens are alike there is no edge at all, and SD is 0 by definition.

    Parameters
    ----------
    metric : Tensor of shape (B, N, C)
        What the similarity of tokens is taken of, such as keys or features of the unmerged model.
    merge : Merge or sequence of Merge
        Of those N tokens; or the merges of a run in their order, such as ``handle.stats.merges`` (none: SD is 0).

    Returns
    -------
    Tensor of shape (B,), float64

    Raises
    ------
    ValueError
        A metric of another shape or with NaN or infinity; a method without groups; groups of another number of rows or
        tokens than the metric has.
    """
    return TokenGraph(metric).distance(merge)


class TokenGraph:
    """The graph of tokens, whose spectrum is computed once for any number of merges; everything in float64.

    Attributes
    ----------
    weights : Tensor of shape (B, N, N), float64
        1 - cos; 0 on the diagonal.
    """

    def __init__(self, metric: Tensor) -> None:
        """``metric`` (B, N, C); a zero row is at distance 1 of every other. ValueError as in `spectral_distance`."""
        if not isinstance(metric, Tensor) or metric.dim() != 3 or not metric.shape[1]:
            got = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
            raise UserError(f"metric is {got}; pass a tensor (batch, tokens, channels) with at least one token")
        if not metric.isfinite().all():
            raise UserError("metric holds NaN or infinity, so that its graph has no spectrum; pass finite features")
        unit = F.normalize(metric.detach().double(), dim=-1)
        distance = 1 - unit @ unit.mT
        distance.diagonal(dim1=1, dim2=2).zero_()
        self.weights = distance.where(distance > SAME, 0.0)

    @cached_property
    def spectrum(self) -> Tensor:
        """(B, N) eigenvalues of L, ascending."""
        return laplacian_spectrum(self.weights)

    def coarse(self, merge: Merge | Sequence[Merge]) -> Tensor:
        """(B, K, K) the graph of groups: sums of weights over their tokens."""
        member = self._membership(merge)
        return member.mT @ self.weights @ member

    def distance(self, merge: Merge | Sequence[Merge]) -> Tensor:
        """(B,) the `spectral_distance` of a merge."""
        coarse = laplacian_spectrum(self.coarse(merge))
        # The lifted graph has the coarse one's eigenvalues, and one for every token beyond its group's first.
        ones = torch.ones_like(self.spectrum[:, coarse.shape[1] :])
        lifted = torch.cat([coarse, ones], dim=1).sort(dim=1).values
        return (self.spectrum - lifted).abs().sum(-1)

    def _membership(self, merge: Merge | Sequence[Merge]) -> Tensor:
        """(B, N, K) float64: 1 where a token belongs to a group; a dropped token belongs to none."""
        merges = [merge] if isinstance(merge, Merge) else list(merge)
        if not merges:
            return torch.eye(self.weights.shape[1]).to(self.weights).expand_as(self.weights)
        whole = reduce(Merge.then, merges)
        if whole.group is None:
            raise UserError("this method forms no groups, so there is no graph of groups; choose one that merges")
        if whole.group.shape != self.weights.shape[:2]:
            raise UserError(
                f"the merge is of {tuple(whole.group.shape)} (rows, tokens), the metric of "
                f"{tuple(self.weights.shape[:2])}; pass the metric of the tokens that were merged, class token included"
            )
        group = whole.group.to(self.weights.device)
        return (group[..., None] == torch.arange(whole.count, device=group.device)).double()


def laplacian_spectrum(weights: Tensor) -> Tensor:
    """Ascending eigenvalues (B, N) of L = I - D^-1/2 W D^-1/2 for ``weights`` (B, N, N).

    A node without edges has eigenvalue one; so a graph without edges, and whatever becomes of it, has only ones.
    """
    degree = weights.sum(-1)
    scale = degree.rsqrt().where(degree > 0, 0.0)
    identity = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return torch.linalg.eigvalsh(identity - scale[..., None] * weights * scale[..., None, :])
