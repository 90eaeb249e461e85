"""Tables and plot of README and docs, from what was measured: ``python -m pitome_mllm_eval.accuracy.report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from pitome_mllm.methods import UserError

from ..documents import markdown, marks, put_in, read
from ..provenance import RESULTS as FOLDER
from . import gates
from .costs import stored
from .curves import RESULTS, results
from .search import COMMAND as SEARCH
from .tables import COST_KEEP, COST_SHAPE, Row, Spent, plot, table

MARKS = marks("accuracy", "python -m pitome_mllm_eval.accuracy.report")
GATES = """## What the embedded model and its benchmark must show

From the same results, in per cent or points, by `python -m pitome_mllm_eval.accuracy.gates`, which fails if one of them
does:"""


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
    return f"{markdown(lines)}\n\n{about}"


def spending(path: Path) -> Spent:
    """What merging costs by method and place, as far as the tables speak of it; empty if that was not measured."""
    rows = stored(path) if path.is_file() else []
    chosen = [row for row in rows if (row["shape"], row["keep"]) == (COST_SHAPE, str(COST_KEEP))]
    return {(row["method"], row["where"]): row for row in chosen}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--costs", type=Path, default=FOLDER / "costs.csv")
    parser.add_argument("--search", type=Path, default=FOLDER / "search.csv")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the full tables and the plot")
    args = parser.parse_args(argv)
    try:
        spent, found = spending(args.costs), results(args.results)
        put_in(args.readme, table(found, spent), MARKS)
        everything = [table(found, spent, everywhere=True), GATES, gates.table(found)]
        put_in(args.docs / "accuracy.md", "\n\n".join(everything), MARKS)
        put_in(args.docs / "search.md", ablation(read(args.search, SEARCH, ("sweep", "alternative"))), MARKS)
    except UserError as error:
        parser.error(str(error))
    plot(found, args.docs / "accuracy.png")


if __name__ == "__main__":
    main()
