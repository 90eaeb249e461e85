"""Published tables as data: which runs they need, and what these take. Needs no lmms-eval."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pitome_mllm import METHODS, estimate
from pitome_mllm.costs.memory import weight_bytes
from pitome_mllm.methods import UserError

from ..accuracy.curves import called

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
# Rate and time per question beside it with which VQAv2 takes LLaVA-1.5-7B the hours that the PiToMe paper reports:
# 9 h 05 min with all tokens, 5 h 44 min at ratio 0.9. By FLOPs alone merging would save more than it did there.
SUSTAINED = 129.0  # TFLOP/s
BESIDE = 0.083  # seconds


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
    together : questions that lmms-eval scores together and stumbles over if one is missing.
    changes : what differs from lmms-eval's own settings of the task.
    """

    task: str
    metric: str
    split: str
    documents: int
    data: str = ""
    scale: float = 100.0
    counted: bool = True
    together: int = 1
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
    "mme": Task("mme", "mme_perception_score", "test", 2_374, f"{_HUB}/MME", scale=1, counted=False, together=2),
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
    published: bool = False

    @property
    def amount(self) -> str:
        """Such as "keep=144"; empty for the plain model."""
        given = {"keep": self.keep, "ratio": self.ratio}
        return "".join(f"{name}={value}" for name, value in given.items() if value is not None)

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of the plug-in."""
        given = {"method": self.method, "keep": self.keep, "ratio": self.ratio, "published": self.published or None}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def name(self) -> str:
        return called(self.method, self.published)

    def __str__(self) -> str:
        return " ".join(filter(None, [self.model.split("/")[-1], self.name, self.amount]))


@dataclass(frozen=True)
class Table:
    """Runs and tasks of a published table; ``system_prompt`` stands in front of every question."""

    about: str
    tasks: tuple[str, ...]
    runs: tuple[Run, ...]
    system_prompt: str = ""


_PAPER = ("pitome", "pitome-llava", "tome", "tofu", "dct", "diffrate")
_KEEPS = (192, 128, 64, 32)
_TINY = (("pitome", False), ("tome", False), ("pitome", True), ("tome", True))
TABLES = {
    "pitome-paper": Table(
        "PiToMe (NeurIPS 2024) on LLaVA-1.5: 7B at ratio 0.9, 13B at 0.925, TextVQA without OCR hint",
        ("vqav2_val", "gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val", "mme"),
        (
            Run(LLAVA_7B),
            *(Run(LLAVA_7B, method, ratio=0.9, published=True) for method in _PAPER),
            Run(LLAVA_13B),
            *(Run(LLAVA_13B, method, ratio=0.925, published=True) for method in _PAPER),
        ),
        VICUNA,
    ),
    "pruning-literature": Table(
        "token pruning on LLaVA-1.5-7B at 192, 128, 64 and 32 tokens, TextVQA with OCR hint; and ToMe as published",
        ("gqa", "mmbench", "mme", "pope", "scienceqa_img", "textvqa_ocr"),
        (
            Run(LLAVA_7B),
            *(Run(LLAVA_7B, method, keep=keep, published=True) for method in METHODS for keep in _KEEPS),
            Run(LLAVA_7B, "tome", keep=94, published=True),
            Run(LLAVA_7B, "tome", ratio=0.9, published=True),
        ),
        VICUNA,
    ),
    "embedded": Table(
        "the embedded model and benchmark, beside what `pitome_mllm_eval.accuracy.curves` measured of all questions",
        ("pitome_scenes",),
        (
            Run("tiny"),
            *(Run("tiny", method, keep=keep, published=said) for method, said in _TINY for keep in (144, 72, 36)),
        ),
    ),
}


def narrowed(
    table: Table, model: str | None, methods: list[str] | None, keeps: list[int] | None, tasks: list[str] | None
) -> Table:
    """The table with another model, or only with some methods, numbers of tokens and tasks; the plain model stays.

    Raises
    ------
    ValueError : something that the table does not have, or a choice that leaves nothing of it.
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
    if all(run.method == PLAIN for run in runs) and methods != [PLAIN]:
        raise UserError("no run of the table has one of these methods and one of these numbers of tokens; see --plan")
    return replace(table, tasks=tuple(tasks or table.tasks), runs=tuple(dict.fromkeys(runs)))


def _check(what: str, asked: list[Any] | None, known: Collection[Any]) -> None:
    """ValueError for what is asked for and not known."""
    unknown = [str(one) for one in asked or () if one not in known]
    if unknown:
        choices = f"choose from {', '.join(map(str, known))}" if known else f"it has no {what} at all"
        raise UserError(f"no {what} {', '.join(unknown)} in this table; {choices}")


def check_limit(table: Table, limit: int | None) -> None:
    """ValueError where so many questions cannot be scored."""
    for name in table.tasks:
        if limit is not None and limit % TASKS[name].together:
            raise UserError(
                f"limit={limit} is not possible: {name} scores {TASKS[name].together} questions together; give a "
                f"multiple of {TASKS[name].together}"
            )


@dataclass(frozen=True)
class Estimated:
    """What a run takes: questions, 10^9 FLOPs for each of them, and hours of one GPU."""

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

    Raises
    ------
    ValueError : so many questions cannot be scored.
    """
    check_limit(table, limit)
    sizes = [TASKS[name].documents for name in table.tasks]
    documents = sum(size if limit is None else min(size, limit) for size in sizes)
    found = []
    for run in table.runs:
        settings = {} if run.method == PLAIN else run.settings
        one = estimate(config_of(run.model), **settings, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS)
        seconds = documents * (BESIDE + one.flops / (tflops * 1e12))
        found.append(Estimated(run, documents, one.flops / 1e9, seconds / 3600))
    return found


def downloads(table: Table, local: bool) -> list[str]:
    """What a first run fetches from the hub: weights with their size in float16, and data sets that are not local."""
    models = [m for m in dict.fromkeys(run.model for run in table.runs) if m in SHAPE_OF]
    weights = [f"{model} ({weight_bytes(config_of(model)) / 1e9:.1f} GB)" for model in models]
    data = dict.fromkeys(TASKS[name].data for name in table.tasks)
    return weights + [name for name in data if name and not local]


def config_of(model: str) -> Any:
    """The configuration of a model of the tables, or of one that is here; nothing is fetched."""
    from pitome_mllm.costs.published import get_shape
    from pitome_mllm.loading import read_config

    return get_shape(SHAPE_OF[model]).config() if model in SHAPE_OF else read_config(model)
