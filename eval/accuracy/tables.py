"""Tables and plot of what `curves` measured over all questions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from pitome_mllm import METHODS
from pitome_mllm.settings import DEFAULT_METHOD

from .. import documents
from .curves import BLIND, called, own_place
from .runs import PLAIN

Row = dict[str, str]
Line = tuple[str, bool, str]  # method, whether as published, where
Spent = dict[Line, Row]
COST_SHAPE, COST_KEEP = "llava-1.5-7b", 144  # of which costs the tables speak
NOT_MEASURED = "not measured"
LOOKING = [name for name, method in METHODS.items() if "attention" in method.reducer.needs]
CAUTION = f"""\\*: {", ".join(LOOKING)} look at the attention of the class token. Nothing in the training of the
embedded model asks anything of that token, so these rows tell less about the methods than they would with CLIP.
cdpruner runs without the question, as LLaVA has no text encoder for it; of the tokens beyond the metric's width it
takes the first. random is one draw."""


@dataclass(frozen=True)
class Results:
    """The accuracies over all questions.

    Attributes
    ----------
    plain, blind : of the plain model, and without looking.
    cells : of every line and keep.
    change : what each of them differs by from the plain model.
    """

    plain: Row
    blind: Row
    cells: dict[tuple[Line, int], Row]
    change: dict[tuple[Line, int], Row]

    @classmethod
    def of(cls, found: list[Row]) -> Results:
        """Those in the rows of a CSV."""
        chosen = [row for row in found if row["group"] == "all"]
        plain, blind = (next(r for r in chosen if r["method"] == name and not r["against"]) for name in (PLAIN, BLIND))
        methods = [row for row in chosen if row["method"] not in (PLAIN, BLIND)]
        cells, change = (
            {(line_of(row), int(row["keep"])): row for row in methods if row["against"] == against}
            for against in ("", PLAIN)
        )
        return cls(plain, blind, cells, change)

    @property
    def keeps(self) -> list[int]:
        """All numbers of tokens, the largest first."""
        return sorted({keep for _, keep in self.cells}, reverse=True)

    @property
    def lines(self) -> list[Line]:
        """Every method at every place."""
        return list(dict.fromkeys(line for line, _ in self.cells))

    def shown(self, line: Line, keeps: Iterable[int]) -> list[str]:
        """Accuracies in per cent, each with the paired interval of its difference to the plain model."""
        keys = [(line, keep) for keep in keeps]
        return [_cell(self.cells[key], self.change[key]) if key in self.cells else NOT_MEASURED for key in keys]


def line_of(row: Row) -> Line:
    """The line of tables that a row of a CSV belongs to."""
    return row["method"], row["published"] == "True", row["where"]


def table(found: list[Row], spent: Spent, everywhere: bool = False) -> str:
    """A Markdown table: methods down, keeps across, accuracy in per cent with its paired interval.

    Every method stands at its own place, or ``everywhere`` it was measured; ``spent`` holds what its merges cost.
    """
    results = Results.of(found)
    heads = ["method", "where", "spectral", "ms", *(f"keep {keep}" for keep in results.keeps)]
    lines = [heads, [PLAIN, "-", "-", "-", *[f"{points(results.plain)[0]:.1f}"] * len(results.keeps)]]
    for method, published, where in results.lines:
        if everywhere or where == own_place(method, published):
            spectral = "yes" if METHODS[method].spectral else "no"
            cost = spent.get((method, published, where))
            milliseconds = f"{float(cost['ms']):.1f}" if cost else NOT_MEASURED
            name = called(method, published) + " \\*" * (method in LOOKING)
            figures = results.shown((method, published, where), results.keeps)
            lines.append([name, where, spectral, milliseconds, *figures])
    return "\n\n".join([documents.markdown(lines), CAUTION, _about(found, results, spent)])


def ablation(rows: list[Row]) -> str:
    """A Markdown table of the search: every alternative of every factor, and what it changes on average over keeps."""
    lines = [
        ["sweep", "factor", "alternative", "chosen", "right, %", "difference to the setting before", "95 % interval"]
    ]
    for row in (row for row in rows if row["keep"] == "0"):
        names = ("value", "difference", "difference_low", "difference_high")
        value, change, low, high = (100 * float(row[name]) for name in names)
        chosen = "yes" if row["chosen"] == "True" else ""
        figures = [f"{value:.1f}", f"{change:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        lines.append([row["sweep"], row["factor"], row["alternative"], chosen, *figures])
    keeps = ", ".join(dict.fromkeys(row["keep"] for row in rows if row["keep"] != "0"))
    first = rows[0]
    about = (
        f"{first['questions']} {first['split']} questions, mean over keep {keeps}, embedded model (weights "
        f"{first['weights']}), {first['device']}, torch {first['torch']}, transformers {first['transformers']}, "
        f"commit {first['commit']}, {first['date']}."
    )
    return f"{documents.markdown(lines)}\n\n{about}"


def spending(rows: list[Row]) -> Spent:
    """What merging costs by method and place, as far as the tables speak of it."""
    chosen = [row for row in rows if (row["shape"], row["keep"]) == (COST_SHAPE, str(COST_KEEP))]
    return {line_of(row): row for row in chosen}


def _about(found: list[Row], results: Results, spent: Spent) -> str:
    plain = results.plain
    value, low, high = points(plain)
    seconds = [float(row["seconds"]) for row in found if row["seconds"] and row["group"] == "all"]
    text = (
        f"{plain['questions']} {plain['split']} questions, embedded model (weights {plain['weights']}, commit "
        f"{plain['commit']}), {plain['device']}, torch {plain['torch']}, transformers {plain['transformers']}, "
        f"{plain['date']}{_elsewhere(results)}; per cent right, in brackets the paired 95 % bootstrap interval, over "
        f"pictures, of the difference to the plain model, which has {value:.1f} ({low:.1f} to {high:.1f}). Without "
        f"looking (the most common answer to the same text in training data): {points(results.blind)[0]:.1f}. "
        "Spectral: its paper proves that it keeps the spectrum. All runs took "
        f"{sum(seconds) / 3600:.1f} hours of CPU time, the longest {max(seconds):.0f} s."
    )
    if spent:
        row = next(iter(spent.values()))
        text += (
            f" ms: thread time of choosing and combining tokens for one picture at keep {COST_KEEP}, widths of "
            f"{COST_SHAPE}, float32, median of {row['repeats']} runs on one thread of {row['device']}, torch "
            f"{row['torch']}, commit {row['commit']}, {row['date']}; without what the logarithms of sizes cost "
            "attention."
        )
    return text


def _elsewhere(results: Results) -> str:
    """Which methods were measured at another commit, on another machine or another day than the plain model."""
    origins: dict[str, list[str]] = {}
    for ((method, published, _), _), row in results.cells.items():
        said = ", ".join(["commit " + row["commit"], row["device"], row["date"]])
        if any(row[name] != results.plain[name] for name in ("commit", "device", "date")):
            origins.setdefault(said, []).append(called(method, published))
    return "".join(f" ({', '.join(dict.fromkeys(who))}: {said})" for said, who in origins.items())


def points(row: Row) -> list[float]:
    """Value and interval in per cent, or points."""
    return [100 * float(row[name]) for name in ("value", "low", "high")]


def _cell(row: Row, change: Row) -> str:
    _, low, high = points(change)
    return f"{points(row)[0]:.1f} ({low:+.1f} to {high:+.1f})"


def plot(found: list[Row], path: Path) -> None:
    """Accuracy over visual tokens, one line per method, in a panel for each place."""
    results = Results.of(found)
    places = list(dict.fromkeys(where for _, _, where in results.lines))
    methods = list(dict.fromkeys((method, published) for method, published, _ in results.lines))
    figure, axes = documents.panels(places, "right answers, %", xlabel="visual tokens")
    lines = {}
    for axis, place in zip(axes, places, strict=True):
        lines["plain, 576 tokens"] = axis.axhline(points(results.plain)[0], color="black", linestyle=":")
        for number, method in enumerate(methods):
            cells = results.cells.items()
            measured = sorted(
                ((keep, row) for (line, keep), row in cells if line == (*method, place)), key=itemgetter(0)
            )
            if measured:
                width = 3 if method == (DEFAULT_METHOD, False) else 1.2
                lines[called(*method)] = _line(axis, measured, number, width)
        documents.ticks(axis, results.keeps)
    documents.save(figure, path, lines)


def _line(axis: Any, measured: list[tuple[int, Row]], number: int, width: float) -> Any:
    value, low, high = zip(*(points(row) for _, row in measured), strict=True)
    below = [v - bound for v, bound in zip(value, low, strict=True)]
    above = [bound - v for v, bound in zip(value, high, strict=True)]
    looks = {**documents.style(number), "linewidth": width, "marker": "o", "ms": 4, "capsize": 2}
    return axis.errorbar([keep for keep, _ in measured], value, (below, above), **looks)
