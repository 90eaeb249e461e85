"""What answering costs, measured while it happens, and calculated where it cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from pitome_mllm import estimate
from pitome_mllm.costs.flops import flops_known
from pitome_mllm.costs.latency import timed
from pitome_mllm.hooks.tiles import at_most as of_parts

COUNTS = ("images", "text", "visual", "new")


def at_most(handle: Any, inputs: Any, placeholders: Sequence[int]) -> list[int]:
    """Visual tokens that each row, of so many ``placeholders``, can have in the LLM, as known before the tower runs."""
    plan = handle and handle.plan
    if not plan or plan.is_plain or not any(placeholders):
        return list(placeholders)
    if not handle.family.tiles:
        return [count // plan.available * plan.keep for count in placeholders]
    with handle.using(None):
        full = of_parts(handle, inputs)
    parts, found = iter(zip(full, of_parts(handle, inputs), strict=True)), []
    for count in placeholders:
        found.append(0)
        while count > 0:
            whole, left = next(parts)
            count, found[-1] = count - whole, found[-1] + left
    return found


class Meter:
    """Adds up the cost of every batch in this process; ``settings`` are those of `attach`."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.model, self.settings, self.sums = model, settings, Counter()
        self.flops = lru_cache(maxsize=None)(self._flops) if flops_known(model.config) else None
        self.gpus = {part.device for part in model.parameters() if part.device.type == "cuda"}
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the peak of the GPUs' memory too."""
        self.sums.clear()
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    @contextmanager
    def lap(self) -> Iterator[dict[str, float]]:
        """Milliseconds of what runs inside the ``with`` block: all, up to the first new token, in the vision tower."""
        lap: dict[str, float] = {}
        with timed(self.model) as clock:
            yield lap
        cost = clock.cost()
        lap.update(total_ms=clock.total_ms, prefill_ms=cost.prefill_ms or 0.0, tower_ms=cost.tower_ms or 0.0)

    def add(self, lap: dict[str, float], rows: Sequence[Sequence[int]]) -> None:
        """Count a batch; ``rows`` hold the `COUNTS` of each question."""
        sums = {name: sum(values) for name, values in zip(COUNTS, zip(*rows, strict=True), strict=True)}
        self.sums.update(questions=len(rows), **lap, **sums)
        if self.flops:
            self.sums["flops"] += sum(self.flops(images, text, new) for images, text, _, new in rows)

    def _flops(self, images: int, text: int, new: int) -> int:
        return estimate(self.model, **self.settings, images=images, text_tokens=text, new_tokens=new).flops

    def gather(self, processes: int) -> dict[str, float]:
        """Per question over all processes, each of which has to call it; empty if none of them answered anything.

        Times of a batch are shared out evenly among its questions, and tokens per second count the new tokens of all
        processes over the time of the slowest. Only GPUs tell a peak of memory.
        """
        found = [mine := (dict(self.sums), sum(map(torch.cuda.max_memory_allocated, self.gpus)))]
        if processes > 1:
            found = [None] * processes
            torch.distributed.all_gather_object(found, mine)
        total = sum((Counter(sums) for sums, _ in found), Counter())
        if not (asked := total["questions"]):
            return {}
        elapsed, peak = max(sums.get("total_ms", 0.0) for sums, _ in found) / 1000, max(peak for _, peak in found)
        return {
            "questions_asked": asked,
            "visual_tokens": total["visual"] / asked,
            "prompt_tokens": (total["visual"] + total["text"]) / asked,
            "new_tokens": total["new"] / asked,
            "visual_tokens_per_picture": total["visual"] / max(total["images"], 1),
            "tower_ms": total["tower_ms"] / asked,
            "prefill_ms": total["prefill_ms"] / asked,
            "decode_ms": (total["total_ms"] - total["prefill_ms"]) / asked,
            "total_new_tokens": total["new"],
            "seconds": elapsed,
            "tokens_per_second": total["new"] / elapsed,
            **({"peak_memory_mb": peak / 1e6} if peak else {}),
            **({"gflops": total["flops"] / asked / 1e9} if self.flops else {}),
        }
