"""What lmms-eval wrote about a run: its results file and, beside it, what it says of every question."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pitome_mllm.methods import UserError

from ..benchmark.bootstrap import span, weights

SUFFIX = "_results.json"


class EvaluationError(RuntimeError):
    """A question could not be answered, or results do not hold; says which."""


@dataclass(frozen=True)
class Figure:
    """One figure of one run; what is None cannot be had: the interval, or all where no question counts for it."""

    value: float | None
    low: float | None
    high: float | None
    questions: int


@dataclass(frozen=True)
class Results:
    """One results file, of the plug-in or of lmms-eval's command line."""

    path: Path
    content: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """What the plug-in says about method, settings, versions and cost."""
        said = self.content["config"].get("batch_sizes") or [None]
        if not isinstance(said[0], dict) or "cost" not in said[0]:
            raise UserError(f"{str(self.path)!r} was not written by pitome_llava; run lmms-eval with that model")
        return said[0]

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Every question of a task, or of the tasks of a group, in order; empty where they were not logged.

        Several processes leave theirs one after the other, and a bootstrap draws by place.
        """
        found = []
        for name in self.content["group_subtasks"].get(task) or [task]:
            file = self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}_samples_{name}.jsonl")
            if file.is_file():
                rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
                found += [row | {"doc_id": (name, row["doc_id"])} for row in rows]
        return found

    def figures(self, task: str) -> dict[str, float]:
        """Every figure of a task by its metric."""
        row = self.content["results"][task] | self.content.get("groups", {}).get(task, {})
        named = {key.split(",")[0]: value for key, value in row.items() if "_stderr" not in key}
        return {name: value for name, value in named.items() if isinstance(value, int | float) and name != "samples"}

    def figure(self, task: str, metric: str, scale: float = 1.0) -> Figure:
        """A figure as lmms-eval gives it, with the interval of its questions; these must agree."""
        names = self.content["group_subtasks"].get(task) or [task]
        questions = sum(self.content["n-samples"][name]["effective"] for name in names)
        value, found = self.figures(task).get(metric), interval(self.samples(task), metric)
        if value is None:
            return Figure(None, None, None, questions)
        if found is None:
            return Figure(scale * value, None, None, questions)
        if abs(found[0] - value) > 1e-6 * max(1.0, abs(value)):
            raise EvaluationError(f"{self.path}: {metric} of {task} is {value}, but its questions give {found[0]}")
        return Figure(scale * value, scale * found[1], scale * found[2], questions)


def read(folders: Sequence[Path]) -> Iterator[Results]:
    """The results files in folders, in the order of their paths."""
    for folder in folders:
        files = sorted(folder.rglob(f"*{SUFFIX}"))
        if not files:
            raise UserError(f"no results (*{SUFFIX}) in {str(folder)!r}; say where lmms-eval's --output_path was")
        for file in files:
            try:
                yield Results(file, json.loads(file.read_text()))
            except json.JSONDecodeError as error:
                what = f"was cut off while it was written ({error}); remove it and run again"
                raise UserError(f"{str(file)!r} {what}") from error


def newest(folder: Path) -> Results | None:
    """The last results in a folder, None if there are none."""
    return list(read([folder]))[-1] if any(folder.rglob(f"*{SUFFIX}")) else None


def group_a(plain: Results, coarse: Results, run: Results, task: str, metric: str) -> Figure:
    """Accuracy, in per cent, on the questions that the plain model gets right and plain downsampling gets wrong.

    As VTC-Bench (arXiv 2510.07143) has it; on others downsampling does as well, or nothing can be lost. A question
    counts as right from half a point on; where the questions were not logged, there are none.
    """
    name = FIELDS.get(metric, metric)
    logged = [{row["doc_id"]: row for row in one.samples(task) if name in row} for one in (plain, coarse, run)]
    both = [{key: _score(row[name]) >= 0.5 for key, row in rows.items()} for rows in logged[:2]]
    chosen = [key for key, right in both[0].items() if right and not both[1].get(key, True) and key in logged[2]]
    rows = [logged[2][key] for key in chosen]
    found = interval([row | {"acc": float(_score(row[name]) >= 0.5)} for row in rows], "acc")
    return Figure(*(100 * value for value in found), len(rows)) if found else Figure(None, None, None, len(rows))


def draws(samples: Sequence[dict[str, Any]], metric: str, seed: int = 0) -> tuple[float, np.ndarray] | None:
    """A figure, and what it is in each draw of the bootstrap; None where it is no function of sums over questions.

    Questions on one image depend, so images are resampled where ``samples`` say which ("picture"). Runs that were asked
    the same questions are resampled alike under one seed.
    """
    clusters = _clusters(samples, metric) if metric in FIGURES else {}
    if not clusters:
        return None
    sums, figure = FIGURES[metric]
    parts = [sums(group) for group in clusters.values()]
    names = sorted({name for part in parts for name in part}, key=str)
    table = np.array([[part.get(name, 0.0) for name in names] for part in parts])
    value, *found = (
        figure(dict(zip(names, total, strict=True))) for total in (table.sum(0), *(weights(len(table), seed) @ table))
    )
    return None if np.isnan(found).all() else (value, np.array(found))


def interval(samples: Sequence[dict[str, Any]], metric: str) -> tuple[float, float, float] | None:
    """A figure with its 95 % interval; None where there are no `draws`."""
    drawn = draws(samples, metric)
    return drawn and (drawn[0], *span(drawn[1]))


def _clusters(samples: Sequence[dict[str, Any]], metric: str) -> dict[Hashable, list[Any]]:
    """What the metric says about the questions on each image."""
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
    """MME: of the two questions on an image, per cent right, and 100 more if both are."""
    scores, category = [_score(item) for item in items], items[0]["category"]
    points = 100 * sum(scores) / len(scores) + 100 * (sum(scores) == 2)
    return {("points", category): points, ("pairs", category): 1}


def _points(sums: dict[Hashable, float]) -> float:
    """The mean of each category, added up; nan in a draw that lacks one."""
    categories = [category for kind, category in sums if kind == "pairs"]
    if any(not sums["pairs", category] for category in categories):
        return float("nan")
    return sum(sums["points", category] / sums["pairs", category] for category in categories)


FIELDS = {"gpt_eval_score": "hit"}  # MMBench: whether all rotations were answered right, which `reproduce` notes
PAIRED = ("mme_perception_score", "mme_cognition_score")
Sums = Callable[[list[Any]], dict[Hashable, float]]
FIGURES: dict[str, tuple[Sums, Callable[[dict[Hashable, float]], float]]] = {
    **dict.fromkeys(("exact_match", "acc", "pope_accuracy"), (_mean_sums, _mean)),
    "gpt_eval_score": (_mean_sums, lambda sums: 100 * _mean(sums)),
    "pope_f1_score": (_yes_sums, _f1),
    **dict.fromkeys(PAIRED, (_pair_sums, _points)),
}
