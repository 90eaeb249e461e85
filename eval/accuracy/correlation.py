"""Rank correlation, and its interval where points belong together in clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pitome_mllm.methods import UserError

from ..benchmark.bootstrap import DRAWS, drawn, span


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95 % bootstrap interval over clusters."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    above, equal = values[:, None] > values, values[:, None] == values
    return above.sum(1) + (equal.sum(1) - 1) / 2


def spearman(x: np.ndarray, y: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Rank correlation of ``x`` and ``y`` (n,); with ``strata`` (n,) of ranks within each of them, taken together.

    NaN where one of them never varies.
    """
    strata = np.zeros(len(x)) if strata is None else strata
    a, b = np.zeros(len(x)), np.zeros(len(x))
    for stratum in np.unique(strata):
        inside = strata == stratum
        for target, values in ((a, x), (b, y)):
            own = ranks(values[inside])
            target[inside] = own - own.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def correlation(
    x: np.ndarray,
    y: np.ndarray,
    cluster: Sequence[str],
    strata: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Correlation:
    """`spearman` of points (n,), and how far it would be another with other clusters.

    The points of one ``cluster`` (n,) are not independent: the bootstrap draws clusters, each with all its points.

    Raises
    ------
    ValueError : fewer than two clusters.
    """
    names, strata = np.asarray(cluster), np.zeros(len(x)) if strata is None else strata
    members = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    if len(members) < 2:
        raise UserError(f"an interval over clusters needs at least 2 of them, got {len(members)}; measure more")
    points = (np.concatenate([members[c] for c in row]) for row in drawn(len(members), seed, draws))
    return Correlation(spearman(x, y, strata), *span([spearman(x[i], y[i], strata[i]) for i in points]))
