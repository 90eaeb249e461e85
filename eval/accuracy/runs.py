"""Answer the benchmark under many settings, several at a time; a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..benchmark.score import score
from ..provenance import about_model

PLAIN = "plain"
WORK = Path("runs")  # finished runs, in a folder for each `work_folder`
Jobs = Mapping[str, Mapping[str, Any] | None]  # name of a run -> keywords of `attach`; None = the plain model

_loaded: dict[str, tuple[Any, Any]] = {}  # by name, once per process


def load(name: str) -> tuple[Any, Any]:
    """Model and processor, in float32, once per process."""
    import pitome_mllm

    if name not in _loaded:
        _loaded[name] = pitome_mllm.load(name, dtype="float32")
    return _loaded[name]


@dataclass(frozen=True)
class Answers:
    """What one run gave: whether each question is answered right, in the benchmark's order, and its CPU seconds."""

    right: np.ndarray
    seconds: float


def answers(model_name: str, settings: Mapping[str, Any] | None, split: str, limit: int | None) -> Answers:
    """Ask the questions of the split under ``settings`` of `attach`; None = the plain model."""
    from pitome_mllm import attach

    model, processor = load(model_name)
    handle = None if settings is None else attach(model, **settings)
    start = time.process_time()
    try:
        right = np.array([record.right for record in score(model, processor, split, limit)])
        return Answers(right, time.process_time() - start)
    finally:
        if handle:
            handle.remove()


def measure(
    jobs: Jobs, model_name: str, split: str, limit: int | None, work: Path, processes: int = 1
) -> dict[str, Answers]:
    """The answers of every job, from ``work`` where they are there already.

    Parameters
    ----------
    limit : only the first so many questions; None = all.
    work : folder for finished runs, one file each; see `work_folder`.
    processes : how many jobs run at a time, one thread each.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    work.mkdir(parents=True, exist_ok=True)
    files = {name: work / f"{name}.npz" for name in jobs}
    missing = [name for name in jobs if not files[name].exists()]
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(missing))

        def keep(name: str, found: Answers) -> None:
            part = files[name].with_suffix(".part.npz")
            np.savez(part, right=found.right, seconds=found.seconds)
            part.rename(files[name])
            progress.update(task, advance=1, description=name)

        _run({name: (model_name, jobs[name], split, limit) for name in missing}, processes, keep)
    return {name: _stored(file) for name, file in files.items()}


def _stored(file: Path) -> Answers:
    with np.load(file) as stored:
        return Answers(stored["right"], float(stored["seconds"]))


def _run(calls: dict[str, tuple], processes: int, keep: Callable[[str, Answers], None]) -> None:
    """Call `answers` with each of ``calls``, in this process or in several, and give each result to ``keep``."""
    if processes == 1:
        for name, arguments in calls.items():
            keep(name, answers(*arguments))
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(answers, *arguments): name for name, arguments in calls.items()}
        try:
            for done in as_completed(running):
                keep(running[done], done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all others would be answered first, for nothing
            raise


def sources(method: str | None) -> list[Path]:
    """The files that decide what is answered under a method (None: by the plain model); none of another method's."""
    import pitome_mllm

    package, here = Path(pitome_mllm.__file__).parent, Path(__file__).parent
    beside = [package / name for name in ("methods", "commands", "serving", "visualize", "cli.py")]
    shared = [path for path in package.rglob("*.py") if not any(path.is_relative_to(folder) for folder in beside)]
    return sorted({*shared, *(here.parent / "benchmark").glob("*.py"), here / "runs.py", *_files_of(method)})


def _files_of(method: str | None) -> set[Path]:
    """The file of a method's reducer, and those of what it takes from others."""
    from pitome_mllm import METHODS

    found: set[str] = set()
    todo = [] if method is None else [METHODS[method].reducer.__module__]
    while todo:
        found.add(name := todo.pop())
        owners = {getattr(thing, "__module__", None) for thing in vars(sys.modules[name]).values()}
        todo += [owner for owner in owners - found if owner and owner.startswith("pitome_mllm.methods.")]
    return {Path(sys.modules[name].__file__) for name in found}


def code_of(method: str | None) -> str:
    """A hash of the `sources` of a method, and of its row in METHODS."""
    from pitome_mllm import METHODS

    sha = hashlib.sha256(b"".join(path.read_bytes() for path in sources(method)))
    if method is not None:
        row = METHODS[method]
        sha.update(json.dumps([dict(row.options), dict(row.settings)], sort_keys=True, default=str).encode())
    return sha.hexdigest()[:16]


def run_name(label: object, settings: Mapping[str, Any]) -> str:
    """The name of a finished run: readable, and another one under other settings of `attach` or with other code."""
    said = json.dumps([dict(settings), code_of(settings.get("method"))], sort_keys=True)
    return f"{label}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def work_folder(work: Path, kind: str, model_name: str, split: str, limit: int | None) -> Path:
    """Where finished runs are kept: a folder for these weights, split, limit and libraries; see `run_name`."""
    about = provenance(model_name, split)
    parts = [kind, about["weights"], split, limit or "all", about["torch"], about["transformers"]]
    return work / "-".join(map(str, parts))


def provenance(model_name: str, split: str) -> dict[str, str]:
    """What every row of a CSV of answers says about where it comes from."""
    return about_model(model_name, load(model_name)[0], split)
