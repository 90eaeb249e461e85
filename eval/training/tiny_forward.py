"""Forward pass used in training: many questions share one picture's tower pass and prefix.

The sums are those of the ordinary model (a test compares them); only the layout differs. Every row of questions attends
to the prefix and to itself, and its positions restart after the full 24 x 24 grid, so a window of the canvas gets the
positions its patches have in the whole picture.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from ..benchmark.scenes import COLOURS, GRID, KINDS
from .tiny_batch import IGNORE
from .tiny_model import EOS, PREFIX, vision_tower, word_ids

_START = [word_ids()[word] for word in PREFIX]
LOOKING_LAYER = 2  # after so many language layers a word knows where the object it names is,
COMPARING_LAYER = 3  # and after so many, on which side of it the object named before lies


class Heads(nn.Module):
    """Auxiliary predictions, used in training only: what each patch shows and which object a word mentions."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (len(KINDS) + 1, len(COLOURS) + 1, 1, 2, 2)  # kind, colour, centre, offset, own position
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(self.sizes))
        self.mention_norm = nn.LayerNorm(width)
        self.mention = nn.Linear(width, 2 * GRID)
        self.comparison = nn.Linear(width, 6)

    def patch_loss(self, features: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Dense loss of all patches; background weighs little, as it is most of a picture."""
        kind, colour, centre, offset, place = self.patch(self.norm(features)).float().split(self.sizes, -1)
        loss = sum(
            F.cross_entropy(logits.flatten(0, 1), batch[name].flatten(), weight=_background_weight(logits))
            for name, logits in (("kind", kind), ("colour", colour))
        )
        weight = torch.full((), 10.0, device=centre.device)
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(centre[..., 0], batch["centre"], pos_weight=weight)
        on_object = (batch["kind"] > 0).float()[..., None]
        loss = loss + 0.5 * (F.smooth_l1_loss(offset, batch["offset"], reduction="none") * on_object).sum() / (
            2 * on_object.sum() + 1
        )
        own = torch.stack([batch["patches"] % GRID, batch["patches"] // GRID], -1) / (GRID / 2) - 1
        return loss + F.smooth_l1_loss(place, own)

    def mention_loss(self, states: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Column and row of the object that a word mentions, from the word's hidden state."""
        column, row = self.mention(self.mention_norm(states)).split(GRID, -1)
        return _where_known(column, batch["column"]) + _where_known(row, batch["row"])

    def comparison_loss(self, states: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """On which side the first mentioned object lies, from the hidden state of the second word."""
        across, down = self.comparison(self.mention_norm(states)).split(3, -1)
        return _where_known(across, batch["across"]) + _where_known(down, batch["down"])


def _where_known(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the targets that are given; zero without any."""
    total = F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp_min(1)


def _background_weight(logits: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.1
    return weight


def tower_features(model, pixels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Features (B, N, C) of uint8 pixels (B, 3, H, W) whose patches lie at `patches` (B, N) of the grid."""
    tower = vision_tower(model)
    embeddings = tower.embeddings
    x = embeddings.patch_embedding(pixels.float() / 127.5 - 1).flatten(2).mT
    x = torch.cat([embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
    places = F.pad(patches + 1, (1, 0))
    x = tower.pre_layrnorm(x + embeddings.position_embedding(places))
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, None)
        x = x[0] if isinstance(x, tuple) else x
    return x[:, 1:]


@functools.lru_cache(maxsize=16)
def _text_mask(prefix: int, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """True where a text token (rows * length) may look at prefix and text tokens (prefix + rows * length)."""
    own = torch.block_diag(*[torch.ones(length, length, device=device).tril()] * rows).bool()
    return torch.cat([torch.ones(rows * length, prefix, dtype=torch.bool, device=device), own], 1)


def _positions(patches: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    start = torch.arange(len(_START), device=patches.device).expand(len(patches), -1)
    text = torch.arange(length, device=patches.device).repeat(rows).expand(len(patches), -1)
    return torch.cat([start, patches + len(_START), text + len(_START) + GRID * GRID], 1)


def _attend(attention, x, rotary, prefix: int, mask: torch.Tensor) -> torch.Tensor:
    """Causal attention within the prefix; text rows look at the prefix and at themselves."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    split = (*x.shape[:2], -1, attention.head_dim)
    q, k, v = (
        projection(x).view(split).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True)
    rest = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=mask)
    return attention.o_proj(torch.cat([first, rest], 2).transpose(1, 2).flatten(2))


def language_states(model, features: torch.Tensor, patches: torch.Tensor, tokens: torch.Tensor):
    """Hidden states (B, rows, length, C) of the text: after `LOOKING_LAYER`, after `COMPARING_LAYER`, at the end."""
    batch, rows, length = tokens.shape
    llm = model.model.language_model
    start = llm.embed_tokens(torch.tensor(_START, device=tokens.device)).expand(batch, -1, -1)
    image = model.model.multi_modal_projector(features)
    x = torch.cat([start.to(image.dtype), image, llm.embed_tokens(tokens.flatten(1)).to(image.dtype)], 1)
    rotary = llm.rotary_emb(x, _positions(patches, rows, length))
    prefix = len(_START) + features.shape[1]
    mask = _text_mask(prefix, rows, length, x.device)
    early = []
    for number, layer in enumerate(llm.layers):
        if number in (LOOKING_LAYER, COMPARING_LAYER):
            early.append(x[:, prefix:])
        x = x + _attend(layer.self_attn, layer.input_layernorm(x), rotary, prefix, mask)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return tuple(h.reshape(batch, rows, length, -1) for h in (*early, llm.norm(x[:, prefix:])))


def answer_loss(model, states: torch.Tensor, labels: torch.Tensor):
    """Loss over answers (and, lightly, the end after each), and whether each label was hit (B, rows, length)."""
    logits = model.lm_head(states).float()
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    end, answer = (labels == EOS).flatten(), ((labels != EOS) & (labels != IGNORE)).flatten()
    total = (loss * answer).sum() / answer.sum().clamp_min(1) + 0.1 * (loss * end).sum() / end.sum().clamp_min(1)
    return total, logits.argmax(-1) == labels


def losses(model, heads: Heads, batch: dict[str, torch.Tensor], ask: bool) -> dict[str, torch.Tensor]:
    """Losses ``patch`` and, of questions, ``answer``, ``mention``, ``comparison`` and the hits of one batch."""
    features = tower_features(model, batch["pixels"], batch["patches"])
    out = {"patch": heads.patch_loss(features, batch)}
    if ask:
        looking, comparing, last = language_states(model, features, batch["patches"], batch["tokens"])
        out["mention"] = heads.mention_loss(looking, batch)
        out["comparison"] = heads.comparison_loss(comparing, batch)
        out["answer"], out["hits"] = answer_loss(model, last, batch["labels"])
    return out
