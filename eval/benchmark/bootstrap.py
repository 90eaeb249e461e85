"""Groups of questions, and paired bootstrap intervals of accuracies in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .questions import CATEGORIES
from .scenes import TIERS

DRAWS = 2000


def groups(asked: Sequence[Any]) -> dict[str, np.ndarray]:
    """Masks over questions, or records of them: all, per category and per tier, as far as there are any."""
    masks = {"all": np.ones(len(asked), bool)}
    masks |= {c: np.array([q.category == c for q in asked]) for c in CATEGORIES}
    masks |= {t: np.array([q.tier == t for q in asked]) for t in TIERS}
    return {name: mask for name, mask in masks.items() if mask.any()}


class Bootstrap:
    """Paired 95 % intervals. Pictures are resampled, the same ones for every run, as questions on one depend."""

    def __init__(self, scenes: np.ndarray, seed: int = 0):
        self.member = (scenes[None] == np.unique(scenes)[:, None]).astype(float)  # (pictures, questions)
        count = len(self.member)
        self.weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)

    def __call__(self, values: np.ndarray, mask: np.ndarray, less: np.ndarray | None = None) -> tuple[float, ...]:
        """Mean of ``values`` over ``mask``, minus that over the mask ``less`` if there is one, and the interval."""
        mean, rates = self._rates(values, mask)
        if less is not None:
            other, other_rates = self._rates(values, less)
            mean, rates = mean - other, rates - other_rates
        low, high = np.nanquantile(rates, (0.025, 0.975))
        return float(mean), float(low), float(high)

    def _rates(self, values: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean, and that of every draw; NaN for one that misses a small group altogether."""
        sums, counts = self.member @ (values * mask), self.member @ mask
        drawn = self.weights @ counts
        return sums.sum() / counts.sum(), np.divide(
            self.weights @ sums, drawn, out=np.full(DRAWS, np.nan), where=drawn > 0
        )
