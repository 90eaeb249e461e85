"""What a call costs: FLOPs and KV cache from a configuration alone.

A multiply-add counts as two FLOPs and only matrix products and convolutions count, as in ``torch.utils.flop_counter``.
Attention counts every query with every key, causal or not, as that tool does. Token counts come from the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..families.geometry import geometry
from ..methods import Reducer, UserError
from ..plan import Plan, make_plan
from ..settings import Settings

# Matrices in the MLP of each kind of LLM: gated ones have three. A new LLM is one entry here.
MLP_MATRICES = {
    **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4v_text", "granite", "llama"), 3),
    **dict.fromkeys(
        ("mistral", "olmo2", "paddleocr_vl_text", "phi3", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3"), 3
    ),
    **dict.fromkeys(("qwen3_vl_text", "smollm3", "stablelm"), 3),
    **dict.fromkeys(("gpt_neox", "phi", "starcoder2"), 2),
}
LOGITS = ("last", "all")


@dataclass(frozen=True)
class Estimate:
    """The cost of one batch.

    Attributes
    ----------
    tower_flops : int
        Patch embedding and every block of the vision tower, those after the feature layer included; 0 where they are
        not counted, of families that merge behind it.
    merging_flops : int
        Similarity matrices and other matrix products of the method.
    projector_flops : int
        The projector, on the tokens that are left; 0 with the tower.
    prefill_flops : int
        The LLM over the prompt, with the output head.
    decode_flops : int
        The LLM over the new tokens after the first, which the prefill already gives.
    kv_bytes : int
        Key-value cache of all rows when the last token is out.
    visual_tokens : int
        Per image, what reaches the LLM.
    prompt_tokens : int
        Per row, visual and text tokens; 0 for a tower alone.
    """

    tower_flops: int
    merging_flops: int
    projector_flops: int
    prefill_flops: int
    decode_flops: int
    kv_bytes: int
    visual_tokens: int
    prompt_tokens: int

    @property
    def flops(self) -> int:
        """All of it."""
        parts = (self.tower_flops, self.merging_flops, self.projector_flops, self.prefill_flops, self.decode_flops)
        return sum(parts)


def estimate(
    model_or_config: Any,
    method: str | Reducer | Plan | None = None,
    *,
    batch: int = 1,
    images: int = 1,
    text_tokens: int = 40,
    new_tokens: int = 0,
    logits: str = "last",
    dtype: torch.dtype | str | None = None,
    **settings: Any,
) -> Estimate:
    """What a batch costs with the settings of `attach`; without any, what the plain model costs.

    What it takes in memory, with 8-bit or 4-bit weights if so wanted, says `memory.footprint`, and
    `memory.largest_batch` the most rows that fit.

    Parameters
    ----------
    model_or_config : object
        A model that `attach` takes, or a configuration of one; nothing runs and no weights are needed. Of an encoder
        alone only the vision tower counts.
    method, **settings
        As for `attach`; or as method the plan of a handle, which says all of it.
    batch : int, default 1
        Rows.
    images : int, default 1
        Images per row; where images are cut into tiles, tiles, without their newlines.
    text_tokens : int, default 40
        Tokens per row that are not image placeholders.
    new_tokens : int, default 0
        Tokens to be written per row.
    logits : str, default 'last'
        Positions of the prompt that the output head sees: "last" as in ``generate``, "all" as in ``forward``.
    dtype : torch.dtype or str, optional
        Of the key-value cache; default: the model's or the configuration's, else float16.

    Raises
    ------
    ValueError
        An unsupported model; settings that `attach` refuses; a number out of range; an unknown ``logits`` or ``dtype``.
    """
    at_least(batch=(batch, 1))
    if logits not in LOGITS:
        raise UserError(f"unknown logits {logits!r}; choose from {', '.join(LOGITS)}")
    vision, text, plan = resolve(model_or_config, method, **settings)
    prompt, last = row_lengths(plan, images, text_tokens, new_tokens)
    tower = batch * images * _tower(vision, plan) if plan.geometry.family.linear else 0
    merging = batch * images * _merging(vision, text, plan)
    if text is None:
        return Estimate(tower, merging, 0, 0, 0, 0, plan.keep, 0)
    head = 2 * text.hidden_size * text.vocab_size
    projected = plan.available if plan.packed else plan.keep
    return Estimate(
        tower_flops=tower,
        merging_flops=merging,
        projector_flops=batch * images * projected * _projector(vision, text, plan),
        prefill_flops=batch * (_llm(text, prompt, prompt**2) + head * (prompt if logits == "all" else 1)),
        decode_flops=batch * (_llm(text, last - prompt, sum(range(prompt + 1, last + 1))) + head * (last - prompt)),
        kv_bytes=batch * last * kv_bytes_per_token(text, dtype or getattr(model_or_config, "dtype", None)),
        visual_tokens=plan.keep,
        prompt_tokens=prompt,
    )


def resolve(model_or_config: Any, method: str | Reducer | Plan | None = None, **settings: Any) -> tuple[Any, Any, Plan]:
    """The configurations of vision tower and LLM (None: a tower alone), and the plan of the settings of `attach`."""
    config = getattr(model_or_config, "config", model_or_config)
    shape, vision = geometry(config), getattr(config, "vision_config", config)
    if shape.family.encoder:  # whatever the method's own place
        settings["where"] = settings.get("where") or "tower"
    plan = method if isinstance(method, Plan) else make_plan(Settings().changed(method=method, **settings), shape)
    return vision, None if shape.family.encoder else config.text_config, plan


def row_lengths(plan: Plan, images: int, text_tokens: int, new_tokens: int) -> tuple[int, int]:
    """Tokens of a row's prompt, and keys in its cache when the last new token is out; ValueError out of range."""
    at_least(images=(images, 0), text_tokens=(text_tokens, 0), new_tokens=(new_tokens, 0))
    prompt = images * plan.keep + text_tokens
    return prompt, prompt + max(new_tokens - 1, 0)  # the prompt's last position gives the first new token


