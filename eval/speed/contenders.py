"""What the benchmark of speed compares: models that share their weights, each with its own merging, and oracles."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from pitome_mllm import attach
from pitome_mllm.costs.published import SHAPES, Shape, get_shape
from pitome_mllm.families import FAMILY_OF_CONFIG
from pitome_mllm.methods import METHODS, Merge, Reducer, UserError, unknown
from pitome_mllm.plan import Plan

from .rows import name

MODES = ("eager", "graph")  # of --mode, for everything that is compared
PLAIN, ORACLE, WEIGHTS, PUBLISHED = "plain", "oracle", "weights", "published"


class _Sliced(Merge):
    """The first ``count`` tokens; no sizes, no groups."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.energy = self.group = self._source = None

    def reduce(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, None]:
        return x[:, : self.count], None


@dataclass(frozen=True)
class Slice(Reducer):
    """What merging could cost at best: as many tokens leave as with ``like``, without a decision and without work."""

    forms_groups: ClassVar[bool] = False

    like: Reducer

    @property
    def once(self) -> bool:
        return self.like.once

    def match(
        self, metric: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, depth: float = 0.0
    ) -> Merge:
        return _Sliced(metric.shape[1] - r)

    def max_removable(self, n: int) -> int:
        return self.like.max_removable(n)

    def allowed(self, n: int) -> Any:
        return self.like.allowed(n)


@dataclass(frozen=True)
class Contender:
    """One model in the comparison.

    Attributes
    ----------
    method : a name in `METHODS`, "plain", or "oracle".
    variant : "published", or "weights" where the tower's attention writes its weights down too, as the paper's code
        does; empty under the library's defaults.
    like : the methods whose token counts an oracle has, with spaces between.
    asked : what `attach` was asked for, such as {"keep": 144}.
    model : its own modules; weights are everybody's.
    llm : where its LLM is; for an oracle the plain model.
    plan : None for the plain model.
    """

    method: str
    variant: str
    like: str
    asked: dict[str, Any]
    model: Any
    llm: Any
    plan: Plan | None = None

    @property
    def is_oracle(self) -> bool:
        return self.method == ORACLE


def find_shape(name: str) -> Shape:
    """The shape of this name, or the only one whose name begins so.

    Raises
    ------
    ValueError : there is none, or several.
    """
    begun = [known for known in SHAPES if known.startswith(name)]
    return get_shape(begun[0] if len(begun) == 1 else name)


def configuration(shape: Shape, layers: int | None, tower_only: bool) -> Any:
    """A LLaVA configuration of this shape, with ``layers`` LLM blocks (None: all), or with hardly any LLM at all."""
    from transformers import LlamaConfig, LlavaConfig

    config = shape.config()
    if shape.text is None:
        config = LlavaConfig(vision_config=config, text_config=LlamaConfig(), vision_feature_layer=-1)
        tower_only = True
    if tower_only:
        width = config.vision_config.hidden_size if shape.text is None else config.text_config.hidden_size
        config.text_config = LlamaConfig(hidden_size=width, num_hidden_layers=0, vocab_size=64)
    elif layers is not None:
        if not 1 <= layers <= config.text_config.num_hidden_layers:
            raise UserError(f"--layers {layers} is not possible; choose 1 to {config.text_config.num_hidden_layers}")
        config.text_config.num_hidden_layers = layers
    config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return config


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, as fast as any."""
    import transformers

    kind = getattr(transformers, FAMILY_OF_CONFIG[config.model_type])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def twin(model: Any) -> Any:
    """A model with modules of its own that shares every weight."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def contenders(model: Any, methods: Sequence[str], amounts: Sequence[dict[str, Any]]) -> Iterator[Contender]:
    """The plain model and every method at every amount; for "oracle", one for every token schedule that these take.

    Parameters
    ----------
    model : plain; it is left alone.
    methods : names in `METHODS`, or such a name with ":published" or ":weights" behind it, or "oracle".
    amounts : keywords of `attach`, such as {"keep": 144} or {"ratio": 0.9}.

    Raises
    ------
    ValueError : an unknown method or variant, or an amount that cannot be reached.
    """
    plain = twin(model)
    yield Contender(PLAIN, "", "", {}, plain, plain)
    for asked in amounts:
        ways: dict[Any, list[Contender]] = {}
        for method in (method for method in methods if method != ORACLE):
            made = _merging(model, method, asked)
            ways.setdefault(_way(made.plan), []).append(made)
            yield made
        for alike in ways.values() if ORACLE in methods else ():
            if not alike[0].plan.reducer.shrinks_picture:
                yield _oracle(model, alike, plain)


def _way(plan: Plan) -> tuple[Any, ...]:
    return plan.input_patches, plan.counts, plan.projector_counts, plan.place


def parted(asked: str) -> tuple[str, str]:
    """Method and variant of "tome", "tome:published" or "tome:weights"; ValueError for what there is not."""
    method, _, variant = asked.partition(":")
    if method not in METHODS:
        raise UserError(unknown("method", method, METHODS))
    if variant not in ("", PUBLISHED, WEIGHTS):
        raise UserError(
            f"unknown variant {variant!r} of {method}; there are {method}:{PUBLISHED} and {method}:{WEIGHTS}"
        )
    return method, variant


def _merging(model: Any, wanted: str, asked: dict[str, Any]) -> Contender:
    (method, variant), own = parted(wanted), twin(model)
    if variant == WEIGHTS:
        own.set_attn_implementation({"vision_config": "eager"})
    handle = attach(own, method, published=bool(variant), graph=False, **asked)
    return Contender(method, variant, "", asked, own, own, handle.plan)


def _oracle(model: Any, alike: list[Contender], plain: Any) -> Contender:
    """The oracle of contenders that go the same way."""
    made, own = alike[0], twin(model)
    plan, like = made.plan, " ".join(dict.fromkeys(name(each.method, each.variant, "") for each in alike))
    where = {"counts": plan.counts} if plan.where == "tower" and not plan.reducer.once else made.asked
    told = {"calibration": "none", "proportional_attention": False, "metric": "hidden"}
    handle = attach(own, Slice(plan.reducer), **where, where=plan.where, place=plan.place, graph=False, **told)
    if _way(handle.plan) != _way(plan):
        raise RuntimeError(f"the oracle of {made.method} goes {_way(handle.plan)}, the method {_way(plan)}")
    return replace(made, method=ORACLE, variant="", like=like, model=own, llm=plain, plan=handle.plan)
