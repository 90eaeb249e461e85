"""Does the spectral distance foretell the loss of accuracy? ``python -m pitome_mllm_eval.spectra``.

The mean spectral distance over benchmark pictures of every setting that `curves` measured, beside what that setting
loses, and their rank correlation. The points go to one CSV and one plot.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .benchmark import SCENES, scene
from .curves import DRAWS, RESULTS, Setting
from .report import COLOURS, read
from .runs import PLAIN, load, provenance, write_csv

LEAST_POINTS = 40
BATCH = 10  # pictures whose graphs are in memory at once
MARKERS = "osD^vP*X<>"
OUT, PLOT = RESULTS.with_name("spectra.csv"), Path("docs/spectra.png")


@dataclass(frozen=True)
class Loss:
    """What a setting loses against the plain model: share of right answers, with its 95 % interval."""

    loss: float
    loss_low: float
    loss_high: float


@dataclass(frozen=True)
class Point:
    """One setting: mean spectral distance over pictures, and loss of accuracy."""

    method: str
    where: str
    keep: int
    distance: float
    loss: float
    loss_low: float
    loss_high: float


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95 % bootstrap interval over points."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def losses(found: list[dict[str, str]]) -> dict[Setting, Loss]:
    """What every setting in a CSV of `curves` loses over all questions.

    Those that borrow another method's schedule and settings in the LLM are left out: they are no method of their own.
    """
    chosen = [row for row in found if row["group"] == "all" and row["against"] == PLAIN and not row.get("like")]
    return {
        Setting(row["method"], row["where"], int(row["keep"])): Loss(
            *(-float(row[k]) for k in ("value", "high", "low"))
        )
        for row in chosen
    }


def distances(
    model: Any, pixels: torch.Tensor, wanted: Iterable[Setting], advance: Any = lambda: None
) -> dict[Setting, float]:
    """Mean spectral distance over pictures (I, 3, H, W), of every setting whose method forms groups."""
    from pitome_mllm import attach
    from pitome_mllm.features import tower_features
    from pitome_mllm.spectral import TokenGraph

    wanted = list(wanted)
    sums = dict.fromkeys(wanted, 0.0)
    for batch in pixels.split(BATCH):
        graph = TokenGraph(tower_features(model, batch).float())
        for setting in wanted:
            with attach(model, **setting.keywords()) as handle:
                tower_features(model, batch)
                if handle.stats.groups is None:
                    sums.pop(setting, None)
                else:
                    sums[setting] += float(graph.distance(handle.stats.merges).sum())
            advance()
    return {setting: round(total / len(pixels), 6) for setting, total in sums.items()}


def points(distance: dict[Setting, float], lost: dict[Setting, Loss]) -> list[Point]:
    """The settings that both know.

    Raises
    ------
    ValueError : fewer than 40.
    """
    both = [setting for setting in distance if setting in lost]
    if len(both) < LEAST_POINTS:
        raise ValueError(
            f"a rank correlation of {len(both)} settings says little; at least {LEAST_POINTS} are needed: measure more "
            "methods or keeps with python -m pitome_mllm_eval.curves"
        )
    return [Point(s.method, s.where, s.keep, distance[s], **asdict(lost[s])) for s in both]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    above, equal = values[:, None] > values, values[:, None] == values
    return above.sum(1) + (equal.sum(1) - 1) / 2


def spearman(x: np.ndarray, y: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Rank correlation of ``x`` and ``y`` (n,); with ``strata`` (n,) of ranks within each of them, taken together.

    NaN where one of them never varies.
    """
    strata = np.zeros(len(x)) if strata is None else strata
    a, b = np.zeros(len(x)), np.zeros(len(x))
    for stratum in np.unique(strata):
        inside = strata == stratum
        for target, values in ((a, x), (b, y)):
            own = ranks(values[inside])
            target[inside] = own - own.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def correlation(found: Sequence[Point], within_keep: bool = False, draws: int = DRAWS, seed: int = 0) -> Correlation:
    """Spearman's correlation of distance and loss; with ``within_keep`` of methods at the same number of tokens.

    The first is high already where both only grow as tokens get fewer; the second leaves that out.
    """
    x, y, keep = (np.array([getattr(p, name) for p in found], float) for name in ("distance", "loss", "keep"))
    strata = keep if within_keep else np.zeros(len(found))
    rng = np.random.default_rng(seed)
    drawn = [spearman(x[i], y[i], strata[i]) for i in rng.integers(0, len(found), (draws, len(found)))]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Correlation(spearman(x, y, strata), float(low), float(high))


def plot(found: Sequence[Point], path: Path, title: str) -> None:
    """Loss over spectral distance: a colour and marker for each method, one panel for each place."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    methods = list(dict.fromkeys(p.method for p in found))
    places = list(dict.fromkeys(p.where for p in found))
    figure = Figure(figsize=(4.6 * len(places) + 1.6, 4.4), layout="constrained")
    lines = {}
    axes = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    for axis, where in zip(axes, places, strict=True):
        for number, method in enumerate(methods):
            own = [p for p in found if (p.method, p.where) == (method, where)]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            if own:
                (lines[method],) = axis.plot([p.distance for p in own], [100 * p.loss for p in own], lw=0.6, **style)
        axis.set(xscale="log", xlabel="spectral distance", title=where)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss against the plain model, points")
    figure.legend(lines.values(), lines, loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def check_same_model(rows: list[dict[str, str]], about: dict[str, str]) -> None:
    """ValueError where the accuracies are those of other weights."""
    measured = {row["weights"] for row in rows}
    if measured != {about["weights"]}:
        raise ValueError(
            f"the accuracies are of weights {', '.join(sorted(measured))}, this model has {about['weights']}; "
            "measure them again with python -m pitome_mllm_eval.curves"
        )


def run(args: argparse.Namespace) -> None:
    """Measure, write the CSV and the plot, and print the correlations."""
    from pitome_mllm.commands.options import progress
    from pitome_mllm.commands.spectrum import check_matplotlib
    from pitome_mllm.features import pixel_values

    if not 1 <= args.pictures <= SCENES:
        raise ValueError(f"--pictures {args.pictures} is not possible; choose 1 to {SCENES}")
    rows = read(args.results)
    lost, split = losses(rows), rows[0]["split"]
    points(dict.fromkeys(lost, 0.0), lost)  # too few: better said before hours than after
    check_matplotlib()
    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    about = provenance(args.model, split) | {"pictures": args.pictures}
    check_same_model(rows, about)
    pixels = pixel_values(processor, [scene(number, split)[0] for number in range(args.pictures)])
    with progress("Computing spectra", total=len(lost) * -(-args.pictures // BATCH)) as advance:
        found = points(distances(model, pixels, lost, advance), lost)
    whole, within = correlation(found), correlation(found, within_keep=True)
    said = f"Spearman correlation over {len(found)} settings: {whole}; of methods at the same keep: {within}"
    write_csv(args.out, found, about)
    plot(found, args.plot, f"{said}; {args.pictures} {split} pictures")
    print(f"{said}; in brackets 95 % bootstrap intervals over settings.")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV of pitome_mllm_eval.curves (%(default)s)")
    parser.add_argument("--pictures", type=int, default=20, help="scenes to average over (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