def _projector(vision: Any, text: Any, plan: Plan) -> int:
    """FLOPs of the projector for one token."""
    linear = plan.geometry.family.linear
    read = vision.hidden_size * max(1, len(plan.geometry.layers)) * plan.geometry.shuffle_factor**2
    return 2 * text.hidden_size * (read + (linear - 1) * text.hidden_size) if linear else 0


def _tower(vision: Any, plan: Plan) -> int:
    """FLOPs of the vision tower for one image."""
    shape, width, (matrices, hidden) = plan.geometry, vision.hidden_size, _mlp(vision)
    patch = vision.patch_size**2 if isinstance(vision.patch_size, int) else vision.patch_size[0] * vision.patch_size[1]
    flops = 2 * plan.input_patches * width * getattr(vision, "num_channels", 3) * patch
    tokens = plan.input_patches + shape.class_tokens
    for block in range(shape.blocks):
        left = tokens - plan.removed(block)
        flops += 8 * tokens * width**2 + 4 * tokens**2 * width
        flops += 2 * matrices * (left if plan.place == "mid" else tokens) * width * hidden
        tokens = left
    if getattr(vision, "vision_use_head", vision.model_type == "siglip_vision_model"):  # it pools by attention, always
        flops += 4 * (tokens + 1) * width**2 + 4 * tokens * width + 4 * width * hidden
    return flops


def _mlp(vision: Any) -> tuple[int, int]:
    """Matrices in the MLP of a tower's block, and the width between them; DINOv2 says the latter as a ratio."""
    hidden = getattr(vision, "intermediate_size", None) or int(vision.hidden_size * vision.mlp_ratio)
    if getattr(vision, "use_swiglu_ffn", False):  # two thirds of it, in whole eights
        return 3, (int(hidden * 2 / 3) + 7) // 8 * 8
    return 2 + getattr(vision, "use_gated_mlp", False), hidden


def _merging(vision: Any, text: Any, plan: Plan) -> int:
    """FLOPs of the merges in tower and projector for one image, and of the attention that they look at."""
    flops = sum(_matching(vision, text, plan, *step) for step in plan.steps)
    if "attention" in plan.match_inputs:  # the class token's row of the attention matrix
        input_tokens = [plan.input_patches, *plan.counts]
        blocks = {*plan.merging, *([plan.geometry.merging_blocks - 1] if plan.projector_counts else [])}
        tokens = sum(input_tokens[block] + plan.geometry.class_tokens for block in blocks)
        flops += 2 * tokens * vision.hidden_size
    return flops


