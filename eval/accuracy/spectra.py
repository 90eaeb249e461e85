"""Does the spectral distance foretell the loss of accuracy? ``python -m pitome_mllm_eval.accuracy.spectra``.

The mean spectral distance over benchmark pictures of every setting that `curves` measured, beside what that setting
loses, and their rank correlation. The points go to one CSV; `pitome_mllm_eval.report` makes plot and sentence of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from pitome_mllm.methods import UserError

from ..benchmark.bootstrap import DRAWS, drawn, span
from ..benchmark.sets import SCENES, scene
from ..documents import panels, read, save, style, write_csv
from .curves import COMMAND as CURVES
from .curves import FOLDER, SUMMARY, Setting, called, summary
from .figures import BLIND
from .runs import PLAIN, load, provenance
from .tables import TABLES

BATCH = 10  # pictures whose graphs are in memory at once
MARKERS = "osD^vP*X<>"
OUT = FOLDER / "spectra.csv"
COMMAND = "python -m pitome_mllm_eval.accuracy.spectra"


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    above, equal = values[:, None] > values, values[:, None] == values
    return above.sum(1) + (equal.sum(1) - 1) / 2


def spearman(x: np.ndarray, y: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Rank correlation of ``x`` and ``y`` (n,), NaN where one never varies; of ranks within each of ``strata`` (n,)."""
    strata = np.zeros(len(x)) if strata is None else strata
    parts = [[ranks(values[strata == s]) for s in np.unique(strata)] for values in (x, y)]
    a, b = (np.concatenate([own - own.mean() for own in part]) for part in parts)
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def correlation(
    x: np.ndarray, y: np.ndarray, cluster: Sequence[str], strata: np.ndarray | None = None, draws: int = DRAWS
) -> tuple[float, float, float]:
    """`spearman` of points (n,) and its 95 % interval, by drawing clusters (n,), as points of one depend."""
    names, strata = np.asarray(cluster), np.zeros(len(x)) if strata is None else strata
    members = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    if len(members) < 2:
        raise UserError(
            f"an interval over methods needs at least 2 of them, got {len(members)}; measure more: {CURVES}"
        )
    points = (np.concatenate([members[c] for c in row]) for row in drawn(len(members), draws=draws))
    return spearman(x, y, strata), *span([spearman(x[i], y[i], strata[i]) for i in points])


@dataclass(frozen=True)
class Point:
    """One setting: mean spectral distance over pictures, and loss against the plain model."""

    method: str
    published: bool
    keep: int
    distance: float
    loss: float

    @property
    def name(self) -> str:
        """What tables call the method."""
        return called(self.method, self.published)


def losses(found: list[dict[str, str]]) -> dict[Setting, float]:
    """What every setting in a summary of `curves` loses."""
    return {Setting.of(row): -float(row["change"]) for row in found if row["method"] not in (PLAIN, BLIND)}


def distances(model: Any, pixels: torch.Tensor, wanted: Iterable[Setting]) -> dict[Setting, float]:
    """Mean spectral distance over pictures (I, 3, H, W), of every setting whose method forms groups."""
    from pitome_mllm import attach
    from pitome_mllm.families.features import tower_features
    from pitome_mllm.spectral import TokenGraph

    batches = pixels.split(BATCH)
    graphs = [TokenGraph(tower_features(model, batch).float()) for batch in batches]
    found: dict[Setting, float] = {}
    for setting in wanted:
        with attach(model, **asdict(setting)) as handle:
            for graph, batch in zip(graphs, batches, strict=True):
                tower_features(model, batch)
                if handle.stats.groups is not None:
                    found[setting] = found.get(setting, 0.0) + float(graph.distance(handle.stats.merges).sum())
    return {setting: round(total / len(pixels), 6) for setting, total in found.items()}


def correlations(found: Sequence[Point]) -> list[tuple[float, float, float]]:
    """Of distance and loss: over all settings, and between methods at the same number of tokens.

    Clusters are methods; the sampling error of the pictures is in neither interval.
    """
    distance, loss, keep = (np.array([getattr(p, name) for p in found], float) for name in ("distance", "loss", "keep"))
    methods = [p.name for p in found]
    return [correlation(distance, loss, methods, strata) for strata in (None, keep)]


def plot(found: Sequence[Point], about: dict[str, Any], path: Path) -> None:
    """Loss over spectral distance: a colour and marker for each method, one panel for each table."""
    from matplotlib.ticker import LogLocator, NullFormatter

    methods, lines = list(dict.fromkeys(p.method for p in found)), {}
    figure, axes = panels(
        list(TABLES.values()), "loss against the plain model, points", xscale="log", xlabel="spectral distance"
    )
    for axis, published in zip(axes, TABLES, strict=True):
        for number, method in enumerate(methods):
            own = [p for p in found if (p.method, p.published) == (method, published)]
            looks = {**style(number), "marker": MARKERS[number % len(MARKERS)], "linewidth": 0.6}
            (lines[method],) = axis.plot([p.distance for p in own], [100 * p.loss for p in own], **looks)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    figure.suptitle(f"distances over {about['pictures']} {about['split']} pictures", fontsize=10)
    save(figure, path, lines)


def measured(pictures: int, results: Path) -> tuple[list[Point], dict[str, Any]]:
    """The points as measured now, and where they come from."""
    from pitome_mllm.families.features import pixel_values

    if not 1 <= pictures <= SCENES:
        raise UserError(f"--pictures {pictures} is not possible; choose 1 to {SCENES}")
    rows = summary(results)
    lost, split = losses(rows), rows[0]["split"]
    model, processor = load("tiny")
    about = provenance("tiny", split) | {"pictures": pictures}
    if (weights := {row["weights"] for row in rows}) != {about["weights"]}:
        raise UserError(
            f"the accuracies are of weights {', '.join(weights)}, this model of {about['weights']}: {CURVES}"
        )
    pixels = pixel_values(processor, [scene(number, split)[0] for number in range(pictures)])
    distance = distances(model, pixels, track(lost, "Computing spectra", transient=True))
    return [Point(**asdict(s), distance=far, loss=lost[s]) for s, far in distance.items()], about


def stored(path: Path = OUT) -> tuple[list[Point], dict[str, Any]]:
    """The points of a CSV of this command, and where they come from."""
    rows = read(path, COMMAND, ("published", "distance", "loss"))
    return [Point(**asdict(Setting.of(r)), distance=float(r["distance"]), loss=float(r["loss"])) for r in rows], rows[0]


def sentence(found: Sequence[Point], about: dict[str, Any]) -> str:
    """Both `correlations`, of what, and what their intervals leave out."""
    methods = len({p.name for p in found})
    whole, within = ("{:.2f} ({:.2f} to {:.2f})".format(*each) for each in correlations(found))
    return (
        f"Over {len(found)} settings of {methods} methods, as published and under the library's defaults, Spearman's "
        f"correlation between spectral distance and loss of accuracy is {whole}; between methods at the same number of "
        f"tokens it is {within}. In brackets 95 % bootstrap intervals over methods; the sampling error of the pictures "
        f"is in neither. Embedded model (weights {about['weights']}); distances are means over {about['pictures']} "
        f"{about['split']} pictures."
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, write the CSV, and say what comes out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER / SUMMARY, help="summary of curves (%(default)s)")
    parser.add_argument("--pictures", type=int, default=20, help="scenes to average over (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV of the points (%(default)s)")
    args = parser.parse_args(argv)
    try:
        found, about = measured(args.pictures, args.results)
        print(sentence(found, about))
    except UserError as error:
        parser.error(str(error))
    write_csv(args.out, found, about)


if __name__ == "__main__":
    main()
