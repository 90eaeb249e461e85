"""Merging written out by hand on a plain model: what `attach` must reproduce, straight from the definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from models import IMAGE, PATCHES
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration


@dataclass
class Tokens:
    """Merged tokens of several pictures.

    features : (I, K, C) what reaches the LLM, projected.
    groups : (I, N) group of each visual token of the plain model.
    sizes : (I, K) patches behind each token.
    """

    features: Tensor
    groups: Tensor
    sizes: Tensor

    @property
    def first(self) -> Tensor:
        """(I, K): the smallest original index of each group."""
        images, full = self.groups.shape
        count = self.sizes.shape[1]
        order = torch.arange(full).expand(images, full)
        groups = self.groups.where(self.groups >= 0, count)  # dropped tokens go to one place more
        return torch.full((images, count + 1), full).scatter_reduce(1, groups, order, "amin")[:, :count]


def encode(
    model: LlavaForConditionalGeneration,
    pixels: Tensor,
    counts: list[int],
    method: Any,
    place: str = "mid",
    metric: str = "keys",
    weighted: bool = True,
    proportional: bool = True,
) -> Tokens:
    """Tower and projector of a plain model with merging written out: the definition, one line per step.

    ``counts`` holds the patch tokens left after each merging block; one class token in front of them never merges.
    """
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    size = torch.ones(*x.shape[:2], 1)
    total = None
    for index, count in enumerate(counts):
        layer = tower.encoder.layers[index]
        normed = layer.layer_norm1(x)
        mixed, keys = attention(layer.self_attn, normed, size if proportional and total is not None else None)
        x = x + mixed
        if place == "end":
            x = x + layer.mlp(layer.layer_norm2(x))
        r = x.shape[1] - 1 - count
        if r:
            by = keys if metric == "keys" else x
            merge = method.match(by, r, size=size, protected=1, depth=index / len(counts))
            x, size = merge.reduce(x, size if weighted else torch.ones_like(size))[0], merge.reduce(x, size)[1]
            total = merge if total is None else total.then(merge)
        if place == "mid":
            x = x + layer.mlp(layer.layer_norm2(x))
    full = pixels.shape[0], PATCHES
    groups = torch.arange(PATCHES).expand(full) if total is None else total.group[:, 1:] - 1
    return Tokens(model.model.multi_modal_projector(x[:, 1:]), groups, size[:, 1:, 0])


def states(tower: nn.Module, pixels: Tensor, counts: list[int], reducer: Any, protected: int) -> dict[int, Tensor]:
    """Merged hidden states of every block, each with the merges of later blocks: {blocks before it: (B, K, C)}."""
    x = tower.embeddings(pixels)
    x = tower.pre_layrnorm(x) if protected else x
    size, found, merged = torch.ones(*x.shape[:2], 1), {0: x}, False
    for index, count in enumerate(counts):
        layer = tower.encoder.layers[index]
        mixed, keys = attention(layer.self_attn, layer.layer_norm1(x), size if merged else None)
        x = x + mixed
        r = x.shape[1] - protected - count
        if r:
            merge = reducer.match(keys, r, size=size, protected=protected, depth=index / len(counts))
            found = {before: merge.reduce(state, size)[0] for before, state in found.items()}
            x, size = merge.reduce(x, size)
            merged = True
        x = x + layer.mlp(layer.layer_norm2(x))
        found[index + 1] = x
    return found


def attention(module: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention with log(size) added for every key, and the keys' mean over heads (B, N, head width).

    Through the same kernel as the model's "sdpa": differences of rounding would turn near-ties into other groups.
    """
    batch, tokens, width = x.shape
    shape = (batch, tokens, module.num_heads, width // module.num_heads)
    q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in (module.q_proj, module.k_proj, module.v_proj))
    bias = None if size is None else size.log().to(x.dtype).view(batch, 1, 1, tokens).expand(-1, -1, tokens, -1)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return module.out_proj(mixed.transpose(1, 2).reshape(x.shape)), k.mean(1)


