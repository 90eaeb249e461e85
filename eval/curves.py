"""Accuracy over the number of visual tokens: ``python -m pitome_mllm_eval.curves``.

Every method at every place and every keep answers the benchmark. What is measured is kept in ``--work``, so a killed
run goes on where it stopped. The results go to one CSV; `report` draws the plot and the README's table from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .benchmark import blind_answer, questions
from .glyphs import SPLITS
from .questions import CATEGORIES, Question
from .runs import PLAIN, load, measure, provenance, work_folder, write_csv
from .scenes import GRID, TIERS

KEEPS = (288, 144, 72, 36, 16)
PLACES = ("tower", "projector", "both")
BLIND = "blind"
DRAWS = 2000
RESULTS = Path(__file__).parent / "results" / "curves.csv"


@dataclass(frozen=True)
class Setting:
    """One run: a method at a place, keeping so many tokens; ``like`` another method in the schedule and in the LLM."""

    method: str
    where: str
    keep: int
    like: str = ""

    def __str__(self) -> str:
        return f"{self.method}-{self.where}-{self.keep}{self.like and '-like-' + self.like}"

    def keywords(self) -> dict[str, Any]:
        """What `attach` is called with."""
        from pitome_mllm import METHODS
        from pitome_mllm.plan import WHERE

        borrowed = METHODS[self.like].settings if self.like else {}
        borrowed = {name: value for name, value in borrowed.items() if name in WHERE}
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


def settings(methods: Iterable[str], places: Iterable[str], keeps: Iterable[int], geometry: Any) -> Iterator[Setting]:
    """Every combination that exists; a method with a place of its own is measured there, others at all of them.

    What works where the default method does is measured once more with the default's schedule and its settings in the
    LLM, which are no part of any method; metric, mean and place within the block stay its own.
    """
    from pitome_mllm import METHODS
    from pitome_mllm.plan import DEFAULT_METHOD, Settings, make_plan

    default = METHODS[DEFAULT_METHOD].settings.get("where", "tower")
    for method, where, keep in product(methods, places, keeps):
        if where != METHODS[method].settings.get("where", where):
            continue
        for like in ("", DEFAULT_METHOD) if where == default and method != DEFAULT_METHOD else ("",):
            setting = Setting(method, where, keep, like)
            try:
                make_plan(Settings().changed(**setting.keywords()), geometry)
            except ValueError:
                continue
            yield setting


def groups(asked: list[tuple[int, Question]]) -> dict[str, np.ndarray]:
    """Masks over the questions: all, per category and per tier, as far as there are any."""
    masks = {"all": np.ones(len(asked), bool)}
    masks |= {c: np.array([q.category == c for _, q in asked]) for c in CATEGORIES}
    masks |= {t: np.array([q.tier == t for _, q in asked]) for t in TIERS}
    return {name: mask for name, mask in masks.items() if mask.any()}


class Bootstrap:
    """Paired 95 % intervals. Pictures are resampled, the same ones for every run, as questions on one depend."""

    def __init__(self, scenes: np.ndarray, seed: int = 0):
        self.member = (scenes[None] == np.unique(scenes)[:, None]).astype(float)  # (pictures, questions)
        count = len(self.member)
        self.weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)

    def __call__(self, values: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
        """Mean of ``values`` over ``mask`` and its interval."""
        sums, counts = self.member @ (values * mask), self.member @ mask
        drawn = self.weights @ counts  # 0 where a draw misses a small group altogether: such draws are left out
        rates = np.divide(self.weights @ sums, drawn, out=np.full(DRAWS, np.nan), where=drawn > 0)
        low, high = np.nanquantile(rates, (0.025, 0.975))
        return float(sums.sum() / counts.sum()), float(low), float(high)


def rows(
    runs: dict[Setting, np.ndarray], plain: np.ndarray, blind: np.ndarray, asked: list[tuple[int, Question]]
) -> Iterator[Row]:
    """Accuracies, and differences: to the plain model, between methods at the same place and keep, and between the
    default method and every other, wherever that merges, at the same keep."""
    bootstrap, masks = Bootstrap(np.array([scene for scene, _ in asked])), groups(asked)
    references = {Setting(PLAIN, "none", GRID * GRID): plain, Setting(BLIND, "none", 0): blind}
    for setting, right in {**references, **runs}.items():
        compared = {"": right.astype(float)}
        if setting in runs:
            compared[PLAIN] = right.astype(float) - plain
        for (name, mask), (against, values) in product(masks.items(), compared.items()):
            figures = _named(bootstrap(values, mask))
            yield Row(**asdict(setting), group=name, against=against, questions=int(mask.sum()), **figures)
    for one, other in permutations(runs, 2):
        if against := _opponent(one, other):
            difference = runs[one].astype(float) - runs[other]
            for name, mask in masks.items():
                figures = _named(bootstrap(difference, mask))
                yield Row(**asdict(one), group=name, against=against, questions=int(mask.sum()), **figures)


def _opponent(one: Setting, other: Setting) -> str:
    """What to call ``other`` where ``one`` is compared with it; empty where it is not."""
    from pitome_mllm.plan import DEFAULT_METHOD

    if one.keep != other.keep or other.method == DEFAULT_METHOD:
        return ""
    if one.method == DEFAULT_METHOD:
        return f"{other.method} {other.where}{other.like and ' like ' + other.like}"
    return other.method if (one.where, one.like) == (other.where, other.like) and one.method < other.method else ""


def _named(figures: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), (round(f, 4) for f in figures), strict=True))


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
    made.add_argument("--work", type=Path, help="folder for finished runs (default: one in runs/)")
    made.add_argument("--out", type=Path, default=RESULTS)
    return made


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSV."""
    from pitome_mllm.specs import geometry

    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    about = provenance(args.model, args.split)
    work = args.work or work_folder("curves", args.model, args.split, args.limit)
    wanted = list(settings(args.methods, args.where, args.keep, geometry(load(args.model)[0].config)))
    jobs = {PLAIN: None, **{str(setting): setting.keywords() for setting in wanted}}
    found = measure(jobs, args.model, args.split, args.limit, work, args.processes)
    asked = questions(args.split)[: len(found[PLAIN])]
    blind = np.array([blind_answer(question) == question.answer for _, question in asked])
    runs = {setting: found[str(setting)] for setting in wanted}
    write_csv(args.out, rows(runs, found[PLAIN], blind, asked), about)


if __name__ == "__main__":
    main()
