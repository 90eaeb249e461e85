"""Tables, plot and sentences of what `curves` and `search` measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitome_mllm import METHODS, estimate
from pitome_mllm.costs.published import get_shape
from pitome_mllm.methods import UserError
from pitome_mllm.settings import DEFAULT_METHOD

from .. import documents
from .figures import BLIND
from .runs import PLAIN

Row = dict[str, str]
Line = tuple[str, bool, str]  # method, whether as published, where
TABLES = {True: "as published", False: "under the library's defaults"}
SHAPE, COST_KEEP, GROUP_A_KEEP = "llava-1.5-7b", 144, 72
NOT_MEASURED = "not measured"
LOOKING = [name for name, method in METHODS.items() if "attention" in method.reducer.needs]
CAUTION = f"""\\*: {", ".join(LOOKING)} look at the attention of the class token. Nothing in the training of the
embedded model asks anything of that token, so these rows tell less about the methods than they would with CLIP.
cdpruner runs without the question, as LLaVA has no text encoder for it; of the tokens beyond the metric's width it
takes the first. random is one draw."""


@dataclass(frozen=True)
class Results:
    """The figures of `curves`: of the plain model, without looking, and of every line and keep."""

    plain: Row
    blind: Row
    cells: dict[tuple[Line, int], Row]

    @classmethod
    def of(cls, found: list[Row]) -> Results:
        """Those in the rows of its summary."""
        plain, blind = (next(row for row in found if row["method"] == name) for name in (PLAIN, BLIND))
        lines = {((row["method"], row["published"] == "True", row["where"]), int(row["keep"])): row for row in found}
        return cls(plain, blind, {key: row for key, row in lines.items() if row["method"] not in (PLAIN, BLIND)})

    @property
    def keeps(self) -> list[int]:
        """All numbers of tokens, the largest first."""
        return sorted({keep for _, keep in self.cells}, reverse=True)

    def lines(self, published: bool) -> list[Line]:
        """Those of one table."""
        return list(dict.fromkeys(line for line, _ in self.cells if line[1] == published))


def table(found: list[Row], published: bool) -> str:
    """A Markdown table: methods down, keeps across, accuracy (%) with its paired interval."""
    results = Results.of(found)
    heads = ["method", "where", "spectral", "TFLOPs", *(f"keep {k}" for k in results.keeps), "group A"]
    lines = [heads, [PLAIN, "-", "-", teraflops(), *[f"{points(results.plain)[0]:.1f}"] * len(results.keeps), "100"]]
    for method, _, where in results.lines(published):
        cells = [results.cells.get(((method, published, where), keep)) for keep in results.keeps]
        spectral = "yes" if METHODS[method].spectral else "no"
        cost = teraflops(method, published=published, keep=COST_KEEP)
        name = f"{method} \\*" if method in LOOKING else method
        hard = results.cells.get(((method, published, where), GROUP_A_KEEP), {}).get("group_a")
        shown = [_cell(row) if row else NOT_MEASURED for row in cells]
        lines.append([name, where, spectral, cost, *shown, f"{100 * float(hard):.1f}" if hard else NOT_MEASURED])
    return documents.markdown(lines)


def teraflops(*method: str, **settings: Any) -> str:
    """What tower, merging and projector of the published model take for one picture; "-" where it is no setting."""
    try:
        cost = estimate(get_shape(SHAPE).config(), *method, **settings)
    except UserError:
        return "-"
    return f"{(cost.tower_flops + cost.merging_flops + cost.projector_flops) / 1e12:.2f}"


def _cell(row: Row) -> str:
    _, low, high = points(row, "change")
    return f"{points(row)[0]:.1f} ({low:+.1f} to {high:+.1f})"


def points(row: Row, name: str = "value") -> list[float]:
    """Value and interval in %, or points."""
    names = ("value", "low", "high") if name == "value" else (name, f"{name}_low", f"{name}_high")
    return [100 * float(row[n]) for n in names]


def about(found: list[Row]) -> str:
    """What was measured, where, and what the columns say."""
    results, (value, low, high) = Results.of(found), points(Results.of(found).plain)
    plain = results.plain
    commits, devices = (", ".join(dict.fromkeys(row[name] for row in found)) for name in ("commit", "device"))
    hard = {row["group_a_questions"] for (_, keep), row in results.cells.items() if keep == GROUP_A_KEEP}
    return f"""{CAUTION}

