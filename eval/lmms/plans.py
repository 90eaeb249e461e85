"""A table narrowed to what is asked for, and what its runs take. Needs no lmms-eval."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pitome_mllm import estimate
from pitome_mllm.costs.flops import MLP_MATRICES
from pitome_mllm.costs.memory import weight_bytes
from pitome_mllm.families.geometry import geometry
from pitome_mllm.methods import UserError
from pitome_mllm.serving.resolution import CONTROL, scales

from .tables import PLAIN, SHAPE_OF, TASKS, Run, Table, config_of, images_of, plan_of, tokens_of_one

# For estimates: tokens of a question with its instruction, and of an answer.
TEXT_TOKENS, NEW_TOKENS = 60, 4
# Rate and time per question beside it with which VQAv2 takes LLaVA-1.5-7B the hours that the PiToMe paper reports:
# 9 h 05 min with all tokens, 5 h 44 min at ratio 0.9. By FLOPs alone merging would save more than it did there.
SUSTAINED = 129.0  # TFLOP/s
BESIDE = 0.083  # seconds
GRIDS = ("pool", "downsample")


def narrowed(
    table: Table,
    model: str | None = None,
    methods: list[str] | None = None,
    keeps: list[int | float] | None = None,
    tasks: list[str] | None = None,
) -> Table:
    """The table with another model, or only with some methods, numbers of tokens and tasks; the plain model stays.

    A model that merges behind its projector only gets the runs that it can do, under the library's defaults; one whose
    pictures keep their size gets `CONTROL` beside each.
    """
    known = [run for run in table.runs if run.method != PLAIN]
    _check("task", tasks, table.tasks)
    _check("method", methods, [PLAIN, *dict.fromkeys(run.method for run in known)])
    _check("keep", keeps, sorted({run.keep for run in known if run.keep is not None}))
    runs = [run if model is None else replace(run, model=model) for run in table.runs]
    if methods is not None:
        runs = [run for run in runs if run.method in (PLAIN, *methods)]
    if keeps is not None:
        runs = [run for run in runs if run.method == PLAIN or run.keep in keeps]
    config = config_of(runs[0].model)
    if not geometry(config).family.merges_in_tower:
        runs = [one for one in (replace(run, published=False) for run in runs) if _possible(one)]
    if scales(config):
        runs = [run for old in runs for run in _with_smaller(old)]
    if all(run.method == PLAIN for run in runs) and methods != [PLAIN]:
        raise UserError("no run of the table has one of these methods and one of these numbers of tokens; see --plan")
    runs = [control(run, run.method) if run.method in GRIDS else run for run in runs]  # not every share
    return replace(table, tasks=tuple(tasks or table.tasks), runs=tuple(dict.fromkeys(runs)))


def _possible(run: Run) -> bool:
    with suppress(UserError):
        return plan_of(run) is not None
    return run.method in GRIDS and scales(config_of(run.model))  # which `CONTROL` takes the place of


def _with_smaller(run: Run) -> list[Run]:
    """A run of a model whose pictures keep their size, before it `CONTROL` for as many tokens, and no other control."""
    smaller = [Run(run.model, CONTROL, run.keep)] if run.keep is not None else []
    return smaller + [run] * (run.method not in GRIDS)


def _check(what: str, asked: list[Any] | None, known: Collection[Any]) -> None:
    unknown = [str(one) for one in asked or () if one not in known]
    if unknown:
        choices = f"choose from {', '.join(map(str, known))}" if known else f"it has no {what} at all"
        raise UserError(f"no {what} {', '.join(unknown)} in this table; {choices}")


def check_limit(table: Table, limit: int | None) -> None:
    """Refuse a number of questions of which a task cannot be scored."""
    for name in table.tasks:
        together = TASKS[name].together
        if limit is not None and limit % together:
            raise UserError(
                f"limit={limit} is not possible: {name} scores {together} questions together; give a multiple of "
                f"{together}"
            )


def with_controls(table: Table) -> Table:
    """The table with plain downsampling to as many tokens as each run keeps."""
    return replace(table, runs=tuple(dict.fromkeys((*table.runs, *(control(run) for run in table.runs)))))


def control(run: Run, method: str = "downsample") -> Run:
    """A method that divides the grid, at as many tokens of an image or tile as a run keeps, or the nearest it can.

    As published or under the library's defaults, as the run itself. `CONTROL` where pictures keep their size.
    """
    if run.method in (PLAIN, CONTROL):
        return run
    if scales(config_of(run.model)):
        return Run(run.model, CONTROL, run.keep)
    tokens = tokens_of_one(replace(run, method="uniform") if run.method in GRIDS else run)
    for keep in sorted(range(1, 2 * tokens), key=lambda n: abs(n - tokens)):
        found = Run(run.model, method, keep, published=run.published)
        with suppress(UserError):
            tokens_of_one(found)
            break
    return found


@dataclass(frozen=True)
class Estimated:
    """What a run takes: questions, 10^9 FLOPs for each of them, and hours of one GPU; None where they are not known."""

    run: Run
    documents: int
    gflops: float | None
    hours: float | None


def plan(table: Table, limit: int | None, tflops: float = SUSTAINED) -> list[Estimated]:
    """What every run of a table takes, of ``limit`` questions per task, on a machine that sustains ``tflops``."""
    check_limit(table, limit)
    sizes = [TASKS[name].documents for name in table.tasks]
    documents = sum(size if limit is None else min(size, limit) for size in sizes)
    found = []
    for run in table.runs:
        flops = _flops(run)
        if flops is None:
            found.append(Estimated(run, documents, None, None))
            continue
        seconds = flops / (tflops * 1e12) + (0 if table.of_encoders else BESIDE)
        found.append(Estimated(run, documents, flops / 1e9, documents * seconds / 3600))
    return found


def notes(table: Table) -> list[str]:
    """What has to be said of the tokens and FLOPs of a table's models."""
    found = {}
    for config in map(config_of, dict.fromkeys(run.model for run in table.runs)):
        shape, name = geometry(config), config.model_type
        if shape.family.side:
            found[f"tokens of {name}: of a picture that has {shape.available:,}; other sizes have others"] = None
        if not shape.family.linear:
            found[f"FLOPs and hours of {name}: of the LLM alone; those of its vision tower are not known"] = None
    return [*found]


@cache
def _flops(run: Run) -> int | None:
    text, alone = getattr(config_of(run.model), "text_config", None), geometry(config_of(run.model)).family.encoder
    if text is not None and text.model_type not in MLP_MATRICES and not alone:
        return None
    about = {"text_tokens": TEXT_TOKENS, "new_tokens": NEW_TOKENS, "images": images_of(run.model)}
    return estimate(config_of(run.model), plan_of(run), **about).flops


def downloads(table: Table, local: bool) -> list[str]:
    """What a first run fetches from the hub: weights, with their size in float16 where it is known of all of a model,
    and data sets that are not local.
    """
    models = [m for m in dict.fromkeys(run.model for run in table.runs) if m in SHAPE_OF]
    sized = [model for model in models if not table.of_encoders]  # of those the tower's alone is
    weights = [f"{m} ({weight_bytes(config_of(m)) / 1e9:.1f} GB)" if m in sized else m for m in models]
    data = dict.fromkeys(TASKS[name].data for name in table.tasks)
    return weights + [name for name in data if name and not local]
