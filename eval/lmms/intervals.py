"""Bootstrap intervals of lmms-eval's figures, from what it says about every question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from ..benchmark.bootstrap import span, weights


def draws(samples: Sequence[dict[str, Any]], metric: str, seed: int = 0) -> tuple[float, np.ndarray] | None:
    """A figure, and what it is in each draw of the bootstrap; None where it is no function of sums over questions.

    Questions on one picture depend, so pictures are resampled where ``samples`` say which ("picture"). Runs that were
    asked the same questions are resampled alike under one seed.
    """
    clusters = _clusters(samples, metric) if metric in FIGURES else {}
    if not clusters:
        return None
    sums, figure = FIGURES[metric]
    parts = [sums(group) for group in clusters.values()]
    names = sorted({name for part in parts for name in part}, key=str)
    table = np.array([[part.get(name, 0.0) for name in names] for part in parts])
    found = [figure(dict(zip(names, total, strict=True))) for total in weights(len(table), seed) @ table]
    value = figure(dict(zip(names, table.sum(0), strict=True)))
    return None if np.isnan(found).all() else (value, np.array(found))


def interval(samples: Sequence[dict[str, Any]], metric: str) -> tuple[float, float, float] | None:
    """A figure with its 95 % interval; None where there are no `draws`."""
    drawn = draws(samples, metric)
    return drawn and (drawn[0], *span(drawn[1]))


def _clusters(samples: Sequence[dict[str, Any]], metric: str) -> dict[Hashable, list[Any]]:
    """What the metric says about the questions of each picture."""
    found, field = defaultdict(list), FIELDS.get(metric, metric)
    for sample in samples:
        if field in sample:  # questions of MME count for one of its two figures, rotated ones of MMBench for none
            item = sample[field]
            pair = (item["category"], item["question_id"]) if metric in PAIRED else None
            known = sample.get("picture")
            found[pair or (sample["doc_id"] if known is None else known)].append(item)
    return found


def _score(item: Any) -> float:
    return float(item["score"] if isinstance(item, dict) else item)


def _mean_sums(items: list[Any]) -> dict[Hashable, float]:
    return {"right": sum(map(_score, items)), "asked": len(items)}


def _mean(sums: dict[Hashable, float]) -> float:
    return sums["right"] / sums["asked"]


def _yes_sums(items: list[Any]) -> dict[Hashable, float]:
    """Hits, false alarms and misses of "yes"."""
    pairs = [(item["prediction"] == "yes", item["ground_truth"] == "yes") for item in items]
    return {"hit": pairs.count((True, True)), "alarm": pairs.count((True, False)), "miss": pairs.count((False, True))}


def _f1(sums: dict[Hashable, float]) -> float:
    wrong = (sums["alarm"] + sums["miss"]) / 2
    return sums["hit"] / (sums["hit"] + wrong) if sums["hit"] else 0.0


def _pair_sums(items: list[Any]) -> dict[Hashable, float]:
    """MME: of the two questions on a picture, per cent right, and 100 more if both are."""
    scores, category = [_score(item) for item in items], items[0]["category"]
    return {
        ("points", category): 100 * sum(scores) / len(scores) + 100 * (sum(scores) == 2),
        ("pairs", category): 1,
    }


def _points(sums: dict[Hashable, float]) -> float:
    """The mean of each category, added up; nan in a draw that lacks one."""
    categories = [category for kind, category in sums if kind == "pairs"]
    if any(not sums["pairs", category] for category in categories):
        return float("nan")
    return sum(sums["points", category] / sums["pairs", category] for category in categories)


# MMBench: whether all rotations of a question were answered right, which `circular` notes.
FIELDS = {"gpt_eval_score": "hit"}
PAIRED = ("mme_perception_score", "mme_cognition_score")
Sums = Callable[[list[Any]], dict[Hashable, float]]
FIGURES: dict[str, tuple[Sums, Callable[[dict[Hashable, float]], float]]] = {
    **dict.fromkeys(("exact_match", "acc", "pope_accuracy"), (_mean_sums, _mean)),
    "gpt_eval_score": (_mean_sums, lambda sums: 100 * _mean(sums)),
    "pope_f1_score": (_yes_sums, _f1),
    **dict.fromkeys(PAIRED, (_pair_sums, _points)),
}
