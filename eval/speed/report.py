"""Tables and plots of speed, from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pitome_mllm.methods import UserError

from ..documents import markdown, panels, read, save, style, ticks
from . import promises
from .contenders import ORACLE, PLAIN, PUBLISHED
from .rows import GPU_RESULTS, RESULTS, RUN, SERIES, name
from .stages import STAGES

Found = dict[str, str]
OLD_DEFAULT = {"pitome-tuned": "pitome"}
BRIEF = ("576", "144")  # numbers of visual tokens that the README shows


def called(row: Found) -> str:
    """What the contender of a row is called."""
    return name(row["method"], row["variant"], row["like"])


def results(path: Path = RESULTS) -> list[Found]:
    """The rows of a CSV of the benchmark; ValueError as `read`."""
    return [_as_today(row) for row in read(path, "pitome-mllm bench, as docs/speed.md says", RUN)]


def _as_today(row: Found) -> Found:
    """A row of before version 0.2: methods ran as published then, but for the default, `pitome` today."""
    if not row["pitome_mllm"].startswith("0.1."):
        return row
    names = [OLD_DEFAULT.get(name, f"{name}:{PUBLISHED}") for name in row["like"].split()]
    method = OLD_DEFAULT.get(row["method"], row["method"])
    published = method == row["method"] and method not in (PLAIN, ORACLE)
    variant = row["variant"] or (PUBLISHED if published else "")
    return row | {"method": method, "variant": variant, "like": " ".join(names)}


def on_gpu() -> tuple[str, str]:
    """What was measured on a GPU: as a paragraph, and beside what was promised."""
    rows = read(GPU_RESULTS, "make bench-gpu", ("phase", "share"))
    return promises.brief(rows), f"{promises.about(rows)}\n\n{promises.table(rows)}"


def tables(rows: list[Found], brief: bool = False) -> str:
    """A table for each run; ``brief``: only of what the README shows."""
    if brief:
        usual = [row for row in rows if (row["batch"], row["dtype"], row["mode"]) == ("1", "float32", "eager")]
        shown = [row for row in usual if row["rho"] or row["keep"] in BRIEF]
    else:
        shown = rows
    return "\n\n".join(map(table, runs(shown)))


def table(rows: list[Found]) -> str:
    """A Markdown table of one run: contenders down, stages across, ms and in brackets the share of plain.

    Raises
    ------
    ValueError : a stage of a contender was measured twice; both cannot be shown.
    """
    stages = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
    lines = [["", "keep", *stages]]
    cells: dict[tuple[str, str, int, str], Found] = {}
    for row in rows:
        key = (called(row), row["rho"], int(row["keep"]), row["stage"])
        if key in cells:
            raise UserError(
                f"measured twice: {', '.join(map(str, key))} in the run of {row['model']}, batch {row['batch']}, "
                f"commit {row['commit']}, {row['date']}; take one of them out of the results"
            )
        cells[key] = row
    for who, rho, keep in dict.fromkeys(key[:3] for key in cells):
        figures = [cells.get((who, rho, keep, stage)) for stage in stages]
        shown = f"{who}, ratio {rho}" if rho else who
        lines.append([shown, str(keep), *map(_cell, figures)])
    return f"{markdown(lines, numbers=1)}\n\n{about(rows[0])}"


def _cell(row: Found | None) -> str:
    if row is None:
        return ""
    share = "" if row["method"] == "plain" or not row["ratio"] else f" ({float(row['ratio']):.3f})"
    return f"{float(row['ms']):.4g}{share}"


def about(row: Found) -> str:
    """Where the numbers of a run come from."""
    return (
        f"{row['model']}{blocks(row)}, batch {row['batch']}, {row['images']} picture a row, {row['text_tokens']} text "
        f"tokens, {row['dtype']}, {row['mode']}; {row['device']}, {row['threads']} thread, torch {row['torch']}, "
        f"commit {row['commit']}, {row['date']}. ms of {row['clock']} time, medians of {row['repeats']} rounds in "
        "turns; in brackets the share of plain, of merge and yardstick that of the model's own tower. What a contender "
        "does not have stays empty."
    )


def blocks(row: Found) -> str:
    """How much of the LLM there was, as a part of a sentence."""
    return {"none": ", the tower alone", "all": ""}.get(row["llm_layers"], f", {row['llm_layers']} LLM blocks")


def runs(rows: list[Found], columns: Sequence[str] = RUN) -> list[list[Found]]:
    """Rows that are alike in ``columns``; by default those of one table: same model, device, settings and batch."""
    groups: dict[tuple[str, ...], list[Found]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in columns), []).append(row)
    return list(groups.values())


def longest(rows: list[Found], columns: Sequence[str], x: str) -> list[Found]:
    """Of the rows that are alike in ``columns``, those with the most values of ``x``; the first of equals."""
    return max(runs(rows, columns), key=lambda group: len({row[x] for row in group}))


def plot(
    rows: list[Found], path: Path, x: str, y: Callable[[Found], float], xlabel: str, ylabel: str, title: str
) -> None:
    """``y`` over the column ``x``, a line for each contender that was measured at more than one value of it."""

    values = {who: {row[x] for row in rows if called(row) == who} for who in map(called, rows)}
    rows = [row for row in rows if len(values[called(row)]) > 1 or row["method"] == PLAIN]
    marked = {int(row[x]) for row in rows}
    if len(marked) < 2:
        return
    figure, (axis,) = panels([title], ylabel, width=5.6, ylim=(0, None), xlabel=xlabel)
    lines = {}
    for number, who in enumerate(dict.fromkeys(map(called, rows))):
        points = sorted((int(row[x]), y(row)) for row in rows if called(row) == who)
        (lines[who],) = axis.plot(*zip(*points), marker="o", **style(number))
    ticks(axis, marked)
    save(figure, path, lines)


def plots(rows: list[Found], folder: Path) -> None:
    """Time to the first token over keep, and pictures per second over batch at keep 144; each of one run."""
    first = [row for row in rows if row["stage"] == "first token"]
    if not first:
        return
    single = longest(first, RUN, "keep")
    labels = ("visual tokens", "ms to the first token", place(single[0]))
    plot(single, folder / "speed-keep.png", "keep", lambda row: float(row["ms"]), *labels)
    several = longest([row for row in first if row["method"] == PLAIN or row["keep"] == "144"], SERIES, "batch")
    labels = ("batch", "pictures per second, first token", place(several[0]))
    images = int(several[0]["images"])

    def per_second(row: Found) -> float:
        return 1000 * images * int(row["batch"]) / float(row["ms"])

    plot(several, folder / "speed-batch.png", "batch", per_second, *labels)


def place(row: Found) -> str:
    """Model and device of a run, for a title."""
    return f"{row['model']}{blocks(row)}, {row['device']}, {row['threads']} thread, {row['dtype']}, {row['mode']}"
