"""What a run cost, as a table beside the plain run and as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from ..costs.answer import AnswerCost
from ..serving.resolution import CONTROL
from ._options import progress

WIDE = 160  # columns of a table that goes into a file
TIMED_TOKENS = 8  # new tokens that every timed run writes; FLOPs and KV cache are calculated for as many


@dataclass(frozen=True)
class Run(AnswerCost):
    """One answer, "plain", "merged" or of a control, with its cost when the last of `TIMED_TOKENS` new tokens is out.

    The cache then holds the prompt and every new token but that last one, which no later token looks at.
    """

    mode: str = "merged"
    answer: str = ""


ROWS = {  # field of Run: its name in the table
    "visual_tokens": "visual tokens",
    "prompt_tokens": "LLM prompt length",
    "tower_ms": "vision tower, ms",
    "prefill_ms": "prefill with tower, ms",
    "per_token_ms": "each new token, ms",
    "kv_cache_mb": "KV cache, MB",
    "gflops": "GFLOPs",
}
TIMES = ("tower_ms", "prefill_ms", "per_token_ms")


def add_times(runs: list[Run], model: Any, asked: dict[str, Any], handle: Any, repeats: int) -> list[Run]:
    """The runs with their times, medians of ``repeats`` in turns; ``asked`` has the inputs of every mode."""
    from ..costs.latency import in_turns, measure

    def once(mode: str) -> AnswerCost:
        with in_mode(handle, mode):
            return measure(model, asked[mode], new_tokens=TIMED_TOKENS)

    with progress("Timing", total=(repeats + 1) * len(runs)) as advance:
        seen = in_turns({run.mode: partial(once, run.mode) for run in runs}, repeats, done=advance)
    return [replace(run, **{f: median(getattr(t, f) for t in seen[run.mode]) for f in TIMES}) for run in runs]


def add_costs(run: Run, model: Any, settings: dict[str, Any]) -> Run:
    """The run with its key-value cache and FLOPs, calculated from the settings of `attach` (empty: the plain model).

    The FLOPs of an LLM that `costs.flops` does not know stay None, as those of images cut into tiles.
    """
    from ..costs.flops import estimate, flops_known, kv_bytes_per_token

    if not flops_known(model.config):
        cached = run.prompt_tokens + TIMED_TOKENS - 1
        return replace(run, kv_cache_mb=cached * kv_bytes_per_token(model.config.text_config, model.dtype) / 1e6)
    text_tokens = run.prompt_tokens - run.visual_tokens
    cost = estimate(model, **settings, text_tokens=text_tokens, new_tokens=TIMED_TOKENS)
    return replace(run, kv_cache_mb=cost.kv_bytes / 1e6, gflops=cost.flops / 1e9)


def what_decides(model: Any, settings: dict[str, Any], share: float) -> str:
    """Where the FLOPs are that merging can save, and what ``settings``, keeping that share, save in LLaVA-1.5-7B."""
    from ..costs.flops import estimate
    from ..costs.published import get_shape

    def parts(shape: Any, chosen: dict[str, Any]) -> tuple[int, int]:
        cost = estimate(shape, **chosen, new_tokens=TIMED_TOKENS)
        return cost.tower_flops + cost.merging_flops, cost.flops

    large = get_shape("llava-1.5-7b").config()
    chosen = settings if settings.get("ratio") else {**settings, "keep": share}
    (tower, whole), (large_tower, large_whole), (_, merged) = parts(model, {}), parts(large, {}), parts(large, chosen)
    return (
        "What decides: merging saves in the LLM and in the tower's later blocks, and takes time itself, which small "
        f"models feel. The tower has {tower / whole:.0%} of the plain run's FLOPs, the LLM the rest; in LLaVA-1.5-7B "
        f"it has {large_tower / large_whole:.0%}, and this leaves {merged / large_whole:.2f} of all (calculated)."
    )


def in_mode(handle: Any, mode: str) -> AbstractContextManager[Any]:
    """The attached model as it is (mode "merged"), or without merging (other modes)."""
    return nullcontext() if mode == "merged" else handle.using(None)


def describe_device(model: Any) -> str:
    """Such as "cpu, threads: 2, float32" or "NVIDIA A100, float16"."""
    import torch

    kind = model.device.type
    name = torch.cuda.get_device_name(model.device) if kind == "cuda" else kind
    threads = f", threads: {torch.get_num_threads()}" if kind == "cpu" else ""
    return f"{name}{threads}, {str(model.dtype).removeprefix('torch.')}"


def print_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", notes: Sequence[str] = (), text: int = 1
) -> None:
    """A table, wide enough where stdout is a file; so many columns hold ``text``, the others figures."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
    columns = [Column(h, justify="right" if n >= text else "left", no_wrap=not n) for n, h in enumerate(heads)]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0)
    for row in rows:
        table.add_row(*row)
    if title:
        console.print(title, style="italic", markup=False)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", markup=False)


def print_comparison(about: dict[str, Any], runs: list[Run], repeats: int, decides: str) -> None:
    """The plain run and, each as a share of it, the others side by side, and what ``decides`` about it."""
    plain, *others = runs
    same = ("same" if run.answer == plain.answer else "differs" for run in others)
    rows = [("answer", plain.answer, *chain(*zip((run.answer for run in others), same)))]
    for field, title in ROWS.items():
        before, *after = (getattr(run, field) for run in runs)
        cells = chain(*((_number(one), f"{one / before:.2f}" if before and one else "") for one in after))
        rows.append((title, _number(before), *cells))
    how = (
        f"Times: wall clock on this device ({about['device']}), medians of {repeats} runs in turns after a warm-up. "
        f"FLOPs: calculated, from the picture to new token {TIMED_TOKENS}. KV cache: calculated, for the prompt and "
        f"{TIMED_TOKENS - 1} new tokens, as nothing looks at token {TIMED_TOKENS}."
    )
    unknown = (
        "FLOPs are unknown where pictures are cut into tiles or keep their size, and for LLMs of which costs/flops.py "
        "has no row."
    )
    notes = [how, unknown if plain.gflops is None else decides]
    if len(others) > 1:
        notes.append(
            f"{CONTROL}: the plain model, the picture scaled down to as many tokens: what merging has to beat."
        )
    heads = ("", plain.mode, *chain(*((run.mode, "ratio") for run in others)))
    print_table(heads, rows, f"{about['model']}, {about['method']}", notes)


def _number(value: float | None) -> str:
    """Whole numbers as they are, others with three significant digits."""
    if value is None:
        return "unknown"
    return str(value) if isinstance(value, int) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def print_json(about: dict[str, Any], runs: list[Run]) -> None:
    """One JSON object: what was asked, the answer, and one entry for each run."""
    entries = {run.mode: {k: v for k, v in asdict(run).items() if k != "mode" and v is not None} for run in runs}
    sys.stdout.write(json.dumps({**about, "answer": runs[-1].answer, "runs": entries}, ensure_ascii=False) + "\n")
