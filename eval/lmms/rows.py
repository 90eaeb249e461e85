"""How a published table is run, and its figures beside the published ones. Needs no lmms-eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tables import Run


@dataclass(frozen=True)
class Options:
    """How a table is run."""

    limit: int | None = None  # questions per task; None = all
    batch_size: int = 8
    data: Path | None = None  # folder with a file or folder for each task instead of the data sets on the hub
    out: Path = Path("runs/reproduce")
    load: dict[str, Any] | None = None  # keywords of `pitome_mllm.load`


@dataclass(frozen=True)
class Row:
    """One figure beside the published one, each with its visual tokens; what is None is not known."""

    run: Run
    task: str
    questions: int
    tokens: int
    ours: float | None
    low: float | None
    high: float | None
    published: float | None = None
    published_tokens: int | None = None
    source: str = ""

    @property
    def difference(self) -> tuple[float, float | None, float | None] | None:
        """Ours less the published figure, with its interval."""
        if self.published is None or self.ours is None:
            return None
        bounds = (None if bound is None else bound - self.published for bound in (self.low, self.high))
        return self.ours - self.published, *bounds


def beside(known: dict[tuple[Run, str], dict[str, str]], run: Run, task: str, questions: int, *ours: Any) -> Row:
    """Our figure with its interval, and what ``known`` says of it."""
    theirs = known.get((run, task))
    told = (float(theirs["value"]), int(theirs["tokens"] or 0) or None, theirs["source"]) if theirs else ()
    return Row(run, task, questions, run.tokens, *ours, *told)
