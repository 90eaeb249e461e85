"""Train the embedded model: ``python -m pitome_mllm_eval.training.train_tiny --out DIR [--resume] [--device cuda]``.

Three phases: the tower alone on dense labels of windows of the canvas, then questions on windows, then questions on
whole pictures with all 576 tokens and a falling learning rate. Batch i of a phase depends on (seed, phase, i) alone and
the state is saved whole, so an interrupted run continues as if nothing had happened.
"""

import argparse
import csv
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..benchmark.questions import CATEGORIES
from .tiny_batch import Phase, encode_scene, row_length, stack
from .tiny_trainer import PHASES, Trainer, accuracies

COLUMNS = "time split phase step pictures loss answer patch mention comparison rate accuracy".split()


def validation_batches(count: int, pictures: int = 8) -> list[dict[str, torch.Tensor]]:
    """About `count` questions on whole validation pictures, the first ones of the benchmark's validation set."""
    from ..benchmark.sets import scene_questions

    batches, per_picture = [], 16
    for first in range(0, count // per_picture, pictures):
        items = []
        for number in range(first, first + pictures):
            picture, asked = scene_questions(number, "validation")
            rows = [[q] for q in (asked * per_picture)[:per_picture]]
            items.append(encode_scene(picture, rows, row_length(1)))
        batches.append(stack(items))
    return batches


def save(state: dict, path: Path) -> None:
    """Write a checkpoint so that a crash leaves the old one or the new one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


class Log:
    """The training log, one CSV row per stretch of training or evaluation, continued after `step`."""

    def __init__(self, path: Path, step: int = 0):
        self.path, self.fields = path, (*COLUMNS, *CATEGORIES)
        kept = []
        if step:  # what an interrupted run logged after its last checkpoint is done again
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        part = path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(part, path)

    def write(self, trainer: Trainer, split: str, phase: str, values: dict) -> None:
        """Append a row."""
        row = {"time": f"{trainer.seconds:.0f}", "split": split, "phase": phase, "step": trainer.step}
        row |= {"pictures": trainer.pictures}
        row |= {k: f"{v:.4g}" for k, v in values.items() if k in self.fields}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.fields).writerow(row)


def run(trainer: Trainer, out: Path, args: argparse.Namespace) -> None:
    """Train to the end, logging, evaluating and saving on the way."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    log, checkpoint = Log(out / "log.csv", trainer.step), out / "checkpoint.pt"
    held_out = validation_batches(args.validation)
    saved = evaluated = time.monotonic()
    sums, hits = {}, torch.zeros(2, len(CATEGORIES))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=trainer.total, completed=trainer.step)
        while trainer.step < trainer.total:
            result = trainer.advance(trainer.batch(trainer.step))
            phase, last = result.pop("phase"), trainer.step == trainer.total
            phase_ends = not last and trainer.locate(trainer.step)[1] == 0
            hits += result.pop("hits")
            sums = {name: sums.get(name, 0) + value for name, value in (result | {"steps": 1}).items()}
            progress.update(task, completed=trainer.step, description=f"{phase} loss {result['loss']:.3f}")
            if trainer.step % args.log_every == 0 or phase_ends or last:
                count = sums.pop("steps")
                means = {name: value / count for name, value in sums.items()}
                log.write(trainer, "train", phase, means | (accuracies(hits) if hits[1].sum() else {}))
                sums, hits = {}, torch.zeros_like(hits)
            if last or (phase != "see" and time.monotonic() - evaluated > args.evaluate_seconds):
                log.write(trainer, "validation", phase, trainer.evaluate(held_out))
                evaluated = time.monotonic()
            if last or phase_ends or time.monotonic() - saved > args.save_seconds:
                # last, since a resumed run logs nothing of this step again
                save(trainer.state(), checkpoint)
                saved = time.monotonic()


def _phases(overrides: list[str]) -> tuple[Phase, ...]:
    """`PHASES` with step counts replaced as "name=steps" says."""
    if bad := [item for item in overrides if not re.fullmatch(r"[a-z-]+=\d+", item)]:
        raise SystemExit(f"got --phases {' '.join(bad)}; give NAME=STEPS, such as ask-full=500")
    wanted = dict(item.split("=") for item in overrides)
    if unknown := set(wanted) - {phase.name for phase in PHASES}:
        raise SystemExit(f"unknown phase {sorted(unknown)}; choices: {', '.join(p.name for p in PHASES)}")
    return tuple(replace(phase, steps=int(wanted.get(phase.name, phase.steps))) for phase in PHASES)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and log.csv")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--phases", nargs="*", default=[], metavar="NAME=STEPS", help="other numbers of steps")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", type=int, default=512, help="validation questions per evaluation")
    parser.add_argument("--log-every", type=int, default=25, metavar="STEPS")
    parser.add_argument("--save-seconds", type=float, default=180)
    parser.add_argument("--evaluate-seconds", type=float, default=300)
    args = parser.parse_args(argv)
    phases = _phases(args.phases)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and not checkpoint.exists():
        parser.error(f"{checkpoint} does not exist: there is nothing to resume")
    if checkpoint.exists() and not args.resume:
        parser.error(f"{checkpoint} exists; add --resume to continue it, or choose another --out")
    torch.set_num_threads(args.threads)
    trainer = Trainer(phases, args.seed, args.device)
    if args.resume:
        trainer.load(torch.load(checkpoint, map_location=args.device))
    run(trainer, args.out, args)


if __name__ == "__main__":
    main()
