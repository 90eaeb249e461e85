"""The search for the best PiToMe, on validation questions: ``python -m pitome_mllm_eval.accuracy.search``.

One factor after the other: every alternative is measured with all others as they are by then, and the best stays; of
those within `TIE` of the best the first. Then the factors in `AGAIN` are asked again, now that the rest has changed.
What is found becomes the preset `pitome-tuned`; the CSV is the ablation. The test set plays no part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pitome_mllm.families.geometry import geometry
from pitome_mllm.methods import UserError
from pitome_mllm.plan import make_plan
from pitome_mllm.schedule import SHAPES
from pitome_mllm.settings import Settings

from ..benchmark.bootstrap import Bootstrap
from ..benchmark.sets import questions
from ..documents import write_csv
from ..provenance import RESULTS as FOLDER
from ..provenance import check_out
from .runs import WORK, load, measure, provenance, run_name, work_folder

KEEPS = (144, 72, 36, 16)
COMMAND = "python -m pitome_mllm_eval.accuracy.search"
RESULTS = FOLDER / "search.csv"
TIE = 0.002
START: dict[str, Any] = {"method": "pitome"}

# What is tried, factor by factor; the paper's choice is always among it. None of an option is the paper's.
FACTORS: dict[str, list[dict[str, Any]]] = {
    "where": [{"where": place} for place in ("tower", "projector", "both")],
    "calibration": [{"calibration": kind} for kind in ("none", "size", "distance")],
    "schedule, first and last merging block": [{"schedule": shape} for shape in SHAPES],
    "tokens out of the tower": [{"tower_keep": share} for share in (None, 0.75, 0.5, 0.25)],
    "order": [{"order": "reading"}, {"order": "source"}],
    "protected share": [{"protect": share} for share in (1.0, 0.75, 0.5, 0.25, 0.0)],
    "metric": [{"metric": "keys"}, {"metric": "hidden"}],
    "place": [{"place": "mid"}, {"place": "end"}],
    "weighted mean": [{"weighted": True}, {"weighted": False}],
    "proportional attention": [{"proportional_attention": True}, {"proportional_attention": False}],
    "energy": [{"energy": "paper"}, {"energy": "elu"}],
    "alpha": [{"alpha": alpha} for alpha in (1.0, 0.5, 0.0)],
    "margin": [{"margin": margin} for margin in (None, 0.9, 0.6, 0.3, 0.0)],
    "steps per merge": [{"steps": steps} for steps in (1, 2, 3)],
}
AGAIN = ("schedule, first and last merging block", "protected share", "place", "proportional attention", "margin")


@dataclass(frozen=True)
class Row:
    """One alternative at one keep: accuracy, and the difference to the setting before this factor, with intervals.

    ``keep`` 0 stands for the mean over all keeps, which decides.
    """

    sweep: int
    factor: str
    alternative: str
    chosen: bool
    keep: int
    questions: int
    value: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    settings: str


class Search:
    """Measures settings and remembers what came out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = work_folder(args.work, "search", args.model, "validation", args.limit)
        self.geometry = geometry(load(args.model)[0].config)
        asked = questions("validation")[: args.limit]
        self.bootstrap = Bootstrap(np.array([scene for scene, _ in asked]))
        self.everything = np.ones(len(asked), bool)

    def measured(self, candidates: list[Mapping[str, Any]]) -> list[np.ndarray]:
        """Hits (keeps, questions) of every candidate."""
        jobs: dict[str, Mapping[str, Any] | None] = {}
        for candidate in candidates:
            jobs |= {run_name(keep, candidate): {**candidate, "keep": keep} for keep in self.args.keep}
        found = measure(jobs, self.args.model, "validation", self.args.limit, self.work, self.args.processes)
        return [np.stack([found[run_name(keep, c)].right for keep in self.args.keep]).astype(float) for c in candidates]

    def exists(self, candidate: Mapping[str, Any]) -> bool:
        """Whether these settings go together, at every keep."""
        try:
            for keep in self.args.keep:
                make_plan(Settings().changed(**candidate, keep=keep), self.geometry)
        except UserError:
            return False
        return True

    def factor(
        self, sweep: int, factor: str, alternatives: list[dict[str, Any]], current: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Row]]:
        """The best alternative in place, and the rows of all that go with the rest."""
        alternatives = [alternative for alternative in alternatives if self.exists({**current, **alternative})]
        candidates = [{**current, **alternative} for alternative in alternatives]
        *found, before = self.measured([*candidates, current])
        means = [hits.mean() for hits in found]
        best = next(i for i, mean in enumerate(means) if mean >= max(means) - TIE)
        rows = [
            row
            for i, (alternative, hits) in enumerate(zip(alternatives, found, strict=True))
            for row in self.rows((sweep, factor, label(alternative), i == best), candidates[i], hits, before)
        ]
        return candidates[best], rows

    def rows(self, key: tuple, candidate: Mapping[str, Any], hits: np.ndarray, before: np.ndarray) -> Iterator[Row]:
        """The row of the mean over keeps, and one row per keep."""
        said = json.dumps(candidate, sort_keys=True)
        for keep, mine, theirs in ((0, hits.mean(0), before.mean(0)), *zip(self.args.keep, hits, before, strict=True)):
            figures = [*self.bootstrap(mine, self.everything), *self.bootstrap(mine - theirs, self.everything)]
            yield Row(*key, keep, hits.shape[1], *(round(f, 6) for f in figures), settings=said)


def label(alternative: Mapping[str, Any]) -> str:
    """How a table names an alternative."""
    return ", ".join(f"{key}={value}" for key, value in alternative.items())


def main(argv: list[str] | None = None) -> None:
    """Search, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    parser.add_argument("--keep", nargs="+", type=int, default=list(KEEPS))
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--processes", type=int, default=2, help="settings measured at a time, one thread each")
    parser.add_argument("--work", type=Path, default=WORK, help="where finished runs are kept (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="%(default)s")
    args = parser.parse_args(argv)
    try:
        check_out(args.out, RESULTS, (args.model, args.limit, args.keep) == ("tiny", None, list(KEEPS)))
    except UserError as error:
        parser.error(str(error))
    search, about = Search(args), provenance(args.model, "validation")
    current, found = dict(START), []
    for sweep, factors in enumerate((FACTORS, AGAIN), 1):
        for factor in factors:
            current, rows = search.factor(sweep, factor, FACTORS[factor], current)
            found += rows
            print(f"sweep {sweep}, {factor}: {json.dumps(current)}")
    write_csv(args.out, found, about)


if __name__ == "__main__":
    main()
