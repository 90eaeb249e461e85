"""Answer the benchmark under many settings, in several processes at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..benchmark.score import predicted
from ..provenance import about_model

PLAIN = "plain"
Settings = Mapping[str, Any]  # keywords of `attach`


@cache
def load(name: str) -> tuple[Any, Any]:
    """Model and processor, in float32, once per process."""
    import pitome_mllm

    return pitome_mllm.load(name, dtype="float32")


@dataclass(frozen=True)
class QuestionSet:
    """Which questions which model answers: the first ``limit`` of a split (None = all)."""

    model: str
    split: str
    limit: int | None


@dataclass(frozen=True)
class Answers:
    """What one run gave: whether each question is answered right, in the benchmark's order, and its CPU seconds."""

    right: np.ndarray
    seconds: float


def answers(asked: QuestionSet, settings: Settings | None) -> Answers:
    """Ask the questions under ``settings``; None = the plain model."""
    from pitome_mllm import attach

    model, processor = load(asked.model)
    handle = None if settings is None else attach(model, **settings)
    start = time.process_time()
    try:
        found = predicted(model, processor, asked.split, asked.limit)
        right = np.array([answer == question.answer for _, question, answer in found])
        return Answers(right, round(time.process_time() - start, 1))
    finally:
        if handle:
            handle.remove()


def measure(
    asked: QuestionSet, wanted: Sequence[Settings | None], jobs: int = 1, seconds: float | None = None
) -> Iterator[tuple[int, Answers]]:
    """The place in ``wanted`` and the answers of every run, as they come, by so many processes of one thread each.

    After so many seconds what runs is given up, and nothing else begun.
    """
    until = None if seconds is None else time.monotonic() + seconds
    calls = [(asked, number, settings) for number, settings in enumerate(wanted)]
    if jobs == 1:
        for call in calls:
            if until is None or time.monotonic() < until:
                yield _numbered(call)
        return
    with get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:  # what runs ends with it
        found = pool.imap_unordered(_numbered, calls)
        for _ in calls:
            try:
                yield found.next(None if until is None else max(0, until - time.monotonic()))
            except TimeoutError:
                return


def _numbered(call: tuple[QuestionSet, int, Settings | None]) -> tuple[int, Answers]:
    asked, number, settings = call
    return number, answers(asked, settings)


def code() -> str:
    """A hash of all files that decide what is answered."""
    import pitome_mllm

    package, here = Path(pitome_mllm.__file__).parent, Path(__file__).parent
    beside = [package / name for name in ("commands", "serving", "visualize", "cli.py")]
    files = [path for path in package.rglob("*.py") if not any(path.is_relative_to(folder) for folder in beside)]
    files += [*(here.parent / "benchmark").glob("*.py"), here / "runs.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


@cache
def provenance(model_name: str, split: str) -> dict[str, str]:
    """What every row of a CSV of answers says about where it comes from."""
    return about_model(model_name, load(model_name)[0], split)
