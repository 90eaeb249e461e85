"""What a call needs of memory: weights, key-value cache, and a bound on activations, from a configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..families import FAMILY_OF_CONFIG
from ..families.geometry import family_of
from ..methods import Reducer, UserError
from ..plan import Plan
from .flops import at_least, itemsize, kv_bytes_per_token, resolve, row_lengths

BITS = (4, 8)
NF4_BLOCK = 64  # weights that share one float32 scale, as bitsandbytes has it by default
NF4_TABLE = 16 * 4  # bytes of the code book that every 4-bit matrix carries


@dataclass(frozen=True)
class Footprint:
    """Bytes of one batch in ``generate``.

    Attributes
    ----------
    weights : int
        Of the whole model.
    kv : int
        Key-value cache of all rows when the last token is out.
    activations : int
        What lives at most at once besides these; a bound, see `footprint`.
    """

    weights: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; a GPU's own context and the allocator's waste come on top."""
        return self.weights + self.kv + self.activations


def footprint(
    model_or_config: Any,
    method: str | Reducer | None = None,
    *,
    batch: int = 1,
    images: int = 1,
    text_tokens: int = 40,
    new_tokens: int = 1,
    dtype: torch.dtype | str = "float16",
    bits: int | None = None,
    **settings: Any,
) -> Footprint:
    """What a batch holds in memory, with sdpa or flash attention, which write no attention matrix down.

    Activations are bounded by the sum of
    (1) the hidden states of all tower blocks, which transformers keeps until the LLM is through;
    (2) the largest working set: of attention or MLP in a tower block (8 rows of its width for every token, or 3 rows
    and 3 intermediates), of a merge (3 rows, every pair of tokens four times in float32, and the size bias), or of an
    LLM block (8 rows, or 3 rows and 4 intermediates; the mask; the logits of one position, twice more in float32);
    (3) one block's cache, which is copied when it grows, and, where weights are quantised, one matrix unpacked.

    Parameters
    ----------
    model_or_config, method, batch, images, text_tokens, new_tokens, **settings
        As for `estimate`.
    dtype : torch.dtype or str, default 'float16'
        Of cache, activations, and of the weights that are not quantised.
    bits : int, optional
        4 (nf4) or 8 for linear layers quantised by bitsandbytes, as `load` does; the output head never is.

    Raises
    ------
    ValueError
        As `estimate`; bits other than 4, 8 or None; a vision tower alone.
    """
    vision, text, plan = resolve(model_or_config, method, **settings)
    if text is None:
        raise UserError(f"{type(vision).__name__} is a vision tower alone; pass the configuration of a whole model")
    at_least(batch=(batch, 1))
    size = itemsize(dtype)
    prompt, last = row_lengths(plan, images, text_tokens, new_tokens)
    kv = batch * last * kv_bytes_per_token(text, dtype)
    states, working = _tower_bytes(vision, plan, size)
    llm = batch * _llm_bytes(text, prompt, size)
    config = getattr(model_or_config, "config", model_or_config)
    unpacked = text.hidden_size * max(text.intermediate_size, text.hidden_size) * size if bits else 0
    copied = -(-kv // text.num_hidden_layers)
    return Footprint(
        weights=weight_bytes(config, dtype, bits),
        kv=kv,
        activations=batch * images * states + max(batch * images * working, llm) + copied + unpacked,
    )


def largest_batch(model_or_config: Any, memory: int, method: str | Reducer | None = None, **given: Any) -> int:
    """The most rows whose `footprint` fits in ``memory`` bytes; 0 if one is too many.

    Raises
    ------
    ValueError
        As `footprint`; no memory; ``batch`` among the settings.
    """
    if isinstance(memory, bool) or not memory > 0:
        raise UserError(f"memory={memory!r} is not possible; give the bytes there are, such as 24e9")
    if "batch" in given:
        raise UserError("batch is what largest_batch finds; leave it out")
    one, two = (footprint(model_or_config, method, batch=batch, **given) for batch in (1, 2))
    row = two.total - one.total  # what every row adds is the same
    return max(0, int((memory - (one.total - row)) // row))


def weight_bytes(config: Any, dtype: torch.dtype | str = "float16", bits: int | None = None) -> int:
    """Bytes of a model's weights and buffers, in ``dtype`` or, where bitsandbytes quantises them, in ``bits``.

    Raises
    ------
    ValueError
        An unsupported family, dtype or number of bits.
    """
    if bits is not None and (isinstance(bits, bool) or bits not in BITS):
        raise UserError(f"bits={bits!r} is not possible; choose 4 or 8, or leave it out for unquantised weights")
    family_of(config)  # raises for what is not supported
    key, size = config.to_json_string(), itemsize(dtype)
    if key not in _SIZES:
        _SIZES[key] = _sizes(config)
    plain, linear, buffers = _SIZES[key]
    if bits is None:
        return (plain + sum(math.prod(shape) for shape in linear)) * size + buffers
    return plain * size + sum(_packed(math.prod(shape), shape[0], bits) for shape in linear) + buffers


_Sizes = tuple[int, list[torch.Size], int]
_SIZES: dict[str, _Sizes] = {}  # of configurations that were asked for


def _sizes(config: Any) -> _Sizes:
    """Weights that stay as they are, the matrices that bitsandbytes quantises, and the bytes of buffers.

    These matrices are all linear layers but the output head.
    """
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, FAMILY_OF_CONFIG[config.model_type])(config)
    head = model.get_output_embeddings()
    linear = [part.weight.shape for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
    plain = sum(weight.numel() for weight in model.parameters()) - sum(math.prod(shape) for shape in linear)
    return plain, linear, sum(buffer.nbytes for buffer in model.buffers())


def _packed(count: int, rows: int, bits: int) -> int:
    """Bytes of a quantised matrix with its scales: one for each row of 8 bits, or for each block of 4 bits."""
    if bits == 8:
        return count + 4 * rows
    return -(-count // 2) + 4 * -(-count // NF4_BLOCK) + NF4_TABLE


def _tower_bytes(vision: Any, plan: Plan, size: int) -> tuple[int, int]:
    """Bytes of one image in the tower: all recorded hidden states, and the largest working set."""
    width, hidden = vision.hidden_size, vision.intermediate_size
    before = plan.geometry.patches + plan.geometry.class_tokens
    working = before * max(8 * width, 3 * width + 3 * hidden) * size
    if plan.merging or plan.projector_counts:
        working = max(working, before * 3 * width * size + before**2 * (4 * 4 + size))
    counts = [before]
    for block in range(plan.geometry.blocks):
        counts.append(counts[-1] - plan.removed(block))
    return sum(counts) * width * size, working


def _llm_bytes(text: Any, prompt: int, size: int) -> int:
    """Bytes of one row in an LLM block, with its mask and the logits of one position."""
    rows = prompt * max(8 * text.hidden_size, 3 * text.hidden_size + 4 * text.intermediate_size)
    return rows * size + prompt**2 * size + text.vocab_size * (size + 2 * 4)
