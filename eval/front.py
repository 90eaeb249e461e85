"""The README's first screen: one number, and a table of accuracy and time at a few numbers of visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pitome_mllm.settings import DEFAULT_METHOD

from .accuracy.tables import NOT_MEASURED
from .documents import markdown
from .speed.phases import KEEP, KEEPS, LLM_BATCHES
from .speed.report import shown

Row = Mapping[str, str]
PATCHES, CONTROL, LARGE = 576, "downsample", LLM_BATCHES[-1]
KEY = ("phase", "what", "mode", "batch")
# Where little or nothing is gained, should it be measured so: the file's name, phase, who, mode, batch, and in words.
DOUBTFUL = (
    ("gpu", "first token", "default", "graph", "1", f"the first token on the GPU at batch 1, {KEEP} tokens"),
    ("gpu", "first token", "default", "eager", "1", "the same with `graph=False`"),
    ("cpu", "tower", f"{DEFAULT_METHOD}, 144", "eager", "1", "the embedded model's narrow tower on a processor"),
    ("cpu", "decode", f"{DEFAULT_METHOD}, 144", "eager", "1", "every further token of its answers"),
)
LITTLE = 0.95  # of the plain model's time, from which on


def number(gpu: Sequence[Row]) -> str:
    """What this is, in a sentence with one number; gpu : rows of a GPU's speed."""
    keep = next((keep for keep in (144, KEEP) if first_token(gpu, keep, LARGE)), KEEP)
    before, after = first_token(gpu, PATCHES, LARGE), first_token(gpu, keep, LARGE)
    measured = f"how much faster they are is {NOT_MEASURED} yet"
    if before and after:
        measured = (
            f"on one {gpu[0]['device']} the first token of a LLaVA-1.5-7B comes after **{shown(after)} ms in place of "
            f"{shown(before)}** (batch {LARGE}, {keep} of {PATCHES} visual tokens, random weights)"
        )
    return (
        "Run LLaVA-like models with a fraction of their visual tokens, by merging similar ones inside the vision "
        f"tower, without training and without changing the model's code: {measured}."
    )


def first_token(gpu: Sequence[Row], keep: int, batch: int) -> str:
    """Milliseconds until the first token of `generate` by default; "" where that was not measured."""
    what = {PATCHES: "plain", KEEP: "default"}.get(keep, f"{DEFAULT_METHOD}, {keep}")
    key = ["first token", what, "graph", str(batch)]
    return next((row["ms"] for row in reversed(gpu) if [row[name] for name in KEY] == key), "")


def table(accuracy: Sequence[Row], gpu: Sequence[Row], cpu: Sequence[Row]) -> str:
    """The table, what it was measured on, and where merging does not help; no rows: it was not measured."""
    right = {(row["method"], int(row["keep"])): row for row in accuracy if row["published"] != "True"}
    heads = ["visual tokens", "accuracy, %", f"`{CONTROL}`, %"]
    lines = [[*heads, *(f"first token, batch {batch}, ms" for batch in LLM_BATCHES)]]
    for keep in (PATCHES, *KEEPS, KEEP):
        methods = ("plain", "plain") if keep == PATCHES else (DEFAULT_METHOD, CONTROL)
        found = [right.get((method, keep)) for method in methods]
        cells = [f"{100 * float(row['value']):.1f}" if row else NOT_MEASURED for row in found]
        times = [first_token(gpu, keep, batch) for batch in LLM_BATCHES]
        cells += [shown(ms) if ms else NOT_MEASURED for ms in times]
        lines.append([f"{keep}, plain" if keep == PATCHES else str(keep), *cells])
    return f"{markdown(lines, numbers=0)}\n\n{measured_on(accuracy, gpu)}{best(right)}{little(gpu, cpu)}"


def best(right: Mapping[tuple[str, int], Row]) -> str:
    """Which method leads at which numbers of tokens, as a sentence behind others; right : rows by method and tokens."""
    leads: dict[str, list[str]] = {}
    behind = [0.0]
    for keep in sorted({keep for _, keep in right} - {0, PATCHES}, reverse=True):
        values = {method: 100 * float(row["value"]) for (method, tokens), row in right.items() if tokens == keep}
        first = max(values, key=lambda method: values[method])
        leads.setdefault(first, []).append(str(keep))
        behind.append(values[first] - values.get(DEFAULT_METHOD, values[first]))
    said = "; ".join(f"`{method}` at {', '.join(keeps)}" for method, keeps in leads.items())
    lead = f" ({DEFAULT_METHOD} is at most {max(behind):.1f} points behind)" if max(behind) > 0 else ""
    return f" The best method, all under the same defaults: {said}{lead}." if said else ""


def measured_on(accuracy: Sequence[Row], gpu: Sequence[Row]) -> str:
    """Of what model, on what, the figures are."""
    asked, device, by = "the embedded model", "a GPU", "`make bench-gpu`"
    if accuracy:
        row = accuracy[0]
        asked = f"{row['questions']} held-out questions to the embedded model"
        asked += f" (`python -m pitome_mllm_eval.accuracy.curves`, {row['device']}, commit {row['commit']})"
    if gpu:
        device, by = f"one {gpu[0]['device']}, {gpu[0]['dtype']}", f"{by}, commit {gpu[0]['commit']}"
    return (
        f"*Accuracy*: {asked}, about drawn scenes; `{CONTROL}` is the control, a smaller picture with as many "
        f"tokens, which costs less still. *First token*: a LLaVA-1.5-7B with random weights, {device}, its tower as a "
        f"CUDA graph, as by default ({by})."
    )


def little(gpu: Sequence[Row], cpu: Sequence[Row]) -> str:
    """Where merging does not help, as a sentence behind others."""
    said = []
    for name, *key, words in DOUBTFUL:
        rows = gpu if name == "gpu" else [row for row in cpu if row["shape"] == "tiny"]
        shares = [row["share"] for row in rows if [row[n] for n in KEY] == key]
        if shares and float(shares[-1]) >= LITTLE:
            said.append(f"{words} ({float(shares[-1]):.2f})")
    return f" **Where it does not help** (share of the plain model's time): {', '.join(said)}." if said else ""
