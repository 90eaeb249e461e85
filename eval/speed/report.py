"""One table of speed for each device, and what the README says of it, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        for mode, first in zip(MODES, (1.15, 0.4))
        for batch, most in zip(LLM_BATCHES, (first, 0.25))
    },
}
MERGES: dict[Key, float] = {
    **{("merge", "keys", "captured", batch): most for batch, most in zip(LLM_BATCHES, (0.025, 0.065))},
    **{("merge", "hidden states", "captured", batch): most for batch, most in zip(LLM_BATCHES, (0.035, 0.11))},
}
OVER_SLICING = 1.13
TITLES = {
    "5 points": "5 merges to 64 tokens, keys",
    "6 points": "6 merges to 192 tokens, hidden states",
    "default": f"the default, {KEEP} tokens",
    "keys": "577 tokens once, keys",
    "hidden states": "577 tokens once, hidden states",
}
GRAPHS = {"captured": "as one graph", "graph": "`graph=True`", "eager": "eager"}
# On a processor, by model and contender: of the plain tower's time, of slicing's, and of merging in the tower's.
LIMITS = {
    ("tiny", "pitome, 144", "tower"): 1.0,
    ("LLaVA-1.5-7B, the tower alone", "pitome, 144", "tower"): 0.68,
    **{
        ("LLaVA-1.5-7B, the tower alone", f"pitome:published, ratio {r}", "slicing"): 1.03
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


def texts() -> dict[str, str]:
    """The tables of docs/speed.md by device, and the README's paragraph."""
    cpu, gpu = results(CPU_RESULTS), results(GPU_RESULTS)
    return {
        "processor": f"{about(cpu, 'make bench')}\n\n{cpu_table(cpu)}",
        "gpu": f"{about(gpu, 'make bench-gpu')}\n\n{gpu_table(gpu)}",
        "brief": brief(cpu, gpu),
    }


def about(rows: Sequence[Found], command: str) -> str:
    """Where rows come from."""
    row = rows[0]
    return (
        f"`{command}` on {row['device']}: {row['dtype']}, random weights but for the embedded model, 40 text tokens, "
        f"torch {row['torch']}, transformers {row['transformers']}, commit {row['commit']}, {row['date']}."
    )


def judged(value: float, most: float | None) -> str:
    """A share, and whether a promise is kept."""
    shown = f"{value:.3g}"
    return shown if most is None else f"{shown} (<= {most:.3g})" if value <= most else f"**{shown}** (<= {most:.3g})"


def gpu_table(rows: Iterable[Found]) -> str:
    """Times and shares on a GPU beside what is promised; the last measurement of each counts."""
    last = {(row["phase"], row["what"], row["mode"], int(row["batch"])): row for row in rows}
    lines = [["", "batch", "plain, ms", "ms", "share of plain", "over slicing"]]
    for key, most in {**SHARES, **MERGES}.items():
        phase, what, mode, batch = key
        line = [f"{phase}, {GRAPHS[mode]}: {TITLES[what]}", str(batch), "", "not measured", "", ""]
        if found := last.get(key):
            ms = float(found["ms"])
            line[3] = judged(ms, most) if key in MERGES else f"{ms:.3g}"
            if key in SHARES:
                line[2] = f"{float(last[phase, 'plain', mode, batch]['ms']):.3g}"
                line[4] = judged(float(found["share"]), most)
            if slicing := last.get((phase, f"oracle of {what}", mode, batch)):
                line[5] = judged(ms / float(slicing["ms"]), OVER_SLICING if mode == "captured" else None)
        lines.append(line)
    return f"{markdown(lines, numbers=1)}\n\n{memory(last)} {bits(last)}"


def memory(last: dict[Key, Found]) -> str:
    """Peaks of memory of a first token, as a sentence."""
    said = []
    for batch in LLM_BATCHES:
        values = [last.get(("memory", what, mode, batch)) for what, mode in (("plain", "eager"), ("default", "graph"))]
        shown = [f"{float(row['value']):.0f} MiB" if row and row["value"] else "not measured" for row in values]
        said.append(f"{shown[0]} plain and {shown[1]} with the default and its graph at batch {batch}")
    return f"Most memory beside the weights until the first token: {'; '.join(said)}."


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
        method, _, amount = what.partition(", ")
        slicing = cells.get((shape, f"oracle of {method}, {amount}"), {}).get("tower")
        tower, plain = found["tower"], what == "plain"
        over = float(tower["ms"]) / float(slicing["ms"]) if slicing else None
        lines.append([
            shape,
            what,
            f"{float(tower['ms']):.3g}",
            "" if plain else judged(float(tower["share"]), LIMITS.get((shape, what, "tower"))),
            "" if over is None else judged(over, LIMITS.get((shape, what, "slicing"))),
            judged(float(found["merge"]["share"]), LIMITS.get((shape, what, "merge"))) if "merge" in found else "",
            f"{float(found['first token']['ms']):.3g}" if "first token" in found else "",
            *("" if plain or name not in found else f"{float(found[name]['share']):.3g}"
              for name in ("first token", "decode")),
        ])  # fmt: skip
    return markdown(lines, numbers=2)


def brief(cpu: Sequence[Found], gpu: Sequence[Found]) -> str:
    """What attaching with nothing said does to the first token, in a paragraph."""
    found = {(row["what"], row["batch"]): row for row in gpu if (row["phase"], row["mode"]) == ("first token", "graph")}

    def took(batch: int) -> str:
        before, after = (float(found[what, str(batch)]["ms"]) for what in ("plain", "default"))
        return f"{before:.1f} to {after:.1f} ms at batch {batch}"

    ways = " and from ".join(map(took, LLM_BATCHES)) if found else "(not measured)"
    tower = {row["shape"]: row for row in cpu if (row["phase"], row["what"]) == ("tower", "pitome, 144")}
    shares = " and ".join(f"{float(row['share']):.2f} of the plain tower's ({shape})" for shape, row in tower.items())
    return (
        f"On one {gpu[0]['device']} the first token of a LLaVA-1.5-7B (random weights, {gpu[0]['dtype']}, {KEEP} "
        f"visual tokens in place of 576, `graph=True`) goes from {ways}; on one thread of a processor the "
        f"vision tower takes with 144 tokens {shares}. Tables, and how they were measured: "
        "[docs/speed.md](docs/speed.md)."
    )
