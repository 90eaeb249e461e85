"""CSV, plots and a table from folders of lmms-eval results: ``python -m pitome_mllm_eval.lmms.report FOLDER``.

Reads what the plug-in left there, whether through ``pitome-mllm reproduce`` or ``python -m lmms_eval --log_samples``.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pitome_mllm.methods import UserError

from ..accuracy.curves import called
from ..documents import markdown, marks, panels, put_in, save, style, write_csv
from .results import FIGURES, EvaluationError, Results, read

MARKS = marks("lmms", "python -m pitome_mllm_eval.lmms.report")
PLOTS = {"visual_tokens": "visual tokens per question", "latency_ms": "milliseconds per question"}
# What a question cost, with the heading and form of its column; times only where they are asked for, as they need a
# machine to themselves.
COSTS = {
    "visual_tokens": ("visual tokens", "{:.1f}"),
    "prompt_tokens": ("prompt tokens", "{:.1f}"),
    "gflops": ("GFLOPs", "{:.2f}"),
    "peak_memory_mb": ("peak GPU MB", "{:.0f}"),
}
TIMES = {
    "tower_ms": ("tower ms", "{:.1f}"),
    "prefill_ms": ("prefill ms", "{:.1f}"),
    "decode_ms": ("decode ms", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
}
SETUP = ("device", "dtype", "bits", "attention", "system_prompt", "batch", "processes")
VERSIONS = ("pitome_mllm", "lmms_eval", "torch", "transformers")
CONDITIONS = ("questions", *SETUP, *VERSIONS)  # what tells runs of one setting apart; in the table where it differs
Row = dict[str, Any]


def rows(results: Results) -> Iterator[Row]:
    """The figures of one results file, of groups where there are any, else of tasks, each with what a question cost.

    "" = not known. ``resampled`` says over what the interval is. ``seconds`` is what lmms-eval says of the whole run.
    Other times are means per question of batches; what was read from lmms-eval's cache cost nothing.
    """
    said, cost, content = results.about, results.about["cost"], results.content
    asked = " ".join(f"{k}={v}" for k, v in said["asked"].items() if k not in ("method", "published")) or "all tokens"
    method = called(said["method"], said["asked"].get("published", False))
    spent = {name: round(cost[name], 3) if name in cost else "" for name in (*COSTS, *TIMES)}
    spent["latency_ms"] = round(cost["prefill_ms"] + cost["decode_ms"], 3) if cost else ""
    inside = {task for tasks in content["group_subtasks"].values() for task in tasks}
    for task in content["results"]:
        known = any(sample.get("picture") is not None for sample in results.samples(task))
        for metric in () if task in inside else results.figures(task):
            figure = results.figure(task, metric)
            bounds = {"low": figure.low, "high": figure.high}
            yield {
                **{"model": said["pretrained"], "method": method, "asked": asked},
                **{"task": task, "metric": metric, "value": round(figure.value, 6)},
                **{name: "" if bound is None else round(bound, 6) for name, bound in bounds.items()},
                **{"resampled": "images" if known else "questions", "questions": figure.questions},
                **spent,
                **{"timed_questions": cost.get("questions_asked", 0), "date": content["date"]},
                "seconds": round(float(content["total_evaluation_time_seconds"]), 1),
                **{name: said[name] for name in SETUP},
                **{name: said["versions"][name] for name in VERSIONS},
                "dtype": said["dtype"].removeprefix("torch."),
            }


def differing(found: Sequence[Row]) -> list[str]:
    """The conditions that are not the same for all rows."""
    return [name for name in CONDITIONS if len({row[name] for row in found}) > 1]


def main_figures(found: Sequence[Row]) -> list[Row]:
    """One row per run and task: the first metric whose interval is known, else the first; two of one are refused."""
    best: dict[tuple[Any, ...], Row] = {}
    seen: dict[tuple[Any, ...], Row] = {}
    for row in found:
        key = tuple(row[name] for name in ("model", "method", "asked", "task", *CONDITIONS))
        if (before := seen.setdefault((*key, row["metric"]), row)) is not row:
            raise UserError(
                f"two runs of {' '.join(key[:3])} on {row['task']} under the same conditions, of {before['date']} and "
                f"{row['date']}; name the folder of one of them only"
            )
        if key not in best or (best[key]["metric"] not in FIGURES and row["metric"] in FIGURES):
            best[key] = row
    methods = list(dict.fromkeys(row["method"] for row in best.values()))
    by_tokens = sorted(best.values(), key=lambda row: -(row["visual_tokens"] or 0.0))
    return sorted(by_tokens, key=lambda row: (row["model"], row["task"], methods.index(row["method"])))


def table(found: Sequence[Row], times: bool = False) -> str:
    """A Markdown table: one line per run, score and cost, with ``times`` what they took; no column that is empty."""
    shown, costs = main_figures(found), COSTS | (TIMES if times else {})
    costs = {name: costs[name] for name in costs if any(row[name] != "" for row in shown)}
    apart = differing(shown)
    heads = ("model", "method", "asked", *(name.replace("_", " ") for name in apart), "task", "score")
    lines = [(*heads, *(heading for heading, _ in costs.values()))]
    for row in shown:
        span = f" ({row['low']:.3f}-{row['high']:.3f})" if row["low"] != "" else ""
        cells = ("-" if row[name] == "" else form.format(row[name]) for name, (_, form) in costs.items())
        said = (str(row[name]) for name in ("model", "method", "asked", *apart))
        lines.append((*said, f"{row['task']} {row['metric']}", f"{row['value']:.3f}{span}", *cells))
    return f"{markdown(lines)}\n\n{_about(found, times)}"


def _about(found: Sequence[Row], times: bool) -> str:
    """What the runs have in common; what they have not, by its several values."""
    common = {name: ", ".join(dict.fromkeys(str(row[name]) for row in found)) for name in CONDITIONS}
    over = ", ".join(dict.fromkeys(row["resampled"] for row in found if row["low"] != ""))
    brackets = f"; in brackets 95 % bootstrap intervals over {over}" if over else ""
    return (
        f"{common['questions']} questions per run{brackets}. Means per question of all tasks of a run, batches of "
        f"{common['batch']}, {common['processes']} process(es), {common['dtype']}, {common['device']}, lmms-eval "
        f"{common['lmms_eval']}, torch {common['torch']}, transformers {common['transformers']}. FLOPs are calculated."
        f"{' Times are by the wall clock, whatever else the machine did.' if times else ''}"
    )


def plot(found: Sequence[Row], over: str, path: Path) -> None:
    """Score over ``over``; one panel per task, one line per method and conditions."""
    chosen = [row for row in main_figures(found) if row[over] != ""]
    if not chosen:
        logging.getLogger(__name__).warning("no plot over %s: no run measured them", PLOTS[over])
        return
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in chosen:
        tasks[f"{row['model'].split('/')[-1]}, {row['task']}: {row['metric']}"].append(row)
    figure, axes = panels(list(tasks), "score", alike=False, xlabel=PLOTS[over])
    handles: dict[str, Any] = {}
    for axis, here in zip(axes, tasks.values(), strict=True):
        lines: dict[str, list[Row]] = defaultdict(list)
        for row in sorted(here, key=lambda row: row[over]):
            lines[" ".join([row["method"], *(str(row[name]) for name in differing(here))])].append(row)
        for label, points in lines.items():
            y = [row["value"] for row in points]
            bars = [[0.0 if row[b] == "" else abs(row["value"] - row[b]) for row in points] for b in ("low", "high")]
            look = style(list(handles).index(label) if label in handles else len(handles))
            x = [row[over] for row in points]
            handles[label] = axis.errorbar(x, y, bars, marker="o", ms=4, capsize=2, **look)
    save(figure, path, handles)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="with results, at any depth")
    parser.add_argument("--csv", type=Path, default=Path("runs/lmms.csv"), help="%(default)s")
    parser.add_argument("--plots", type=Path, default=Path("runs"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table between its marks in this document")
    parser.add_argument("--times", action="store_true", help="also the times in the table; of a machine of its own")
    args = parser.parse_args(argv)
    try:
        found = [row for results in read(args.folders) for row in rows(results)]
        text = table(found, args.times)
        if args.page:
            put_in(args.page, text, MARKS)
    except (UserError, EvaluationError) as error:
        parser.error(str(error))
    write_csv(args.csv, found)
    for over in PLOTS:
        plot(found, over, args.plots / f"lmms_{over}.png")
    print(text)


if __name__ == "__main__":
    main()
