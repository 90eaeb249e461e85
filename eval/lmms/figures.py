"""The figures of results files, each with what it cost and how it came about: the rows of the report's CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pitome_mllm.methods import UserError

from ..accuracy.curves import called
from .intervals import FIGURES
from .results_files import Results


@dataclass(frozen=True)
class Row:
    """One figure of one run, with what a question cost; "" = not known.

    ``resampled`` says over what the interval is. ``seconds`` is what lmms-eval says of the whole run. Other times are
    means per question of batches; what was read from lmms-eval's cache cost nothing and does not count.
    """

    model: str
    method: str
    asked: str
    task: str
    metric: str
    questions: int
    value: float
    low: float | str
    high: float | str
    resampled: str
    visual_tokens: float | str
    prompt_tokens: float | str
    tower_ms: float | str
    prefill_ms: float | str
    decode_ms: float | str
    latency_ms: float | str
    tokens_per_second: float | str
    peak_memory_mb: float | str
    gflops: float | str
    timed_questions: int
    batch: int
    processes: int
    seconds: float
    device: str
    dtype: str
    bits: int | str
    attention: str
    system_prompt: str
    date: str
    pitome_mllm: str
    torch: str
    transformers: str
    lmms_eval: str


def rows(results: Results) -> list[Row]:
    """The figures of one results file: of groups where there are any, else of tasks.

    Raises
    ------
    ValueError : another model wrote the file.
    """
    said, cost, content = results.about, results.about["cost"], results.content
    settings = (
        " ".join(f"{k}={v}" for k, v in said["asked"].items() if k not in ("method", "published")) or "all tokens"
    )
    timed = {name: cost.get(name, "") for name in ("visual_tokens", "prompt_tokens", "tower_ms", "prefill_ms")}
    timed |= {name: cost.get(name, "") for name in ("decode_ms", "tokens_per_second", "peak_memory_mb", "gflops")}
    timed = {name: round(value, 3) if value != "" else value for name, value in timed.items()}
    latency = round(cost["prefill_ms"] + cost["decode_ms"], 3) if cost else ""
    inside = {task for tasks in content["group_subtasks"].values() for task in tasks}
    found = []
    for task in content["results"]:
        if task in inside:
            continue
        for metric in results.figures(task):
            figure = results.figure(task, metric)
            found.append(
                Row(
                    model=said["pretrained"],
                    method=called(said["method"], said["asked"].get("published", False)),
                    asked=settings,
                    task=task,
                    metric=metric,
                    questions=figure.questions,
                    value=round(figure.value, 6),
                    low="" if figure.low is None else round(figure.low, 6),
                    high="" if figure.high is None else round(figure.high, 6),
                    resampled=_resampled(results.samples(task)),
                    **timed,
                    latency_ms=latency,
                    timed_questions=cost.get("questions_asked", 0),
                    batch=said["batch"],
                    processes=said["processes"],
                    seconds=round(float(content["total_evaluation_time_seconds"]), 1),
                    device=said["device"],
                    dtype=said["dtype"].removeprefix("torch."),
                    **{name: said[name] for name in ("bits", "attention", "system_prompt")},
                    date=content["date"],
                    **{name: said["versions"][name] for name in ("pitome_mllm", "torch", "transformers", "lmms_eval")},
                )
            )
    return found


def _resampled(samples: Sequence[dict[str, Any]]) -> str:
    """lmms-eval's command line does not say which picture a question is about; without questions, nothing."""
    if not samples:
        return ""
    return "pictures" if any(sample.get("picture") is not None for sample in samples) else "questions"


# What tells runs of one setting apart; in the table where it differs.
CONDITIONS = (
    *("questions", "device", "dtype", "bits", "attention", "system_prompt", "batch", "processes"),
    *("pitome_mllm", "lmms_eval", "torch", "transformers"),
)


def differing(found: Sequence[Row]) -> list[str]:
    """The conditions that are not the same for all rows."""
    return [name for name in CONDITIONS if len({getattr(row, name) for row in found}) > 1]


def main_figures(found: Sequence[Row]) -> list[Row]:
    """One row per run and task: the first metric whose interval is known, else the first.

    Raises
    ------
    ValueError : two runs of one setting, under the same conditions.
    """
    best: dict[tuple[Any, ...], Row] = {}
    seen: dict[tuple[Any, ...], Row] = {}
    for row in found:
        key = (row.model, row.method, row.asked, row.task, *(getattr(row, name) for name in CONDITIONS))
        if (before := seen.setdefault((*key, row.metric), row)) is not row:
            raise UserError(
                f"two runs of {row.model} {row.method} {row.asked} on {row.task} under the same conditions, of "
                f"{before.date} and {row.date}; name the folder of one of them only"
            )
        if key not in best or (best[key].metric not in FIGURES and row.metric in FIGURES):
            best[key] = row
    methods = list(dict.fromkeys(row.method for row in best.values()))
    return sorted(best.values(), key=lambda row: (row.model, row.task, methods.index(row.method), -_tokens(row)))


def _tokens(row: Row) -> float:
    """Visual tokens; nothing where they are not known."""
    return 0.0 if row.visual_tokens == "" else row.visual_tokens
