"""``pitome-mllm reproduce``: a published table, run here, with ours beside the published figures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._companion import companion
from ._options import keep, positive
from ._report import print_table

NAMES = (
    "pitome-paper",
    "pruning-literature",
    "llava-next",
    "shares",
    "pitome-retrieval",
    "pitome-imagenet",
    "embedded",
)


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "reproduce",
        help="run a published table",
        description="Run a published table, those of multimodal models through lmms-eval, and print ours beside it.",
    )
    parser.add_argument("--table", required=True, choices=NAMES)
    parser.add_argument("--plan", action="store_true", help="print what would run, and what it takes; run nothing")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of every task")
    parser.add_argument("--model", metavar="M", help="another model than the table's: 'tiny', a folder, a hub name")
    parser.add_argument("--method", nargs="+", metavar="M", help="only these methods of the table")
    parser.add_argument("--keep", nargs="+", type=keep, metavar="K", help="only these numbers of tokens of the table")
    parser.add_argument("--task", nargs="+", metavar="T", help="only these tasks of the table")
    parser.add_argument(
        "--group-a",
        action="store_true",
        help="also the accuracy on the questions that plain gets right and downsample at as many tokens wrong",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="local data instead of the hub's data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="%(default)s")
    parser.add_argument("--bits", type=int, metavar="4|8", help="quantise the weights (needs bitsandbytes)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    parser.add_argument("--device", help="cpu, cuda:0, ...; auto spreads the model (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Plan or run the table; exit code 1 where it could not be run to its end."""
    tables, plans = companion("eval", "lmms.tables"), companion("eval", "lmms.plans")
    table = plans.narrowed(tables.TABLES[options.table], options.model, options.method, options.keep, options.task)
    if table.of_encoders and options.group_a:
        raise UserError("--group-a is about questions; leave it out with tables of encoders alone")
    table = plans.with_controls(table) if options.group_a else table
    if options.plan:
        _show_plan(options, table, tables.TASKS, plans)
        return
    asked = companion("eval", "lmms.rows").Options(
        limit=options.limit,
        batch_size=options.batch_size,
        data=options.data,
        out=options.out,
        load={"bits": options.bits, "dtype": options.dtype, "device": options.device},
    )
    failed = companion("eval", "lmms.results").EvaluationError
    reproduce = companion("eval", f"{'encoders' if table.of_encoders else 'lmms'}.reproduce")
    try:
        found = reproduce.reproduce(options.table, table, asked, lambda text: sys.stderr.write(f"{text}\n"))
        rows = list(reproduce.compare(options.table, table, found, options.group_a))
    except (failed, OSError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"pitome-mllm: {' '.join(str(error).split())}\n")
        raise SystemExit(1) from error
    if rows:  # none in the other processes of a parallel run
        _show(options, table, rows)


def _show_plan(options: argparse.Namespace, table: Any, known: Any, plans: Any) -> None:
    estimated = plans.plan(table, options.limit)
    fetched = plans.downloads(table, options.data is not None)
    hours = sum(one.hours or 0 for one in estimated)
    runs = [
        {"run": str(one.run), "tokens": one.run.tokens, "questions": one.documents, "gflops": one.gflops}
        | {"hours": one.hours}
        for one in estimated
    ]
    if options.json:
        about = [name for name in table.tasks if not known[name].counted]
        said = {"runs": runs, "downloads": fetched, "hours": hours, "sizes_about_right": about}
        sys.stdout.write(json.dumps(said) + "\n")
        return
    forms = ("{}", "{}", "{:,}", "{:,.1f}", "{:.2f}")
    lines = (["-" if value is None else form.format(value) for form, value in zip(forms, row.values())] for row in runs)
    tasks = {name: known[name] for name in table.tasks}
    sizes = [f"{name} {'' if task.counted else 'about '}{task.documents:,}" for name, task in tasks.items()]
    text = f" and {1000 * plans.BESIDE:.0f} ms beside them, prompts of {plans.TEXT_TOKENS} text tokens and answers of "
    text = ", of pictures only" if table.of_encoders else f"{text}{plans.NEW_TOKENS}"
    notes = [
        f"questions per task: {', '.join(sizes)}",
        f"downloads: {'; '.join(fetched) or 'none'}",
        f"{hours:.1f} GPU hours in all, by FLOPs at {plans.SUSTAINED:g} TFLOP/s{text}; GPUs differ",
        *plans.notes(table),
    ]
    heads = ("run", "tokens", "questions", "GFLOPs per question", "GPU hours")
    print_table(heads, lines, f"{options.table}: {table.about}", notes)


def _show(options: argparse.Namespace, table: Any, rows: list[Any]) -> None:
    if options.json:
        sys.stdout.write(json.dumps([_plain(row) for row in rows]) + "\n")
        return
    columns = ("run", "tokens", "task", "questions", "ours", "95 % interval", "published", "tokens", "difference")
    columns += ("95 % interval",)
    notes = [f"published: {source}" for source in dict.fromkeys(row.source for row in rows if row.source)]
    if options.limit is not None or options.data is not None:
        notes.append("published figures are over all questions of the published data, ours here are not")
    print_table(columns, map(_cells, rows), f"{options.table}: {table.about}", notes)


def _cells(row: Any) -> list[str]:
    ours, theirs = ("-" if value is None else f"{value:.1f}" for value in (row.ours, row.published))
    cells = [str(row.run), str(row.tokens), row.task, str(row.questions or "-"), ours, _span(row.low, row.high)]
    cells += [theirs, str(row.published_tokens or "-")]
    if row.difference is None:
        return [*cells, "-", "-"]
    change, low, high = row.difference
    return [*cells, f"{change:+.1f}", _span(low, high, "+")]


def _span(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None else f"{low:{sign}.1f} to {high:{sign}.1f}"


def _plain(row: Any) -> dict[str, Any]:
    change = row.difference or (None, None, None)
    return {
        "run": str(row.run),
        "model": row.run.model,
        "method": row.run.method,
        "amount": row.run.amount,
        "as_published": row.run.published,
        **{name: getattr(row, name) for name in ("task", "questions", "tokens", "ours", "low", "high")},
        **{name: getattr(row, name) for name in ("published", "published_tokens", "source")},
        **dict(zip(("difference", "difference_low", "difference_high"), change, strict=True)),
    }
