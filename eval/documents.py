"""Writing and reading what was measured, and putting what was made of it into documents."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# What the CSV of each command must hold.
COLUMNS = {
    "curves": {"like", "against", "seconds"},
    "search": {"sweep", "alternative"},
    "spectra": {"distance", "loss"},
    "costs": {"shape", "ms", "commit"},
    "chat": {"name", "value", "load"},
    "finetune": {"what", "steps", "rank"},
}


def read(path: Path, command: str = "curves") -> list[dict[str, str]]:
    """The rows of a CSV that ``command`` wrote.

    Raises
    ------
    ValueError : no such file, or one of something else or of an older version.
    """
    module = f"pitome_mllm_eval.{'training' if command == 'finetune' else 'accuracy'}.{command}"
    if not path.is_file():
        raise ValueError(f"no results {str(path)!r}; measure first: python -m {module}")
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    if not found or not COLUMNS[command] <= set(found[0]):
        raise ValueError(f"{str(path)!r} does not hold results of today's {module}; measure them again with it")
    return found


def write_csv(path: Path, made: Iterable[Any], about: dict[str, str] | None = None) -> None:
    """Write dataclass rows, each with what holds ``about`` all of them; a crash leaves the old file or the new one."""
    rows = [asdict(row) | (about or {}) for row in made]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    part.rename(path)


def put_in(document: Path, text: str, marks: tuple[str, str]) -> None:
    """Replace what stands between the marks.

    Raises
    ------
    ValueError : the marks are missing.
    """
    content = document.read_text()
    if any(content.count(mark) != 1 for mark in marks):
        raise ValueError(f"{str(document)!r} must hold each of {' and '.join(marks)} once")
    before, rest = content.split(marks[0])
    after = rest.split(marks[1])[1]
    document.write_text(f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}")
