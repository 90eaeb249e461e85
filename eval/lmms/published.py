"""Published figures, and what was measured of the embedded model, by table, run and task."""

from __future__ import annotations

import csv
from pathlib import Path

from pitome_mllm import METHODS

HERE = Path(__file__).parents[1]
FIGURES = HERE / "data" / "published.csv"
CURVES = HERE / "results" / "curves.csv"

Published = dict[tuple[str, str, str, str], tuple[float, str]]  # (model, method, amount, task): figure and source


def published(table: str) -> Published:
    """What a table's figures were where they were published."""
    if table == "embedded":
        return _measured()
    with FIGURES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == table]
    return {
        (row["model"], row["method"], row["amount"], row["task"]): (float(row["value"]), row["source"]) for row in rows
    }


def _measured() -> Published:
    """The embedded benchmark as `curves` measured it, every method at its own place; empty without a checkout."""
    if not CURVES.is_file():
        return {}
    with CURVES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["like"] and not row["against"] and row["group"] == "all"]
    found = {}
    for row in rows:
        own = METHODS[row["method"]].settings.get("where", "tower") if row["method"] in METHODS else None
        source = f"eval/results/curves.csv, {row['questions']} questions"
        if row["method"] == "plain":
            found["tiny", "none", "", "pitome_scenes"] = (100 * float(row["value"]), source)
        elif row["where"] == own:
            key = ("tiny", row["method"], f"keep={row['keep']}", "pitome_scenes")
            found[key] = (100 * float(row["value"]), source)
    return found
