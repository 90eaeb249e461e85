"""What is promised of speed on a GPU, and which of it the rows of `gpu` keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pitome_mllm import METHODS

from ..accuracy.tables import NOT_MEASURED
from ..documents import markdown

BATCHES, LLM_BATCHES = (1, 4, 16), (1, 16)


@dataclass(frozen=True)
class Promise:
    """At most ``most`` of ``column`` of one row, over that of another where ``over`` names one."""

    phase: str
    what: str
    mode: str
    batch: int
    most: float
    column: str = "share"
    over: str = ""


def promises(methods: Iterable[str]) -> Iterator[Promise]:
    """All that is promised, of the bits of ``methods``."""
    for name, most in (("5 points", (0.86, 0.56, 0.40)), ("6 points", (0.97, 0.76, 0.66))):
        for batch, share in zip(BATCHES, most):
            yield Promise("tower", name, "captured", batch, share)
            yield Promise("tower", name, "captured", batch, 1.13, over=f"oracle of {name}")
        yield Promise("tower", name, "eager", 1, 1.5)
        yield Promise("tower", name, "eager", 16, 1.0)
    for what, times in (("keys", (0.025, 0.065)), ("hidden states", (0.035, 0.110))):
        for batch, ms in zip(LLM_BATCHES, times):
            yield Promise("merge", what, "captured", batch, ms, "ms")
    for what, shares in (("default", (1 / 2.1, 1 / 5.0)), ("5 points", (1 / 2.2, 1 / 5.4))):
        for batch, share in zip(LLM_BATCHES, shares):
            yield Promise("prefill", what, "captured", batch, share)
    for mode, share in (("eager", 1.15), ("graph", 0.85)):
        yield Promise("first token", "default", mode, 1, share)
        yield Promise("first token", "default", mode, 16, 0.25)
    for method in methods:
        yield Promise("bits", method, "graph and eager", 2, 1, "value")
    for batch in LLM_BATCHES:
        for stage in ("tower", "first token"):
            yield Promise("memory", f"default, {stage}", "graph", batch, 1.0, "value", over=f"plain, {stage}")


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table of every promise: what was measured, and whether it is kept."""
    last = {(row["phase"], row["what"], row["mode"], int(row["batch"])): row for row in rows}
    lines = [["", "batch", "at most", "measured", "kept"]]
    methods = dict.fromkeys(row["what"] for row in rows if row["phase"] == "bits") or METHODS
    for each in promises(methods):
        found = last.get((each.phase, each.what, each.mode, each.batch))
        modes = (each.mode, "eager")  # memory of the plain model is that of its eager calls
        other = next((last[key] for m in modes if (key := (each.phase, each.over, m, each.batch)) in last), None)
        title = f"{each.phase}, {each.mode}: {each.what}" + (f" / {each.over}" if each.over else "")
        if found is None or (each.over and other is None):
            lines.append([title, str(each.batch), f"{each.most:.3g}", NOT_MEASURED, ""])
            continue
        value = float(found[each.column]) / ((float(other[each.column]) or 1.0) if each.over else 1.0)
        kept = "yes" if value <= each.most else "no"
        lines.append([title, str(each.batch), f"{each.most:.3g}", f"{value:.3g}", kept])
    return markdown(lines, numbers=1)


def about(rows: list[dict[str, str]]) -> str:
    """Where the rows come from, and what the numbers are."""
    row = rows[0]
    return (
        f"`make bench-gpu` on one {row['device']}: {row['shape']}, random weights, {row['dtype']}, 40 text tokens, "
        f"torch {row['torch']}, transformers {row['transformers']}, commit {row['commit']}, {row['date']}. Medians, as "
        "shares of the plain model's in the same turns; bits: how many different results 20 runs give; memory: peaks."
    )


def brief(rows: list[dict[str, str]]) -> str:
    """What attaching with nothing said does to the first token, in a paragraph."""
    found = {(row["what"], row["mode"], row["batch"]): row for row in rows if row["phase"] == "first token"}

    def took(what: str, batch: int) -> str:
        return f"{float(found[what, 'graph', str(batch)]['ms']):.1f}"

    times = [f"{took('plain', batch)} to {took('default', batch)} ms at batch {batch}" for batch in LLM_BATCHES]
    row = rows[0]
    return (
        f"GPU: on one {row['device']} the first token of {row['shape']} (random weights, {row['dtype']}, one image, 40 "
        f"text tokens, 64 visual tokens in place of 576, the tower as a graph) goes from {' and from '.join(times)} "
        f"(`make bench-gpu`, commit {row['commit']}, {row['date']}); more in [docs/speed.md](docs/speed.md)."
    )
