"""Accuracy over the number of visual tokens: ``python -m pitome_mllm_eval.accuracy.curves``.

Every method at every place and every keep answers the benchmark. What is measured is kept in ``--work``, so a killed
run goes on where it stopped. The results go to one CSV; `report` draws the plot and the README's table from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..benchmark.bootstrap import Bootstrap, groups
from ..benchmark.glyphs import SPLITS
from ..benchmark.questions import CATEGORIES, Question
from ..benchmark.scenes import GRID
from ..benchmark.sets import blind_answer, questions
from ..documents import write_csv
from .runs import PLAIN, WORK, Answers, check_out, load, measure, provenance, run_name, work_folder

KEEPS = (288, 144, 72, 36, 16)
PLACES = ("tower", "projector", "both")
BLIND = "blind"
RESULTS = Path(__file__).parents[1] / "results" / "curves.csv"


@dataclass(frozen=True)
class Setting:
    """One run: a method at a place, keeping so many tokens; ``like`` says which settings the default method lends it.

    "" none, "where" its schedule and what the LLM is told (no part of any method), "all" also its metric, mean, order,
    place within the block and proportional attention.
    """

    method: str
    where: str
    keep: int
    like: str = ""

    def __str__(self) -> str:
        return f"{self.method}-{self.where}-{self.keep}{self.like and '-like-' + self.like}"

    def keywords(self) -> dict[str, Any]:
        """What `attach` is called with."""
        from pitome_mllm import METHODS
        from pitome_mllm.settings import DEFAULT_METHOD, DEFAULTS, WHERE

        lent = DEFAULTS | METHODS[DEFAULT_METHOD].settings
        names = {"": set(), "where": set(WHERE), "all": set(DEFAULTS)}[self.like]
        names -= {"merges"}  # others merge in every block
        if not METHODS[self.method].reducer.forms_groups:
            names -= {"positions"}  # without groups there is no original position
        borrowed = {name: value for name, value in lent.items() if name in names}
        return {**borrowed, "method": self.method, "where": self.where, "keep": self.keep}


@dataclass(frozen=True)
class Row:
    """One figure: an accuracy, or (``against`` another run) the difference of two, with its 95 % interval."""

    method: str
    where: str
    keep: int
    like: str
    group: str
    against: str
    questions: int
    value: float
    low: float
    high: float
    seconds: float | str = ""  # of CPU time, for all questions of the run


def loans(method: str, where: str) -> tuple[str, ...]:
    """What the default method can lend to ``method`` at this place (see `Setting`); one-step methods keep their own."""
    from pitome_mllm import METHODS
    from pitome_mllm.settings import DEFAULT_METHOD

    if method == DEFAULT_METHOD:
        return ("",)
    if METHODS[method].reducer.once:
        return "", "where"
    return ("", "where", "all") if where == own_place(DEFAULT_METHOD) else ("",)


def own_place(method: str) -> str:
    """Where a method merges if nobody says."""
    from pitome_mllm import METHODS
    from pitome_mllm.settings import DEFAULTS

    return METHODS[method].settings.get("where", DEFAULTS["where"])


def settings(methods: Iterable[str], places: Iterable[str], keeps: Iterable[int], geometry: Any) -> Iterator[Setting]:
    """Every combination that exists."""
    from pitome_mllm.plan import make_plan
    from pitome_mllm.settings import Settings

    for method, where, keep in product(methods, places, keeps):
        for like in loans(method, where):
            setting = Setting(method, where, keep, like)
            try:
                make_plan(Settings().changed(**setting.keywords()), geometry)
            except ValueError:
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
    """Accuracies, and differences: to the plain model, between methods at the same place and keep, and between the
    default method at its own place and every other, wherever that merges, at the same keep."""
    made = Rows(asked)
    yield from made.accuracy(Setting(PLAIN, "none", GRID * GRID), plain.right, round(plain.seconds, 1))
    yield from made.accuracy(Setting(BLIND, "none", 0), blind)
    for setting, run in runs.items():
        yield from made.accuracy(setting, run.right, round(run.seconds, 1))
        yield from made.difference(setting, PLAIN, run.right, plain.right)
        yield from made.spread(setting, run.right, plain.right)
    for one, other in permutations(runs, 2):
        if against := _opponent(one, other):
            yield from made.difference(one, against, runs[one].right, runs[other].right)


def _opponent(one: Setting, other: Setting) -> str:
    """What to call ``other`` where ``one`` is compared with it; empty where it is not."""
    from pitome_mllm.settings import DEFAULT_METHOD

    if one.keep != other.keep or one.method == other.method:
        return ""
    if one.method == DEFAULT_METHOD and one.where == own_place(DEFAULT_METHOD):
        return f"{other.method} {other.where}{other.like and f' (lent {other.like})'}"
    return other.method if (one.where, one.like) == (other.where, other.like) and one.method < other.method else ""


def _row(setting: Setting, group: str, against: str, mask: np.ndarray, figures: tuple[float, ...]) -> Row:
    value, low, high = (round(f, 6) for f in figures)
    return Row(
        **asdict(setting), group=group, against=against, questions=int(mask.sum()), value=value, low=low, high=high
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from pitome_mllm import METHODS

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


def whole(args: argparse.Namespace) -> bool:
    """Whether nothing of the benchmark is left out."""
    usual = parser().parse_args([])
    return all(getattr(args, n) == getattr(usual, n) for n in ("model", "split", "methods", "where", "keep", "limit"))


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSV."""
    from pitome_mllm.families.geometry import geometry

    args = parser().parse_args(argv)
    try:
        check_out(args.out, RESULTS, whole(args))
    except ValueError as error:
        parser().error(str(error))
    torch.set_num_threads(1)
    about = provenance(args.model, args.split)
    work = work_folder(args.work, "curves", args.model, args.split, args.limit)
    wanted = list(settings(args.methods, args.where, args.keep, geometry(load(args.model)[0].config)))
    names = {setting: run_name(setting, setting.keywords()) for setting in wanted}
    jobs = {PLAIN: None, **{names[setting]: setting.keywords() for setting in wanted}}
    found = measure(jobs, args.model, args.split, args.limit, work, args.processes)
    asked = questions(args.split)[: len(found[PLAIN].right)]
    blind = np.array([blind_answer(question) == question.answer for _, question in asked])
    runs = {setting: found[names[setting]] for setting in wanted}
    write_csv(args.out, rows(runs, found[PLAIN], blind, asked), about)


if __name__ == "__main__":
    main()
