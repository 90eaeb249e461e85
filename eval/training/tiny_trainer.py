"""The state of a training run and one step of it."""

import time

import torch
from torch import nn

from ..benchmark.questions import CATEGORIES
from .muon import Muon
from .tiny_batch import IGNORE, Phase, training_batch
from .tiny_forward import Heads, losses
from .tiny_model import EOS, build_model, vision_tower

PHASES = (
    Phase("see", steps=700, pictures=24, rows=0, side=96, ask=False, warmup=60, auxiliary=1.0, chat_share=0.0),
    Phase("ask-small", steps=960, pictures=24, rows=16, side=96, warmup=60),
    Phase("ask-full", steps=2000, pictures=12, rows=20, rate=(0.7, 0.01)),
)
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3


class Trainer:
    """Model, auxiliary heads and optimisers, advanced one step at a time.

    Parameters
    ----------
    phases : tuple of Phase
        What to train on, in order.
    seed : int
        Of the initial weights and of every picture.
    device : str
        Where to train.
    """

    def __init__(self, phases: tuple[Phase, ...] = PHASES, seed: int = 0, device: str = "cpu"):
        self.phases, self.seed, self.device = phases, seed, torch.device(device)
        self.model = build_model(seed).to(self.device)
        self.heads = Heads(self.model.config.vision_config.hidden_size).to(self.device)
        self.step = self.pictures = 0
        self.seconds = 0.0
        self._freeze_unused()
        named = [*self.model.named_parameters(), *self.heads.named_parameters(prefix="heads")]
        named = [(name, p) for name, p in named if p.requires_grad]
        self.parameters = [p for _, p in named]
        matrices = [p for name, p in named if p.dim() == 2 and not _is_table(name)]
        rest = [p for name, p in named if p.dim() != 2 or _is_table(name)]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.02},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimisers = {
            "muon": (Muon(matrices, MUON_RATE), MUON_RATE),
            "adam": (torch.optim.AdamW(groups, ADAM_RATE, betas=(0.9, 0.98)), ADAM_RATE),
        }

    def _freeze_unused(self) -> None:
        """The features are read before the tower's last block, which therefore has nothing to learn."""
        tower = vision_tower(self.model)
        tower.encoder.layers[-1].requires_grad_(False)
        tower.post_layernorm.requires_grad_(False)

    @property
    def total(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> tuple[int, int]:
        """Phase index of a step, and its number within the phase."""
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return index, step
            step -= phase.steps
        raise IndexError("past the last phase")

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step."""
        index, number = self.locate(step)
        return training_batch(self.seed, index, self.phases[index], number)

    def advance(self, batch: dict[str, torch.Tensor]) -> dict:
        """Learn from one batch; returns what the log keeps."""
        index, number = self.locate(self.step)
        phase, start = self.phases[index], time.perf_counter()
        share = number / phase.steps
        rate = min(1, (number + 1) / phase.warmup) * (phase.rate[0] * (1 - share) + phase.rate[1] * share)
        for optimiser, base in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = base * rate
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        self.model.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            out = losses(self.model, self.heads, batch, phase.ask)
        loss = phase.auxiliary * out["patch"]
        if phase.ask:
            loss = loss + out["answer"] + phase.auxiliary * (out["mention"] + out["comparison"])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, _ in self.optimisers.values():
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step, self.pictures = self.step + 1, self.pictures + len(batch["pixels"])
        self.seconds += time.perf_counter() - start
        values = {name: out[name].item() for name in ("patch", "answer", "mention", "comparison") if name in out}
        return {"phase": phase.name, "loss": loss.item(), "rate": rate, **values, "hits": tally(out, batch)}

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, torch.Tensor]]) -> dict:
        """Accuracy on whole pictures that were not trained on."""
        self.model.eval()
        hits = torch.zeros(2, len(CATEGORIES))
        for batch in batches:
            batch = {name: value.to(self.device) for name, value in batch.items()}
            hits += tally(losses(self.model, self.heads, batch, True), batch)
        return accuracies(hits)

    def state(self) -> dict:
        """Everything a later run needs to continue exactly."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            **{name: optimiser.state_dict() for name, (optimiser, _) in self.optimisers.items()},
            "progress": (self.step, self.pictures, self.seconds),
        }

    def load(self, state: dict) -> None:
        """Continue from `state`."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for name, (optimiser, _) in self.optimisers.items():
            optimiser.load_state_dict(state[name])
        self.step, self.pictures, self.seconds = state["progress"]


def _is_table(name: str) -> bool:
    """Embeddings and output layers, which Muon is not meant for."""
    return any(part in name for part in ("embed", "lm_head", "heads."))


def tally(out: dict, batch: dict) -> torch.Tensor:
    """Right answers and questions per category (2, categories)."""
    if "hits" not in out:
        return torch.zeros(2, len(CATEGORIES))
    asked = (batch["labels"] != IGNORE) & (batch["labels"] != EOS)
    category, hits = batch["category"][asked], out["hits"][asked].float()
    count = torch.bincount(category, minlength=len(CATEGORIES))
    return torch.stack([torch.bincount(category, hits, minlength=len(CATEGORIES)), count]).float().cpu()


def accuracies(hits: torch.Tensor) -> dict:
    """Accuracy overall and per category from a tally."""
    rates = (hits[0] / hits[1].clamp_min(1)).tolist()
    overall = (hits[0].sum() / hits[1].sum().clamp_min(1)).item()
    return {"accuracy": overall, **dict(zip(CATEGORIES, rates, strict=True))}
