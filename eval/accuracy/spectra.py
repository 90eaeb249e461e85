"""Does the spectral distance foretell the loss of accuracy? ``python -m pitome_mllm_eval.accuracy.spectra``.

The mean spectral distance over benchmark pictures of every setting that `curves` measured, beside what that setting
loses, and their rank correlation. The points go to one CSV; `pitome_mllm_eval.report` makes plot and sentence from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from pitome_mllm.methods import UserError

from ..benchmark.sets import SCENES, scene
from ..documents import panels, read, save, style, write_csv
from .correlation import Correlation, correlation
from .curves import COMMAND as CURVES
from .curves import RESULTS, Setting, called, results
from .runs import PLAIN, load, provenance

LEAST_POINTS = 40
BATCH = 10  # pictures whose graphs are in memory at once
MARKERS = "osD^vP*X<>"
OUT = RESULTS.with_name("spectra.csv")
COMMAND = "python -m pitome_mllm_eval.accuracy.spectra"


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
    published: bool
    distance: float
    loss: float
    loss_low: float
    loss_high: float

    @property
    def name(self) -> str:
        return called(self.method, self.published)


def losses(found: list[dict[str, str]]) -> dict[Setting, Loss]:
    """What every setting in a CSV of `curves` loses over all questions."""
    chosen = [row for row in found if row["group"] == "all" and row["against"] == PLAIN]
    return {Setting.of(row): Loss(*(-float(row[name]) for name in ("value", "high", "low"))) for row in chosen}


def distances(
    model: Any, pixels: torch.Tensor, wanted: Iterable[Setting], advance: Any = lambda: None
) -> dict[Setting, float]:
    """Mean spectral distance over pictures (I, 3, H, W), of every setting whose method forms groups."""
    from pitome_mllm import attach
    from pitome_mllm.families.features import tower_features
    from pitome_mllm.spectral import TokenGraph

    wanted = list(wanted)
    sums = dict.fromkeys(wanted, 0.0)
    for batch in pixels.split(BATCH):
        graph = TokenGraph(tower_features(model, batch).float())
        for setting in wanted:
            with attach(model, **asdict(setting)) as handle:
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
    ValueError : fewer than 40, or all of one method.
    """
    both = [setting for setting in distance if setting in lost]
    if len(both) < LEAST_POINTS:
        raise UserError(
            f"a rank correlation of {len(both)} settings says little; at least {LEAST_POINTS} are needed: measure more "
            f"methods or keeps with {CURVES}"
        )
    if len({(setting.method, setting.published) for setting in both}) < 2:
        raise UserError(
            "all settings are of one method; measure others too with python -m pitome_mllm_eval.accuracy.curves"
        )
    return [Point(**asdict(s), distance=distance[s], **asdict(lost[s])) for s in both]


def correlations(found: Sequence[Point]) -> tuple[Correlation, Correlation]:
    """Of distance and loss: over all settings, and between methods at the same number of tokens; clusters are methods.

    The first is high already where both only grow as tokens get fewer; the second leaves that out. The sampling error
    of the pictures is in neither interval.
    """
    distance, loss, keep = (np.array([getattr(p, name) for p in found], float) for name in ("distance", "loss", "keep"))
    methods = [p.name for p in found]
    return correlation(distance, loss, methods), correlation(distance, loss, methods, strata=keep)


def plot(found: Sequence[Point], about: dict[str, Any], path: Path) -> None:
    """Loss over spectral distance: a colour and marker for each method, one panel for each place."""
    from matplotlib.ticker import LogLocator, NullFormatter

    methods = list(dict.fromkeys(p.name for p in found))
    places = list(dict.fromkeys(p.where for p in found))
    figure, axes = panels(places, "loss against the plain model, points", xscale="log", xlabel="spectral distance")
    lines = {}
    for axis, where in zip(axes, places, strict=True):
        for number, method in enumerate(methods):
            own = [p for p in found if (p.name, p.where) == (method, where)]
            looks = {**style(number), "marker": MARKERS[number % len(MARKERS)], "linewidth": 0.6}
            if own:
                (lines[method],) = axis.plot([p.distance for p in own], [100 * p.loss for p in own], **looks)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    whole, within = correlations(found)
    title = f"Spearman correlation over {len(found)} settings: {whole}; of methods at the same keep: {within}"
    pictures = f"{about['pictures']} {about['split']} pictures"
    figure.suptitle(f"{title}\n95 % bootstrap intervals over methods; distances over {pictures}", fontsize=10)
    save(figure, path, lines)


def check_same_model(rows: list[dict[str, str]], about: dict[str, str]) -> None:
    """ValueError where the accuracies are those of other weights."""
    measured = {row["weights"] for row in rows}
    if measured != {about["weights"]}:
        raise UserError(
            f"the accuracies are of weights {', '.join(sorted(measured))}, this model has {about['weights']}; "
            "measure them again with python -m pitome_mllm_eval.accuracy.curves"
        )


def measured(args: argparse.Namespace) -> tuple[list[Point], dict[str, Any]]:
    """The points as measured now, and where they come from."""
    from pitome_mllm.families.features import pixel_values

    if not 1 <= args.pictures <= SCENES:
        raise UserError(f"--pictures {args.pictures} is not possible; choose 1 to {SCENES}")
    rows = results(args.results)
    lost, split = losses(rows), rows[0]["split"]
    points(dict.fromkeys(lost, 0.0), lost)  # too few: better said before hours than after
    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    about = provenance(args.model, split) | {"pictures": args.pictures}
    check_same_model(rows, about)
    pixels = pixel_values(processor, [scene(number, split)[0] for number in range(args.pictures)])
    with Progress(transient=True) as bar:
        task = bar.add_task("Computing spectra", total=len(lost) * -(-args.pictures // BATCH))
        return points(distances(model, pixels, lost, lambda: bar.advance(task)), lost), about


def stored(path: Path) -> tuple[list[Point], dict[str, Any]]:
    """The points of a CSV of this command, and where they come from."""
    rows = read(path, COMMAND, ("distance", "loss"))
    figures = ("distance", "loss", "loss_low", "loss_high")
    return [Point(**asdict(Setting.of(row)), **{name: float(row[name]) for name in figures}) for row in rows], rows[0]


def sentence(found: Sequence[Point], about: dict[str, Any]) -> str:
    """Both `correlations`, of what, and what their intervals leave out."""
    methods, (whole, within) = len({p.name for p in found}), correlations(found)
    return (
        f"Over {len(found)} settings of {methods} methods Spearman's correlation between spectral distance and loss of "
        f"accuracy is {whole}; between methods at the same number of tokens it is {within}. In brackets 95 % bootstrap "
        "intervals over methods; the sampling error of the pictures is in neither. Embedded model (weights "
        f"{about['weights']}); distances are means over {about['pictures']} {about['split']} pictures."
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, write the CSV, and say what comes out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="CSV of pitome_mllm_eval.accuracy.curves (%(default)s)"
    )
    parser.add_argument("--pictures", type=int, default=20, help="scenes to average over (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT, help="CSV of the points (%(default)s)")
    args = parser.parse_args(argv)
    try:
        found, about = measured(args)
    except UserError as error:
        parser.error(str(error))
    write_csv(args.out, found, about)
    print(sentence(found, about))


if __name__ == "__main__":
    main()
