"""The search for the best PiToMe, on validation questions: ``python -m pitome_mllm_eval.accuracy.search --jobs 16``.

It starts from the library's default. In each round every alternative in `FACTORS` is measured in place of what is
there, and the best one stays if it gains beyond chance more than `PRICE` for what it costs; a round that takes nothing
is the last. The test set plays no part. The CSV shows accuracy beside counted FLOPs and launches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pitome_mllm import attach
from pitome_mllm.families.features import tower_features
from pitome_mllm.families.geometry import geometry
from pitome_mllm.methods import UserError
from pitome_mllm.plan import Plan, make_plan
from pitome_mllm.settings import Settings

from ..benchmark.sets import questions
from ..documents import read, write_csv
from ..provenance import RESULTS as FOLDER
from ..provenance import check_out
from .figures import bootstrap_of
from .runs import QuestionSet, load, measure, provenance
from .tables import teraflops

KEEPS = (144, 72, 36, 16)
COMMAND = "python -m pitome_mllm_eval.accuracy.search"
RESULTS = FOLDER / "search.csv"
PRICE = 0.05  # what twice the FLOPs or launches have to gain, as a share of the questions
ROUNDS = 4
SAID = ", ".join(map(str, KEEPS))

# What is tried in place of the library's defaults, factor by factor; None of an option is the paper's.
FACTORS: dict[str, list[dict[str, Any]]] = {
    "what the LLM is told": [{"calibration": told} for told in ("distance", "size", "none")],
    "where": [{"where": "tower"}, {"where": "projector"}],
    "tokens out of the tower": [{"tower_keep": count} for count in (160, 192, 240, 288)],
    "merge points": [{"merges": points} for points in (3, 4, 5, 6, "every")],
    "first and last merge point": [{"schedule": shape} for shape in ("delayed", "early", "equal")],
    "metric": [{"metric": "keys"}, {"metric": "hidden"}],
    "mean": [{"weighted": True}, {"weighted": False}],
    "place in a block": [{"place": "end"}, {"place": "mid"}],
    "protected share": [{"protect": share} for share in (1.0, 0.75, 0.5, 0.25)],
    "margin": [{"margin": margin} for margin in (None, 0.8, 0.6, 0.3)],
    "alpha": [{"alpha": alpha} for alpha in (1.0, 0.5, 0.0)],
}


@dataclass(frozen=True)
class Row:
    """One alternative: accuracy as the mean over keeps and at each, gain over what was there, and what it costs.

    ``low`` and ``high`` hold the gain of all alternatives of a round together with 95 % confidence; TFLOPs are of the
    tower and projector of a published model, launches of operators in the embedded one, both means over keeps.
    """

    round: int
    factor: str
    alternative: str
    taken: bool
    front: bool
    keeps: str
    value: float
    each: str
    gain: float
    low: float
    high: float
    teraflops: float
    launches: float
    questions: int
    settings: str


def results() -> list[dict[str, str]]:
    """The rows of the CSV of this command; ValueError as `read`."""
    return read(RESULTS, COMMAND, ("round", "alternative"))


class Launches(TorchDispatchMode):
    """Counts operators that run a kernel: all that do not only look at memory in another way."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator, and run it."""
        views = [out.alias_info for out in func._schema.returns if out.alias_info and not out.alias_info.is_write]
        self.count += not views
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def launches(settings: Mapping[str, Any]) -> int:
    """Operators in the embedded model's tower, and before its projector, for one picture."""
    model = load("tiny")[0]
    side = model.config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with attach(model, **settings), Launches() as counted:
        tower_features(model, pixels)
    return counted.count


def alternatives(current: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What differs from ``current`` in one factor and can be had at every keep, by factor and name; itself first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    plans, looks = list[Plan](), geometry(load("tiny")[0].config)
    for factor, choices in {"": [{}], **FACTORS}.items():
        for choice in choices:
            asked, settings = Settings().changed(**current).changed(**choice), {**current, **choice}
            settings = {k: v for k, v in settings.items() if k in asked.options or getattr(asked, k) is not None}
            try:
                plan = [make_plan(Settings().changed(**settings, keep=keep), looks) for keep in KEEPS][0]
            except UserError:
                continue
            if plan not in plans:
                found[factor, label(choice) or "as it is"] = settings
                plans.append(plan)
    return found


def label(alternative: Mapping[str, Any]) -> str:
    """How a table names an alternative."""
    return ", ".join(f"{key}={value}" for key, value in alternative.items())


def one_round(number: int, current: dict[str, Any], args: argparse.Namespace) -> list[Row]:
    """The rows of all alternatives to ``current``, which is the first; at most one of them is taken."""
    wanted, asked = alternatives(current), questions("validation")[: args.questions]
    runs = [{**settings, "keep": keep} for settings in wanted.values() for keep in KEEPS]
    right = np.zeros((len(runs), len(asked)))
    for place, found in measure(QuestionSet("tiny", "validation", args.questions), runs, args.jobs):
        right[place] = found.right
    right = right.reshape(len(wanted), len(KEEPS), -1)
    bootstrap, everything, level = bootstrap_of(asked), np.ones(len(asked), bool), 1 - 0.05 / max(1, len(wanted) - 1)
    rows = []
    for (names, settings), hits in zip(wanted.items(), right, strict=True):
        figures = hits.mean(), *bootstrap((hits - right[0]).mean(0), everything, level=level)
        value, gain, low, high = (round(float(figure), 6) for figure in figures)
        costs = [(float(teraflops(**settings, keep=keep)), launches({**settings, "keep": keep})) for keep in KEEPS]
        each = " ".join(f"{100 * share:.1f}" for share in hits.mean(1))
        spent = (round(float(cost), 3) for cost in np.mean(costs, 0))
        said = json.dumps(settings, sort_keys=True)
        rows.append(Row(number, *names, False, False, SAID, value, each, gain, low, high, *spent, len(asked), said))
    good = [row for row in rows[1:] if row.low > price(row, rows[0])]
    best = max(good, key=lambda row: row.gain - price(row, rows[0]), default=rows[0])
    return [replace(row, taken=row is best, front=not any(better(other, row) for other in rows)) for row in rows]


def price(row: Row, before: Row) -> float:
    """What an alternative has to gain for what it costs more."""
    return PRICE * max(row.teraflops / before.teraflops - 1, row.launches / before.launches - 1, 0)


def better(one: Row, other: Row) -> bool:
    """Whether one is nowhere worse than the other, and somewhere better."""
    a, b = ((row.value, -row.teraflops, -row.launches) for row in (one, other))
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def main(argv: list[str] | None = None) -> None:
    """Search, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1680, help="only the first so many (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="%(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        check_out(args.out, RESULTS, args.questions == 1680)
    except UserError as error:
        parser.error(str(error))
    current, found = dict[str, Any](), list[Row]()
    for number in range(1, ROUNDS + 1):
        rows = one_round(number, current, args)
        found += rows
        write_csv(args.out, found, provenance("tiny", "validation"))
        taken = next(row for row in rows if row.taken)
        print(f"round {number}: {taken.alternative}, {100 * taken.value:.1f} % right ({taken.each})", flush=True)
        if taken is rows[0]:
            break
        current = json.loads(taken.settings)


if __name__ == "__main__":
    main()
