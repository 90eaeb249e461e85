"""Accuracy over the number of visual tokens: ``python -m pitome_mllm_eval.accuracy.curves``.

Every method at every place and every keep answers the benchmark. What is measured is kept in ``--work``, so a killed
run goes on where it stopped. The results go to two files: ``--out`` holds every category and tier, `SUMMARY` beside it
all questions together; `report` makes plot and tables from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pitome_mllm import METHODS
from pitome_mllm.methods import UserError
from pitome_mllm.plan import make_plan
from pitome_mllm.settings import Settings

from ..benchmark.bootstrap import Bootstrap, groups
from ..benchmark.glyphs import SPLITS
from ..benchmark.questions import CATEGORIES, Question
from ..benchmark.scenes import GRID
from ..benchmark.sets import blind_answer, questions
from ..documents import read, write_csv
from ..provenance import RESULTS as FOLDER
from ..provenance import check_out
from .runs import PLAIN, WORK, Answers, load, measure, provenance, run_name, work_folder

KEEPS = (288, 144, 72, 36, 16)
PLACES = ("tower", "projector", "both")
BLIND = "blind"
SUMMARY = "accuracy.csv"  # all questions together; of the two files the one that is installed
RESULTS = FOLDER / "curves.csv"
COMMAND = "python -m pitome_mllm_eval.accuracy.curves"


@dataclass(frozen=True)
class Setting:
    """One run: a method at a place, keeping so many tokens, as published or under the library's defaults."""

    method: str
    where: str
    keep: int
    published: bool = False

    def __str__(self) -> str:
        return f"{self.method}-{self.where}-{self.keep}{'-published' if self.published else ''}"

    @classmethod
    def of(cls, row: dict[str, str]) -> Setting:
        """That of a row of a CSV."""
        return cls(row["method"], row["where"], int(row["keep"]), row["published"] == "True")


@dataclass(frozen=True)
class Row:
    """One figure: an accuracy, or (``against`` another run) the difference of two, with its 95 % interval."""

    method: str
    where: str
    keep: int
    published: bool
    group: str
    against: str
    questions: int
    value: float
    low: float
    high: float
    seconds: float | str = ""  # of CPU time, for all questions of the run


def results(path: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of a CSV of this command; ValueError as `read`."""
    return read(path, COMMAND, ("against", "seconds"))


def called(method: str, published: bool) -> str:
    """What tables call a method."""
    return f"{method}, published" if published else method


def own_place(method: str, published: bool) -> str:
    """Where a method merges if nobody says."""
    return Settings(method=method, published=published).defaults["where"]


def settings(methods: Iterable[str], places: Iterable[str], keeps: Iterable[int], geometry: Any) -> Iterator[Setting]:
    """Every combination that exists; what always runs as published once."""
    for setting in (Setting(*parts) for parts in product(methods, places, keeps, (True, False))):
        try:
            if METHODS[setting.method].variant and not setting.published:
                continue
            make_plan(Settings().changed(**asdict(setting)), geometry)
        except UserError:
            continue
        yield setting


class Rows:
    """Makes the rows of the CSV from what was answered right."""

    def __init__(self, asked: list[tuple[int, Question]]) -> None:
        scenes, questions = zip(*asked, strict=True)
        self.bootstrap, self.masks = Bootstrap(np.array(scenes)), groups(questions)

    def accuracy(self, setting: Setting, right: np.ndarray, seconds: float | str = "") -> Iterator[Row]:
        """The share of right answers, in every group."""
        for row in self._each(setting, "", right.astype(float)):
            yield replace(row, seconds=seconds)

    def difference(self, setting: Setting, against: str, right: np.ndarray, other: np.ndarray) -> Iterator[Row]:
        """What ``right`` has more of than ``other``, in every group."""
        yield from self._each(setting, against, right.astype(float) - other)

    def spread(self, setting: Setting, right: np.ndarray, plain: np.ndarray) -> Iterator[Row]:
        """The change of the category that loses least minus that of the one that loses most."""
        change = right.astype(float) - plain
        inside = {name: mask for name, mask in self.masks.items() if name in CATEGORIES}
        order = sorted(inside, key=lambda name: change[inside[name]].mean())
        most, least = inside[order[0]], inside[order[-1]]
        figures = self.bootstrap(change, least, less=most)
        yield _row(setting, f"{order[-1]} - {order[0]}", PLAIN, most | least, figures)

    def _each(self, setting: Setting, against: str, values: np.ndarray) -> Iterator[Row]:
        for name, mask in self.masks.items():
            yield _row(setting, name, against, mask, self.bootstrap(values, mask))


def rows(
    runs: dict[Setting, Answers], plain: Answers, blind: np.ndarray, asked: list[tuple[int, Question]]
) -> Iterator[Row]:
    """Accuracies, and differences: to the plain model; over all questions also of the control "random" to ToMe."""
    made = Rows(asked)
    yield from made.accuracy(Setting(PLAIN, "none", GRID * GRID), plain.right, round(plain.seconds, 1))
    yield from made.accuracy(Setting(BLIND, "none", 0), blind)
    for setting, run in runs.items():
        yield from made.accuracy(setting, run.right, round(run.seconds, 1))
        yield from made.difference(setting, PLAIN, run.right, plain.right)
        yield from made.spread(setting, run.right, plain.right)
        other = replace(setting, method="tome")
        if setting.method == "random" and other in runs:
            yield next(made.difference(setting, "tome", run.right, runs[other].right))  # of all questions


def _row(setting: Setting, group: str, against: str, mask: np.ndarray, figures: tuple[float, ...]) -> Row:
    value, low, high = (round(f, 6) for f in figures)
    return Row(
        **asdict(setting), group=group, against=against, questions=int(mask.sum()), value=value, low=low, high=high
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    made.add_argument("--split", default="test", choices=SPLITS[1:])
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    made.add_argument("--where", nargs="+", default=list(PLACES), choices=PLACES)
    made.add_argument("--keep", nargs="+", type=int, default=list(KEEPS))
    made.add_argument("--limit", type=int, help="only the first so many questions")
    made.add_argument("--processes", type=int, default=2, help="settings measured at a time, one thread each")
    made.add_argument("--work", type=Path, default=WORK, help="where finished runs are kept (%(default)s)")
    made.add_argument("--out", type=Path, default=RESULTS, help="%(default)s")
    return made


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSVs."""
    from pitome_mllm.families.geometry import geometry

    args, usual = parser().parse_args(argv), parser().parse_args([])
    names = ("model", "split", "methods", "where", "keep", "limit")
    try:
        check_out(args.out, RESULTS, all(getattr(args, name) == getattr(usual, name) for name in names))
    except UserError as error:
        parser().error(str(error))
    torch.set_num_threads(1)
    about = provenance(args.model, args.split)
    work = work_folder(args.work, "curves", args.model, args.split, args.limit)
    wanted = list(settings(args.methods, args.where, args.keep, geometry(load(args.model)[0].config)))
    runs = {setting: run_name(setting, asdict(setting)) for setting in wanted}
    jobs = {PLAIN: None, **{runs[setting]: asdict(setting) for setting in wanted}}
    found = measure(jobs, args.model, args.split, args.limit, work, args.processes)
    asked = questions(args.split)[: len(found[PLAIN].right)]
    blind = np.array([blind_answer(question) == question.answer for _, question in asked])
    made = list(rows({setting: found[runs[setting]] for setting in wanted}, found[PLAIN], blind, asked))
    write_csv(args.out, made, about)
    write_csv(args.out.with_name(SUMMARY), [row for row in made if row.group == "all"], about)


if __name__ == "__main__":
    main()
