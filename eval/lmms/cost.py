"""What answering costs, measured while it happens, and calculated where it cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from pitome_mllm import estimate
from pitome_mllm.costs.flops import MLP_MATRICES
from pitome_mllm.costs.latency import timed
from pitome_mllm.families.geometry import geometry


@dataclass
class Lap:
    """Seconds that one batch took: all of it, up to the first new token, and in the vision tower."""

    total: float = 0.0
    prefill: float = 0.0
    tower: float = 0.0


@dataclass(frozen=True)
class Row:
    """One answered question: its pictures, tokens of its text, visual tokens that reached the LLM, new tokens."""

    pictures: int
    text: int
    visual: int
    new: int


class Meter:
    """Adds up the cost of every batch in this process.

    Parameters
    ----------
    model : what answers.
    settings : of `attach`; empty for the plain model.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.model, self.settings, self.sums = model, settings, Counter()
        self.flops = lru_cache(maxsize=None)(self._flops) if knows_flops(model) else None
        self.gpus = {part.device for part in model.parameters() if part.device.type == "cuda"}
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the peak of the GPUs' memory too."""
        self.sums.clear()
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    @contextmanager
    def lap(self) -> Iterator[Lap]:
        """Time what runs inside the ``with`` block."""
        lap = Lap()
        with timed(self.model) as clock:
            yield lap
        cost = clock.cost()
        lap.prefill, lap.tower = ((ms or 0.0) / 1000 for ms in (cost.prefill_ms, cost.tower_ms))
        lap.total = clock.total_ms / 1000

    def add(self, lap: Lap, rows: Sequence[Row]) -> None:
        """Count a batch."""
        self.sums.update(
            questions=len(rows),
            seconds=lap.total,
            tower_seconds=lap.tower,
            prefill_seconds=lap.prefill,
            pictures=sum(row.pictures for row in rows),
            visual_tokens=sum(row.visual for row in rows),
            prompt_tokens=sum(row.visual + row.text for row in rows),
            new_tokens=sum(row.new for row in rows),
        )
        if self.flops:
            self.sums["flops"] += sum(self.flops(row.pictures, row.text, row.new) for row in rows)

    def _flops(self, pictures: int, text: int, new: int) -> int:
        counts = {"images": pictures, "text_tokens": text, "new_tokens": new}
        return estimate(self.model, **self.settings, **counts).flops

    def gather(self, processes: int) -> dict[str, float]:
        """The means of all processes; empty if none of them answered anything. Every process has to call it."""
        mine = (dict(self.sums), sum(map(torch.cuda.max_memory_allocated, self.gpus)))
        found = [mine]
        if processes > 1:
            found = [None] * processes
            torch.distributed.all_gather_object(found, mine)
        return summary([sums for sums, _ in found], [peak for _, peak in found])


def summary(sums: Sequence[dict[str, float]], peaks: Sequence[int]) -> dict[str, float]:
    """Per question over all processes, from the sums of each and its peak bytes on GPUs; empty without questions.

    Times of a batch are shared out evenly among its questions, and tokens per second count the new tokens of all
    processes over the time of the slowest. On a CPU there is no peak: an operating system tells that of a whole
    process only, with all that ran in it before.
    """
    total = Counter()
    for one in sums:
        total.update(one)
    asked = total["questions"]
    if not asked:
        return {}
    elapsed = max(one.get("seconds", 0.0) for one in sums)
    means = ("visual_tokens", "prompt_tokens", "new_tokens")
    return {
        "questions_asked": asked,
        **{name: total[name] / asked for name in means},
        "visual_tokens_per_picture": total["visual_tokens"] / total["pictures"] if total["pictures"] else 0.0,
        "tower_ms": 1000 * total["tower_seconds"] / asked,
        "prefill_ms": 1000 * total["prefill_seconds"] / asked,
        "decode_ms": 1000 * (total["seconds"] - total["prefill_seconds"]) / asked,
        "total_new_tokens": total["new_tokens"],
        "seconds": elapsed,
        "tokens_per_second": total["new_tokens"] / elapsed,
        **({"peak_memory_mb": max(peaks) / 1e6} if any(peaks) else {}),
        **({"gflops": total["flops"] / asked / 1e9} if "flops" in total else {}),
    }


def knows_flops(model: nn.Module) -> bool:
    """Whether `estimate` knows the model's LLM, and how many tokens its pictures have: not where they are tiles."""
    return model.config.text_config.model_type in MLP_MATRICES and not geometry(model.config).family.tiles
