"""The one bootstrap: clusters are drawn, the same for everything that is compared, and figures made of each draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .questions import CATEGORIES, Question
from .scenes import TIERS

DRAWS = 2000


def drawn(clusters: int, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """(draws, clusters) which clusters each draw holds, with replacement."""
    return np.random.default_rng(seed).integers(0, clusters, (draws, clusters))


def weights(clusters: int, seed: int = 0) -> np.ndarray:
    """(DRAWS, clusters) how often each draw holds each cluster."""
    return np.stack([np.bincount(row, minlength=clusters) for row in drawn(clusters, seed)])


def span(figures: np.ndarray | Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of a figure in all draws, those aside that have none (NaN)."""
    low, high = np.nanquantile(figures, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def groups(asked: Sequence[Question]) -> dict[str, np.ndarray]:
    """Masks over questions: all, per category and per tier, as far as there are any."""
    masks = {"all": np.ones(len(asked), bool)}
    masks |= {c: np.array([q.category == c for q in asked]) for c in CATEGORIES}
    masks |= {t: np.array([q.tier == t for q in asked]) for t in TIERS}
    return {name: mask for name, mask in masks.items() if mask.any()}


class Bootstrap:
    """Paired intervals of accuracies. Pictures are drawn, as questions on one depend."""

    def __init__(self, scenes: np.ndarray, seed: int = 0):
        self.member = (scenes[None] == np.unique(scenes)[:, None]).astype(float)  # (pictures, questions)
        self.weights = weights(len(self.member), seed)

    def __call__(
        self, values: np.ndarray, mask: np.ndarray, less: np.ndarray | None = None, level: float = 0.95
    ) -> tuple[float, ...]:
        """Mean of ``values`` over ``mask``, minus that over the mask ``less`` if there is one, and the interval."""
        mean, rates = self._rates(values, mask)
        if less is not None:
            other, other_rates = self._rates(values, less)
            mean, rates = mean - other, rates - other_rates
        return float(mean), *span(rates, level)

    def _rates(self, values: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean, and that of every draw; NaN for one that misses a small group altogether."""
        sums, counts = self.member @ (values * mask), self.member @ mask
        asked = self.weights @ counts
        return sums.sum() / counts.sum(), np.divide(
            self.weights @ sums, asked, out=np.full(DRAWS, np.nan), where=asked > 0
        )
