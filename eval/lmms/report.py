"""CSV, plots and a table from folders of lmms-eval results: ``python -m pitome_mllm_eval.lmms.report FOLDER``.

Reads what the plug-in left there, whether through ``pitome-mllm reproduce`` or ``python -m lmms_eval --log_samples``.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pitome_mllm.methods import UserError

from ..documents import markdown, marks, panels, put_in, save, style, write_csv
from .asked import EvaluationError
from .figures import CONDITIONS, Row, differing, main_figures, rows
from .results_files import read

MARKS = marks("lmms", "python -m pitome_mllm_eval.lmms.report")
PLOTS = {"visual_tokens": "visual tokens per question", "latency_ms": "milliseconds per question"}

# Heading, field of Row and form; times only where they are asked for, as they need a machine to themselves.
COLUMNS = (
    ("visual tokens", "visual_tokens", "{:.1f}"),
    ("prompt tokens", "prompt_tokens", "{:.1f}"),
    ("GFLOPs", "gflops", "{:.2f}"),
    ("peak GPU MB", "peak_memory_mb", "{:.0f}"),
)
TIMES = (
    ("tower ms", "tower_ms", "{:.1f}"),
    ("prefill ms", "prefill_ms", "{:.1f}"),
    ("decode ms", "decode_ms", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
)


def table(found: Sequence[Row], times: bool = False) -> str:
    """A Markdown table: one line per run, score and cost, with ``times`` what they took; no column that is empty."""
    shown = main_figures(found)
    columns = [c for c in COLUMNS + (TIMES if times else ()) if any(getattr(row, c[1]) != "" for row in shown)]
    apart = differing(shown)
    names = [name.replace("_", " ") for name in apart]
    heads = ("model", "method", "asked", *names, "task", "score", *(heading for heading, _, _ in columns))
    lines = [heads]
    for row in shown:
        score = f"{row.value:.3f}" + (f" ({row.low:.3f}-{row.high:.3f})" if row.low != "" else "")
        values = [(getattr(row, name), form) for _, name, form in columns]
        cells = ["-" if value == "" else form.format(value) for value, form in values]
        said = [row.model, row.method, row.asked, *(str(getattr(row, name)) for name in apart)]
        lines.append([*said, f"{row.task} {row.metric}", score, *cells])
    return f"{markdown(lines)}\n\n{_about(found, times)}"


def _about(found: Sequence[Row], times: bool) -> str:
    """What the runs have in common; what they have not, by its several values."""
    common = {name: ", ".join(dict.fromkeys(str(getattr(row, name)) for row in found)) for name in CONDITIONS}
    over = ", ".join(dict.fromkeys(row.resampled for row in found if row.low != ""))
    brackets = f"; in brackets 95 % bootstrap intervals over {over}" if over else ""
    said = (
        f"{common['questions']} questions per run{brackets}. Means per question{_of_all(found)}, batches of "
        f"{common['batch']}, {common['processes']} process(es), {common['dtype']}, {common['device']}, lmms-eval "
        f"{common['lmms_eval']}, torch {common['torch']}, transformers {common['transformers']}. FLOPs are calculated."
    )
    return said + _took(found) + (" Times are by the wall clock, whatever else the machine did." if times else "")


def _of_all(found: Sequence[Row]) -> str:
    """Where a run has several tasks, that its costs are those of all of them."""
    runs = {(row.model, row.method, row.asked, row.date) for row in found}
    return " of all tasks of a run" if len({(row.task, row.date) for row in found}) > len(runs) else ""


def _took(found: Sequence[Row]) -> str:
    """How long all runs took together; nothing where answers came from lmms-eval's cache."""
    runs = defaultdict(list)
    for row in main_figures(found):
        runs[row.model, row.method, row.asked, row.date].append(row)
    if any(tasks[0].timed_questions < sum(row.questions for row in tasks) for tasks in runs.values()):
        return ""
    minutes = sum(tasks[0].seconds for tasks in runs.values()) / 60
    return f" All {len(runs)} runs together took {minutes:.1f} minutes."


def plot(found: Sequence[Row], over: str, path: Path) -> None:
    """Score over ``over``, a field of `Row`; one panel per task, one line per method and conditions."""
    chosen = [row for row in main_figures(found) if getattr(row, over) != ""]
    if not chosen:
        logging.getLogger(__name__).warning("no plot over %s: no run measured them", PLOTS[over])
        return
    tasks = list(dict.fromkeys((row.model, row.task, row.metric) for row in chosen))
    figure, axes = panels(
        [f"{model.split('/')[-1]}, {task}: {metric}" for model, task, metric in tasks], "score", alike=False
    )
    handles: dict[str, Any] = {}
    for axis, key in zip(axes, tasks, strict=True):
        axis.set_xlabel(PLOTS[over])
        here = [row for row in chosen if (row.model, row.task, row.metric) == key]
        lines: dict[str, list[Row]] = defaultdict(list)
        for row in here:
            lines[" ".join([row.method, *(str(getattr(row, name)) for name in differing(here))])].append(row)
        for label, points in lines.items():
            points.sort(key=lambda row: getattr(row, over))
            x, y = [getattr(row, over) for row in points], [row.value for row in points]
            bars = [[_away(row, getattr(row, bound)) for row in points] for bound in ("low", "high")]
            number = list(handles).index(label) if label in handles else len(handles)
            handles[label] = axis.errorbar(x, y, bars, marker="o", ms=4, capsize=2, **style(number))
    save(figure, path, handles)


def _away(row: Row, bound: float | str) -> float:
    """How far a bound is from the value; nothing where it is not known."""
    return 0.0 if bound == "" else abs(row.value - bound)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="with results of lmms-eval, at any depth"
    )
    parser.add_argument("--csv", type=Path, default=Path("runs/lmms.csv"), help="%(default)s")
    parser.add_argument("--plots", type=Path, default=Path("runs"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table between its marks in this document")
    parser.add_argument("--times", action="store_true", help="also the times in the table; of a machine of its own")
    args = parser.parse_args(argv)
    try:
        found = [row for results in read(args.folders) for row in rows(results)]
        text = table(found, args.times)
        if args.readme:
            put_in(args.readme, text, MARKS)
    except (UserError, EvaluationError) as error:
        parser.error(str(error))
    write_csv(args.csv, found)
    for over in PLOTS:
        plot(found, over, args.plots / f"lmms_{over}.png")
    print(text)


if __name__ == "__main__":
    main()
