"""All tables and plots of README and docs that come from what was measured, made anew: ``make report``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import front
from .accuracy import curves, search, spectra, tables
from .accuracy.figures import gate_table
from .documents import NotMeasured, marks, put_in, read
from .encoders import report as encoders
from .provenance import RESULTS
from .speed import report as speed
from .speed import serving_report as serving
from .speed.sheet import CPU_RESULTS, GPU_RESULTS

COMMAND = "make report"
GATES = "## What model, benchmark and defaults must show\n\nFrom the same answers, in % or points:"


def texts() -> dict[str, dict[str, str]]:
    """What stands between the marks of each name, by document."""
    gpu, cpu = (rows_of(partial(speed.results, path)) for path in (GPU_RESULTS, CPU_RESULTS))
    return {
        "README.md": {"number": front.number(gpu), "results": front.table(rows_of(curves.summary), gpu, cpu)},
        "docs/accuracy.md": {"accuracy": if_measured(accuracy_of_all), "spectra": if_measured(spectra_of_all)},
        "docs/search.md": {"accuracy": if_measured(lambda: tables.ablation(search.results()))},
        "docs/encoders.md": {"real": if_measured(lambda: encoders.text(encoders.results()))},
        "docs/serving.md": {"load": if_measured(serving.text)},
        "docs/speed.md": {name: if_measured(made) for name, made in speed.TEXTS.items()},
        "docs/training.md": {"finetune": if_measured(finetuned)},
    }


def rows_of(made: Callable[[], list[dict[str, str]]]) -> list[dict[str, str]]:
    """What was measured, if anything was."""
    try:
        return made()
    except NotMeasured:
        return []


def accuracy_of_all() -> str:
    """The page of accuracy: who leads, both tables, what they are of, and what must be shown."""
    found = curves.summary()
    measured = (f"## {name.capitalize()}\n\n{tables.table(found, key)}" for key, name in tables.TABLES.items())
    gates = gate_table(*curves.answered(curves.results()))
    return "\n\n".join([tables.leaders(found), *measured, tables.about(found), GATES, gates])


def if_measured(made: Callable[[], str]) -> str:
    """A text, or how to measure what it needs."""
    try:
        return made()
    except NotMeasured as error:
        return f"*{error}*"


def spectra_of_all() -> str:
    """Its part on spectra, with the plot that `plots` draws."""
    return f"{spectra.sentence(*spectra.stored())}\n\n![Loss of accuracy over spectral distance](spectra.png)"


def plots(docs: Path) -> None:
    """Draw what has a plot and was measured."""
    if found := rows_of(curves.summary):
        tables.plot(found, docs / "accuracy.png")
    if found := rows_of(encoders.results):
        encoders.plot(found, docs / "encoders.png")
    if found := rows_of(serving.results):
        serving.plot(found, docs / serving.PLOT)
    if spectra.OUT.exists():
        spectra.plot(*spectra.stored(), docs / "spectra.png")


def finetuned(path: Path = RESULTS / "finetune.csv") -> str:
    """What fine-tuning gained, as a paragraph."""
    rows = read(path, "python -m pitome_mllm_eval.training.finetune", ("what", "steps", "rank"))
    found, about = {row["what"]: row for row in rows}, rows[0]

    def figure(what: str, sign: str = "") -> str:
        value, low, high = (f"{100 * float(found[what][name]):{sign}.1f}" for name in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    return (
        f"`{about['method']}`, keep={about['keep']}, {about['where']}: accuracy (%) {figure('before')} before, "
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
