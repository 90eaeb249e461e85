"""Run a published table through lmms-eval, and set what comes out beside what was published."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import get_datetime_str
from loguru import logger
from tenacity import RetryError

from pitome_mllm import load
from pitome_mllm.methods import UserError

from ..benchmark.bootstrap import span
from .identity import identity, model_identity, short
from .manifest import NAME
from .model import PitomeLlava, place
from .plans import check_limit, control
from .results import EvaluationError, Results, draws, group_a, newest
from .rows import Options, Row, beside
from .scene_tasks import GROUP, TASKS
from .tables import PLAIN, RELATIVE, Run, Table, published
from .tables import TASKS as KNOWN

PICTURE = ("scene", "image_id", "imageId", "image_source")  # fields of documents that say which image they are about
ROTATED = 1_000_000  # MMBench: index of a question with rotated choices, less that of the question or a multiple


def reproduce(name: str, table: Table, options: Options, say: Callable[[str], None]) -> dict[Run, Results]:
    """The results of every run, from where they are already, or asked for now; a killed run goes on where it was.

    In a parallel run only the first process has results, and says anything. EvaluationError: data could not be fetched,
    a question not be answered, or results not be written.
    """
    check_limit(table, options.limit)
    for task in table.tasks:
        task_of(task, options.data)  # before anything is loaded or asked
    logger.remove()  # of lmms-eval's log, warnings and errors only
    logger.add(sys.stderr, level="WARNING")
    accelerator, found, loaded = Accelerator(), {}, {}
    first, load_with = accelerator.is_main_process, _load_options(options, accelerator)
    how = {"limit": options.limit, "batch_size": options.batch_size, "processes": accelerator.num_processes}
    how |= {key: value and str(value) for key, value in load_with.items()}
    models = {model: model_identity(model) for model in dict.fromkeys(run.model for run in table.runs)}
    for number, run in enumerate(table.runs, start=1):
        known = identity(run, table, options.data, models[run.model], how)
        here = options.out / name / f"{str(run).replace(',', '').replace(' ', '-')}-{short(known)}"
        there = newest(here / "results")
        accelerator.wait_for_everyone()  # before one of them writes there
        if first:
            say(f"[{number}/{len(table.runs)}] {run}{' is there already' if there else ''}")
        if there is None:
            if run.model not in loaded:
                loaded = {run.model: load(run.model, **load_with)}
            if first:
                here.mkdir(parents=True, exist_ok=True)
                (here / "identity.json").write_text(json.dumps(known, indent=1))
            there = _ask(run, table, loaded[run.model], options, here)
        if there is not None and first:
            found[run] = there
    return found


def _load_options(options: Options, accelerator: Accelerator) -> dict[str, Any]:
    """Keywords of `load`, with the device of this process."""
    given = {"bits": None, "dtype": None, "device": None} | (options.load or {})
    spread = given["device"] if given["device"] == "auto" else None
    return given | {"device": place(given["device"], spread, given["bits"], accelerator)}


def _ask(run: Run, table: Table, loaded: Any, options: Options, here: Path) -> Results | None:
    """Evaluate one run and write what lmms-eval's command line would write, all of it or nothing."""
    model_args = ",".join(f"{key}={value}" for key, value in {"pretrained": run.model, **run.settings}.items())
    own = set(table.tasks) <= {GROUP}
    manager = TaskManager(include_path=str(TASKS), include_defaults=not own, model_name=NAME)
    writing, done = here / "writing", here / "results"
    when, start = get_datetime_str(), time.perf_counter()
    # Not the chat model: lmms-eval makes tasks with changed settings for the simple one only.
    lm = PitomeLlava(
        run.model, batch_size=options.batch_size, system_prompt=table.system_prompt, loaded=loaded, **run.settings
    )
    try:
        with redirect_stdout(sys.stderr):  # some metrics print
            results = simple_evaluate(
                model=lm,
                model_args=model_args,
                tasks=[task_of(name, options.data) for name in table.tasks],
                task_manager=manager,
                batch_size=options.batch_size,
                limit=options.limit,
                use_cache=str(here / "cache"),
                bootstrap_iters=0,
                datetime_str=when,
                cli_args=argparse.Namespace(output_path=str(here), process_with_media=False),
            )
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise EvaluationError(f"lmms-eval could not get a task's data: {type(cause).__name__}: {cause}") from error
    finally:
        lm.close()
    if results is None:
        return None
    shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed here
    tracker = EvaluationTracker(output_path=str(writing))
    tracker.general_config_tracker.start_time = start  # else only the writing would count
    tracker.general_config_tracker.log_experiment_args(NAME, model_args, None, None, False)
    _write(tracker, results, when)
    newest(writing) or _lost(writing)
    writing.rename(done)
    return newest(done)


