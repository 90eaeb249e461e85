"""All tables and plots of README and docs that come from what was measured, made anew: ``make report``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pitome_mllm.methods import UserError

from .accuracy import curves, search, spectra, tables
from .accuracy.figures import gate_table
from .documents import marks, put_in, read
from .provenance import RESULTS
from .speed import report as speed

COMMAND = "make report"
POINTS = "Each setting is a point of [docs/spectra.png](docs/spectra.png)."
GATES = "## What model, benchmark and defaults must show\n\nFrom the same answers, in per cent or points:"
Row = Mapping[str, str]


def texts() -> dict[str, dict[str, str]]:
    """What stands between the marks of each name, by document."""
    found, answered = curves.summary(), curves.answered(curves.results())
    timed = speed.texts()
    tuned = read(RESULTS / "finetune.csv", "python -m pitome_mllm_eval.training.finetune", ("what", "steps", "rank"))
    said, leads = tables.about(found), tables.leaders(found)
    measured = (f"## {name.capitalize()}\n\n{tables.table(found, key)}" for key, name in tables.TABLES.items())
    return {
        "README.md": {
            "accuracy": "\n\n".join([leads, tables.table(found, False), said]),
            "spectra": _if_measured(lambda: f"{spectra.sentence(*spectra.stored())} {POINTS}"),
            "speed": timed.pop("brief"),
            "finetune": finetuned(tuned),
        },
        "docs/accuracy.md": {"accuracy": "\n\n".join([leads, *measured, said, GATES, gate_table(*answered)])},
        "docs/search.md": {"accuracy": _if_measured(lambda: tables.ablation(search.results()))},
        "docs/speed.md": timed,
    }


def _if_measured(made: Callable[[], str]) -> str:
    """A text, or how to measure what it needs."""
    try:
        return made()
    except UserError as error:
        return f"*{error}*"


def plots(docs: Path) -> None:
    """Draw accuracy and spectra."""
    tables.plot(curves.summary(), docs / "accuracy.png")
    if spectra.OUT.exists():
        spectra.plot(*spectra.stored(), docs / "spectra.png")


def finetuned(rows: Sequence[Row]) -> str:
    """What fine-tuning gained, as a paragraph."""
    found, about = {row["what"]: row for row in rows}, rows[0]

    def figure(what: str, sign: str = "") -> str:
        value, low, high = (f"{100 * float(found[what][name]):{sign}.1f}" for name in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    return (
        f"`{about['method']}`, keep={about['keep']}, {about['where']}: {figure('before')} per cent right before, "
        f"{figure('after')} after {about['steps']} steps, {figure('difference', '+')} points; in brackets 95 % "
        f"bootstrap intervals over pictures, the last one paired. {about['questions']} {about['split']} questions, "
        f"adapters of rank {about['rank']}, seed {about['seed']}, trained for {float(about['seconds']):.0f} s of "
        f"processor time, {about['device']}, torch {about['torch']}, transformers {about['transformers']}, weights "
        f"{about['weights']}, {about['date']}."
    )


def main(argv: list[str] | None = None) -> None:
    """Put every text into its document, and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the README and of docs/ (%(default)s)")
    parser.add_argument("--no-plots", action="store_true", help="only the texts")
    args = parser.parse_args(argv)
    for name, parts in texts().items():
        for part, text in parts.items():
            put_in(args.root / name, text, marks(part, COMMAND))
    if not args.no_plots:
        plots(args.root / "docs")


if __name__ == "__main__":
    main()
