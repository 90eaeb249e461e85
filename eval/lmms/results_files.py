"""Read what lmms-eval wrote about a run: its results file and, beside it, what it says of every question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pitome_mllm.methods import UserError

from .asked import EvaluationError
from .intervals import draws, interval

SUFFIX = "_results.json"


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
        """What the plug-in says about method, settings, versions and cost.

        Raises
        ------
        ValueError : another model wrote the file.
        """
        said = self.content["config"].get("batch_sizes") or [None]
        if not isinstance(said[0], dict) or "cost" not in said[0]:
            raise UserError(f"{str(self.path)!r} was not written by pitome_llava; run lmms-eval with that model")
        return said[0]

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Every question of a task, or of the tasks of a group, in order; empty where they were not logged.

        Several processes leave theirs one after the other, and a bootstrap draws by place.
        """
        names = self.content["group_subtasks"].get(task) or [task]
        files = [self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}_samples_{name}.jsonl") for name in names]
        found = []
        for name, file in zip(names, files, strict=True):
            if file.is_file():
                rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
                found += [row | {"doc_id": (name, row["doc_id"])} for row in rows]
        return found

    def questions(self, task: str) -> int:
        """How many were asked of a task, or of the tasks of a group."""
        names = self.content["group_subtasks"].get(task) or [task]
        return sum(self.content["n-samples"][name]["effective"] for name in names)

    def draws(self, task: str, metric: str, seed: int) -> np.ndarray | None:
        """A figure in resamplings of its pictures, alike for all runs on the same questions; None = not known."""
        found = draws(self.samples(task), metric, seed)
        return found and found[1]

    def figures(self, task: str) -> dict[str, float]:
        """Every figure of a task by its metric."""
        row = self.content["results"][task] | self.content.get("groups", {}).get(task, {})
        named = {key.split(",")[0]: value for key, value in row.items() if "_stderr" not in key}
        return {name: value for name, value in named.items() if isinstance(value, int | float) and name != "samples"}

    def figure(self, task: str, metric: str, scale: float = 1.0) -> Figure:
        """A figure as lmms-eval gives it, with the interval that its questions give.

        Raises
        ------
        EvaluationError : the questions on file give another figure than the results.
        """
        value, questions = self.figures(task).get(metric), self.questions(task)
        if value is None:
            return Figure(None, None, None, questions)
        found = interval(self.samples(task), metric)
        if found is None:
            return Figure(scale * value, None, None, questions)
        if abs(found[0] - value) > 1e-6 * max(1.0, abs(value)):
            raise EvaluationError(f"{self.path}: {metric} of {task} is {value}, but its questions give {found[0]}")
        return Figure(scale * value, scale * found[1], scale * found[2], questions)


def read(folders: Sequence[Path]) -> Iterator[Results]:
    """The results files in folders, in the order of their paths.

    Raises
    ------
    ValueError : a folder without any; a file that was cut off.
    """
    for folder in folders:
        files = sorted(folder.rglob(f"*{SUFFIX}"))
        if not files:
            raise UserError(f"no results (*{SUFFIX}) in {str(folder)!r}; say where lmms-eval's --output_path was")
        yield from map(_read, files)


def newest(folder: Path) -> Results | None:
    """The last results in a folder, None if there are none."""
    files = sorted(folder.rglob(f"*{SUFFIX}")) if folder.is_dir() else []
    return _read(files[-1]) if files else None


def _read(file: Path) -> Results:
    try:
        return Results(file, json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{str(file)!r} was cut off while it was written ({error}); remove it and run again") from error
