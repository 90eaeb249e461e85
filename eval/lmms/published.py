"""Published figures, and what was measured of the embedded model, by table, run and task."""

from __future__ import annotations

from pathlib import Path

from pitome_mllm import METHODS

from ..accuracy.curves import PLAIN, SUMMARY, called, summary
from ..documents import read
from ..provenance import RESULTS
from .tables import PLAIN as NONE

FIGURES = Path(__file__).parents[1] / "data" / "published.csv"

Published = dict[tuple[str, str, str, str], tuple[float, str]]  # (model, name, amount, task): figure and source


def published(table: str) -> Published:
    """What a table's figures were where they were published."""
    if table == "embedded":
        return _measured()
    rows = [row for row in read(FIGURES, "pip install again", ("table", "value")) if row["table"] == table]
    return {
        (row["model"], called(row["method"], row["method"] != NONE), row["amount"], row["task"]): (
            float(row["value"]),
            row["source"],
        )
        for row in rows
    }


def _measured() -> Published:
    """The embedded benchmark as `curves` measured it, as published and by default; empty without its results."""
    path = RESULTS / SUMMARY
    if not path.is_file():
        return {}
    found = {}
    for row in summary(path):
        if row["method"] not in (PLAIN, *METHODS):
            continue
        published = row["published"] == "True"
        key = ("tiny", called(row["method"], published), f"keep={row['keep']}", "pitome_scenes")
        if row["method"] == PLAIN:
            key = ("tiny", NONE, "", "pitome_scenes")
        found[key] = (100 * float(row["value"]), f"eval/results/{SUMMARY}, {row['questions']} questions")
    return found