class Reference:
    """What a plain model says when merged features are written into its prompt by hand, row by row, unpadded.

    Parameters
    ----------
    model : a plain twin of the model under test.
    inputs : the caller's inputs (input_ids, attention_mask, pixel_values).
    tokens : merged features of all pictures in reading order over the batch.
    positions : "compact" = 0, 1, 2, ...; "original" = each survivor keeps the place of its group's first token.
    llm_size_bias : every query of the LLM adds log(size) to its logit for a visual token.
    """

    def __init__(
        self, model: Any, inputs: Any, tokens: Tokens, positions: str = "compact", llm_size_bias: bool = False
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.bias: list[Tensor] = []  # (n,) log(size) of each token, if they count
        self.rows: list[tuple[Tensor, Tensor]] = []  # (n, C) embeddings and (n,) positions
        self.caller: list[Tensor] = []  # (n,) index of each token in the caller's row
        image = 0
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            columns = mask.nonzero()[:, 0]
            ids = ids[columns]
            slots = (ids == IMAGE).nonzero()[:, 0]
            number = len(slots) // PATCHES
            rank = torch.cat([i * PATCHES + tokens.first[image + i] for i in range(number)]) if number else slots
            keep = torch.ones(len(ids), dtype=torch.bool)
            keep[slots] = False
            keep[slots[rank]] = True
            at = keep.nonzero()[:, 0]
            embeddings = model.get_input_embeddings()(ids[at]).detach().clone()
            if number:
                features = tokens.features[image : image + number].flatten(0, 1)
                embeddings[ids[at] == IMAGE] = features.detach()
            self.bias.append(torch.zeros(len(at), dtype=embeddings.dtype))
            if llm_size_bias and number:
                self.bias[-1][ids[at] == IMAGE] = tokens.sizes[image : image + number].flatten().log().to(embeddings)
            image += number
            self.rows.append((embeddings, at if positions == "original" else torch.arange(len(at))))
            self.caller.append(columns[at])

    @torch.no_grad()
    def logits(self, row: int = 0, text: Tensor | None = None) -> Tensor:
        """(n, V) logits of one row, optionally with the ids ``text`` (t,) appended."""
        embeddings, positions = self.rows[row]
        if text is not None and len(text):
            embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(text)])
            positions = torch.cat([positions, positions[-1] + 1 + torch.arange(len(text))])
        length = len(positions)
        bias = torch.cat([self.bias[row], self.bias[row].new_zeros(length - len(self.bias[row]))])
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            attention_mask=bias.expand(length, -1).masked_fill(later, -torch.inf)[None, None],
            use_cache=False,
        )
        return self.model.lm_head(hidden.last_hidden_state)[0]

    def greedy(self, row: int = 0, steps: int = 6, text: Tensor | None = None) -> list[int]:
        """The ids that greedy search appends to a row (and to ``text`` after it)."""
        said = torch.empty(0, dtype=torch.long) if text is None else text
        start = len(said)
        for _ in range(steps):
            said = torch.cat([said, self.logits(row, said)[-1].argmax().view(1)])
        return said[start:].tolist()

    def padded(self) -> dict[str, Tensor]:
        """Left-padded embeddings and mask of all rows, for the plain model's own generate (it returns new ids only)."""
        longest = max(len(embeddings) for embeddings, _ in self.rows)
        batch = self.rows[0][0].new_zeros(len(self.rows), longest, self.rows[0][0].shape[1])
        mask = torch.zeros(len(self.rows), longest, dtype=torch.long)
        for i, (embeddings, _) in enumerate(self.rows):
            batch[i, longest - len(embeddings) :] = embeddings
            mask[i, longest - len(embeddings) :] = 1
        return {"inputs_embeds": batch, "attention_mask": mask}
