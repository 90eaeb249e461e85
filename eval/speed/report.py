"""One table of speed for each device, from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from pitome_mllm.methods import UserError

from ..documents import markdown, read
from .phases import BATCHES, KEEP, LLM_BATCHES, MODES, POINTS
from .sheet import CPU_RESULTS, GPU_RESULTS

Found = dict[str, str]
Key = tuple[str, str, str, int]  # phase, what, mode, batch
COMMANDS = {CPU_RESULTS: "make bench", GPU_RESULTS: "make bench-gpu"}

# What is promised at most: of the plain model's time, of slicing's, or else milliseconds of one merge.
SHARES: dict[Key, float] = {
    **{("tower", "5 points", "captured", batch): most for batch, most in zip(BATCHES, (0.86, 0.56, 0.40))},
    **{("tower", "6 points", "captured", batch): most for batch, most in zip(BATCHES, (0.97, 0.76, 0.66))},
    **{("tower", name, "eager", batch): most for name in POINTS for batch, most in zip(LLM_BATCHES, (1.5, 1.0))},
    **{("prefill", "default", "captured", batch): most for batch, most in zip(LLM_BATCHES, (0.476, 0.2))},
    **{("prefill", "5 points", "captured", batch): most for batch, most in zip(LLM_BATCHES, (0.455, 0.185))},
    **{
        ("first token", "default", mode, batch): most
        for mode, first in zip(MODES, (1.15, 0.85, 0.4))
        for batch, most in zip(LLM_BATCHES, (first, 0.25))
    },
}
MERGES: dict[Key, float] = {
    **{("merge", "keys", "captured", batch): most for batch, most in zip(LLM_BATCHES, (0.025, 0.065))},
    **{("merge", "hidden states", "captured", batch): most for batch, most in zip(LLM_BATCHES, (0.035, 0.11))},
}
OVER_SLICING, EMBEDDED = 1.13, "embedded model"
TITLES = {
    "5 points": "5 merges to 64 tokens, keys",
    "6 points": "6 merges to 192 tokens, hidden states",
    "default": f"the default, {KEEP} tokens",
    "keys": "577 tokens once, keys",
    "hidden states": "577 tokens once, hidden states",
}
GRAPHS = {
    "captured": "as one graph",
    "graph": "the tower as a graph",
    "graphs": "the prefill too",
    "eager": "eager",
}
# On a processor, by model and contender: of the plain tower's time, of slicing's, and of merging in the tower's.
LIMITS = {
    ("tiny", "pitome, 144", "tower"): 1.0,
    ("LLaVA-1.5-7B, the tower alone", "pitome, 144", "tower"): 0.68,
    **{
        ("LLaVA-1.5-7B, the tower alone", f"pitome:published, ratio {r}", "over slicing"): 1.03
        for r in ("0.9", "0.95", "0.975")
    },
    ("LLaVA-1.5-7B, the tower alone", "pitome:keys, 144", "merge"): 0.01,
    ("LLaVA-1.5-7B, the tower alone", "pitome:hidden, 144", "merge"): 0.025,
}


def results(path: Path) -> list[Found]:
    """The rows of a CSV of speed; ValueError as `read`, or where they are of several devices or versions."""
    rows = read(path, COMMANDS.get(path, "pitome-mllm bench"), ("phase", "what", "share", "value", "commit"))
    for name in ("device", "torch", "commit"):
        if len(several := {row[name] for row in rows}) > 1:
            raise UserError(
                f"{path.name} has rows of several: {name} {', '.join(sorted(several))}; keep those of one run"
            )
    return rows


def part(path: Path, table: Callable[[Sequence[Found]], str]) -> str:
    """A part of docs/speed.md: where rows come from, and their table."""
    rows = results(path)
    return (
        "`{}` on {device}: {dtype}, 40 text tokens, torch {torch}, transformers {transformers}, commit {commit}, "
        "{date}.\n\n{}"
    ).format(COMMANDS[path], table(rows), **rows[0])


def shown(ms: str | float) -> str:
    """Milliseconds, with three digits."""
    return f"{float(ms):.0f}" if float(ms) >= 100 else f"{float(ms):.3g}"


def judged(value: float, most: float | None) -> str:
    """A share, and whether a promise is kept."""
    said = f"{value:.3g}"
    return said if most is None else beside(said, value <= most, f"<= {most:.3g}")


def beside(said: str, is_kept: bool, promise: str) -> str:
    """A figure beside its promise, in bold where it misses that."""
    return f"{said if is_kept else f'**{said}**'} ({promise})"


def gpu_table(rows: Iterable[Found]) -> str:
    """Times and shares on a GPU beside what is promised; the last measurement of each counts."""
    last = {(row["phase"], row["what"], row["mode"], int(row["batch"])): row for row in rows}
    lines = [["", "batch", "plain, ms", "ms", "share of plain", "over slicing"]]
    for key, most in {**SHARES, **MERGES}.items():
        phase, what, mode, batch = key
        line = [f"{phase}, {GRAPHS[mode]}: {TITLES[what]}", str(batch), "", "not measured", "", ""]
        if found := last.get(key):
            ms = float(found["ms"])
            line[3] = judged(ms, most) if key in MERGES else shown(ms)
            if key in SHARES:
                line[2] = shown(last[phase, "plain", mode, batch]["ms"])
                line[4] = judged(float(found["share"]), most)
            if slicing := last.get((phase, f"oracle of {what}", mode, batch)):
                line[5] = judged(ms / float(slicing["ms"]), OVER_SLICING if mode == "captured" else None)
        lines.append(line)
    return f"{markdown(lines, numbers=1)}\n\n{memory(last)} {bits(last)}"


def memory(last: dict[Key, Found]) -> str:
    """Peaks of memory of a first token, as a sentence."""
    said = []
    for batch in LLM_BATCHES:
        rows = [last.get(("memory", what, mode, batch)) for what, mode in (("plain", "eager"), ("default", "graph"))]
        if all(rows):
            plain, merged = (float(row["value"]) for row in rows)
            said.append(f"{merged:.0f} MiB in place of {plain:.0f} at batch {batch}")
    if not said:
        return "Peaks of memory were not measured."
    return f"Most memory beside the weights until the first token, with the default: {', '.join(said)}."


def bits(last: dict[Key, Found]) -> str:
    """Whether runs give the same bits, as a sentence."""
    found = {what: int(row["value"]) for (phase, what, _, _), row in last.items() if phase == "bits"}
    if not found:
        return "Whether 20 runs give the same bits was not measured."
    others = [what for what, different in found.items() if different > 1]
    kept = f"{len(found) - len(others)} of {len(found)} methods give the same bits in 20 runs, eager and as a graph"
    return f"{kept}{', not ' + ', '.join(others) if others else ''}."


def cpu_table(rows: Iterable[Found]) -> str:
    """Models and methods down; ms, and shares beside what is promised, across."""
    cells: dict[tuple[str, str], dict[str, Found]] = {}
    for row in (row for row in rows if row["batch"] == "1"):
        cells.setdefault((row["shape"], row["what"]), {})[row["phase"]] = row
    lines = [["", "", "tower, ms", "share", "over slicing", "merging's share", "first token, ms", "share", "decode"]]
    for (shape, what), found in cells.items():
        if what.startswith("oracle"):
            continue

        def share(phase: str, found: dict[str, Found] = found, key: tuple[str, str] = (shape, what)) -> str:
            if phase not in found or key[1] == "plain":
                return ""
            return judged(float(found[phase]["share"]), LIMITS.get((*key, phase)))

        lines.append([
            EMBEDDED if shape == "tiny" else shape,
            what,
            shown(found["tower"]["ms"]),
            share("tower"),
            share("over slicing"),
            share("merge"),
            shown(found["first token"]["ms"]) if "first token" in found else "",
            share("first token"),
            share("decode"),
        ])  # fmt: skip
    return markdown(lines, numbers=2)


TEXTS = {"processor": partial(part, CPU_RESULTS, cpu_table), "gpu": partial(part, GPU_RESULTS, gpu_table)}