def _matching(vision: Any, text: Any, plan: Plan, tokens: int, left: int, depth: float) -> int:
    """FLOPs of one merge of ``tokens`` to ``left`` patch tokens: counted while the method runs on zeros."""
    shape, context = plan.geometry, plan.context
    everything = context.get("protected", 0) + tokens
    width = (text if plan.where == "packed" else vision).hidden_size
    if plan.metric == "hidden":
        seen = width * max(1, len(shape.layers)) if depth == 1 else width
    else:
        seen = text.hidden_size if plan.metric == "projected" else width // vision.num_attention_heads
    given = tuple(context.items()), "attention" in plan.match_inputs, everything, seen, width
    try:
        flops = _counted(plan.reducer, *given, tokens - left, depth)
    except TypeError:  # a method of a caller's own, whose options have no hash
        flops = _counted.__wrapped__(plan.reducer, *given, tokens - left, depth)
    return flops + (everything * _projector(vision, text, plan) if plan.metric == "projected" else 0)


@lru_cache(4096)
def _counted(
    reducer: Reducer, context: tuple[Any, ...], attention: bool, tokens: int, metric: int, width: int, r: int,
    depth: float,
) -> int:  # fmt: skip
    """FLOPs of a merge of ``tokens`` of this ``width`` by a metric of its own one."""
    blank = partial(torch.zeros, device="cpu")
    given: dict[str, Any] = {"attention": blank(1, tokens)} if attention else {}
    # In inference mode operators arrive whole, so that the counter would see no matrix product.
    with torch.inference_mode(False), torch.no_grad(), _Counter() as counter:
        merge = reducer.match(blank(1, tokens, metric), r, depth=depth, **dict(context), **given)
        merge.reduce(blank(1, tokens, width))
    return counter.flops


class _Counter(TorchDispatchMode):
    """Sums up the FLOPs of what runs inside it, on this thread."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # the original llava package's torch has none

        super().__init__()
        self.flops, self.formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _llm(text: Any, queries: int, pairs: int) -> int:
    """FLOPs of the LLM's blocks for ``queries`` tokens that look at keys ``pairs`` times altogether."""
    if text.model_type not in MLP_MATRICES:
        raise UserError(f"unknown LLM {text.model_type!r}; FLOPs are known for {', '.join(sorted(MLP_MATRICES))}")
    width, (heads, kv_heads, head_width) = text.hidden_size, _heads(text)
    weights = 2 * width * head_width * (heads + kv_heads)
    weights += MLP_MATRICES[text.model_type] * width * text.intermediate_size
    return text.num_hidden_layers * (2 * queries * weights + 4 * pairs * heads * head_width)


def flops_known(config: Any) -> bool:
    """Whether `estimate` can count a model's FLOPs: not of every LLM, nor of images that are cut into tiles."""
    return config.text_config.model_type in MLP_MATRICES and not geometry(config).family.tiles


def _heads(text: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and the width of one."""
    heads, width = text.num_attention_heads, getattr(text, "head_dim", None)
    return heads, getattr(text, "num_key_value_heads", None) or heads, width or text.hidden_size // heads


def itemsize(dtype: torch.dtype | str) -> int:
    """Bytes of one number; ValueError for what names no dtype."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise UserError(f"unknown dtype {dtype!r}; give a torch dtype or its name, such as 'float16'")
    return found.itemsize


def kv_bytes_per_token(text: Any, dtype: torch.dtype | str | None) -> int:
    """Bytes of keys and values of one token in all blocks."""
    dtype = dtype or getattr(text, "dtype", None) or torch.float16
    _, kv_heads, head_width = _heads(text)
    return 2 * text.num_hidden_layers * kv_heads * head_width * itemsize(dtype)


def at_least(**numbers: tuple[int, int]) -> None:
    """ValueError for the first of ``name=(value, least)`` that is too small."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f"{name}={value} is not possible; give {least} or more")
