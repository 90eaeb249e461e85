"""Tables and plot of the accuracies in the CSV of `curves`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitome_mllm import METHODS
from pitome_mllm.plan import DEFAULT_METHOD

from .curves import BLIND
from .documents import COLOURS, read
from .runs import PLAIN

Row = dict[str, str]
Key = tuple[str, str, int]  # method, where, keep
Spent = dict[tuple[str, str], Row]  # by method and place
COST_SHAPE, COST_KEEP = "llava-1.5-7b", 144  # of which costs the tables speak
NOT_MEASURED = "not measured"
LOOKING = [name for name, method in METHODS.items() if "attention" in method.reducer.needs]
CAUTION = f"""\\*: {", ".join(LOOKING)} look at the attention of the class token. Nothing in the training of the
embedded model asks anything of that token, so these rows tell less about the methods than they would with CLIP.
cdpruner runs without the question, as LLaVA has no text encoder for it; of the tokens beyond the metric's width it
takes the first. random is one draw."""
LENT = f"""Place, schedule and what the LLM is told of positions and sizes are no part of a method. Here every method
has them from `{DEFAULT_METHOD}`. Lent "where": only these; metric, mean and place within the block stay its own. Lent
"all": these too, with proportional attention, so that only matching and each method's own way to combine differ. The
settings were searched for PiToMe, and for no other. Methods that reduce in one step keep their place and metric, and
dct, which has no groups, its compact positions."""
LEAD = f"""## `{DEFAULT_METHOD}` against the closest others

Differences in points, paired over the same questions, at each keep: the three that come closest, of all methods at all
places, with their own and with lent settings."""


@dataclass(frozen=True)
class Results:
    """The accuracies over all questions.

    Attributes
    ----------
    plain, blind : of the plain model, and without looking.
    cells : of every (method, where, keep).
    change : what each of them differs by from the plain model.
    """

    plain: Row
    blind: Row
    cells: dict[Key, Row]
    change: dict[Key, Row]

    @classmethod
    def of(cls, found: list[Row], like: str = "") -> Results:
        """Those where the default method lends the settings that ``like`` says, see `curves.Setting`."""
        chosen = [row for row in found if row["group"] == "all"]
        plain, blind = (next(r for r in chosen if r["method"] == name and not r["against"]) for name in (PLAIN, BLIND))
        methods = [row for row in chosen if row["method"] not in (PLAIN, BLIND) and row["like"] == like]
        cells, change = (
            {(row["method"], row["where"], int(row["keep"])): row for row in methods if row["against"] == against}
            for against in ("", PLAIN)
        )
        return cls(plain, blind, cells, change)

    @property
    def keeps(self) -> list[int]:
        """All numbers of tokens, the largest first."""
        return sorted({keep for _, _, keep in self.cells}, reverse=True)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Every (method, where)."""
        return list(dict.fromkeys((method, where) for method, where, _ in self.cells))

    def shown(self, method: str, where: str, keeps: Iterable[int]) -> list[str]:
        """Accuracies in per cent, each with the paired interval of its difference to the plain model."""
        keys = [(method, where, keep) for keep in keeps]
        return [_cell(self.cells[key], self.change[key]) if key in self.cells else NOT_MEASURED for key in keys]


def table(found: list[Row], spent: Spent, everywhere: bool = False) -> str:
    """A Markdown table: methods down, keeps across, accuracy in per cent with its paired interval.

    Every method stands at its own place, or ``everywhere`` it was measured; ``spent`` holds what its merges cost.
    """
    results = Results.of(found)
    heads = ["method", "where", "spectral", "ms", *(f"keep {keep}" for keep in results.keeps)]
    lines = [heads, [PLAIN, "-", "-", "-", *[f"{_points(results.plain)[0]:.1f}"] * len(results.keeps)]]
    for method, where in results.lines:
        if everywhere or where == METHODS[method].settings.get("where", "tower"):
            spectral = "yes" if METHODS[method].spectral else "no"
            cost = spent.get((method, where))
            milliseconds = f"{float(cost['ms']):.1f}" if cost else NOT_MEASURED
            lines.append([_name(method), where, spectral, milliseconds, *results.shown(method, where, results.keeps)])
    return "\n\n".join([_markdown(lines), CAUTION, _about(results, spent)])


def lent(found: list[Row], kinds: Iterable[str] = ("where", "all")) -> str:
    """A Markdown table of the methods with settings that the default method lends, and of itself.

    ``kinds`` in the order of preference: with one, methods that cannot borrow it show what they can.
    """
    own = Results.of(found)
    keeps, shown, lines = own.keeps, set(), [["method", "where", "lent", *(f"keep {keep}" for keep in own.keeps)]]
    lines += [[m, w, "its own", *own.shown(m, w, keeps)] for m, w in own.lines if m == DEFAULT_METHOD]
    for kind in kinds:
        results = Results.of(found, kind)
        for method, where in results.lines:
            shown.add(method)
            lines.append([_name(method), where, kind, *results.shown(method, where, keeps)])
    rest = Results.of(found, "where")
    lines += [[_name(m), w, "where", *rest.shown(m, w, keeps)] for m, w in rest.lines if m not in shown]
    return _markdown(lines)


