"""The plot of the accuracies in the CSV of `curves`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pitome_mllm.settings import DEFAULT_METHOD

from ..documents import COLOURS
from .tables import Key, Results, Row, borrowers, points


def panels(found: list[Row]) -> dict[str, dict[Key, Row]]:
    """What the panels of the plot show, by title: a place each, and the methods with what the default one lends."""
    own = Results.of(found)
    places = dict.fromkeys(where for _, where in own.lines)
    shown = {f"{place}, own settings": {k: row for k, row in own.cells.items() if k[1] == place} for place in places}
    lent = {}
    for results, _, method, where in borrowers(found):
        lent |= {key: row for key, row in results.cells.items() if key[:2] == (method, where)}
    return shown | {f"settings of {DEFAULT_METHOD}": lent}


def plot(found: list[Row], path: Path) -> None:
    """Accuracy over visual tokens, one line per method, in `panels`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown, plain = panels(found), points(Results.of(found).plain)[0]
    numbers = {method: n for n, method in enumerate(dict.fromkeys(method for method, _ in Results.of(found).lines))}
    width = 4.6 * len(shown) + 2
    figure, axes = plt.subplots(1, len(shown), figsize=(width, 5.4), sharey=True, squeeze=False)
    lines = {}
    for axis, (title, cells) in zip(axes[0], shown.items(), strict=True):
        lines["plain, 576 tokens"] = axis.axhline(plain, color="black", linestyle=":")
        for method, number in numbers.items():
            measured = sorted((keep, row) for (m, _, keep), row in cells.items() if m == method)
            if measured:
                lines[method] = _line(axis, measured, number, method)
        keeps = sorted({keep for _, _, keep in cells})
        axis.set(xscale="log", xlabel="visual tokens", title=title)
        axis.set_xticks(keeps, [str(k) for k in keeps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right answers, %")
    figure.legend(lines.values(), lines, loc="center right", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 2 / width, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _line(axis: Any, measured: list[tuple[int, Row]], number: int, method: str) -> Any:
    """One method's line; the default method stands out, and line styles tell methods of one colour apart."""
    value, low, high = ([100 * float(row[name]) for _, row in measured] for name in ("value", "low", "high"))
    below = [v - bound for v, bound in zip(value, low, strict=True)]
    above = [bound - v for v, bound in zip(value, high, strict=True)]
    style = {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": ("-", "--", "-.")[number // len(COLOURS) % 3],
        "linewidth": 3 if method == DEFAULT_METHOD else 1.2,
    }
    return axis.errorbar([k for k, _ in measured], value, (below, above), marker="o", ms=4, capsize=2, **style)