def _write(tracker: EvaluationTracker, results: dict[str, Any], when: str) -> None:
    """Results, and what lmms-eval says of every question, with its picture and what intervals need."""
    samples = results.pop("samples")
    tracker.date_id = when.replace(":", "-")
    for task, rows in samples.items():
        if task == KNOWN["mmbench"].task:
            note_hits(rows)
        for row in rows:
            row["picture"] = next((row["doc"][name] for name in PICTURE if name in row["doc"]), None)
        tracker.save_results_samples(task, rows)
        if not any(Path(tracker.output_path).rglob(f"{tracker.date_id}_samples_{task}.jsonl")):
            _lost(tracker.output_path)
    tracker.save_results_aggregated(results, None, when)


def _lost(folder: Any) -> Any:
    raise EvaluationError(f"lmms-eval could not write its results into {str(folder)!r}")


def task_of(name: str, data: Path | None) -> Any:
    """What lmms-eval takes as a task: its name, or its name with what differs from its own settings."""
    task = KNOWN[name]
    if data is None or not task.data:
        return {"task": task.task, **task.changes} if task.changes else task.task
    file = data / f"{task.task}.parquet"
    if not file.is_file():
        raise UserError(f"no data {str(file)!r}; put it there, or choose other tasks than {name} with --task")
    local = {"dataset_path": "parquet", "dataset_name": None, "process_docs": None}
    files = {"data_files": {task.split: str(file.resolve())}}
    return {"task": task.task, **task.changes, **local, "dataset_kwargs": files}


def note_hits(rows: Sequence[dict[str, Any]], metric: str = "gpt_eval_score") -> None:
    """Put into every row of a question of MMBench, not into those of its rotations, whether it counts as right ("hit").

    MMBench asks a question again with its choices rotated, and counts it as right only if all answers are. ``rows`` are
    what lmms-eval logged of each document of its static MMBench, whose own matching of answers decides.
    """
    import pandas
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    asked = pandas.DataFrame([row[metric] for row in rows])
    answers = dict(zip(asked["index"], asked["answer"], strict=True))
    for row in rows:
        if (index := row[metric]["index"]) < ROTATED:
            together = asked[asked["index"] % ROTATED == index]
            row["hit"] = float(mmbench_evaluator.eval_sub_data(together, answers, static_only=True))


def compare(name: str, table: Table, found: dict[Run, Results], with_group_a: bool = False) -> Iterator[Row]:
    """Every figure of every run beside the published one, and what a run keeps of the plain model's figures.

    ``with_group_a`` adds `group_a` of each task, where ``found`` holds the plain model and the run's `control`.
    """
    known = published(name)
    for run, results in found.items():
        plain = found.get(Run(run.model)) if run.method != PLAIN else None
        coarse = found.get(control(run)) if with_group_a and plain else None
        for task_name in table.tasks:
            task = KNOWN[task_name]
            figure = results.figure(task.task, task.metric, task.scale)
            yield beside(known, run, task_name, figure.questions, figure.value, figure.low, figure.high)
            if coarse:
                figure = group_a(plain, coarse, results, task.task, task.metric)
                about = (figure.questions, run.tokens, figure.value, figure.low, figure.high)
                yield Row(run, f"{task_name}, group A", *about)
        if plain and (share := _share(table, results, plain)):
            yield beside(known, run, RELATIVE, 0, *share)


def _share(table: Table, results: Results, plain: Results) -> tuple[float, float | None, float | None] | None:
    """Mean over tasks of what a run keeps of the plain model's figures, in per cent, with its paired interval.

    None where a figure is missing, or the plain model has nothing to keep.
    """
    shares, drawn = [], []
    for seed, name in enumerate(table.tasks, start=1):
        task = KNOWN[name]
        values = [one.figures(task.task).get(task.metric) for one in (results, plain)]
        if values[0] is None or not values[1]:
            return None
        shares.append(100 * values[0] / values[1])
        known = [draws(one.samples(task.task), task.metric, seed) for one in (results, plain)]
        if all(known):
            (_, ours), (_, theirs) = known
            drawn.append(100 * np.divide(ours, theirs, out=np.full(len(ours), np.nan), where=theirs > 0))
    bounds = span(np.mean(drawn, axis=0)) if len(drawn) == len(shares) else (None, None)
    return float(np.mean(shares)), *bounds
