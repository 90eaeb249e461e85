"""Published tables as data: which runs they need, what was published, and what that takes. Needs no lmms-eval."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pitome_mllm import METHODS, estimate
from pitome_mllm.memory import weight_bytes

HERE = Path(__file__).parent
PUBLISHED = HERE / "data" / "published.csv"
CURVES = HERE / "results" / "curves.csv"
PLAIN = "none"
RELATIVE = "relative"  # mean over a table's tasks of what a run keeps of the plain model's figure, in per cent
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_7B, LLAVA_13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
SHAPE_OF = {LLAVA_7B: "llava-1.5-7b", LLAVA_13B: "llava-1.5-13b"}
# For estimates: tokens of a question with its instruction, and of an answer.
TEXT_TOKENS, NEW_TOKENS = 60, 4


@dataclass(frozen=True)
class Task:
    """A task of lmms-eval, the figure of it that is published, and its size.

    Attributes
    ----------
    task : lmms-eval's name.
    metric : the key in its results.
    split : of its data set.
    documents : questions in it.
    counted : whether that number was read where the data set is described (for ours: off its files), or is about right.
    data : the data set on the Hugging Face hub; empty for ours.
    scale : published figure over lmms-eval's.
    changes : what differs from lmms-eval's own settings of the task.
    """

    task: str
    metric: str
    split: str
    documents: int
    data: str = ""
    scale: float = 100.0
    counted: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)


_SHORT = "\nAnswer the question using a single word or phrase."
_OCR = {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": _SHORT, "ocr": True}}}
_HUB = "lmms-lab-encoder"
# Exact counts are of the cards of VQA, VizWiz-VQA and ScienceQA-IMG; of the others there was a rounded one or none.
TASKS = {
    "vqav2_val": Task("vqav2_val", "exact_match", "validation", 214_354, f"{_HUB}/VQAv2"),
    "gqa": Task("gqa", "exact_match", "testdev", 12_578, f"{_HUB}/GQA", counted=False),
    "vizwiz_vqa_val": Task("vizwiz_vqa_val", "exact_match", "val", 4_319, f"{_HUB}/VizWiz-VQA"),
    "scienceqa_img": Task("scienceqa_img", "exact_match", "test", 2_017, f"{_HUB}/ScienceQA"),
    "textvqa_val": Task("textvqa_val", "exact_match", "validation", 5_000, f"{_HUB}/textvqa", counted=False),
    "textvqa_ocr": Task(
        "textvqa_val", "exact_match", "validation", 5_000, f"{_HUB}/textvqa", counted=False, changes=_OCR
    ),
    "mme": Task("mme", "mme_perception_score", "test", 2_374, f"{_HUB}/MME", scale=1, counted=False),
    "pope": Task("pope", "pope_f1_score", "test", 9_000, f"{_HUB}/POPE", counted=False),
    "mmbench": Task("mmbench_en_dev_static", "gpt_eval_score", "dev", 4_329, f"{_HUB}/MMBench", scale=1, counted=False),
    "pitome_scenes": Task("pitome_scenes", "exact_match", "test", 3_360),
}


@dataclass(frozen=True)
class Run:
    """One model with one setting; without keep and ratio the plain model."""

    model: str
    method: str = PLAIN
    keep: int | None = None
    ratio: float | None = None

    @property
    def amount(self) -> str:
        """Such as "keep=144"; empty for the plain model."""
        given = {"keep": self.keep, "ratio": self.ratio}
        return "".join(f"{name}={value}" for name, value in given.items() if value is not None)

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of the plug-in."""
        given = {"method": self.method, "keep": self.keep, "ratio": self.ratio}
        return {name: value for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        return " ".join(filter(None, [self.model.split("/")[-1], self.method, self.amount]))


@dataclass(frozen=True)
class Table:
    """Runs and tasks of a published table; ``system_prompt`` stands in front of every question."""

    about: str
    tasks: tuple[str, ...]
    runs: tuple[Run, ...]
    system_prompt: str = ""


_PAPER = ("pitome", "pitome-llava", "tome", "tofu", "dct", "diffrate")
_KEEPS = (192, 128, 64, 32)
_TINY = ("pitome-tuned", "pitome", "tome")
TABLES = {
    "pitome-paper": Table(
        "PiToMe (NeurIPS 2024) on LLaVA-1.5: 7B at ratio 0.9, 13B at 0.925, TextVQA without OCR hint",
        ("vqav2_val", "gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val", "mme"),
        (
            Run(LLAVA_7B),
            *(Run(LLAVA_7B, method, ratio=0.9) for method in _PAPER),
            Run(LLAVA_13B),
            *(Run(LLAVA_13B, method, ratio=0.925) for method in _PAPER),
        ),
        VICUNA,
    ),
    "pruning-literature": Table(
        "token pruning on LLaVA-1.5-7B at 192, 128, 64 and 32 tokens, TextVQA with OCR hint; and ToMe as published",
        ("gqa", "mmbench", "mme", "pope", "scienceqa_img", "textvqa_ocr"),
        (
            Run(LLAVA_7B),
            *(Run(LLAVA_7B, method, keep=keep) for method in METHODS for keep in _KEEPS),
            Run(LLAVA_7B, "tome", keep=94),
            Run(LLAVA_7B, "tome", ratio=0.9),
        ),
        VICUNA,
    ),
    "embedded": Table(
        "the embedded model and benchmark, beside what `python -m pitome_mllm_eval.curves` measured of all questions",
        ("pitome_scenes",),
        (Run("tiny"), *(Run("tiny", method, keep=keep) for method in _TINY for keep in (144, 72, 36))),
    ),
}


def narrowed(
    table: Table, model: str | None, methods: list[str] | None, keeps: list[int] | None, tasks: list[str] | None
) -> Table:
    """The table with another model, or only with some methods, numbers of tokens and tasks; the plain model stays.

    Raises
    ------
    ValueError : a task that the table does not have, or nothing but the plain model is left.
    """
    unknown = sorted({*(tasks or ())} - {*table.tasks})
    if unknown:
        raise ValueError(f"no task {', '.join(unknown)} in this table; choose from {', '.join(table.tasks)}")
    runs = [run if model is None else replace(run, model=model) for run in table.runs]
    if methods is not None:
        runs = [run for run in runs if run.method in (PLAIN, *methods)]
    if keeps is not None:
        runs = [run for run in runs if run.method == PLAIN or run.keep in keeps]
    if all(run.method == PLAIN for run in runs):
        methods = sorted({run.method for run in table.runs} - {PLAIN})
        raise ValueError(f"nothing of the table is left; it has the methods {', '.join(methods)}")
    return replace(table, tasks=tuple(tasks or table.tasks), runs=tuple(dict.fromkeys(runs)))


Published = dict[tuple[str, str, str, str], tuple[float, str]]  # (model, method, amount, task): figure and source


def published(table: str) -> Published:
    """What a table's figures were where they were published."""
    if table == "embedded":
        return _measured()
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == table]
    return {
        (row["model"], row["method"], row["amount"], row["task"]): (float(row["value"]), row["source"]) for row in rows
    }


