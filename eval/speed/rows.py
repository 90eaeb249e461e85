"""What the benchmark of speed writes down: one self-describing row per measurement, and a table for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import provenance

RESULTS = provenance.RESULTS / "bench.csv"
GPU_RESULTS = provenance.RESULTS / "bench-gpu.csv"
# Columns whose values make one line of a plot over batch, and with the batch one table.
SERIES = (
    "model llm_layers device threads dtype mode attention clock images text_tokens new_tokens repeats warmup torch "
    "transformers pitome_mllm commit date"
).split()
RUN = (*SERIES, "batch")


@dataclass(frozen=True)
class Row:
    """One stage of one contender.

    Attributes
    ----------
    keep : visual tokens per picture that reach the LLM.
    rho : the share of its tokens that every block keeps, where that was asked for; else empty.
    ms, p20, p80 : median and percentiles of milliseconds; of one token for "decode".
    against : what ``ratio`` relates to: the same stage of the plain model, or the contender's own tower.
    ratio, ratio_p20, ratio_p80 : of times in the same round.
    gflops : counted while it ran, where the stage is made of matrix products.
    kv_bytes : cache of the prompt.
    peak_bytes : most memory that the stage holds when it runs eagerly and alone, whatever the mode; see `peak_bytes`.
    """

    stage: str
    method: str
    variant: str
    like: str
    where: str
    keep: int
    rho: float | str
    batch: int
    images: int
    text_tokens: int
    ms: float
    p20: float
    p80: float
    against: str
    ratio: float | str
    ratio_p20: float | str
    ratio_p80: float | str
    gflops: float | str
    kv_bytes: int | str
    peak_bytes: int


def show(rows: list[Row], about: dict[str, Any]) -> None:
    """A table in the terminal for every batch: contenders down, stages across."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    stages = list(dict.fromkeys(row.stage for row in rows))
    for batch in dict.fromkeys(row.batch for row in rows):
        table = Table(title=f"{about['model']}, batch {batch}: ms (share of the plain model's)", title_justify="left")
        table.add_column("")
        for stage in stages:
            table.add_column(stage, justify="right")
        lines: dict[str, dict[str, str]] = {}
        for row in rows:
            if row.batch == batch:
                share = f" ({row.ratio:.3f})" if row.ratio != "" and row.method != "plain" else ""
                who = f"{name(row.method, row.variant, row.like)}, {row.keep}"
                lines.setdefault(who, {})[row.stage] = f"{row.ms:.4g}{share}"
        for who, cells in lines.items():
            table.add_row(who, *(cells.get(stage, "") for stage in stages))
        console.print(table)
    console.print(
        f"{about['device']}, {about['threads']} threads, {about['dtype']}, {about['mode']}, torch {about['torch']}; "
        f"medians of {about['repeats']} rounds, {about['clock']} time. "
        "Merge and yardstick: shares of the model's own tower.",
        style="dim",
    )


def name(method: str, variant: str, like: str) -> str:
    """What a contender is called."""
    return f"oracle of {', '.join(like.split())}" if like else method + (variant and f":{variant}")
