"""Charts as SVG that takes its colours from the page: tokens per block, and the embedded benchmark's accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from itertools import pairwise
from math import log2
from typing import Any

from pitome_mllm._companion import companion

from .look import Look

WIDTH = 420  # of every chart, in units of its own; text of 15 units stays readable on a phone
LINE = 25
ALL = 576  # visual tokens of the plain embedded model


@dataclass(frozen=True)
class Curve:
    """Accuracy (from 0 to 1) of one method in one place, by visual tokens kept.

    Attributes
    ----------
    points, lows, highs : by keep: the share of right answers, and its 95 % interval.
    plain, blind : of the plain model, and without looking at the picture.
    about : what was asked, and when.
    """

    method: str
    where: str
    points: dict[int, float]
    lows: dict[int, float]
    highs: dict[int, float]
    plain: float
    blind: float
    about: str

    def at(self, keep: int) -> str:
        """What was measured at ``keep``, or on both sides of it, in words."""
        known = {**self.points, ALL: self.plain}
        if keep in known:
            return f"keep {keep}: {known[keep]:.1%}"
        below = max((k for k in known if k < keep), default=None)
        above = min((k for k in known if k > keep), default=None)
        if above is None:
            return f"keep {keep}: the embedded model has only {ALL} visual tokens"
        if below is None:
            return f"keep {keep}: not measured; keep {above}: {known[above]:.1%}"
        between = f"between {known[below]:.1%} (keep {below}) and {known[above]:.1%} (keep {above})"
        return f"keep {keep}: {between}"


def curve(method: str, where: str) -> Curve | None:
    """What the benchmark's record says about a method in a place; None = not measured."""
    record = _record()
    plain, blind = record.plain, record.blind
    found = {keep: row for (m, w, keep), row in record.cells.items() if (m, w) == (method, where)}
    if not found:
        return None
    values = {name: {keep: float(row[name]) for keep, row in found.items()} for name in ("value", "low", "high")}
    about = f"{int(plain['questions']):,} held-out questions, {plain['date']}"
    of_all = (float(plain["value"]), float(blind["value"]))
    return Curve(method, where, values["value"], values["low"], values["high"], *of_all, about)


@lru_cache(maxsize=1)
def _record() -> Any:
    tables, curves = (companion("eval", f"accuracy.{name}") for name in ("tables", "curves"))
    return tables.Results.of(curves.results(curves.RESULTS.with_name(curves.SUMMARY)))


def bars(look: Look) -> str:
    """Tokens before the first merge and after each one, as bars from top to bottom."""
    names = ["picture", *(short(step) for step in look.steps)]
    left, right = 8 + 8.3 * max(map(len, names)), 44
    parts = []
    for row, (name, count) in enumerate(zip(names, look.counts, strict=True)):
        middle = LINE * row + LINE / 2
        length = (WIDTH - left - right) * count / look.counts[0]
        parts.append(_text(left - 6, middle + 5, name, "end"))
        parts.append(
            f'<rect class="pm-bar" x="{left:.1f}" y="{middle - 9:.1f}" width="{length:.1f}" height="18" rx="2"/>'
        )
        parts.append(_text(left + length + 6, middle + 5, str(count)))
    return _svg(LINE * len(names) + 4, parts, f"Tokens of {look.name}: {', '.join(map(str, look.counts))}")


def short(step: str) -> str:
    """The name of a merge, as short as a chart needs it."""
    return step.replace("before the projector, step", "projector")


def accuracy(found: Curve, keep: int) -> str:
    """The curve over visual tokens, between plain and blind, with a mark at ``keep``."""
    top, bottom, left, right = 14, 220, 52, WIDTH - 18
    keeps = sorted({*found.points, ALL})

    def x(tokens: float) -> float:
        share = (log2(tokens) - log2(keeps[0])) / (log2(ALL) - log2(keeps[0]))
        return left + min(max(share, 0), 1) * (right - left)

    def y(value: float) -> float:
        return bottom - value * (bottom - top)

    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_line([(left, y(value)), (right, y(value))], "pm-grid"))
        parts.append(_text(left - 6, y(value) + 5, f"{value:.0%}", "end"))
    for tokens in keeps:
        parts.append(_text(x(tokens), bottom + 20, str(tokens), "middle"))
    parts.append(_text((left + right) / 2, bottom + 41, "visual tokens kept", "middle"))
    parts.append(_line([(left, y(found.plain)), (right, y(found.plain))], "pm-plain"))
    parts.append(_line([(left, y(found.blind)), (right, y(found.blind))], "pm-blind"))
    parts.append(_text(left + 4, y(found.blind) - 5, f"without looking {found.blind:.1%}"))
    line = [(x(tokens), y(value)) for tokens, value in sorted(found.points.items())]
    parts.append(_line([*line, (x(ALL), y(found.plain))], "pm-curve"))
    for tokens in found.points:
        ends = [(x(tokens), y(found.lows[tokens])), (x(tokens), y(found.highs[tokens]))]
        parts.append(_line(ends, "pm-interval"))
    parts += [f'<circle class="pm-dot" cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in line]
    parts.append(_line([(x(keep), top), (x(keep), bottom)], "pm-now"))
    parts.append(f'<circle class="pm-mark" cx="{x(keep):.1f}" cy="{y(_between(found, keep)):.1f}" r="7"/>')
    title = f"{found.method}, {found.where}, {found.at(keep)}"
    return _svg(bottom + 50, parts, f"Accuracy of {title}; the plain model {found.plain:.1%}")


def _between(found: Curve, keep: int) -> float:
    """Where the drawn line is at ``keep``."""
    known = sorted({**found.points, ALL: found.plain}.items())
    keep = min(max(keep, known[0][0]), ALL)
    (a, low), (b, high) = next(ends for ends in pairwise(known) if keep <= ends[1][0])
    return low + (high - low) * (log2(keep) - log2(a)) / (log2(b) - log2(a))


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pm-chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'