def _measured() -> Published:
    """The embedded benchmark as `curves` measured it, every method at its own place; empty without a checkout."""
    if not CURVES.is_file():
        return {}
    with CURVES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["like"] and not row["against"] and row["group"] == "all"]
    found = {}
    for row in rows:
        own = METHODS[row["method"]].settings.get("where", "tower") if row["method"] in METHODS else None
        source = f"eval/results/curves.csv, {row['questions']} questions"
        if row["method"] == "plain":
            found["tiny", PLAIN, "", "pitome_scenes"] = (100 * float(row["value"]), source)
        elif row["where"] == own:
            key = ("tiny", row["method"], f"keep={row['keep']}", "pitome_scenes")
            found[key] = (100 * float(row["value"]), source)
    return found


@dataclass(frozen=True)
class Estimated:
    """What a run takes: questions, 10^9 FLOPs for each of them, and hours at a sustained rate."""

    run: Run
    documents: int
    gflops: float
    hours: float


def plan(table: Table, limit: int | None, tflops: float) -> list[Estimated]:
    """What every run of a table takes.

    Parameters
    ----------
    limit : questions per task; None = all.
    tflops : 10^12 FLOPs per second that the machine sustains.
    """
    sizes = [TASKS[name].documents for name in table.tasks]
    documents = sum(size if limit is None else min(size, limit) for size in sizes)
    found = []
    for run in table.runs:
        settings = {} if run.method == PLAIN else run.settings
        one = estimate(config_of(run.model), **settings, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS)
        found.append(Estimated(run, documents, one.flops / 1e9, documents * one.flops / (tflops * 1e12) / 3600))
    return found


def downloads(table: Table) -> list[str]:
    """What a first run fetches from the hub: weights with their size in float16, and data sets."""
    models = [m for m in dict.fromkeys(run.model for run in table.runs) if m in SHAPE_OF]
    weights = [f"{model} ({weight_bytes(config_of(model)) / 1e9:.1f} GB)" for model in models]
    return weights + [data for data in dict.fromkeys(TASKS[name].data for name in table.tasks) if data]


def config_of(model: str) -> Any:
    """The configuration of a model of the tables, or of one that is here; nothing is fetched."""
    from pitome_mllm.loading import read_config
    from pitome_mllm.shapes import get_shape

    return get_shape(SHAPE_OF[model]).config() if model in SHAPE_OF else read_config(model)