{plain["questions"]} {plain["split"]} questions, embedded model (weights {plain["weights"]}), {devices}, torch
{plain["torch"]}, transformers {plain["transformers"]}, commit {commits}, {max(row["date"] for row in found)}; accuracy
(%), in brackets the paired 95 % bootstrap interval, over pictures, of the difference to the plain model, which has
{value:.1f} ({low:.1f} to {high:.1f}). Without looking (the most common answer to the same text in training data):
{points(results.blind)[0]:.1f}. Spectral: its paper proves that it keeps the spectrum. TFLOPs: counted for one picture,
tower, merging and projector of {SHAPE} at keep {COST_KEEP}. Group A: accuracy (%), at keep {GROUP_A_KEEP}, of
the {" or ".join(sorted(filter(None, hard))) or "no"} questions that the plain model answers right and `downsample`
wrong."""


def leaders(found: list[Row]) -> str:
    """A Markdown table: at each keep the most accurate method, and the default one, in both tables."""
    results = Results.of(found)
    lines = [["highest accuracy, %", *(f"keep {keep}" for keep in results.keeps)]]
    for published, name in TABLES.items():
        best, ours = [], []
        for keep in results.keeps:
            cells = {
                key[0][0]: points(row)[0]
                for key, row in results.cells.items()
                if (key[0][1], key[1]) == (published, keep)
            }
            first = max(cells, key=lambda method: cells[method], default=None)
            best.append(f"{first} {cells[first]:.1f}" if first else NOT_MEASURED)
            ours.append(f"{cells[DEFAULT_METHOD]:.1f}" if DEFAULT_METHOD in cells else NOT_MEASURED)
        lines += [[name, *best], [f"... {DEFAULT_METHOD}", *ours]]
    return documents.markdown(lines)


def ablation(rows: list[Row]) -> str:
    """A Markdown table of the search: what every alternative gains and costs in each round, and the last front."""
    heads = ["round", "factor", "alternative", "taken", "front", "accuracy, %", "at each keep", "gain", "interval"]
    lines = [[*heads, "TFLOPs", "launches"]]
    for row in rows:
        value, gain, low, high = (100 * float(row[name]) for name in ("value", "gain", "low", "high"))
        said = ["yes" if row[name] == "True" else "" for name in ("taken", "front")]
        figures = [f"{value:.1f}", row["each"], f"{gain:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        costs = [f"{float(row['teraflops']):.2f}", f"{float(row['launches']):.0f}"]
        lines.append([row["round"], row["factor"], row["alternative"], said[0], said[1], *figures, *costs])
    first, final = rows[0], next(row for row in reversed(rows) if row["taken"] == "True")
    return f"""{documents.markdown(lines)}

{first["questions"]} {first["split"]} questions, mean over keep {first["keeps"]}, and at each; embedded model (weights
{first["weights"]}), {first["device"]}, torch {first["torch"]}, transformers {first["transformers"]}, commit
{first["commit"]}, {first["date"]}. What is left in the end, in place of the defaults: `{final["settings"]}`."""


def plot(found: list[Row], path: Path) -> None:
    """Accuracy over visual tokens, one line per method, in a panel for each table."""
    results, lines = Results.of(found), {}
    figure, axes = documents.panels(list(TABLES.values()), "accuracy, %", width=6, xlabel="visual tokens")
    methods = list(dict.fromkeys(line[0] for line, _ in results.cells))
    for axis, published in zip(axes, TABLES, strict=True):
        lines["plain, 576 tokens"] = axis.axhline(points(results.plain)[0], color="black", linestyle=":")
        for line in results.lines(published):
            measured = {keep: points(row)[0] for (one, keep), row in results.cells.items() if one == line}
            looks = {**documents.style(methods.index(line[0])), "linewidth": 3 if line[0] == DEFAULT_METHOD else 1.2}
            (lines[line[0]],) = axis.plot(list(measured), list(measured.values()), marker="o", ms=3, **looks)
        documents.ticks(axis, results.keeps)
    documents.save(figure, path, lines)
