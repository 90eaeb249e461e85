"""The table and the plot of servers under load, from what `serving` measured."""

from __future__ import annotations

from pathlib import Path

from ..documents import markdown, panels, read, save, style
from ..provenance import RESULTS
from .report import Found, beside, judged, shown

SERVE_RESULTS, COMMAND = RESULTS / "bench-serve.csv", "make bench-serve"
STOCK, PLOT = "stock", "serving.png"
COLUMNS = ("load", "what", "requests_s", "first_p95", "each_p95", "kv_blocks", "block_tokens", "commit")
PROMISED = {("12", "64")}  # where merging answers at least three times as many, a first token waits a third at most
TIMES, SHARE = 3.0, 1 / 3


def results() -> list[Found]:
    """The rows of the CSV."""
    return read(SERVE_RESULTS, COMMAND, COLUMNS)


def text() -> str:
    """The part of docs/serving.md: where rows come from, table, plot."""
    rows = results()
    row = rows[0]
    return (
        f"`{COMMAND}` on {row['device']}: vLLM {row['vllm']}, torch {row['torch']}, {row['shape']}, {row['dtype']}, "
        f"{row['rounds']} rounds in turns, commit {row['commit']}, {row['date']}.\n\n{table(rows)}\n\n"
        f"![Requests per second and waiting over concurrency]({PLOT})"
    )


def table(rows: list[Found]) -> str:
    """Loads and servers down; what is promised beside what was found."""
    stock = {row["load"]: row for row in rows if row["what"] == STOCK}
    percentiles = "P50 / P95 / P99, ms"
    head = ["load", "visual tokens", "requests/s", "of stock's", f"first token, {percentiles}", "P95 of stock's"]
    lines = [[*head, f"further tokens, {percentiles}", f"KV blocks of {rows[0]['block_tokens']}"]]
    for row in rows:
        plain, promised = stock[row["load"]], (row["load"], row["what"]) in PROMISED
        times = float(row["requests_s"]) / float(plain["requests_s"])
        share = float(row["first_p95"]) / float(plain["first_p95"])
        own = row["what"] == STOCK
        lines.append([
            said(row),
            "576, stock vLLM" if own else row["what"],
            f"{float(row['requests_s']):.3g}",
            "" if own else at_least(times, TIMES if promised else None),
            waiting(row, "first"),
            "" if own else judged(share, SHARE if promised else None),
            waiting(row, "each"),
            row["kv_blocks"],
        ])  # fmt: skip
    return markdown(lines, numbers=2)


def said(row: Found) -> str:
    """A load in words."""
    return f"Poisson, {float(row['offered']):.3g}/s" if row["offered"] else f"{row['load']} at once"


def waiting(row: Found, what: str) -> str:
    """The percentiles of a time."""
    return " / ".join(shown(row[f"{what}_p{q}"]) for q in (50, 95, 99))


def at_least(times: float, least: float | None) -> str:
    """How many times as many, and whether a promise is kept."""
    found = f"{times:.2f}"
    return found if least is None else beside(found, times >= least, f">= {least:g}")


def plot(rows: list[Found], path: Path) -> None:
    """Requests per second, and the wait for a first token, over how many are asked at once."""
    figure, (left, right) = panels(
        ["requests per second", "P95 of the first token, s"], "", alike=False, xlabel="requests at once", xscale="log"
    )
    lines = {}
    for number, what in enumerate(dict.fromkeys(row["what"] for row in rows)):
        own = [row for row in rows if row["what"] == what and not row["offered"]]
        at = [int(row["load"]) for row in own]
        name = "stock vLLM" if what == STOCK else f"{what} visual tokens"
        (lines[name],) = left.plot(at, [float(row["requests_s"]) for row in own], marker="o", **style(number))
        right.plot(at, [float(row["first_p95"]) / 1000 for row in own], marker="o", **style(number))
    for axis in (left, right):
        axis.set_xticks(at, list(map(str, at)))
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    save(figure, path, lines)
