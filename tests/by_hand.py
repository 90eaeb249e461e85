"""Merging written out by hand on a plain model: what `attach` must reproduce, straight from the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from models import IMAGE, PATCHES
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from pitome_mllm.families.geometry import layer_kinds


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
    def median(self) -> Tensor:
        """(I, K): the median original index of each group, the lower one of two."""
        tokens = range(self.sizes.shape[1])
        return torch.stack([torch.stack([(row == k).nonzero()[:, 0].median() for k in tokens]) for row in self.groups])


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


def frequencies(language: Any, kind: str) -> Tensor:
    """(d,) those of the rotary embedding of an LLM's layers of a kind."""
    rotary = language.rotary_emb
    return getattr(rotary, f"{kind}_inv_freq", None if not hasattr(rotary, "inv_freq") else rotary.inv_freq).double()


def told(
    positions: list[int],
    sizes: list[float],
    theta: Tensor,
    calibration: str,
    window: int | None = None,
    blocks: list[int] | None = None,
    across: bool = False,
) -> Tensor:
    """(n, n) what every query m adds to its logit for every key n: from the definition, one by one.

    ``blocks`` : tokens with the same number, other than -1, see each other, ``across`` any window or within it.
    """
    near = [(distance * theta).cos().mean().item() for distance in range(max(positions) + 1)]

    def sees(m: int, n: int) -> bool:
        block = blocks is not None and blocks[m] == blocks[n] != -1
        inside = window is None or (positions[m] - positions[n] < window and m - n < window)
        return (block or (n <= m and inside)) if across else (block or n <= m) and inside

    rows = []
    for m in range(len(positions)):
        seen = [n for n in range(len(positions)) if sees(m, n)]
        row, any_picture = [-math.inf] * len(positions), any(sizes[n] > 0 for n in seen)
        for n in seen:
            size = max(sizes[n], 1.0) if calibration != "none" else 1.0
            if calibration == "distance" and any_picture:
                size *= 2 - near[abs(positions[m] - positions[n])]
            row[n] = math.log(size)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


class Reference:
    """What a plain model says when merged features are written into its prompt by hand, row by row, unpadded.

    Parameters
    ----------
    model : a plain twin of the model under test.
    inputs : the caller's inputs (input_ids, attention_mask, pixel_values).
    tokens : merged features of all pictures in reading order over the batch.
    calibration : "none" = positions 0, 1, 2, ...; "size" = each survivor has the median place of its group, and every
        query of the LLM adds log(size) to its logit for a visual token; "distance" = `told`.
    """

    def __init__(self, model: Any, inputs: Any, tokens: Tokens, calibration: str = "none") -> None:
        self.model, self.tokens, self.calibration = model, tokens, calibration
        self.sizes: list[list[float]] = []  # (n,) patches of each token, 0 for text
        self.rows: list[tuple[Tensor, Tensor]] = []  # (n, C) embeddings and (n,) positions
        self.caller: list[Tensor] = []  # (n,) index of each token in the caller's row
        image = 0
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            columns = mask.nonzero()[:, 0]
            ids = ids[columns]
            slots = (ids == IMAGE).nonzero()[:, 0]
            patches = tokens.groups.shape[1]
            number = len(slots) // patches
            keep = torch.ones(len(ids), dtype=torch.bool)
            kept = tokens.sizes.shape[1]
            for i in range(number):
                keep[slots[i * patches + kept : (i + 1) * patches]] = False
            at = keep.nonzero()[:, 0]
            visual = ids[at] == IMAGE
            embeddings = model.get_input_embeddings()(ids[at]).detach().clone()
            positions, size = at.clone(), torch.zeros(len(at))
            if number:
                mine = slice(image, image + number)
                embeddings[visual] = tokens.features[mine].flatten(0, 1).detach()
                size[visual] = tokens.sizes[mine].flatten()
                positions[visual] = slots[::patches].repeat_interleave(kept) + tokens.median[mine].flatten()
            image += number
            self.sizes.append(size.tolist())
            self.rows.append((embeddings, torch.arange(len(at)) if calibration == "none" else positions))
            self.caller.append(columns[at])

    @torch.no_grad()
    def logits(self, row: int = 0, text: Tensor | None = None) -> Tensor:
        """(n, V) logits of one row, optionally with the ids ``text`` (t,) appended."""
        embeddings, positions = self.rows[row]
        if text is not None and len(text):
            embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(text)])
            positions = torch.cat([positions, positions[-1] + 1 + torch.arange(len(text))])
        sizes = self.sizes[row] + [0.0] * (len(positions) - len(self.sizes[row]))
        kinds = {*layer_kinds(self.model.model.language_model.config)}
        masks = {kind: self.term(positions.tolist(), sizes, kind)[None, None].to(embeddings) for kind in kinds}
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            use_cache=False,
        )
        return self.model.lm_head(hidden.last_hidden_state)[0]

    def term(self, positions: list[int], sizes: list[float], kind: str = "full_attention") -> Tensor:
        """(n, n) what every query adds to its logit for every key, in the layers of a kind."""
        language = self.model.model.language_model
        window = language.config.sliding_window if kind == "sliding_attention" else None
        return told(positions, sizes, frequencies(language, kind), self.calibration, window)

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
