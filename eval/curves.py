"""Accuracy over the number of visual tokens: ``python -m pitome_mllm_eval.curves``.

Every method at every place and every keep answers the benchmark. What is measured is kept in ``--work``, so a killed
run goes on where it stopped. The results go to one CSV; `report` draws the plot and the README's table from it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import date
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .benchmark import PER_SCENE, SCENES, blind_answer, questions
from .glyphs import SPLITS
from .questions import CATEGORIES, Question
from .scenes import GRID, TIERS
from .score import score

KEEPS = (288, 144, 72, 36, 16)
PLACES = ("tower", "projector", "both")
PLAIN, BLIND = "plain", "blind"
DRAWS = 2000
RESULTS = Path(__file__).parent / "results" / "curves.csv"


@dataclass(frozen=True)
class Setting:
    """One run: a method at a place, keeping so many tokens."""

    method: str
    where: str
    keep: int

    @property
    def file(self) -> str:
        """Name of the file that holds the run's hits."""
        return f"{self.method}-{self.where}-{self.keep}.npy"


@dataclass(frozen=True)
class Row:
    """One figure: an accuracy, or (``against`` another run) the difference of two, with its 95 % interval."""

    method: str
    where: str
    keep: int
    group: str
    against: str
    questions: int
    value: float
    low: float
    high: float


def settings(methods: Iterable[str], places: Iterable[str], keeps: Iterable[int], geometry: Any) -> Iterator[Setting]:
    """Every combination that exists; a method that makes no sense at a place is left out."""
    from pitome_mllm.plan import Settings, make_plan

    for method, where, keep in product(methods, places, keeps):
        try:
            make_plan(Settings().changed(method=method, where=where, keep=keep), geometry)
        except ValueError:
            continue
        yield Setting(method, where, keep)


def hits(model: Any, processor: Any, split: str, limit: int | None, advance: Any) -> np.ndarray:
    """Whether each question of the split is answered right, in the benchmark's order."""
    right = []
    for record in score(model, processor, split, limit):
        right.append(record.right)
        advance()
    return np.array(right)


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
    """Accuracies, differences to the plain model, and differences between methods at the same place and keep."""
    bootstrap, masks = Bootstrap(np.array([scene for scene, _ in asked])), groups(asked)
    references = {Setting(PLAIN, "none", GRID * GRID): plain, Setting(BLIND, "none", 0): blind}
    for setting, right in {**references, **runs}.items():
        compared = {"": right.astype(float)}
        if setting in runs:
            compared[PLAIN] = right.astype(float) - plain
        for (name, mask), (against, values) in product(masks.items(), compared.items()):
            figures = _named(bootstrap(values, mask))
            yield Row(**asdict(setting), group=name, against=against, questions=int(mask.sum()), **figures)
    for one, other in combinations(runs, 2):
        if (one.where, one.keep) == (other.where, other.keep):
            difference = runs[one].astype(float) - runs[other]
            for name, mask in masks.items():
                figures = _named(bootstrap(difference, mask))
                yield Row(**asdict(one), group=name, against=other.method, questions=int(mask.sum()), **figures)


def _named(figures: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), (round(f, 4) for f in figures), strict=True))


def provenance(model_name: str, split: str, model: Any) -> dict[str, str]:
    """What every row says about where it comes from."""
    import transformers

    import pitome_mllm

    sha = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(weight.float().numpy().tobytes())
    return {
        "model": model_name,
        "weights": sha.hexdigest()[:12],
        "split": split,
        "date": date.today().isoformat(),
        "device": str(model.device),
        "pitome_mllm": pitome_mllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(args: argparse.Namespace, model: Any, processor: Any, wanted: list[Setting]) -> dict[Setting | None, Any]:
    """The hits of the plain model (key None) and of every setting, from ``--work`` where they are there already."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from pitome_mllm import attach

    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    total = min(args.limit or sys.maxsize, SCENES * PER_SCENE)
    found: dict[Setting | None, Any] = {}
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total * (len(wanted) + 1))
        for setting in (None, *wanted):
            file = args.work / (setting.file if setting else f"{PLAIN}.npy")
            progress.update(task, description=file.stem)
            if file.exists():
                found[setting] = np.load(file)
                progress.advance(task, total)
                continue
            handle = setting and attach(model, setting.method, keep=setting.keep, where=setting.where)
            found[setting] = hits(model, processor, args.split, args.limit, lambda: progress.advance(task))
            if handle:
                handle.remove()
            part = file.with_suffix(".part.npy")
            np.save(part, found[setting])
            part.rename(file)
    return found


def write(path: Path, made: Iterable[Row], about: dict[str, str]) -> None:
    """Write the CSV; a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *about])
        writer.writeheader()
        writer.writerows(asdict(row) | about for row in made)
    part.rename(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from pitome_mllm import METHODS

    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    made.add_argument("--split", default="test", choices=SPLITS[1:])
    made.add_argument(
        "--methods", nargs="+", default=[m for m in METHODS if m != "pitome-tuned"], choices=list(METHODS)
    )
    made.add_argument("--where", nargs="+", default=list(PLACES), choices=PLACES)
    made.add_argument("--keep", nargs="+", type=int, default=list(KEEPS))
    made.add_argument("--limit", type=int, help="only the first so many questions")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--work", type=Path, help="folder for finished runs (default: runs/curves-MODEL-SPLIT-LIMIT)")
    made.add_argument("--out", type=Path, default=RESULTS)
    return made


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the CSV."""
    import pitome_mllm
    from pitome_mllm.specs import geometry

    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    model, processor = pitome_mllm.load(args.model, dtype="float32")
    about = provenance(args.model, args.split, model)
    args.work = args.work or Path("runs") / f"curves-{about['weights']}-{args.split}-{args.limit or 'all'}"
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = list(settings(args.methods, args.where, args.keep, geometry(model.config)))
    found = measure(args, model, processor, wanted)
    plain = found.pop(None)
    asked = questions(args.split)[: len(plain)]
    blind = np.array([blind_answer(question) == question.answer for _, question in asked])
    write(args.out, rows(found, plain, blind, asked), about)


if __name__ == "__main__":
    main()
