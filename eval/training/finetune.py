"""Fine-tune the embedded model for few visual tokens.

``python -m pitome_mllm_eval.training.finetune --keep 72 --steps 300``.

LoRA adapters on the LLM and the projector learn from questions on training pictures, through the model's own forward
with merging on. The benchmark's questions are asked before and after; none of its pictures or digits is learned from.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pitome_mllm import attach
from pitome_mllm.methods import UserError

from ..accuracy.runs import load, provenance
from ..benchmark.bootstrap import Bootstrap
from ..benchmark.glyphs import SPLITS
from ..benchmark.score import score
from ..benchmark.sets import questions
from ..documents import write_csv
from ..provenance import RESULTS as FOLDER
from ..provenance import check_out
from .tiny_batch import IGNORE, Phase, training_batch
from .tiny_model import EOS, PAD, PREFIX, word_ids

RESULTS = FOLDER / "finetune.csv"
ADAPTED = r".*(language_model.*_proj|multi_modal_projector\.linear_[12])"
WARMUP = 20  # steps
PHASE = Phase("tune", steps=0, pictures=16, rows=4, chat_share=1.0)  # conversations of four questions


@dataclass(frozen=True)
class Row:
    """The share of right answers "before" or "after", or the "difference", with its 95 % interval over pictures."""

    method: str
    where: str
    keep: int
    steps: int
    rank: int
    rate: float
    seed: int
    seconds: float  # of training, processor time
    what: str
    questions: int
    value: float
    low: float
    high: float


def inputs(batch: dict[str, Tensor], image: int, tokens: int) -> dict[str, Tensor]:
    """What the model's forward takes, one conversation for each picture of a training batch.

    ``batch`` has ``pixels`` (B, 3, H, W), ``tokens`` and ``labels`` (B, 1, T), which name the next token; ``image`` and
    ``tokens`` are id and number of the placeholders of a picture.
    """
    text, answers = batch["tokens"][:, 0], batch["labels"][:, 0]
    start = torch.tensor([word_ids()[word] for word in PREFIX] + [image] * tokens).expand(len(text), -1)
    ids = torch.cat([start, text], 1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, start.shape[1] + 1 :] = answers[:, :-1]
    ids = torch.where(labels == EOS, labels, ids)  # rows end with an answer, whose end is a label only
    pixels = batch["pixels"].float() / 127.5 - 1
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels, "labels": labels}


def tune(model: nn.Module, steps: int, rank: int, rate: float, seed: int) -> nn.Module:
    """Put LoRA adapters on ``model``, in place, and train them; merging, where it is attached, takes part."""
    from peft import LoraConfig, get_peft_model
    from rich.progress import track

    torch.manual_seed(seed)
    config = model.config
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED)).train()
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min((n + 1) / WARMUP, 1 - n / steps))
    for step in track(range(steps), "training"):
        batch = training_batch(seed, 0, PHASE, step)
        wrapped(**inputs(batch, config.image_token_id, config.image_seq_length)).loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return wrapped.eval()


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Accuracy before and after, and the paired difference."""

    def right() -> np.ndarray:
        return np.array([float(record.right) for record in score(model, processor, args.split, args.limit)])

    model, processor = load("tiny")
    plan = attach(model, args.method, published=True, keep=args.keep).plan
    before, start = right(), time.process_time()
    tune(model, args.steps, args.rank, args.rate, args.seed)
    seconds = round(time.process_time() - start, 1)
    after = right()
    bootstrap = Bootstrap(np.array([scene for scene, _ in questions(args.split)][: args.limit]))
    settings = (plan.method, plan.where, plan.keep, args.steps, args.rank, args.rate, args.seed, seconds)
    for what, values in {"before": before, "after": after, "difference": after - before}.items():
        yield Row(*settings, what, len(values), *bootstrap(values, np.ones(len(values), dtype=bool)))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=int, default=72)
    parser.add_argument("--method", default="pitome")
    parser.add_argument("--steps", type=int, default=300, help="each of 16 pictures, 4 questions on each")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=SPLITS[1:])
    parser.add_argument("--limit", type=int, help="ask only the first so many questions")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = provenance("tiny", args.split)
    try:
        check_out(args.out, RESULTS, args.limit is None and args.split == "test")
        rows = list(measure(args))
    except UserError as error:
        parser.error(str(error))
    write_csv(args.out, rows, about)
    for row in rows:
        print(f"{row.what}: {100 * row.value:+.1f} % ({100 * row.low:+.1f} to {100 * row.high:+.1f})")


if __name__ == "__main__":
    main()
