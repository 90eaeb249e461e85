"""What a measurement of speed writes down, on every device alike: rows that come one by one, and where they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pitome_mllm.costs.latency import in_turns, milliseconds, runs_alone

from ..documents import append, check_appends
from ..provenance import RESULTS, about_machine, check_commit, commit

CPU_RESULTS, GPU_RESULTS = RESULTS / "bench.csv", RESULTS / "bench-gpu.csv"


@dataclass(frozen=True)
class Row:
    """One thing that was measured."""

    phase: str  # such as "tower" or "first token"
    what: str  # "plain", or a method with what it was asked for
    mode: str  # "eager", or as what graph it ran
    batch: int
    ms: float | str = ""  # median of milliseconds
    p20: float | str = ""
    p80: float | str = ""
    share: float | str = ""  # of the plain model's time, of merging that of its own tower; the median of the rounds'
    value: float | str = ""  # what is no time


ABOUT = ("device", "dtype", "shape", "torch", "transformers", "commit", "date")


class Sheet:
    """Rows of one model on one device, added to the file ``out`` as they come; refuses one that cannot take them."""

    def __init__(self, out: Path | None, device: torch.device, dtype: torch.dtype, shape: str) -> None:
        self.out, self.device, self.rows = out, device, list[Row]()
        if out:
            check_commit(out, commit())
            check_appends(out, (*Row.__dataclass_fields__, *ABOUT))
        known = about_machine() | {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        if device.type == "cuda":
            known["device"] = torch.cuda.get_device_name(device)
        else:
            threads = torch.get_num_threads()
            known["device"] += f", {threads} thread{'s' * (threads > 1)}" + " (its own time)" * runs_alone(device)
        self.about = {name: known[name] for name in ABOUT}

    def add(self, *rows: Row) -> None:
        """Keep rows, and write them down."""
        self.rows += rows
        if self.out:
            append(self.out, rows, self.about)

    def time(
        self, phase: str, mode: str, batch: int, calls: Mapping[str, Callable[[], Any]], repeats: int, times: int = 1
    ) -> None:
        """Time calls in turns; shares are those of the first one. A call does its thing ``times`` times."""
        timed = {what: partial(milliseconds, call, self.device, times) for what, call in calls.items()}
        taken = in_turns(timed, repeats, warmup=3)
        base = next(iter(taken.values()))
        self.add(*(timing(phase, what, mode, batch, ms, base) for what, ms in taken.items()))


def timing(phase: str, what: str, mode: str, batch: int, ms: Sequence[float], base: Sequence[float]) -> Row:
    """The row of times, and of other times of the same rounds that they are a share of."""
    low, middle, high = (round(q, 4) for q in np.quantile(ms, (0.2, 0.5, 0.8)).tolist())
    return Row(phase, what, mode, batch, middle, low, high, round(float(np.median(np.divide(ms, base))), 4))