def lead(found: list[Row]) -> str:
    """The default method against every other, at each keep: a Markdown table of the closest ones, and who ties."""
    rows = [row for row in found if row["method"] == DEFAULT_METHOD and row["group"] == "all" and " " in row["against"]]
    lines, said = [["keep", "points ahead of", "difference", "95 % interval"]], []
    change = Results.of(found).change
    for keep in sorted({int(row["keep"]) for row in rows}, reverse=True):
        closest = sorted((row for row in rows if int(row["keep"]) == keep), key=lambda row: float(row["value"]))
        for row in closest[:3]:  # what is negative leads
            value, low, high = _points(row)
            lines.append([str(keep), row["against"], f"{value:+.1f}", f"{low:+.1f} to {high:+.1f}"])
        said.append(f"- keep {keep}: {_standing(closest)}{_room(change, keep)}.")
    return "\n".join([_markdown(lines), "", *said])


def _standing(rows: list[Row]) -> str:
    """Whom the default method does not lead by an interval above zero, in words."""
    ahead = [row["against"] for row in rows if float(row["high"]) < 0]
    level = [row["against"] for row in rows if float(row["low"]) <= 0 <= float(row["high"])]
    said = [f"behind {', '.join(ahead)}"] if ahead else []
    said += [f"no interval above zero against {', '.join(level)}"] if level else []
    return f"`{DEFAULT_METHOD}`: {'; '.join(said)}" if said else f"`{DEFAULT_METHOD}` leads every other one"


def _room(change: dict[Key, Row], keep: int) -> str:
    """How far below the plain model the default method stands, which bounds what anybody can lead it by."""
    for (method, _, at), row in change.items():
        if (method, at) == (DEFAULT_METHOD, keep):
            value, low, high = _points(row)
            return f"; to the plain model {value:+.1f} ({low:+.1f} to {high:+.1f})"
    return ""


def _about(results: Results, spent: Spent) -> str:
    plain = results.plain
    value, low, high = _points(plain)
    text = (
        f"{plain['questions']} {plain['split']} questions, embedded model (weights {plain['weights']}, code "
        f"{plain['code']}), {plain['device']}, torch {plain['torch']}, transformers {plain['transformers']}, "
        f"{plain['date']}; per cent right, in brackets the paired 95 % bootstrap interval, over pictures, of the "
        f"difference to the plain model, which has {value:.1f} ({low:.1f} to {high:.1f}). Without looking (the most "
        f"common answer to the same text in training data): {_points(results.blind)[0]:.1f}. Spectral: its paper "
        "proves that it keeps the spectrum."
    )
    if spent:
        row = next(iter(spent.values()))
        text += (
            f" ms: thread time of choosing and combining tokens for one picture at keep {COST_KEEP}, widths of "
            f"{COST_SHAPE}, float32, median of {row['repeats']} runs on one thread of {row['processor']}, torch "
            f"{row['torch']}, code {row['code']}, {row['date']}; without what the logarithms of sizes cost attention."
        )
    return text


def _name(method: str) -> str:
    return f"{method} \\*" if method in LOOKING else method


def _points(row: Row) -> list[float]:
    """Value and interval in per cent, or points."""
    return [100 * float(row[name]) for name in ("value", "low", "high")]


def _cell(row: Row, change: Row) -> str:
    _, low, high = _points(change)
    return f"{_points(row)[0]:.1f} ({low:+.1f} to {high:+.1f})"


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def plot(found: list[Row], path: Path) -> None:
    """Accuracy over visual tokens, one panel per place, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = Results.of(found)
    cells = results.cells
    methods = list(dict.fromkeys(method for method, _ in results.lines))
    places = list(dict.fromkeys(where for _, where in results.lines))
    figure, axes = plt.subplots(1, len(places), figsize=(5 * len(places) + 2, 5.4), sharey=True, squeeze=False)
    lines = {}
    for axis, where in zip(axes[0], places, strict=True):
        lines["plain, 576 tokens"] = axis.axhline(_points(results.plain)[0], color="black", linestyle=":")
        for number, method in enumerate(methods):
            points = sorted((k, row) for (m, w, k), row in cells.items() if (m, w) == (method, where))
            if points:
                lines[method] = _line(axis, points, number, method)
        keeps = sorted({k for m, w, k in cells if w == where})
        axis.set(xscale="log", xlabel="visual tokens", title=where)
        axis.set_xticks(keeps, [str(k) for k in keeps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right answers, %")
    figure.legend(lines.values(), lines, loc="center right", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 2 / (5 * len(places) + 2), 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _line(axis, points: list[tuple[int, Row]], number: int, method: str) -> Any:
    """One method's line; the default method stands out, and line styles tell methods of one colour apart."""
    value, low, high = ([100 * float(row[name]) for _, row in points] for name in ("value", "low", "high"))
    below = [v - bound for v, bound in zip(value, low, strict=True)]
    above = [bound - v for v, bound in zip(value, high, strict=True)]
    style = {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": ("-", "--", "-.")[number // len(COLOURS) % 3],
        "linewidth": 3 if method == DEFAULT_METHOD else 1.2,
    }
    return axis.errorbar([k for k, _ in points], value, (below, above), marker="o", ms=4, capsize=2, **style)


def spending(path: Path) -> Spent:
    """What merging costs by method and place at `COST_KEEP`; empty if that was not measured."""
    if not path.is_file():
        return {}
    rows = [row for row in read(path, "costs") if (row["shape"], row["keep"]) == (COST_SHAPE, str(COST_KEEP))]
    return {(row["method"], row["where"]): row for row in rows}
