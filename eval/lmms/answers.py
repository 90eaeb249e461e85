"""What the plug-in gives back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult

from .asked import EvaluationError


class Coming(Sequence):
    """Answers that are made when they are asked for, in order."""

    def __init__(self, coming: Iterator[Any], total: int) -> None:
        self._coming, self._total, self._known = coming, total, []

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._total):
            if number == len(self._known):
                self._known.append(next(self._coming))
            yield self._known[number]


class Likelihood(tuple):
    """(loss, greedy) of a continuation."""

    def strip(self) -> str:
        """Called by lmms-eval's response cache, which takes it for a text and would give a string back."""
        raise EvaluationError("lmms-eval's response cache cannot hold likelihoods; run these tasks without it")


def likelihood(scores: torch.Tensor, ids: torch.Tensor) -> GenerationResult:
    """Of ids (n,) under scores (n, V): mean negative log-likelihood, and whether each is the best."""
    loss = torch.nn.functional.cross_entropy(scores, ids)
    return GenerationResult(Likelihood((float(loss), bool((scores.argmax(-1) == ids).all()))))
