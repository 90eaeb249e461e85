"""Tables and plot of the accuracies in the CSV of `curves`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitome_mllm import METHODS
from pitome_mllm.settings import DEFAULT_METHOD

from ..documents import read
from .curves import BLIND, own_place
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
LENT = f"""Place, schedule and what the LLM is told of positions and sizes are no part of a method. Here the others have
them from `{DEFAULT_METHOD}`, as far as they can take them. Lent "where": only these; metric, mean and place within the
block stay their own. Lent "all": these too, and whether attention is proportional, so that only matching and each
method's own way to combine differ. Methods that reduce in one step take what the LLM is told and nothing else, as they
have no schedule and cannot merge at both places; dct, which has no groups, keeps compact positions. The settings were
searched for PiToMe, and for no other."""
LEAD = f"""## `{DEFAULT_METHOD}` against the closest others

Differences in points, paired over the same questions, at each keep: the three that come closest, of all methods at all
places, with their own and with lent settings."""
LENDER = (DEFAULT_METHOD, own_place(DEFAULT_METHOD))


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
    lines = [heads, [PLAIN, "-", "-", "-", *[f"{points(results.plain)[0]:.1f}"] * len(results.keeps)]]
    for method, where in results.lines:
        if everywhere or where == own_place(method):
            spectral = "yes" if METHODS[method].spectral else "no"
            cost = spent.get((method, where))
            milliseconds = f"{float(cost['ms']):.1f}" if cost else NOT_MEASURED
            lines.append([_name(method), where, spectral, milliseconds, *results.shown(method, where, results.keeps)])
    return "\n\n".join([_markdown(lines), CAUTION, _about(found, results, spent)])


def borrowers(found: list[Row], everywhere: bool = False) -> Iterator[tuple[Results, str, str, str]]:
    """Results, what was lent, method and place of the default method and of those that borrow its settings.

    Every method with all it can borrow, at its own place, or ``everywhere`` and with all that was measured.
    """
    own, part, whole = (Results.of(found, like) for like in ("", "where", "all"))
    borrowing = {method for method, _ in whole.lines}
    yield own, "its own", *LENDER
    for method, where in whole.lines:
        yield whole, "all", method, where
    for method, where in part.lines:
        if everywhere or method not in borrowing and where == own_place(method):
            yield part, "where", method, where


def lent(found: list[Row], everywhere: bool = False) -> str:
    """A Markdown table of the `borrowers`."""
    keeps = Results.of(found).keeps
    lines = [["method", "where", "lent", *(f"keep {keep}" for keep in keeps)]]
    for results, kind, method, where in borrowers(found, everywhere):
        lines.append([_name(method), where, kind, *results.shown(method, where, keeps)])
    return _markdown(lines)


def rivals(found: list[Row]) -> dict[int, list[Row]]:
    """By keep, what the default method is ahead of every other, the closest ones first; what is negative leads it."""
    rows = [row for row in found if row["method"] == DEFAULT_METHOD and row["group"] == "all" and " " in row["against"]]
    rows.sort(key=lambda row: float(row["value"]))
    keeps = sorted({int(row["keep"]) for row in rows}, reverse=True)
    return {keep: [row for row in rows if int(row["keep"]) == keep] for keep in keeps}


def lead(found: list[Row]) -> str:
    """The default method against every other, at each keep: a Markdown table of the closest ones, and who ties."""
    lines, said = [["keep", "points ahead of", "difference", "95 % interval"]], []
    change = Results.of(found).change
    for keep, closest in rivals(found).items():
        for row in closest[:3]:
            value, low, high = points(row)
            lines.append([str(keep), row["against"], f"{value:+.1f}", f"{low:+.1f} to {high:+.1f}"])
        value, low, high = points(change[(*LENDER, keep)])  # bounds what anybody can lead it by
        to_plain = f"to the plain model {value:+.1f} ({low:+.1f} to {high:+.1f})"
        said.append(f"- keep {keep}: {_standing(closest)}; {to_plain}.")
    return "\n".join([_markdown(lines), "", *said])


def _standing(rows: list[Row]) -> str:
    """Whom the default method does not lead by an interval above zero, in words."""
    ahead, level = ([row["against"] for row in rows if holds(row)] for holds in (_behind, _level))
    said = [f"behind {', '.join(ahead)}"] if ahead else []
    said += [f"no interval above zero against {', '.join(level)}"] if level else []
    return f"`{DEFAULT_METHOD}`: {'; '.join(said)}" if said else f"`{DEFAULT_METHOD}` leads every other one"


def _behind(row: Row) -> bool:
    return float(row["high"]) < 0


def _level(row: Row) -> bool:
    return float(row["low"]) <= 0 <= float(row["high"])


def summary(found: list[Row]) -> str:
    """In two sentences how the default method stands against the others with their own settings, and with lent ones."""
    said, standing = [], rivals(found)
    for title, lending in (("with their own settings", False), ("to which its settings are lent", True)):
        leads, levels, behind = [], [], []
        for keep, rows in standing.items():
            chosen = [row for row in rows if ("(lent" in row["against"]) == lending]
            among = behind if any(map(_behind, chosen)) else levels if any(map(_level, chosen)) else leads
            among.append((keep, chosen[0] if chosen else None))
        closest = [row for _, row in leads if row]
        nearest = f", by {min(points(row)[0] for row in closest):.1f} points or more" if closest else ""
        words = [f"leads all of them at keep {_numbers(leads)}{nearest}"] if leads else []
        words += [f"is level with the best of them at keep {_numbers(levels)}"] if levels else []
        words += [f"is behind the best of them at keep {_numbers(behind)}"] if behind else []
        said.append(f"Against the others {title} `{DEFAULT_METHOD}` {', '.join(words)}.")
    return " ".join([*said, "(Leading: the 95 % interval of the difference lies above zero. Level: it holds zero.)"])


def _numbers(chosen: list[tuple[int, Any]]) -> str:
    return ", ".join(str(keep) for keep, _ in chosen)


def _hours(found: list[Row]) -> str:
    """CPU time of all runs, and of the longest."""
    seconds = [float(row["seconds"]) for row in found if row["seconds"] and row["group"] == "all"]
    return f"{sum(seconds) / 3600:.1f} hours of CPU time, the longest {max(seconds):.0f} s"


def _about(found: list[Row], results: Results, spent: Spent) -> str:
    plain = results.plain
    value, low, high = points(plain)
    text = (
        f"{plain['questions']} {plain['split']} questions, embedded model (weights {plain['weights']}, commit "
        f"{plain['commit']}), {plain['device']}, torch {plain['torch']}, transformers {plain['transformers']}, "
        f"{plain['date']}; per cent right, in brackets the paired 95 % bootstrap interval, over pictures, of the "
        f"difference to the plain model, which has {value:.1f} ({low:.1f} to {high:.1f}). Without looking (the most "
        f"common answer to the same text in training data): {points(results.blind)[0]:.1f}. Spectral: its paper "
        f"proves that it keeps the spectrum. All runs took {_hours(found)}."
    )
    if spent:
        row = next(iter(spent.values()))
        text += (
            f" ms: thread time of choosing and combining tokens for one picture at keep {COST_KEEP}, widths of "
            f"{COST_SHAPE}, float32, median of {row['repeats']} runs on one thread of {row['processor']}, torch "
            f"{row['torch']}, commit {row['commit']}, {row['date']}; without what the logarithms of sizes cost "
            "attention."
        )
    return text


def _name(method: str) -> str:
    return f"{method} \\*" if method in LOOKING else method


def points(row: Row) -> list[float]:
    """Value and interval in per cent, or points."""
    return [100 * float(row[name]) for name in ("value", "low", "high")]


def _cell(row: Row, change: Row) -> str:
    _, low, high = points(change)
    return f"{points(row)[0]:.1f} ({low:+.1f} to {high:+.1f})"


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def spending(path: Path) -> Spent:
    """What merging costs by method and place at `COST_KEEP`; empty if that was not measured."""
    if not path.is_file():
        return {}
    rows = [row for row in read(path, "costs") if (row["shape"], row["keep"]) == (COST_SHAPE, str(COST_KEEP))]
    return {(row["method"], row["where"]): row for row in rows}
