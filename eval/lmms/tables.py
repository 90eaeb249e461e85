"""Published tables as data: which tasks and runs they need, and what was published. Needs no lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pitome_mllm import METHODS
from pitome_mllm.costs.published import get_shape
from pitome_mllm.families.encoders import ENCODER_OF_CONFIG
from pitome_mllm.families.geometry import geometry
from pitome_mllm.loading import read_config
from pitome_mllm.methods import UserError
from pitome_mllm.plan import Plan, make_plan
from pitome_mllm.serving.resolution import CONTROL, near_grid
from pitome_mllm.settings import Settings

from ..accuracy.curves import PLAIN as ALL_TOKENS
from ..accuracy.curves import SUMMARY, called, summary
from ..documents import read
from ..provenance import RESULTS

FIGURES = Path(__file__).parents[1] / "data" / "published.csv"
PLAIN = "none"
RELATIVE = "relative"  # mean over a table's tasks of what a run keeps of the plain model's figure, in per cent
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_7B, LLAVA_13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
LLAVA_NEXT = "llava-hf/llava-v1.6-vicuna-7b-hf"
CLIP_L, CLIP_B, DEIT = (
    "openai/clip-vit-large-patch14-336",
    "openai/clip-vit-base-patch16",
    "facebook/deit-small-patch16-224",
)
BLIP = "Salesforce/blip-itm-base-flickr"
SHAPE_OF = {LLAVA_7B: "llava-1.5-7b", LLAVA_13B: "llava-1.5-13b", LLAVA_NEXT: "llava-next-7b"}
SHAPE_OF |= {CLIP_L: "clip-l-336", CLIP_B: "clip-b-16", DEIT: "deit-s", BLIP: "blip-b-384"}


@dataclass(frozen=True)
class Task:
    """A task of lmms-eval, or of encoders alone; the figure of it that is published, and its size."""

    task: str  # lmms-eval's name,
    metric: str  # the key in its results,
    split: str  # and the part of its data set
    documents: int  # questions in it
    data: str = ""  # the data set on the Hugging Face hub; empty for ours
    scale: float = 100.0  # published figure over lmms-eval's
    counted: bool = True  # whether ``documents`` was read where the data set is described, or is about right
    together: int = 1  # questions that lmms-eval scores together and stumbles over if one is missing
    changes: Mapping[str, Any] = field(default_factory=dict)  # what differs from lmms-eval's own settings of the task


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
ENCODER_TASKS = {  # of encoders alone: pictures of the split
    "flickr30k": Task("flickr30k", "Rsum", "test", 1_000, "nlphuji/flickr30k"),
    "coco": Task("coco", "Rsum", "test", 5_000, "nlphuji/mscoco_2014_5k_test_image_text_retrieval"),
    "imagenet": Task("imagenet", "top-1", "validation", 50_000, "ILSVRC/imagenet-1k"),
}
TASKS |= ENCODER_TASKS


@dataclass(frozen=True)
class Run:
    """One model with one setting; without keep and ratio the plain model."""

    model: str
    method: str = PLAIN
    keep: int | float | None = None
    ratio: float | None = None
    published: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of the plug-in."""
        given = {"method": self.method, "keep": self.keep, "ratio": self.ratio, "published": self.published or None}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def attached(self) -> dict[str, Any]:
        """Keywords of `attach`."""
        return {} if self.method in (PLAIN, CONTROL) else self.settings

    @property
    def amount(self) -> str:
        """Such as "keep=144"; empty for the plain model."""
        return "".join(f"{name}={self.settings[name]}" for name in ("keep", "ratio") if name in self.settings)

    @property
    def name(self) -> str:
        """What tables call the method."""
        return called(self.method, self.published)

    @property
    def tokens(self) -> int:
        """Of an image that reach the LLM; where it is cut into tiles, of the shape's number of them."""
        return tokens_of_one(self) * images_of(self.model)

    def __str__(self) -> str:
        return " ".join(filter(None, [self.model.split("/")[-1], self.name, self.amount]))


@dataclass(frozen=True)
class Table:
    """Runs and tasks of a published table; ``system_prompt`` stands before every question."""

    about: str
    tasks: tuple[str, ...]
    runs: tuple[Run, ...]
    system_prompt: str = ""

    @property
    def of_encoders(self) -> bool:
        """Whether it is of encoders alone, without lmms-eval."""
        return {*self.tasks} <= {*ENCODER_TASKS}


def _alone(model: str, *ratios: float) -> tuple[Run, ...]:
    """The plain encoder, and methods as published in every block."""
    methods = ("pitome", "tome", "tofu", "dct", "diffrate")
    return Run(model), *(Run(model, method, ratio=ratio, published=True) for ratio in ratios for method in methods)


def _every(model: str, *keeps: int | float) -> tuple[Run, ...]:
    """The plain model and every method, as published, at every number or share of tokens."""
    return Run(model), *(Run(model, method, keep, published=True) for method in METHODS for keep in keeps)


