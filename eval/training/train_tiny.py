"""Train the embedded model: ``python -m pitome_mllm_eval.training.train_tiny --out DIR [--resume]``.

Three phases: the tower alone on dense labels of windows of the canvas, then questions on windows, then questions on
whole pictures with all 576 tokens and a falling learning rate. Batch i of a phase depends on (seed, phase, i) alone and
the state is saved whole, log included, so an interrupted run continues as if nothing had happened. Needs torch 2.9.
"""

import argparse
import os
import re
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..benchmark.sets import scene_questions
from ..documents import write_csv
from .tiny_batch import PHASES, Phase, encode_scene, row_length, stack, training_batch
from .tiny_forward import Heads, losses
from .tiny_model import build_model, vision_tower

COLUMNS = "time split phase step pictures loss answer patch mention comparison rate accuracy".split()
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3


def validation_batches(count: int) -> list[dict[str, Tensor]]:
    """About `count` questions on whole validation pictures, the first ones of the benchmark's validation set."""
    items, per_picture = [], 16
    for number in range(count // per_picture):
        picture, asked = scene_questions(number, "validation")
        rows = [[q] for q in (asked * per_picture)[:per_picture]]
        items.append(encode_scene(picture, rows, row_length(1)))
    return [stack(items[first : first + 8]) for first in range(0, len(items), 8)]


class Trainer:
    """Model, auxiliary heads and optimisers, advanced one step at a time; the seed is of weights and pictures."""

    def __init__(self, phases: tuple[Phase, ...], seed: int = 0):
        self.phases, self.seed = phases, seed
        model = build_model(seed)
        heads = Heads(model.config.vision_config.hidden_size)
        self.parts = nn.ModuleDict({"model": model, "heads": heads})
        tower = vision_tower(model)  # whose last block has nothing to learn: features are read before it
        for unused in (tower.encoder.layers[-1], tower.post_layernorm):
            unused.requires_grad_(False)
        named = [(name, p) for name, p in self.parts.named_parameters() if p.requires_grad]
        table = re.compile("embed|lm_head|^heads")  # embeddings and output layers, which Muon is not meant for
        matrices = [p for name, p in named if p.dim() == 2 and not table.search(name)]
        rest = [p for name, p in named if p.dim() != 2 or table.search(name)]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.02},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        muon = torch.optim.Muon(matrices, MUON_RATE, 0.05, adjust_lr_fn="match_rms_adamw")
        self.optimisers = {muon: MUON_RATE, torch.optim.AdamW(groups, ADAM_RATE, betas=(0.9, 0.98)): ADAM_RATE}
        self.step, self.seconds, self.log = 0, 0.0, []

    def locate(self, step: int) -> tuple[int, int]:
        """Phase index of a step, and its number within the phase."""
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return index, step
            step -= phase.steps
        return len(self.phases), 0

    def advance(self) -> dict[str, float]:
        """Learn from the next batch; returns what the log keeps."""
        index, number = self.locate(self.step)
        phase = self.phases[index]
        batch, start = training_batch(self.seed, index, phase, number), time.perf_counter()
        share = number / phase.steps
        rate = min(1, (number + 1) / phase.warmup) * (phase.rate[0] * (1 - share) + phase.rate[1] * share)
        self.parts.train()
        out = losses(self.parts["model"], self.parts["heads"], batch, phase.ask)
        loss = phase.auxiliary * out["patch"]
        if phase.ask:
            loss = loss + out["answer"] + phase.auxiliary * (out["mention"] + out["comparison"])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        for optimiser, base in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = base * rate
            optimiser.step()
            optimiser.zero_grad()
        self.step, self.seconds = self.step + 1, self.seconds + time.perf_counter() - start
        return {"loss": loss.item(), "rate": rate, **{name: value.item() for name, value in out.items()}}

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Accuracy on whole pictures that were not trained on."""
        self.parts.eval()
        found = [losses(self.parts["model"], self.parts["heads"], batch, True)["accuracy"].item() for batch in batches]
        return {"accuracy": sum(found) / len(found)}

    def note(self, split: str, phase: str, values: dict[str, float]) -> None:
        """Put a row into the log."""
        ends = [sum(p.steps for p in self.phases[:n]) for n in range(len(self.phases))]
        done = zip(self.phases, ends, strict=True)
        pictures = sum(p.pictures * min(max(self.step - before, 0), p.steps) for p, before in done)
        about = {"time": f"{self.seconds:.0f}", "split": split, "phase": phase, "step": self.step, "pictures": pictures}
        self.log.append(about | {name: f"{value:.4g}" for name, value in values.items()})

    def save(self, out: Path) -> None:
        """Write checkpoint.pt and log.csv so that a crash leaves the old ones or the new ones."""
        state = {"parts": self.parts.state_dict(), "progress": (self.step, self.seconds, self.log)}
        state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        torch.save(state, out / "checkpoint.part")
        os.replace(out / "checkpoint.part", out / "checkpoint.pt")
        write_csv(out / "log.csv", [dict.fromkeys(COLUMNS, "") | row for row in self.log])

    def load(self, out: Path) -> None:
        """Continue from what `save` wrote."""
        state = torch.load(out / "checkpoint.pt")
        self.parts.load_state_dict(state["parts"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step, self.seconds, self.log = state["progress"]


def run(trainer: Trainer, out: Path, every: int, questions: int) -> None:
    """Train to the end; log, evaluate and save every so many steps and at the end of each phase."""
    from rich.progress import track

    held_out, total = validation_batches(questions), sum(phase.steps for phase in trainer.phases)
    results: list[dict[str, float]] = []
    for step in track(range(trainer.step, total), "training", total=total, completed=trainer.step):
        phase = trainer.phases[trainer.locate(step)[0]]
        results.append(trainer.advance())
        if trainer.step % every == 0 or trainer.locate(trainer.step)[1] == 0:
            means = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
            trainer.note("train", phase.name, means)
            if phase.ask:
                trainer.note("validation", phase.name, trainer.evaluate(held_out))
            trainer.save(out)
            results.clear()


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and log.csv")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", type=int, default=512, help="validation questions per evaluation")
    parser.add_argument("--every", type=int, default=50, metavar="STEPS", help="log, evaluate and save so often")
    args = parser.parse_args(argv)
    there = (args.out / "checkpoint.pt").exists()
    if there != args.resume:
        what = "exists; add --resume to continue it" if there else "does not exist: there is nothing to resume"
        parser.error(f"{args.out / 'checkpoint.pt'} {what}, or choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    trainer = Trainer(PHASES, args.seed)
    if args.resume:
        trainer.load(args.out)
    run(trainer, args.out, args.every, args.validation)


if __name__ == "__main__":
    main()
