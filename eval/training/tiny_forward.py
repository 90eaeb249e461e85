"""Forward pass used in training: many questions share one picture's tower pass and prefix.

The sums are those of the ordinary model (a test compares them); only the layout differs. Every row of questions attends
to the prefix and to itself, and its positions restart after the full 24 x 24 grid, so a window of the canvas gets the
positions its patches have in the whole picture.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..benchmark.scenes import COLOURS, GRID, KINDS
from .tiny_batch import IGNORE
from .tiny_model import EOS, PREFIX, vision_tower, word_ids

_START = [word_ids()[word] for word in PREFIX]
LOOKING_LAYER = 2  # after so many language layers a word knows where the object it names is,
COMPARING_LAYER = 3  # and after so many, on which side of it the object named before lies
BACKGROUND = 0.1  # weight of patches without object, which are most of a picture


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

    def patch_loss(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Dense loss of all patches."""
        kind, colour, centre, offset, place = self.patch(self.norm(features)).float().split(self.sizes, -1)
        loss = 0.5 * F.binary_cross_entropy_with_logits(centre[..., 0], batch["centre"], pos_weight=torch.tensor(10.0))
        for name, logits in (("kind", kind), ("colour", colour)):
            weight = torch.tensor([BACKGROUND] + [1.0] * (logits.shape[-1] - 1))
            loss = loss + F.cross_entropy(logits.flatten(0, 1), batch[name].flatten(), weight=weight)
        on_object = (batch["kind"] > 0).float()[..., None]
        away = F.smooth_l1_loss(offset, batch["offset"], reduction="none") * on_object
        own = torch.stack([batch["patches"] % GRID, batch["patches"] // GRID], -1) / (GRID / 2) - 1
        return loss + 0.5 * away.sum() / (2 * on_object.sum() + 1) + F.smooth_l1_loss(place, own)

    def mention_loss(self, states: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Column and row of the object that a word mentions, from the word's hidden state."""
        column, row = self.mention(self.mention_norm(states)).split(GRID, -1)
        return _where_known(column, batch["column"]) + _where_known(row, batch["row"])

    def comparison_loss(self, states: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """On which side the first mentioned object lies, from the hidden state of the second word."""
        across, down = self.comparison(self.mention_norm(states)).split(3, -1)
        return _where_known(across, batch["across"]) + _where_known(down, batch["down"])


def _where_known(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are given; zero without any."""
    total = F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp_min(1)


def tower_features(model: nn.Module, pixels: Tensor, patches: Tensor) -> Tensor:
    """Features (B, N, C) of uint8 pixels (B, 3, H, W) whose patches lie at `patches` (B, N) of the grid."""
    tower = vision_tower(model)
    x = tower.embeddings.patch_embedding(pixels.float() / 127.5 - 1).flatten(2).mT
    x = torch.cat([tower.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
    x = tower.pre_layrnorm(x + tower.embeddings.position_embedding(F.pad(patches + 1, (1, 0))))
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, None)
    return x[:, 1:]


@functools.lru_cache(maxsize=16)
def _mask(prefix: int, rows: int, length: int) -> Tensor:
    """True where a token of prefix and rows may look: at those before it, but never from one row into another."""
    total = prefix + rows * length
    row = (torch.arange(total) - prefix).div(length, rounding_mode="floor").clamp_min(-1)
    earlier = torch.ones(total, total, dtype=torch.bool).tril()
    return ((row == -1) | (row == row[:, None])) & earlier


def language_states(model: nn.Module, features: Tensor, patches: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Hidden states (B, rows, length, C) of the text: after `LOOKING_LAYER`, after `COMPARING_LAYER`, at the end."""
    (batch, rows, length), llm = tokens.shape, model.model.language_model
    start = torch.arange(len(_START)).expand(batch, -1)
    text = torch.arange(length).repeat(rows).expand(batch, -1)
    positions = torch.cat([start, patches + len(_START), text + len(_START) + GRID * GRID], 1)
    image = model.model.multi_modal_projector(features)
    words = llm.embed_tokens(torch.cat([torch.tensor(_START).expand(batch, -1), tokens.flatten(1)], 1))
    x = torch.cat([words[:, : len(_START)], image, words[:, len(_START) :]], 1)
    prefix = len(_START) + features.shape[1]
    mask = _mask(prefix, rows, length)[None, None]
    states = llm(
        inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True
    ).hidden_states
    chosen = (states[LOOKING_LAYER], states[COMPARING_LAYER], states[-1])
    return tuple(h[:, prefix:].reshape(batch, rows, length, -1) for h in chosen)


def answer_loss(model: nn.Module, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss over answers (and, lightly, the end after each), and the share of answers that are right."""
    logits = model.lm_head(states).float()
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    end, answer = (labels == EOS).flatten(), ((labels != EOS) & (labels != IGNORE)).flatten()
    right = (logits.argmax(-1) == labels).flatten()[answer].float().mean()
    return loss[answer].mean() + 0.1 * loss[end].sum() / end.sum().clamp_min(1), right


def losses(model: nn.Module, heads: Heads, batch: dict[str, Tensor], ask: bool) -> dict[str, Tensor]:
    """Losses ``patch`` and, of questions, ``answer``, ``mention``, ``comparison``, and the accuracy of one batch."""
    features = tower_features(model, batch["pixels"], batch["patches"])
    out = {"patch": heads.patch_loss(features, batch)}
    if ask:
        looking, comparing, last = language_states(model, features, batch["patches"], batch["tokens"])
        out["mention"] = heads.mention_loss(looking, batch)
        out["comparison"] = heads.comparison_loss(comparing, batch)
        out["answer"], out["accuracy"] = answer_loss(model, last, batch["labels"])
    return out