_PAPER = ("pitome", "pitome-llava", "tome", "tofu", "dct", "diffrate")
_TINY = (("pitome", False), ("tome", False), ("pitome", True), ("tome", True))
_TASKS = ("gqa", "mmbench", "mme", "pope", "scienceqa_img", "textvqa_ocr")
TABLES = {
    "pitome-paper": Table(
        "PiToMe (NeurIPS 2024) on LLaVA-1.5: 7B at ratio 0.9, 13B at 0.925, TextVQA without OCR hint. The paper does "
        "not say how many visual tokens its rows have; in later papers figures like its 7B row's are of 160 to 200",
        ("vqav2_val", "gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val", "mme"),
        tuple(
            run
            for model, ratio in ((LLAVA_7B, 0.9), (LLAVA_13B, 0.925))
            for run in (Run(model), *(Run(model, method, ratio=ratio, published=True) for method in _PAPER))
        ),
        VICUNA,
    ),
    "pruning-literature": Table(
        "token pruning on LLaVA-1.5-7B at 192, 128, 64 and 32 tokens, TextVQA with OCR hint; and ToMe as published",
        _TASKS,
        (
            *_every(LLAVA_7B, 192, 128, 64, 32),
            Run(LLAVA_7B, "tome", keep=94, published=True),
            Run(LLAVA_7B, "tome", ratio=0.9, published=True),
        ),
        VICUNA,
    ),
    "llava-next": Table(
        "token pruning on LLaVA-NeXT-7B at 640, 320 and 160 of 2,880 tokens: so many of each of an image's 5 tiles",
        _TASKS,
        _every(LLAVA_NEXT, 128, 64, 32),
        VICUNA,
    ),
    "shares": Table(
        "token pruning at 33, 22 and 11 %, and at 20, 10 and 5 % of the tokens, for any --model",
        _TASKS,
        _every(LLAVA_7B, 0.333, 0.222, 0.111, 0.2, 0.1, 0.05),
        VICUNA,
    ),
    "pitome-retrieval": Table(
        "retrieval by embeddings, off the shelf, recall both ways. The paper's BLIP sorts the best pairs again with "
        "its matching head, which ours does not, and its CLIP was trained again with merging",
        ("flickr30k", "coco"),
        (*_alone(BLIP, 0.95, 0.925), *_alone(CLIP_L, 0.95, 0.925), *_alone(CLIP_B, 0.95, 0.925)),
    ),
    "pitome-imagenet": Table(
        "ImageNet-1k top-1, off the shelf: classifiers, and CLIP by the names of the classes. The paper's DeiT-S is "
        "merged to 2.9 * 10^9 multiply-adds, which it has here at ratio 0.92",
        ("imagenet",),
        (*_alone(DEIT, 0.92), *_alone(CLIP_B, 0.95, 0.9), *_alone(CLIP_L, 0.95, 0.9)),
    ),
    "embedded": Table(
        "the embedded model and benchmark, beside what `pitome_mllm_eval.accuracy.curves` measured of all questions",
        ("pitome_scenes",),
        (
            Run("tiny"),
            *(Run("tiny", method, keep, published=said) for method, said in _TINY for keep in (144, 72, 36)),
        ),
    ),
}


def published(table: str) -> dict[tuple[Run, str], dict[str, str]]:
    """The figures of a table where they were published, by run and task: value, tokens ("" = not said) and source."""
    found: dict[tuple[Run, str], dict[str, str]] = {}
    for row in [] if table == "embedded" else read(FIGURES, "pip install again", ("table", "value", "tokens")):
        if row["table"] == table:
            name, _, value = row["amount"].partition("=")
            amount = {name: json.loads(value)} if value else {}
            found[Run(row["model"], row["method"], **amount, published=row["method"] != PLAIN), row["task"]] = row
    if table == "embedded" and (RESULTS / SUMMARY).is_file():
        for row in summary(RESULTS / SUMMARY):
            run = Run("tiny", row["method"], int(row["keep"]), published=row["published"] == "True")
            about = {"source": f"eval/results/{SUMMARY}, {row['questions']} questions", "tokens": row["keep"]}
            about["value"] = str(100 * float(row["value"]))
            found[Run("tiny") if row["method"] == ALL_TOKENS else run, "pitome_scenes"] = about
    return found


@cache
def plan_of(run: Run) -> Plan:
    """What a run does to an image, or to one of its tiles; refuses what `attach` refuses."""
    known = geometry(config_of(run.model))
    if run.method != CONTROL:
        return make_plan(Settings().changed(**run.attached), known)
    (rows, columns), side = known.grid, known.shuffle_factor
    tokens = make_plan(Settings().changed(keep=run.keep), known).keep
    smaller = tuple(side * count for count in near_grid(tokens, rows / columns))
    return make_plan(Settings(), replace(known, grid=smaller))


def tokens_of_one(run: Run) -> int:
    """Visual tokens of an image, or of one of its tiles, that reach the LLM."""
    return plan_of(run).keep


def images_of(model: str) -> int:
    """Times that the tower runs for one image."""
    return get_shape(SHAPE_OF[model]).images if model in SHAPE_OF else 1


@cache
def config_of(model: str) -> Any:
    """The configuration of a model of the tables, or of one that is here; nothing is fetched."""
    return get_shape(SHAPE_OF[model]).config() if model in SHAPE_OF else own_config(model)


def own_config(model: str) -> Any:
    """The configuration in a model's folder or on the hub, of an encoder alone too."""
    try:
        return read_config(model)  # first, since not every name is one of the hub's
    except UserError as error:
        if error.__cause__ is not None:  # it cannot be read, whatever it is of
            raise
        with suppress(OSError, ValueError):
            config = AutoConfig.from_pretrained(model)
            if config.model_type in ENCODER_OF_CONFIG:
                return config
        raise
