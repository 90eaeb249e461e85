"""Charts as SVG: tokens per block, and the embedded benchmark's accuracy."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pitome_mllm.methods import UserError
from pitome_mllm_eval.accuracy import curves, tables

from .controls import PLACES
from .look import Look

INK = "#010203"  # stands for the colour of the page's text
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
LETTERS = {"svg.fonttype": "none", "svg.hashsalt": "pitome", "font.family": "sans-serif", "font.size": 14}
STYLE = {**dict.fromkeys(COLOURED, INK), **LETTERS}  # letters stay letters
ALL = 576  # visual tokens of the plain embedded model


@dataclass(frozen=True)
class Curve:
    """Shares of right answers of one method in one place, by visual tokens kept."""

    name: str  # method and place
    points: dict[int, float]
    away: list[list[float]]  # from the ends of their 95 % intervals, low and high
    plain: float  # of the plain model
    blind: float  # without looking at the picture
    about: str  # what was asked, and when

    @property
    def known(self) -> dict[int, float]:
        """With the plain model's, from few tokens to many."""
        return dict(sorted({**self.points, ALL: self.plain}.items()))

    def at(self, keep: int) -> str:
        """What was measured at ``keep``, or on both sides of it, in words."""
        known = self.known
        if keep in known:
            return f"keep {keep}: {known[keep]:.1%}"
        below, above = [k for k in known if k < keep], [k for k in known if k > keep]
        if not above:
            return f"keep {keep}: the embedded model has only {ALL} visual tokens"
        if not below:
            return f"keep {keep}: not measured; keep {above[0]}: {known[above[0]]:.1%}"
        ends = [f"{known[k]:.1%} (keep {k})" for k in (below[-1], above[0])]
        return f"keep {keep}: between {' and '.join(ends)}"


def curve(method: str, where: str, published: bool = False) -> Curve | None:
    """What the benchmark's record says about a method in a place; None = not measured."""
    try:
        record = _record()
    except UserError:  # a checkout in which nothing is measured
        return None
    found = {keep: row for (line, keep), row in record.cells.items() if line == (method, published, where)}
    if not found:
        return None
    points, low, high = ({keep: float(row[c]) for keep, row in found.items()} for c in ("value", "low", "high"))
    away = [[abs(points[k] - bound[k]) for k in points] for bound in (low, high)]
    about = f"{int(record.plain['questions']):,} held-out questions, {max(row['date'] for row in found.values())}"
    name = f"{method}{', published' if published else ''}, {PLACES[where]}"
    return Curve(name, points, away, float(record.plain["value"]), float(record.blind["value"]), about)


@lru_cache(maxsize=1)
def _record() -> Any:
    return tables.Results.of(curves.summary())


@rc_context(STYLE)
def bars(look: Look) -> str:
    """Tokens before the first merge and after each one, as bars from top to bottom."""
    names = ["picture", *(step.replace("before the projector, step", "projector") for step in look.steps)]
    figure, axis = _axis(0.42 * len(names) + 0.4)
    drawn = axis.barh(range(len(names)), look.counts, color="#0072B2")
    axis.bar_label(drawn, padding=4)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.margins(x=0.12)
    return _svg(figure, f"Tokens of {look.name}: {', '.join(map(str, look.counts))}")


@rc_context(STYLE)
def accuracy(found: Curve, keep: int) -> str:
    """The curve over visual tokens, between plain and blind, with a mark at ``keep``."""
    known = found.known
    figure, axis = _axis(3.6)
    axis.axhline(found.plain, color=INK, linestyle="--", linewidth=1)
    axis.axhline(found.blind, color="grey", linestyle=":")
    axis.text(min(known), found.blind + 0.02, f"without looking {found.blind:.1%}")
    axis.plot(list(known), list(known.values()), color="#0072B2")
    axis.errorbar(list(found.points), list(found.points.values()), found.away, fmt="o", color="#0072B2", capsize=2)
    at = min(max(keep, min(known)), ALL)
    height = np.interp(np.log(at), np.log(list(known)), list(known.values()))
    axis.axvline(at, color="#D55E00", linewidth=1)
    axis.plot([at], [height], "o", color="#D55E00", markersize=9)
    axis.set(xscale="log", xlabel="visual tokens kept", ylim=(0, 1.02))
    axis.set_xticks(list(known), [str(tokens) for tokens in known])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _svg(figure, f"Accuracy of {found.name}, {found.at(keep)}; the plain model {found.plain:.1%}")


def _axis(height: float) -> tuple[Any, Any]:
    """A figure without frame or background, with one pair of axes."""
    figure = Figure(figsize=(5.2, height), layout="constrained")
    figure.patch.set_alpha(0)
    axis = figure.subplots()
    axis.patch.set_alpha(0)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _svg(figure: Any, title: str) -> str:
    """The figure as a part of a page, which tells its title to those who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue().replace(INK, "currentColor")
    head, rest = drawn[drawn.index("<svg") :].split(">", 1)
    return f'{head} class="pm-chart" role="img"><title>{escape(title)}</title>{rest}'
